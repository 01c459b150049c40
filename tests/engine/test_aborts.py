"""A request that is aborted leaves nothing, whichever step of its life it is in."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import pytest

from tests.engine.asking import Ask
from tests.engine.engine import Engine, Setup
from tests.engine.measured import note
from tests.engine.official import case
from tests.engine.runs import fresh
from tests.tolerances import ENGINE_LOGPROB, ENGINE_STATE

TOKENS = 32
CHUNK = 24
LONG = tuple(range(40, 99))
"""With what comes before it three steps of prefill or more."""
FIRST = tuple(range(10, 34))
PROBE = (7, 8, 9)
NEVER = ("never sampled here",)
FREE_SECONDS = 0.1


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    expected = case("qwen3_tsw_r8")
    options = {"max_num_batched_tokens": CHUNK, "enable_chunked_prefill": True, "max_num_seqs": 4}
    with Engine(Setup(expected.model, expected.adapter, options, slots=4, stepped=True), "stepped") as engine:
        yield engine


def with_memory(engine: Engine, name: str) -> str:
    session = fresh(name)
    assert engine.one(Ask(FIRST, session, n=4)).status == "committed"
    return session


def abort_everywhere(
    engine: Engine, session: str, before: tuple[int, ...], stop: tuple[str, ...], steps: int = 0
) -> list[float]:
    """Abort after ``steps`` and so on, at every position of prefill and reply; the seconds until the session was free.

    Each prompt is another one: blocks that an aborted request left in the prefix cache would shorten the next prefill.
    """
    record, probe = engine.record_bytes(session), engine.one(Ask(PROBE, session, "read", n=2))
    seconds: list[float] = []
    seen = [0] * (steps + 1)
    while seen[-1] < TOKENS - 1:
        found = engine.abort(Ask((*before, len(seen), *LONG), session, n=TOKENS, stop=stop), len(seen) - 1)
        assert found.outcome["status"] == "aborted", found
        assert (found.tokens is not None, found.outcome["version"]) == (True, 1), found
        assert found.blocks == 1, "its blocks are still in use (one is vLLM's own)"
        assert engine.record_bytes(session) == record
        info = engine.info(session)
        assert info is not None
        assert not info["busy"]
        again = engine.one(Ask(PROBE, session, "read", n=2))
        assert (again.tokens, again.logprobs) == (probe.tokens, probe.logprobs), "the next request starts elsewhere"
        seconds.append(found.seconds)
        seen.append(found.tokens or 0)
    assert seen == [*[0] * seen.count(0), *range(1, TOKENS)], f"a position of the reply was left out: {seen}"
    assert seen.count(0) >= 4, "no request was aborted in the middle of its prefill"
    return seconds


@pytest.mark.parametrize("stop", [(), NEVER], ids=["plain", "with a stop string"])
@pytest.mark.parametrize("window", ["new", "extended"])
def test_an_abort_at_any_position_leaves_nothing(engine: Engine, stop: tuple[str, ...], window: str) -> None:
    session = with_memory(engine, "aborted")
    before = () if window == "new" else FIRST
    seconds = abort_everywhere(engine, session, before, stop)
    note("abort to free, median s", statistics.median(seconds))
    note("abort to free, worst s", max(seconds))
    # The worst is the machine's: a stepped engine and its session thread may have to wait for a core.
    assert statistics.median(seconds) <= FREE_SECONDS, seconds

    # A prompt whose blocks an aborted request left in the prefix cache gives what it would have given without.
    prompt = (*before, 20, *LONG)
    other = with_memory(engine, "never aborted")
    again, never = (engine.one(Ask(prompt, s, n=TOKENS)) for s in (session, other))
    assert again.cached > never.cached == 0
    assert again.tokens == never.tokens
    mine, theirs = engine.record(session), engine.record(other)
    assert mine is not None
    assert theirs is not None
    assert (mine.version, mine.tokens, mine.windows, mine.window) == (2, theirs.tokens, theirs.windows, theirs.window)
    assert abs(mine.end - theirs.end).max() <= ENGINE_STATE
    assert (mine.base == theirs.base).all()
    a, b = (engine.one(Ask(PROBE, s, "read", n=2)) for s in (session, other))
    assert a.tokens == b.tokens
    for mine_at, theirs_at in zip(a.logprobs, b.logprobs, strict=True):
        assert max(abs(mine_at[t] - theirs_at.get(t, mine_at[t])) for t in mine_at) <= ENGINE_LOGPROB


def test_the_suite_catches_an_abort_that_commits(engine: Engine) -> None:
    session = with_memory(engine, "planted")
    engine.plant("commit-aborted")
    try:
        with pytest.raises(AssertionError, match="'status': 'committed'"):
            abort_everywhere(engine, session, (), (), steps=6)
    finally:
        engine.plant("none")


# --- an engine that is done before it hears of the stop string --------------------------------------------------------


@pytest.mark.parametrize("kept", [1, 2, 5, 31, TOKENS])
def test_what_is_sampled_behind_a_stop_string_is_never_written(engine: Engine, kept: int) -> None:
    """By then the engine has completed the request by itself; the memory is that of an answer of ``kept`` tokens."""
    ran_on, plain = with_memory(engine, "ran on"), with_memory(engine, "plain")
    mine = engine.run_on(Ask(LONG, ran_on, n=TOKENS, stop=NEVER), kept)
    theirs = engine.one(Ask(LONG, plain, n=kept))
    assert (mine.status, mine.tokens[:kept]) == (theirs.status, theirs.tokens) == ("committed", theirs.tokens)
    a, b = engine.record(ran_on), engine.record(plain)
    assert a is not None
    assert b is not None
    assert (a.version, a.tokens, a.windows, a.window) == (2, b.tokens, b.windows, b.window)
    assert abs(a.end - b.end).max() <= ENGINE_STATE


def test_a_complete_answer_whose_client_has_left_leaves_nothing(engine: Engine) -> None:
    session = with_memory(engine, "left at the end")
    record = engine.record_bytes(session)
    assert engine.run_on(Ask(LONG, session, n=TOKENS, stop=NEVER), None).status == "aborted"
    assert engine.record_bytes(session) == record
    assert engine.one(Ask(LONG, session, n=2)).outcome["version"] == 2
