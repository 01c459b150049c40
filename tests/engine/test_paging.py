"""500 sessions on 8 slots of the device: the same bits as with a slot for each, and nothing left of a deleted one."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest

from tests.conftest import NIGHTLY
from tests.engine.asking import Ask, Reply
from tests.engine.engine import ASK_INSIDE, Engine, Setup
from tests.engine.official import case
from tests.engine.runs import fresh

SESSIONS = 500
FEW = 8
TOGETHER = 50
ROUNDS = 6 if NIGHTLY else 3
TOKENS = 8 if NIGHTLY else 4
DEADLINE = 1800.0 if NIGHTLY else 300.0
"""Seconds for all rounds on one engine; some 15 by default on an idle machine. A deadlock has none."""


@dataclass
class Talk:
    """What sessions were answered, in order, and what they committed in the end."""

    replies: list[tuple[str, Reply]] = field(default_factory=list)
    committed: dict[str, tuple[int, bytes, bytes, bytes]] = field(default_factory=dict)


def talk(engine: Engine, sessions: int, rounds: int) -> Talk:
    """Every session takes a turn, then shares of them further ones, each round in another order, many at a time.

    A turn either resends everything or opens a new window; every tenth only reads.
    """
    rng = random.Random(sessions)
    made, said = Talk(), dict[str, tuple[int, ...]]()
    names = [f"talk-{i}" for i in range(sessions)]
    begun = time.monotonic()
    for turn in range(rounds):
        share = names if turn < 2 else rng.sample(names, sessions // 3)
        order = rng.sample(share, len(share))
        for start in range(0, len(order), TOGETHER):
            asks = []
            for name in order[start : start + TOGETHER]:
                number = int(name.split("-")[1])
                new = (number % 250, 250 + number // 250, *(rng.randrange(250) for _ in range(rng.randint(2, 6))))
                again = said.get(name, ()) if rng.random() < 0.5 else ()
                mode = "read" if turn and rng.random() < 0.1 else "readwrite"
                asks.append(Ask((*again, *new), name, mode, n=rng.randint(TOKENS - 1, TOKENS)))  # type: ignore[arg-type]
            replies = engine.run_in_step(*asks)
            assert time.monotonic() - begun < DEADLINE, f"round {turn} is not through after {DEADLINE:g} s"
            for ask, reply in zip(asks, replies, strict=True):
                assert ask.session is not None
                assert reply.status == ("committed" if ask.mode == "readwrite" else "unchanged"), reply.outcome
                made.replies.append((ask.session, reply))
                if ask.mode == "readwrite":
                    said[ask.session] = (*ask.ids, *reply.tokens)
    for name, record in zip(names, engine.records(names), strict=True):
        assert record is not None
        made.committed[name] = (record.version, record.base.tobytes(), record.end.tobytes(), record.window)
    return made


def same(a: Talk, b: Talk) -> None:
    """Token ids, log-probabilities, versions, states and windows, bit for bit."""
    assert len(a.replies) == len(b.replies)
    for (session, mine), (other, theirs) in zip(a.replies, b.replies, strict=True):
        assert session == other
        assert (mine.tokens, mine.logprobs, mine.outcome) == (theirs.tokens, theirs.logprobs, theirs.outcome), session
    assert a.committed == b.committed


def started(slots: int) -> Engine:
    expected = case("qwen3_tsw_r8")
    return Engine(
        Setup(expected.model, expected.adapter, {"max_num_seqs": TOGETHER}, slots=slots, env=ASK_INSIDE),
        f"{slots} slots",
    )


@pytest.fixture(scope="module")
def plenty() -> Talk:
    with started(512) as engine:
        found = talk(engine, SESSIONS, ROUNDS)
        assert sum(any(state) for state in engine.pool_states()) > FEW, "the large pool was not used"
        return found


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with started(FEW) as engine:
        yield engine


@pytest.mark.timeout(3600)
def test_500_sessions_on_8_slots_are_answered_as_on_512(plenty: Talk, engine: Engine) -> None:
    few = talk(engine, SESSIONS, ROUNDS)
    assert len({state for _, _, state, _ in few.committed.values()}) == SESSIONS, "every session has its own state"
    same(few, plenty)


def test_the_comparison_catches_a_neighbours_state(plenty: Talk, engine: Engine) -> None:
    asks = [Ask((7, i, 9), f"caught-{i}", n=2) for i in range(FEW)]
    engine.run_in_step(*asks)
    reading = [Ask((3, 4, i), f"caught-{i}", "read", n=2) for i in range(FEW)]
    right = engine.run_in_step(*reading)
    again = engine.run_in_step(*reading)
    assert [r.logprobs for r in again] == [r.logprobs for r in right]
    engine.plant("neighbour")
    try:
        engine.run_in_step(*reading)  # its blocks are shorter than a page, so none is cached
        wrong = engine.run_in_step(*reading)
    finally:
        engine.plant("none")
    with pytest.raises(AssertionError):
        same(Talk([("", r) for r in wrong]), Talk([("", r) for r in right]))


# --- deletion ---------------------------------------------------------------------------------------------------------


def wait_for(happened: Callable[[], bool], seconds: float = 60) -> bool:
    """Whether it happens in time."""
    end = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def versions(engine: Engine, session: str, turns: int, first: int) -> set[bytes]:
    """All states that a session has had: of each turn's end, which the next new window takes for its base."""
    states = set()
    for i in range(turns):
        assert engine.one(Ask((first + i, 12, 13), session, n=3)).status == "committed"
        states.add(engine.state(session).tobytes())
    assert len(states) == turns
    return states


def test_a_deletion_zeroes_every_version_on_the_device(engine: Engine) -> None:
    """No further request comes: the engine is idle, and must forget all the same."""
    gone, kept = fresh("gone"), fresh("kept")
    theirs = versions(engine, kept, 2, 30)
    states = versions(engine, gone, 4, 40)
    assert not states & theirs
    there = set(engine.pool_states())
    assert states <= there, "older versions lie on the device, too"
    assert theirs <= there
    assert engine.delete(gone)
    assert wait_for(lambda: not states & set(engine.pool_states()))
    assert theirs <= set(engine.pool_states()), "another session's states were zeroed"
    assert bytes(len(next(iter(states)))) in engine.pool_states()


def test_a_state_that_two_sessions_share_stays_until_the_last_one_goes(engine: Engine) -> None:
    first, second = fresh("twin"), fresh("twin")
    for session in (first, second):
        engine.one(Ask((21, 22, 23), session, n=3))
    state = engine.state(first).tobytes()
    assert engine.state(second).tobytes() == state
    engine.delete(first)
    engine.one(Ask((1, 2, 3), None, n=1))
    assert engine.pool_states().count(state) == 1
    engine.delete(second)
    assert wait_for(lambda: state not in engine.pool_states())


def test_the_search_finds_what_is_not_zeroed(engine: Engine) -> None:
    gone = fresh("planted")
    states = versions(engine, gone, 2, 50)
    engine.plant("no-zero")
    try:
        engine.delete(gone)
        for _ in range(2):  # steps in which it would have been done
            engine.one(Ask((1, 2, 3), None, n=2))
        assert states & set(engine.pool_states())
    finally:
        engine.plant("none")


def test_the_8_slots_are_used_up(engine: Engine) -> None:
    """The tests above are worth something only if the slots were contended."""
    assert len(engine.pool_states()) == FEW
    assert np.frombuffer(b"".join(engine.pool_states()), np.float32).any()
