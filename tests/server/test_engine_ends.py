"""The engine process ends under a running server: killed, or asked to stop, with requests in flight.

What a client was told is committed is there afterwards; what was under way is there wholly or not at all; the API says
clearly that the engine is gone. `test_server_kill` kills the whole server.
"""

import json
import os
import signal
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from deltamem_vllm.demo.server import VllmServer, group_members
from tests.server.slow import PACE
from tests.server.talk import Talk, completion, distance, memory_headers, new_session, ok, outcome
from tests.server.test_server_kill import Committer, stored
from tests.tolerances import SAME_MEMORY

FACT = list(range(64, 96))
LONG = 900
SOON = 20.0
"""Seconds within which requests in flight must have ended; a client's own patience is longer."""


def engine_pid(server: VllmServer) -> int:
    """The engine core's process."""
    assert server.pid is not None
    names = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in group_members(server.pid)}
    [found] = [pid for pid, name in names.items() if b"EngineCore" in name]
    return found


def stream_all(server: VllmServer, session: str, started: "Future[None]") -> tuple[str, BaseException | None]:
    """A long streamed completion; what came, and what ended it."""
    text = ""
    with Talk(server.base_url) as talk:
        try:
            with talk.streamed([1, 2, 3], session, n=LONG, logprobs=None, vllm_xargs=PACE) as response:
                for part in response.iter_text():
                    text += part
                    if not started.done():
                        started.set_result(None)
        except httpx.TransportError as e:
            return text, e
    return text, None


def ask_all(server: VllmServer, session: str) -> Any:
    """A long completion: its response, or what ended it."""
    with Talk(server.base_url) as talk:
        try:
            body = completion([1, 2, 3], LONG, logprobs=None, vllm_xargs=PACE)
            return talk.post("/v1/completions", json=body, headers=memory_headers(session, None))
        except httpx.TransportError as e:
            return e


def wait_until(happened: Any, seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, what
        time.sleep(0.02)


class InFlight:
    """Sessions with a memory, and requests under way on them when the engine ends.

    Attributes:
        stream, answer, waiting: a streamed request, one that is not, and one that waits for the stream's session.
        clients: further ones that commit turn after turn.
    """

    def __init__(self, server: VllmServer, talk: Talk) -> None:
        self.server, self.path = server, server.log.with_name("sessions.db")
        self.streamed, self.asked = new_session(), new_session()
        for session in (self.streamed, self.asked):
            ok(talk.complete(FACT, session))
        self.before = {s: stored(self.path, s) for s in (self.streamed, self.asked)}
        self.clients = [Committer(server.base_url, new_session(), i) for i in range(2)]
        self.pool = ThreadPoolExecutor(3)
        started: Future[None] = Future()
        self.stream = self.pool.submit(stream_all, server, self.streamed, started)
        self.answer = self.pool.submit(ask_all, server, self.asked)
        started.result(60)
        self.waiting = self.pool.submit(ask_all, server, self.streamed)
        for client in self.clients:
            client.start()
        wait_until(lambda: all(c.told >= 1 for c in self.clients), 60, "the clients do not commit")
        wait_until(lambda: ok(talk.get(f"/v1/sessions/{self.asked}"))["busy"], 60, "the request does not run")
        assert not any(f.done() for f in (self.stream, self.answer, self.waiting)), "too early for the test"
        for client in self.clients:
            client.dying = True

    def ended(self) -> float:
        """Waits until all of them have their answers; seconds."""
        begun = time.monotonic()
        for future in (self.stream, self.answer, self.waiting):
            future.exception(90)
        for client in self.clients:
            client.join(90)
            assert not client.wrong, client.wrong
        self.pool.shutdown()
        return time.monotonic() - begun

    def check_store(self) -> dict[str, tuple[int, bytes]]:
        """Told versions are there; requests under way left nothing, or one whole turn."""
        for session, before in self.before.items():
            assert stored(self.path, session) == before, "an answer that was cut short was committed"
        for client in self.clients:
            version = stored(self.path, client.session)[0]
            assert client.told <= version <= client.told + 1, f"told {client.told}, {version} is in the store"
        return {s: stored(self.path, s) for s in [*self.before, *(c.session for c in self.clients)]}

    def check_served(self, talk: Talk, versions: dict[str, tuple[int, bytes]]) -> None:
        """The next server goes on from just that."""
        for session, (version, _) in versions.items():
            assert ok(talk.get(f"/v1/sessions/{session}"))["version"] == version
        fresh = new_session()
        ok(talk.complete(FACT, fresh))
        assert distance(talk.probe(self.streamed), talk.probe(fresh)) <= SAME_MEMORY
        for client in self.clients:
            fresh = new_session()
            for prompt in client.turns[: versions[client.session][0]]:
                ok(talk.complete(prompt, fresh, n=2))
            assert distance(talk.probe(client.session), talk.probe(fresh)) <= SAME_MEMORY
        assert outcome(talk.complete([5, 6], self.asked)) == (self.asked, "2", "committed")


def says_engine_is_gone(response: Any) -> None:
    """OpenAI's error format, and a message that names the engine; or, where the server is going down, no answer."""
    if isinstance(response, httpx.TransportError):
        return
    assert response.status_code in (500, 503), f"{response.status_code} {response.text[:300]}"
    error = response.json()["error"]
    assert error["code"] == response.status_code
    assert "engine" in error["message"].lower(), error


@pytest.mark.timeout(900)
def test_an_engine_that_is_killed(server: VllmServer, talk: Talk) -> None:
    flying = InFlight(server, talk)
    os.kill(engine_pid(server), signal.SIGKILL)
    seconds = flying.ended()
    server.kill()
    server.start()  # at once, so that what follows may fail and leave a server to the other tests
    versions = flying.check_store()
    server.wait_ready()
    assert seconds < SOON, f"requests hung for {seconds:.1f} s after the engine had died"
    text, error = flying.stream.result()
    assert "x-deltamem-commit: committed" not in text
    assert error is not None or '"error"' in text, f"the stream ended as if it were whole: {text[-300:]}"
    if error is None:
        [said] = [json.loads(line[6:]) for line in text.splitlines() if line.startswith('data: {"error"')]
        assert "engine" in said["error"]["message"].lower(), said
    says_engine_is_gone(flying.answer.result())
    says_engine_is_gone(flying.waiting.result())
    flying.check_served(talk, versions)


@pytest.mark.timeout(900)
def test_a_server_that_is_asked_to_stop(server: VllmServer, talk: Talk) -> None:
    """vLLM aborts what runs, unless --shutdown-timeout lets it finish."""
    flying = InFlight(server, talk)
    try:
        server.stop(timeout=60)
        seconds = flying.ended()
    finally:
        server.start()
    versions = flying.check_store()
    server.wait_ready()
    assert seconds < SOON, seconds
    text, _ = flying.stream.result()
    assert "x-deltamem-commit: committed" not in text
    flying.check_served(talk, versions)
