"""The comparisons of `test_conversations` can fail: each sees the bugs that it is there for, in a real server."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.conversations import (
    NEW_TURNS,
    RESENT,
    Client,
    Habit,
    Served,
    WrongMemory,
    converse,
    edit_message,
    hang_up,
    look,
    mixed,
    overlap,
    regenerate,
    retry,
    rewrite_reply,
    stop,
    users,
    vanish,
)
from tests.server.fed_once import Reference, check_once, check_same

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(900)]  # the first test starts the server

TURNS = 4
PLANTED = Path(__file__).parent / "planted_sessions"
SEEN_BY: dict[str, tuple[Habit, ...]] = {
    "always-new": (retry, vanish),
    "only-the-end": (regenerate, edit_message, rewrite_reply, overlap, stop),
    "commit-aborted": (vanish, hang_up),
    "reads-commit": (look,),
}
"""Of the clients that resend everything, who must see the bug."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with Served(tmp_path_factory.mktemp("planted"), path=[PLANTED]).running() as made:
        yield made


def resent(served: Served, session: str, habit: Habit) -> None:
    """All that the tests ask of a client that resends everything."""
    client = converse(Client(served, session), users(TURNS), habit)
    check_once(client)
    if habit is not rewrite_reply:
        check_same(client, converse(Client(served), users(TURNS)))


def repeat(times: int, habit: Habit, client: Client) -> None:
    for _ in range(times):
        habit(client, "how are you")


def new_turns(served: Served, session: str, habit: Habit | None = None) -> None:
    """All that they ask of one that does not."""
    client = Client(served, session, resends=False, rng=random.Random(3))
    Reference().check_new_turns(converse(client, users(TURNS), habit))


def test_without_a_bug_nothing_is_seen(served: Served) -> None:
    resent(served, "none.resent", mixed(RESENT))
    new_turns(served, "none.new-turns", mixed(NEW_TURNS))


@pytest.mark.parametrize(("bug", "habit"), [(b, h) for b, habits in SEEN_BY.items() for h in habits])
def test_seen_by_those_who_resend(served: Served, bug: str, habit: Habit) -> None:
    with pytest.raises(WrongMemory):
        resent(served, f"{bug}.{habit.__name__}", habit)


@pytest.mark.parametrize(
    ("bug", "habit"),
    [("by-count", None), ("always-new", retry), ("only-the-end", regenerate), ("commit-aborted", vanish)],
)
def test_seen_by_those_who_send_new_turns(served: Served, bug: str, habit: Habit | None) -> None:
    with pytest.raises(WrongMemory):
        new_turns(served, f"{bug}.new-turns", habit)


@pytest.mark.parametrize("bug", ["cut-early", "runs-on"])
def test_an_answer_committed_elsewhere_than_at_its_cut_is_seen(served: Served, bug: str) -> None:
    client = Client(served, f"{bug}.stop")
    client.say("hello", stop=["."])
    assert client.stops == 1
    with pytest.raises(WrongMemory, match="reference's state"):
        Reference().check_resent(client)


def test_requests_that_do_not_wait_for_each_other_are_seen(served: Served) -> None:
    client = Client(served, "no-turns.overlap")
    client.say("hello")
    with pytest.raises(WrongMemory, match="the commit is conflict"):
        repeat(50, overlap, client)  # until two have really run at once
