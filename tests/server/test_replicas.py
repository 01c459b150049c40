"""Two whole servers on one PostgreSQL: a session moves between them, races are decided before anything is generated,
and a server that was paused or killed neither overwrites nor blocks.

One server's lease is short, so that a test can outlast it. The tests run in this order: the last one kills a server.
"""

import itertools
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deltamem_vllm.demo.server import VllmServer
from deltamem_vllm.store.postgres import PostgresStore
from deltamem_vllm.store.protocol import Record, SessionKey
from tests.conftest import NIGHTLY
from tests.server.conftest import FLAGS, HERE, MODEL
from tests.server.streams import Stream, prompt
from tests.server.talk import TENANT, Talk, new_session, ok, outcome, refused, token_ids
from tests.store import services
from tests.tolerances import SAME_MEMORY

CLIENTS, RACE_SECONDS = 64, 120.0 if NIGHTLY else 8.0
PAUSES = 8 if NIGHTLY else 1
LEASES = (2, 15)
pytestmark = pytest.mark.timeout(900 + 120 * PAUSES)


@dataclass
class Pair:
    """Two servers, a client of each, and the store they share."""

    servers: list[VllmServer]
    talks: list[Talk]
    store: PostgresStore

    def record(self, session: str) -> Record:
        found = self.store.get(SessionKey(TENANT, session))
        assert found is not None
        return found


@pytest.fixture(scope="module")
def pair(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("replicas")
    with services.postgres() as postgres:
        place = f"postgresql://test@127.0.0.1:{postgres.port}/postgres"
        servers = [
            VllmServer(MODEL, adapter, f"{place}?lease={lease}", *FLAGS, env=HERE, log=folder / f"log{number}")
            for number, lease in enumerate(LEASES)
        ]
        try:
            for server in servers:
                server.start()
            for server in servers:
                server.wait_ready(600)
            talks = [Talk(server.base_url) for server in servers]
            store = PostgresStore(place, lease_seconds=0)
            yield Pair(servers, talks, store)
            store.close()
            for talk in talks:
                talk.close()
        finally:
            for server in servers:
                server.kill()


@pytest.fixture(autouse=True)
def servers_are_well(pair: Pair) -> Iterator[None]:
    yield
    for server in pair.servers:
        assert server.pid is None or server.healthy(), server.last_lines(40)


def same_memory(left: Record, right: Record) -> None:
    """Two sessions to which the same was told hold the same, and count the same."""
    assert np.abs(left.end).max() > 1e-2, "an empty memory equals anything"
    assert np.abs(left.end - right.end).max() <= SAME_MEMORY
    assert np.abs(left.base - right.base).max() <= SAME_MEMORY
    assert (left.version, left.tokens, left.windows) == (right.version, right.tokens, right.windows)


# --- moving -------------------------------------------------------------------------------------------------


def test_a_session_moves_with_every_turn(pair: Pair) -> None:
    """New windows, extensions of a window and a regenerated answer, each turn on the other server."""
    moving, staying = new_session(), new_session()
    for place in (pair.talks, pair.talks[1:]):
        session = moving if len(place) == 2 else staying
        servers = itertools.cycle(place)
        history = prompt(1)
        for version in range(1, 9):
            response = next(servers).complete(history, session, n=6)
            assert outcome(response) == (session, f"{version}", "committed")
            match version % 4:
                case 1 | 2:  # the conversation goes on
                    history = [*history, *token_ids(response), *prompt(version, 5)]
                case 3:  # the same request again, which replaces
                    pass
                case _:  # a client that sends only what is new
                    history = prompt(10 + version)
    same_memory(pair.record(moving), pair.record(staying))
    assert pair.talks[0].version(moving) == pair.talks[1].version(moving) == 8
    assert ok(pair.talks[0].delete(f"/v1/sessions/{moving}"))
    assert pair.talks[1].version(moving) == 0
    assert outcome(pair.talks[1].complete(prompt(1), moving)) == (moving, "1", "committed")


# --- races --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [0, 1])
def test_the_second_waits_and_remembers_both(pair: Pair, first: int) -> None:
    session, alone = new_session(), new_session()
    stream = Stream(pair.talks[first], prompt(20), session, 60).start_writing()
    second = pair.talks[1 - first].complete(prompt(21), session, n=4)
    told = stream.finish()
    assert (told["x-session-version"], told["x-deltamem-commit"]) == ("1", "committed")
    assert outcome(second) == (session, "2", "committed")
    for tokens, n in ((prompt(20), 60), (prompt(21), 4)):
        ok(pair.talks[first].complete(tokens, alone, n=n))
    same_memory(pair.record(session), pair.record(alone))


def test_at_once(pair: Pair) -> None:
    for turn in range(4):
        session = new_session()
        gate = threading.Barrier(2)

        def ask(number: int, session: str = session, gate: threading.Barrier = gate) -> Any:
            gate.wait(60)
            return outcome(pair.talks[number].complete(prompt(30 + number), session, n=4))

        with ThreadPoolExecutor(2) as pool:
            answers = list(pool.map(ask, range(2)))
        assert {version for _, version, _ in answers} == {"1", "2"}, answers
        assert {commit for _, _, commit in answers} == {"committed"}, answers
        if turn == 0:
            alone = new_session()
            for number in sorted(range(2), key=lambda number: answers[number][1] or ""):
                ok(pair.talks[0].complete(prompt(30 + number), alone, n=4))
            same_memory(pair.record(session), pair.record(alone))


def test_readers_do_not_wait(pair: Pair) -> None:
    session = new_session()
    ok(pair.talks[1].complete(prompt(40), session, n=4))
    stream = Stream(pair.talks[0], prompt(41), session, 200).start_writing()
    ok(pair.talks[1].complete(prompt(42), session, "read", n=2))
    assert stream.is_alive(), "the reader waited for the writer"
    assert pair.talks[1].delete(f"/v1/sessions/{session}").status_code == 200
    assert stream.is_alive(), "the deletion waited for the writer"
    assert stream.finish()["x-deltamem-commit"] == "conflict"
    assert pair.talks[0].version(session) == pair.talks[1].version(session) == 0


def take_over(pair: Pair, session: str, seed: int, n: int) -> tuple[Stream, Stream, float]:
    """Pause the first server in the middle of an answer, and go on when the second one writes the session.

    Returns:
        the paused answer, which goes on; its successor's, of ``n`` tokens; seconds from the pause to its first token.
    """
    ok(pair.talks[0].complete(prompt(seed), session, n=4))
    paused = Stream(pair.talks[0], prompt(seed + 1), session, 100).start_writing()
    group = pair.servers[0].pid
    assert group is not None
    os.killpg(group, signal.SIGSTOP)
    try:
        start = time.monotonic()
        other = Stream(pair.talks[1], prompt(seed + 2), session, n).start_writing()
        waited = time.monotonic() - start
        if n < 10:
            other.join(120)
    finally:
        os.killpg(group, signal.SIGCONT)
    return paused, other, waited


@pytest.mark.parametrize("tokens", [4, 400])
def test_a_paused_server_cannot_commit_over_its_successor(pair: Pair, tokens: int) -> None:
    """It wakes up when its successor has committed, or while that is still writing and only the lease tells."""
    for turn in range(PAUSES):
        session, alone, seed = new_session(), new_session(), 50 + 10 * turn
        paused, other, waited = take_over(pair, session, seed, tokens)
        assert paused.finish()["x-deltamem-commit"] == "conflict"
        assert other.is_alive() == (tokens > 10), "the case is not what it is to be"
        told = other.finish()
        assert (told["x-session-version"], told["x-deltamem-commit"]) == ("2", "committed")
        for each, n in ((prompt(seed), 4), (prompt(seed + 2), tokens)):
            ok(pair.talks[0].complete(each, alone, n=n))
        same_memory(pair.record(session), pair.record(alone))
        assert outcome(pair.talks[0].complete(prompt(80), session, n=4)) == (session, "3", "committed")
        print(f"paused past its lease of {LEASES[0]} s: taken over after {waited:.1f} s, the late commit was refused")


# --- many clients -------------------------------------------------------------------------------------------


@dataclass
class Client(threading.Thread):
    """Sends turns to a server chosen at random until the time is over, each again while it is told to come later."""

    pair: Pair
    session: str
    number: int
    start_line: threading.Barrier
    seconds: float
    committed: list[tuple[int, list[int]]] = field(default_factory=list)
    refused: int = 0
    conflicts: int = 0
    wrong: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(daemon=True)

    def __hash__(self) -> int:
        return id(self)

    def run(self) -> None:
        rng = random.Random(self.number)
        try:
            self.start_line.wait(60)
            end = time.monotonic() + self.seconds
            turn = 0
            while time.monotonic() < end:
                tokens = [self.number, turn, *prompt(1000 + 64 * turn + self.number, 10)]
                response = rng.choice(self.pair.talks).complete(tokens, self.session, n=2)
                if response.status_code == 409:
                    refused(response, 409, "busy|another server")
                    assert 1 <= int(response.headers["Retry-After"]) <= 15
                    self.refused += 1
                    time.sleep(rng.uniform(0.1, 0.5))
                    continue
                _, version, commit = outcome(response)
                if commit == "conflict":
                    self.conflicts += 1
                    continue
                assert (response.status_code, commit) == (200, "committed"), f"{response.status_code} {commit}"
                self.committed.append((int(version or 0), tokens))
                turn += 1
        except BaseException as error:
            self.wrong.append(repr(error))


def check_many_clients(pair: Pair, seconds: float) -> str:
    """64 clients, one session, both servers; returns the figures."""
    session = new_session()
    start_line = threading.Barrier(CLIENTS)
    clients = [Client(pair, session, number, start_line, seconds) for number in range(CLIENTS)]
    for client in clients:
        client.start()
    for client in clients:
        client.join(seconds + 100)
        assert not client.is_alive(), "a client still waits: a deadlock"
        assert client.wrong == []
        versions = [version for version, _ in client.committed]
        assert versions == sorted(versions), "a client's later turn has an earlier version"
    commits = dict(commit for client in clients for commit in client.committed)
    acknowledged = sum(len(client.committed) for client in clients)
    excess, conflicts = (sum(getattr(client, name) for client in clients) for name in ("refused", "conflicts"))
    record = pair.record(session)
    assert len(commits) == acknowledged, "two turns were told the same version: a fork"
    assert sorted(commits) == list(range(1, record.version + 1)), "a version that nobody was told, or that is gone"
    assert record.tokens == sum(len(tokens) + 1 for tokens in commits.values()), "a turn is missing in the memory"
    assert excess > 0
    alone = new_session()
    for version in sorted(commits):
        ok(pair.talks[1].complete(commits[version], alone, n=2))
    same_memory(record, pair.record(alone))
    stood_still = "were taken over by another server" in "".join(server.log.read_text() for server in pair.servers)
    assert conflicts == 0 or stood_still, "an answer was generated in vain"
    return (
        f"{CLIENTS} clients: {acknowledged} commits, {excess} times told to come later, {conflicts} conflicts, 0 forks"
    )


def test_many_clients_on_one_session(pair: Pair) -> None:
    print(check_many_clients(pair, RACE_SECONDS))


# --- a crash ------------------------------------------------------------------------------------------------


def test_a_killed_servers_session_goes_on_elsewhere(pair: Pair) -> None:
    """The last test: nobody starts the server again."""
    session, alone = new_session(), new_session()
    for version in range(1, 4):
        assert outcome(pair.talks[0].complete(prompt(90 + version), session, n=4))[1:] == (f"{version}", "committed")
    stream = Stream(pair.talks[0], prompt(99), session, 900).start_writing()
    pair.servers[0].kill()
    start = time.monotonic()
    assert pair.talks[1].version(session) == 3, "what was acknowledged can be seen at once"
    other = pair.talks[1].complete(prompt(94), session, n=4)
    waited = time.monotonic() - start
    assert outcome(other) == (session, "4", "committed")
    stream.join(30)
    for version in range(1, 5):
        ok(pair.talks[1].complete(prompt(90 + version), alone, n=4))
    same_memory(pair.record(session), pair.record(alone))
    start = time.monotonic()
    ok(pair.talks[1].complete(prompt(95), session, n=4))
    answer = time.monotonic() - start
    assert waited < LEASES[0] + 8 < LEASES[1], "it waited for longer than the lease"
    print(
        f"killed, with a lease of {LEASES[0]} s: written elsewhere after {waited:.1f} s (an answer takes {answer:.1f})"
    )
