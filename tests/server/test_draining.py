"""What an API process does while it ends, without a server: what is counted, waited for, refused and aborted."""

import asyncio
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from deltamem_vllm import compat
from deltamem_vllm.server.drain import Drain
from deltamem_vllm.server.middleware import SessionMiddleware


def finishing(drain: Drain, seconds: float, abort: Callable[[], None]) -> tuple[threading.Thread, list[float]]:
    left: list[float] = []
    thread = threading.Thread(target=lambda: left.append(drain.finish(seconds, abort)), daemon=True)
    thread.start()
    while not drain.draining:
        time.sleep(0.001)
    return thread, left


def test_nothing_under_way_is_not_waited_for() -> None:
    begun = time.monotonic()
    left = Drain().finish(30, lambda: pytest.fail("there is nothing to abort"))
    assert time.monotonic() - begun < 1
    assert 29 < left <= 30


def test_it_waits_for_what_is_under_way() -> None:
    drain = Drain()
    with drain.serving():
        thread, left = finishing(drain, 30, lambda: pytest.fail("there is time enough"))
        thread.join(0.1)
        assert thread.is_alive()
    thread.join(5)
    assert 25 < left[0] < 30


def test_what_takes_too_long_is_aborted_and_the_engines_keep_their_time() -> None:
    drain, aborted = Drain(), threading.Event()
    begun = time.monotonic()
    with drain.serving():
        thread, left = finishing(drain, 1.2, aborted.set)
        assert aborted.wait(5)
        assert time.monotonic() - begun > 0.5
    thread.join(5)
    assert left[0] >= 0.39


def test_what_does_not_even_end_when_aborted_is_left() -> None:
    drain = Drain()
    with drain.serving():
        begun = time.monotonic()
        assert drain.finish(0.6, lambda: None) == pytest.approx(0.2)
        assert time.monotonic() - begun < 5


async def ask(middleware: SessionMiddleware, path: str) -> tuple[int, dict[bytes, bytes]]:
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    await middleware({"type": "http", "method": "POST", "path": path, "headers": []}, receive, send)
    return sent[0]["status"], dict(sent[0]["headers"])


async def answer(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"yes"})


def test_what_comes_is_refused_and_told_to_connect_elsewhere() -> None:
    drain = Drain()
    middleware = SessionMiddleware(answer, drain=drain)
    assert asyncio.run(ask(middleware, "/v1/completions"))[0] == 200
    drain.finish(1, lambda: None)
    for path in ("/v1/completions", "/v1/sessions/mia", "/health", "/ping"):
        status, headers = asyncio.run(ask(middleware, path))
        assert status == 503, path
        assert headers[b"connection"] == b"close"
        assert int(headers[b"retry-after"]) >= 1
    for path in ("/metrics", "/version"):
        assert asyncio.run(ask(middleware, path))[0] == 200


def test_a_response_counts_until_it_has_ended_whatever_ends_it() -> None:
    drain = Drain()

    async def fails(scope: Any, receive: Any, send: Any) -> None:
        assert drain.finish(0.06, lambda: None) < 0.06, "it was not waited for"
        drain.draining = False
        raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        asyncio.run(ask(SessionMiddleware(fails, drain=drain), "/v1/completions"))
    assert drain.finish(30, lambda: pytest.fail("nothing is under way")) > 29


class Client:
    """vLLM's engine client, as far as an end is concerned."""

    def __init__(self) -> None:
        self.ended: list[float | None] = []
        self.aborted: list[str] = []
        self.output_processor = SimpleNamespace(request_states={"a": None, "b": None})

    def shutdown(self, timeout: float | None = None) -> None:
        self.ended.append(timeout)

    async def abort(self, requests: list[str], internal: bool = False) -> None:
        assert internal
        self.aborted += requests


def test_vllms_engines_are_ended_after_it() -> None:
    async def end() -> tuple[Client, list[float]]:
        client, finished = Client(), []

        def finish(seconds: float, abort: Callable[[], None]) -> float:
            finished.append(seconds)
            assert client.ended == []
            abort()
            return 3.0

        compat.before_shutdown(client, finish)
        await asyncio.to_thread(client.shutdown, timeout=20)
        await asyncio.sleep(0)
        client.shutdown(timeout=20)  # on the event loop: nobody could answer meanwhile
        await asyncio.to_thread(client.shutdown, timeout=0)
        return client, finished

    client, finished = asyncio.run(end())
    assert finished == [20]
    assert client.ended == [3.0, 20, 0]
    assert client.aborted == ["a", "b"]
