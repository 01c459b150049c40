"""Many sessions: the pool's size changes nothing, and a deleted session is forgotten."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.engine.asking import Ask, Reply, stop_in
from tests.engine.engine import Engine, Setup
from tests.engine.measured import note
from tests.engine.official import Case, case, check_reply, worst
from tests.engine.runs import fresh, with_first_turn
from tests.tolerances import ENGINE_STATE

SESSIONS = 12
NAME = "qwen3_tsw_r8"


@dataclass(frozen=True)
class Talk:
    """What many sessions were answered in three rounds, and what they committed."""

    replies: list[Reply]
    states: list[bytes]


def talk(engine: Engine, expected: Case, *, together: bool) -> Talk:
    """Every session takes its turns, all sessions of a round in one batch or one after the other."""
    names = [f"{'batch' if together else 'alone'}-{i}" for i in range(SESSIONS)]
    first, second = expected.prompt("first_turn"), expected.prompt("new_window")
    rounds = [
        [Ask((*first, 40 + i), name, n=4) for i, name in enumerate(names)],
        [Ask((*second, 60 + i), name, n=4) for i, name in enumerate(names)],
        [Ask((*first, 80 + i), name, "read", n=4) for i, name in enumerate(reversed(names))],
    ]
    replies = [r for asks in rounds for r in (engine.run(*asks) if together else map(engine.one, asks))]
    assert len({tuple(reply.logprobs[0].items()) for reply in replies}) == len(replies), "every answer is another"
    return Talk(replies, [engine.state(name).tobytes() for name in names])


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """With one slot for all sessions."""
    expected = case(NAME)
    with Engine(Setup(expected.model, expected.adapter, slots=1), "1 slot") as engine:
        yield engine


@pytest.fixture(scope="module")
def talks(standing: Engine, engine: Engine) -> dict[tuple[int, bool], Talk]:
    """By size of the pool, and whether the sessions of a round ran together."""
    expected = case(NAME)
    return {
        (each.setup.slots, together): talk(each, expected, together=together)
        for each in (standing, engine)
        for together in (False, True)
    }


def test_a_pool_of_one_slot_gives_the_same_bits(talks: dict[tuple[int, bool], Talk]) -> None:
    assert talks[1, False] == talks[64, False]


def test_a_pool_of_one_slot_serves_a_batch_of_many_sessions(talks: dict[tuple[int, bool], Talk]) -> None:
    """Not bit for bit: which requests share a step, and so how sums are rounded, is a matter of timing."""
    for mine, alone in zip(talks[1, True].replies, talks[64, False].replies, strict=True):
        assert mine.tokens == alone.tokens
        assert mine.status == alone.status
        note("batch", worst("batch", mine.logprobs, alone.logprobs))


def test_a_deleted_session_starts_from_the_empty_memory(engine: Engine) -> None:
    expected = case(NAME)
    session = with_first_turn(engine, expected, "gone")
    check_reply(expected, "read_only", engine.one(Ask(expected.prompt("read_only"), session, "read")))
    assert engine.delete(session)
    assert not engine.delete(session)
    assert engine.record(session) is None
    assert engine.info(session) is None
    again = engine.one(Ask(expected.prompt("new_window_zero_state"), session))
    check_reply(expected, "new_window_zero_state", again)
    assert again.outcome["version"] == 1


def test_info_tells_what_was_committed(engine: Engine) -> None:
    expected = case(NAME)
    session = fresh("info")
    assert engine.info(session) is None
    engine.one(Ask(expected.prompt("first_turn"), session))
    info = engine.info(session)
    assert info is not None
    assert (info["version"], info["tokens"], info["windows"]) == (1, len(expected.prompt("first_turn")) + 31, 1)


def test_a_stop_string_ends_a_turn_and_is_the_end_of_what_is_written(engine: Engine) -> None:
    """`SessionLLM` says where the answer ended, as servers do: the engine would take it for an abort."""
    prompt, stopped, plain = case(NAME).prompt("first_turn"), fresh("stopped"), fresh("plain")
    text = engine.one(Ask(prompt, n=24, stop=("never sampled here",))).text
    stop = stop_in(text)
    reply, longer = engine.run(Ask(prompt, stopped, stop=(stop,)), Ask(prompt, fresh("longer"), n=64, stop=(stop * 9,)))
    assert reply.status == longer.status == "committed"
    assert (len(reply.tokens) < 24, len(longer.tokens)) == (True, 64)
    engine.one(Ask(prompt, plain, n=len(reply.tokens)))
    a, b = engine.record(stopped), engine.record(plain)
    assert a is not None
    assert b is not None
    assert (a.tokens, a.window) == (b.tokens, b.window)
    assert abs(a.end - b.end).max() <= ENGINE_STATE
