"""Prefix-cache hits bring the memory with them, and the salt keeps every other memory's blocks away."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.asking import Ask
from tests.engine.engine import Engine, Setup
from tests.engine.official import STANDING, Case, WrongAnswer, case, check_reply
from tests.engine.runs import answer, check_turn_state, fresh, with_first_turn


@pytest.fixture
def cached(standing: Engine) -> tuple[Engine, Case]:
    return standing, case(STANDING)


def test_the_next_turn_of_a_window_hits(cached: tuple[Engine, Case]) -> None:
    engine, expected = cached
    session = fresh("hit")
    assert answer(engine, expected, "first_turn", session, prompt=False).cached == 0
    assert answer(engine, expected, "same_window", session, prompt=False).cached == 128
    check_turn_state(engine, expected, "same_window", session)


def test_a_retry_hits_and_writes_nothing_twice(cached: tuple[Engine, Case]) -> None:
    engine, expected = cached
    session = with_first_turn(engine, expected, "retry")
    assert answer(engine, expected, "new_window", session, prompt=False).cached == 0
    once = engine.state(session)
    retried = answer(engine, expected, "new_window", session, prompt=False)
    assert retried.cached == 64
    assert retried.status == "committed"
    assert (engine.state(session) == once).all()


def test_requests_that_arrive_together_share_blocks(cached: tuple[Engine, Case]) -> None:
    """One fills a block and the other hits it in the same step."""
    engine, expected = cached
    session = with_first_turn(engine, expected, "together")
    replies = engine.run(*[Ask(expected.prompt("read_only"), session, "read")] * 3)
    assert [reply.cached for reply in replies] == [0, 64, 64]
    for reply in replies:
        check_reply(expected, "read_only", reply)


def test_prompt_logprobs_skip_the_cache_but_not_the_memory(cached: tuple[Engine, Case]) -> None:
    engine, expected = cached
    session = with_first_turn(engine, expected, "logprobs")
    for prompt in (False, True):
        reply = answer(engine, expected, "read_only", session, "read", prompt=prompt)
        assert reply.cached == 0


def test_no_session_hits_the_blocks_of_another(cached: tuple[Engine, Case]) -> None:
    engine, expected = cached
    for session in (with_first_turn(engine, expected, "mine"), with_first_turn(engine, expected, "theirs")):
        assert answer(engine, expected, "new_window", session, prompt=False).cached == 0


def one_prompt_in_two_sessions(engine: Engine, expected: Case) -> None:
    """The prompt of a new window in a session with the memory of a turn, after one without."""
    engine.one(Ask(expected.prompt("new_window"), fresh("empty")))
    session = with_first_turn(engine, expected, "full")
    answer(engine, expected, "new_window", session, prompt=False)


def one_prompt_before_and_after_the_memory_grew(engine: Engine, expected: Case) -> None:
    """The same prompt in one session, from the empty memory and then from that of a turn."""
    session = fresh("grows")
    engine.one(Ask(expected.prompt("read_only"), session, "read"))
    engine.one(Ask(expected.full("first_turn"), session, n=1))
    answer(engine, expected, "read_only", session, "read", prompt=False)


SEQUENCES = [one_prompt_in_two_sessions, one_prompt_before_and_after_the_memory_grew]


@pytest.mark.parametrize("sequence", SEQUENCES)
def test_right_blocks_only(cached: tuple[Engine, Case], sequence: object) -> None:
    assert callable(sequence)
    sequence(*cached)


@pytest.fixture(scope="module", params=["one-salt", "no-base"])
def broken(request: pytest.FixtureRequest) -> Iterator[tuple[str, Engine, Case]]:
    expected = case("qwen3_tsw_r8")
    planted = Setup(
        expected.model,
        expected.adapter,
        env={"DELTAMEM_TEST_PLANT": request.param},
        path=(str(Path(__file__).parent / "planted"),),
    )
    with Engine(planted, f"planted {request.param}") as engine:
        yield request.param, engine, expected


@pytest.mark.nightly
def test_a_broken_salt_is_seen(broken: tuple[str, Engine, Case]) -> None:
    """These tests can fail: with the salt broken they do, by wrong answers."""
    bug, engine, expected = broken
    seen = []
    for sequence in SEQUENCES:
        try:
            sequence(engine, expected)
        except WrongAnswer:
            seen.append(sequence)
    assert seen == (SEQUENCES if bug == "one-salt" else SEQUENCES[1:])
