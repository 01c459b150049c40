"""However a client behaves, the memory is that of the conversation fed once: 30 turns of the bundled recall model."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import NIGHTLY
from tests.server.conversations import (
    NEW_TURNS,
    RESENT,
    Client,
    Habit,
    Served,
    converse,
    edit_message,
    every,
    hang_up,
    mixed,
    overlap,
    overlap_others,
    regenerate,
    retry,
    rewrite_reply,
    users,
    vanish,
)
from tests.server.fed_once import Reference, apart, check_once, check_same
from tests.server.late import LATE_ABORTS
from tests.tolerances import SAME_MEMORY

pytestmark = pytest.mark.timeout(900)  # the first test of each server starts it

TURNS = 30
SEEDS = range(20) if NIGHTLY else (1, 2)
CACHING = {"cached": "--enable-prefix-caching", "uncached": "--no-enable-prefix-caching"}
long = pytest.mark.parametrize("served", CACHING if NIGHTLY else ["cached"], indirect=True, scope="module")
"""The 30 turns: with caching, at full size also without."""


@pytest.fixture(scope="module", params=CACHING)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server with prefix caching, and then one without, whose engine hears late of aborts."""
    folder: Path = tmp_path_factory.mktemp(f"conversations-{request.param}")
    late = [LATE_ABORTS] if request.param == "uncached" else []
    with Served(folder, CACHING[request.param], path=late).running() as made:
        yield made
        assert made.server.healthy(), made.server.last_lines(40)
        assert (made.cache_hits() > 0) == (request.param == "cached")


@pytest.fixture(scope="module")
def plainly(served: Served) -> Client:
    """The conversation by a client that resends everything and never does anything else."""
    return converse(Client(served), users(TURNS))


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference()


# --- 30 turns, everything resent --------------------------------------------------------------------------------------


@long
def test_the_plain_conversation_is_the_references(plainly: Client, reference: Reference) -> None:
    assert len(plainly.left) == TURNS
    assert {left.record.windows for left in plainly.left} == {1}
    assert [left.record.version for left in plainly.left] == list(range(1, TURNS + 1))
    print(f"\n{plainly.left[-1].record.tokens} tokens; state off by {reference.check_resent(plainly):.1e}")
    check_once(plainly)


def retry_and_leave(client: Client, user: str) -> None:
    """A retry at one turn, a request left in one way or the other at the next."""
    (retry, vanish, retry, hang_up)[len(client.left) % 4](client, user)


@long
def test_regenerated_every_third_turn(served: Served, plainly: Client) -> None:
    check_same(converse(Client(served), users(TURNS), every(3, regenerate)), plainly)


@long
def test_retried_and_left(served: Served, plainly: Client) -> None:
    client = converse(Client(served), users(TURNS), retry_and_leave)
    check_same(client, plainly)
    assert client.vanished > 5, "too few requests were left before they were complete"


@long
def test_streamed(served: Served, plainly: Client) -> None:
    check_same(converse(Client(served, streams=True), users(TURNS)), plainly)


@long
@pytest.mark.parametrize("seed", SEEDS)
def test_everything_mixed(served: Served, plainly: Client, seed: int) -> None:
    client = converse(Client(served, rng=random.Random(seed)), users(TURNS), mixed(RESENT))
    print(f"\nstates off by {check_same(client, plainly):.1e}")
    assert client.stops > 0


# --- 30 turns, new messages only --------------------------------------------------------------------------------------


@long
@pytest.mark.parametrize("habit", [None, mixed(NEW_TURNS)], ids=["plainly", "mixed"])
def test_new_turns_only(served: Served, reference: Reference, habit: Habit | None) -> None:
    """Each window from the state that the one before has left, as plain torch computes it."""
    client = converse(Client(served, resends=False, rng=random.Random(3)), users(TURNS), habit)
    assert client.left[-1].record.windows == TURNS
    print(f"\nstates off by {reference.check_new_turns(client):.1e}")


# --- exactly once -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "habit", [retry, regenerate, edit_message, rewrite_reply, vanish, overlap, overlap_others], ids=lambda h: h.__name__
)
def test_written_exactly_once(served: Served, habit: Habit) -> None:
    """At every turn; what is left is what the last request alone leaves in a session of its own."""
    check_once(converse(Client(served), users(6), habit))


@pytest.mark.parametrize(
    "cut",
    [{"max_tokens": 1}, {"max_tokens": 2}, {"stop": [" "]}, {"stop": ["."]}],
    ids=["one token", "two", "a blank", "a full stop"],
)
def test_answers_cut_short_are_written_up_to_the_cut(
    served: Served, reference: Reference, cut: dict[str, object]
) -> None:
    """Cut answers stay in the conversation, and the last one ends it."""
    client = Client(served)
    for user in users(4):
        client.say(user, **cut)
    assert client.stops == (4 if "stop" in cut else 0)
    reference.check_resent(client)


def test_of_two_at_once_the_last_committed_stays(served: Served) -> None:
    """A hasty client with two different messages: one after the other, and the later one replaces the earlier."""
    client = converse(Client(served), users(4))
    overlap_others(client, "how are you")
    later = client.record()
    assert later.version == 6
    alone = [Client(served, history=list(client.history)) for _ in range(2)]
    for other, opener in zip(alone, ("hello", "by the way"), strict=True):
        other.say(f"{opener}, how are you")
    far = sorted(apart(later.end, other.record().end) for other in alone)
    assert far[0] <= SAME_MEMORY < far[1]
