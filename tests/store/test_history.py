"""Compare-and-set under replicas: 16 writers, 3 replica processes, every request at a random one.

Each commit extends a digest of all commits before it. At the end every acknowledged commit must be one link of one
chain per session: no version given twice (a fork), none missing (a lost update).
"""

import json
import os
import random
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from deltamem_vllm.store.protocol import SessionKey
from deltamem_vllm.store.url import open_store
from tests.conftest import NIGHTLY
from tests.store.replica import chain

WINS = 200 if NIGHTLY else 16
WRITERS, REPLICAS, SESSIONS = 16, 3, 3
ROOT = Path(__file__).parents[2]


class Client:
    """A writer's connection to one replica."""

    def __init__(self, port: int) -> None:
        self.peer = socket.create_connection(("127.0.0.1", port), 60)
        self.peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.lines = self.peer.makefile("rb")

    def ask(self, **what: Any) -> dict[str, Any]:
        self.peer.sendall(json.dumps(what).encode() + b"\n")
        answer: dict[str, Any] = json.loads(self.lines.readline())
        return answer

    def close(self) -> None:
        self.lines.close()
        self.peer.close()


def start(url: str, bug: str) -> tuple[subprocess.Popen[str], int]:
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.store.replica", url, bug],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )
    assert child.stdout is not None
    return child, int(child.stdout.readline())


Won = tuple[str, int, str, str, str]  # session, version, window before, request id, window after


def write(index: int, ports: list[int], won: list[Won], conflicts: list[int]) -> None:
    """One writer: read at a random replica, commit at a random replica."""
    clients = [Client(port) for port in ports]
    rng = random.Random(index)
    mine = 0
    while mine < WINS:
        session = f"{rng.randrange(SESSIONS)}"
        seen = rng.choice(clients).ask(read=session)
        request = f"w{index}-{rng.getrandbits(64):016x}"
        asked = {"session": session, "request": request}
        asked |= {name: seen[name] for name in ("version", "tokens", "window")}
        answer = rng.choice(clients).ask(commit=asked)
        if answer["won"]:
            mine += 1
            won.append((session, answer["version"], seen["window"], request, answer["window"]))
        else:
            conflicts.append(index)
    for client in clients:
        client.close()


def check_history(url: str, bug: str = "none") -> tuple[int, int]:
    """Run the writers; returns (wins, conflicts). Fails on a fork or a lost update."""
    open_store(url).close()
    children = [start(url, bug) for _ in range(REPLICAS)]
    won: list[Won] = []
    conflicts: list[int] = []
    errors: list[BaseException] = []

    def run(index: int) -> None:
        try:
            write(index, [port for _, port in children], won, conflicts)
        except BaseException as error:
            errors.append(error)

    try:
        threads = [threading.Thread(target=run, args=(index,)) for index in range(WRITERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        for child, _ in children:
            child.kill()
            child.wait()
            assert child.stdout is not None
            child.stdout.close()
    assert errors == []
    assert len(won) == WRITERS * WINS
    store = open_store(url)
    total = 0
    for session in {each[0] for each in won}:
        links = sorted(each[1:] for each in won if each[0] == session)
        versions = [link[0] for link in links]
        assert len(set(versions)) == len(versions), f"fork: session {session} gave a version to two writers"
        assert versions == list(range(1, len(versions) + 1)), f"session {session}: versions are missing"
        window = b""
        for version, before, request, after in links:
            assert before == window.hex(), f"lost update: version {version} does not rest on the one before it"
            window = chain(window, request)
            assert after == window.hex()
        found = store.get(SessionKey("tenant", session))
        assert found is not None
        assert (found.version, found.tokens, found.window) == (len(links), len(links), window)
        total += len(links)
    store.close()
    return total, len(conflicts)


@pytest.fixture(params=["sqlite", "postgres", "redis"])
def url(request: pytest.FixtureRequest, memory_path: Path) -> str:
    match request.param:
        case "postgres":
            return str(request.getfixturevalue("postgres_url"))
        case "redis":
            place, namespace = request.getfixturevalue("redis_place")
            return f"{place}?namespace={namespace}"
        case _:
            return f"sqlite:///{memory_path}/s.db"


@pytest.mark.timeout(3600)
def test_replicas_keep_one_history(url: str) -> None:
    wins, conflicts = check_history(url)
    print(f"{url.partition(':')[0]}: {wins} commits, {conflicts} conflicts, 0 lost updates, 0 forks")
    assert conflicts > 0, "the writers never met"


@pytest.mark.parametrize("url", ["sqlite", "postgres"], indirect=True)
def test_history_catches_a_dropped_comparison(url: str) -> None:
    with pytest.raises(AssertionError, match=r"fork|lost update"):
        check_history(url, "blind")
