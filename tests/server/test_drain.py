"""SIGTERM with ``--shutdown-timeout``: what runs is finished, committed and told, what comes is refused, and another
server on the same store goes on at once, without waiting for leases to run out.

The tests run in this order: each ends a server. The second server has bugs in its own end only.
"""

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest

from deltamem_vllm.demo.server import VllmServer
from tests.conftest import NIGHTLY
from tests.server.conftest import FLAGS, HERE, MODEL, ROOT
from tests.server.slow import PACE
from tests.server.streams import Stream, prompt
from tests.server.talk import Talk, new_session, outcome, refused
from tests.store import services

API_SERVERS = 2 if NIGHTLY else 1
SECONDS = 20
"""--shutdown-timeout; requests have 20 - 5 - 2 of them."""
TOO_LONG = {"step_seconds": 0.03}
"""A pace at which 900 tokens take longer than that."""
LEASE = 600
"""Seconds; nobody here waits so long for a lease that was not given back."""
pytestmark = pytest.mark.timeout(900)


@dataclass
class Pair:
    """A server to be drained, and one on the same PostgreSQL whose end is planted with bugs."""

    leaving: VllmServer
    planted: VllmServer
    place: str

    def leases(self) -> int:
        """Leases that some server has."""
        with psycopg.connect(self.place) as connection:
            [count] = connection.execute("SELECT count(*) FROM deltamem_leases").fetchone() or (0,)
        return int(count)


@pytest.fixture(scope="module")
def pair(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("drain")
    with services.postgres() as postgres:
        place = f"postgresql://test@127.0.0.1:{postgres.port}/postgres"
        plants = f"{ROOT / 'tests' / 'server' / 'planted_drain'}{os.pathsep}{HERE['PYTHONPATH']}"
        flags = [*FLAGS, "--shutdown-timeout", str(SECONDS)]
        servers = [
            VllmServer(MODEL, adapter, f"{place}?lease={LEASE}", *flags, *more, env=env, log=folder / f"log{number}")
            for number, (more, env) in enumerate(
                [(("--api-server-count", str(API_SERVERS)), HERE), ((), {**HERE, "PYTHONPATH": plants})]
            )
        ]
        try:
            for server in servers:
                server.start()
            for server in servers:
                server.wait_ready(600)
            yield Pair(*servers, place)
        finally:
            for server in servers:
                server.kill()


class UnderWay:
    """Requests that a server is answering.

    Attributes:
        streams: streamed ones; the last is too long to be finished in time.
        whole: one that is not streamed. waiting: one that waits for the first stream's session.
    """

    def __init__(self, talk: Talk) -> None:
        kinds = ((30, PACE), (40, PACE), (900, TOO_LONG))
        self.streams = [Stream(talk, prompt(i), new_session(), n, pace) for i, (n, pace) in enumerate(kinds)]
        for stream in self.streams:
            stream.start_writing()
        self.asked, self.queued = new_session(), self.streams[0].session
        pool = ThreadPoolExecutor(2)
        self.whole = pool.submit(talk.complete, prompt(5), self.asked, n=30, vllm_xargs=PACE)
        self.waiting = pool.submit(talk.complete, prompt(6), self.queued, n=4)
        pool.shutdown(wait=False)
        time.sleep(0.2)  # both are there
        assert not any([self.whole.done(), self.waiting.done(), *(not s.is_alive() for s in self.streams)])


def stopping(server: VllmServer) -> threading.Thread:
    """SIGTERM; the thread ends with the server."""
    thread = threading.Thread(target=server.stop, args=(2 * SECONDS,), daemon=True)
    thread.start()
    end = time.monotonic() + 30
    while "shutdown triggered" not in server.log.read_text(errors="replace"):
        assert time.monotonic() < end, server.last_lines(40)
        time.sleep(0.02)
    return thread


def test_a_server_that_is_drained(pair: Pair) -> None:
    with Talk(pair.leaving.base_url) as talk, Talk(pair.planted.base_url) as other:
        under_way = UnderWay(talk)
        assert pair.leases() >= 4
        begun = time.monotonic()
        end = stopping(pair.leaving)
        with Talk(pair.leaving.base_url) as late:
            for session in (None, new_session(), under_way.asked):
                response = late.complete(prompt(7), session, n=2)
                refused(response, 503, "shutting down")
                assert int(response.headers["retry-after"]) >= 1
                assert response.headers["connection"] == "close"
            refused(late.get(f"/v1/sessions/{under_way.asked}"), 503, "shutting down")
            assert late.get("/health").status_code == 503, "a router is to leave it out"
            assert late.get("/metrics").status_code == 200
        assert end.is_alive(), "the server ended before it could be asked"
        for stream in under_way.streams[:2]:
            told = stream.finish()
            assert (told["x-session-version"], told["x-deltamem-commit"]) == ("1", "committed")
            assert stream.text.rstrip().endswith(": x-deltamem-commit: committed"), stream.text[-300:]
        assert outcome(under_way.whole.result(60)) == (under_way.asked, "1", "committed")
        assert outcome(under_way.waiting.result(60)) == (under_way.queued, "2", "committed")
        assert under_way.streams[2].finish()["x-deltamem-commit"] == "aborted"
        end.join(2 * SECONDS)
        seconds = time.monotonic() - begun
        assert seconds < SECONDS + 10, f"it took {seconds:.1f} s"  # vLLM kills what is left of the engine after SECONDS
        assert pair.leases() == 0
        begun = time.monotonic()
        for session, version in [(under_way.queued, "3"), (under_way.asked, "2"), (under_way.streams[2].session, "1")]:
            assert outcome(other.complete(prompt(8), session, n=2)) == (session, version, "committed")
        waited = time.monotonic() - begun
        print(f"ended {seconds:.1f} s after SIGTERM; its sessions were written elsewhere {waited:.1f} s after that")


def test_bugs_in_the_end_are_seen(pair: Pair) -> None:
    """The last test: nobody starts the servers again."""
    with Talk(pair.planted.base_url) as talk:
        under_way = UnderWay(talk)
        stopping(pair.planted).join(2 * SECONDS)
        for stream in under_way.streams:
            stream.join(30)
            assert "x-deltamem-commit: committed" not in stream.text
        assert pair.leases() > 0
