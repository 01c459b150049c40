"""Requests that end early, wait, or are wrong; the server must stay well, and sessions free and exact."""

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from deltamem_vllm.demo.server import VllmServer
from deltamem_vllm.metrics import REQUESTS_WAITING
from tests.engine.asking import stop_in
from tests.pages import at
from tests.server.talk import (
    API_KEY,
    Talk,
    chat,
    completion,
    distance,
    logprobs,
    new_session,
    ok,
    outcome,
    refused,
    token_ids,
)
from tests.tolerances import SAME_MEMORY

FACT = list(range(64, 96))
OTHER = list(range(10, 40))
QUICKLY = 10.0
"""Seconds; far below the 30 s for which a request may wait for its session, and the 60 s of a lost ticket."""


@contextlib.contextmanager
def occupied(talk: Talk, session: str) -> Iterator[None]:
    """A client that writes to the session for longer than the block takes, and then disconnects."""
    with talk.streamed(OTHER, session, n=950) as response:
        assert response.status_code == 200
        parts = response.iter_raw()  # kept, since it disconnects when it is collected
        next(parts)
        yield


def wait_until(happened: Any, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def queued(talk: Talk) -> float:
    """Requests that wait for the turn of their session, as the server says."""
    return at(talk.metrics(), REQUESTS_WAITING)


def is_free(talk: Talk, session: str) -> bool:
    return not ok(talk.get(f"/v1/sessions/{session}"))["busy"]


# --- stop strings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [False, True])
def test_a_stop_string_commits_exactly_at_the_cut(talk: Talk, streamed: bool) -> None:
    """The engine has run further when the stop string is seen; the memory must not have."""
    s, t, prompt = new_session(), new_session(), [*FACT, 7]
    text = ok(talk.complete(prompt, None, n=40, logprobs=None))["choices"][0]["text"]
    stop = stop_in(text)
    if streamed:
        with talk.streamed(prompt, s, n=200, stop=[stop]) as response:
            response.read()
    else:
        assert ok(talk.complete(prompt, s, n=200, stop=[stop]))["choices"][0]["finish_reason"] == "stop"
    found = ok(talk.get(f"/v1/sessions/{s}"))
    sampled = token_ids(talk.complete(prompt, t, n=found["window_tokens"] - len(prompt) + 1))
    cut = ok(talk.complete(sampled, mode="off", n=1, logprobs=None, echo=True))["choices"][0]["text"]
    assert cut[: len(sampled)].endswith(stop), f"cut after {cut!r}, not after {stop!r}"
    assert ok(talk.get(f"/v1/sessions/{t}"))["window_tokens"] == found["window_tokens"]
    assert distance(talk.probe(s), talk.probe(t)) <= SAME_MEMORY
    grown = [*prompt, *sampled[:-1], *OTHER]
    assert distance(logprobs(talk.complete(grown, s)), logprobs(talk.complete(grown, t))) <= SAME_MEMORY


def test_stop_tokens_and_stops_in_the_prompt(talk: Talk) -> None:
    s = new_session()
    sampled = token_ids(talk.complete(FACT, None, n=20))
    ends = next(i for i in range(3, 20) if sampled.index(sampled[i]) == i)
    ok(talk.complete(FACT, s, n=200, stop_token_ids=[sampled[ends]]))
    assert ok(talk.get(f"/v1/sessions/{s}"))["window_tokens"] == len(FACT) + ends
    response = talk.complete(FACT, s, n=5, stop=["never sampled here"])
    assert outcome(response)[2] == "committed"
    assert ok(talk.get(f"/v1/sessions/{s}"))["window_tokens"] == len(FACT) + 4


# --- clients that leave -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [None, ["never sampled here"]], ids=["plain", "with a stop string"])
def test_a_client_that_leaves_a_stream_commits_nothing(talk: Talk, stop: list[str] | None) -> None:
    s = new_session()
    ok(talk.complete(FACT, s))
    before = talk.probe(s)
    for read in (1, 3):
        with talk.streamed(OTHER, s, n=950, stop=stop) as response:
            parts = response.iter_raw()
            for _ in range(read):
                next(parts)
        start = time.monotonic()
        assert outcome(talk.complete(OTHER, s, "read"))[1] == "1"
        wait_until(lambda: is_free(talk, s), QUICKLY)
        assert time.monotonic() - start < QUICKLY
    assert distance(talk.probe(s), before) <= SAME_MEMORY
    assert outcome(talk.complete(OTHER, s)) == (s, "2", "committed")


def test_the_next_request_is_served_at_once(talk: Talk) -> None:
    s = new_session()
    ok(talk.complete(FACT, s))
    with occupied(talk, s):
        pass
    start = time.monotonic()
    assert outcome(talk.complete(OTHER, s)) == (s, "2", "committed")
    assert time.monotonic() - start < QUICKLY


def test_a_client_that_leaves_before_its_answer_commits_nothing(talk: Talk, server: VllmServer) -> None:
    s = new_session()
    ok(talk.complete(FACT, s))
    body = json.dumps(completion(OTHER, 950)).encode()
    request = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-Session-ID: {s}\r\nAuthorization: Bearer {API_KEY}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(request + body)
        wait_until(lambda: not is_free(talk, s))
    start = time.monotonic()
    assert outcome(talk.complete(OTHER, s)) == (s, "2", "committed")
    assert time.monotonic() - start < QUICKLY


def test_a_client_that_leaves_the_line_holds_nothing(talk: Talk, server: VllmServer) -> None:
    s = new_session()
    ok(talk.complete(FACT, s))
    with occupied(talk, s):
        for _ in range(2):
            body = json.dumps(completion([1, 2, 3], 8)).encode()
            connection = socket.create_connection(("127.0.0.1", server.port))
            head = (
                f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-Session-ID: {s}\r\nAuthorization: Bearer {API_KEY}\r\n"
            )
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)
            time.sleep(0.3)
            connection.close()
        time.sleep(0.3)
    start = time.monotonic()
    assert outcome(talk.complete(OTHER, s)) == (s, "2", "committed"), "a request without a client was run"
    assert time.monotonic() - start < QUICKLY


# --- clients that wait ------------------------------------------------------------------------------------------------


def crowd(talk: Talk, s: str) -> list[str]:
    """Two requests wait for an occupied session, further ones are sent away; the versions that the two made."""
    with ThreadPoolExecutor(2) as pool:
        with occupied(talk, s):
            waiting = []
            for i in range(2):
                waiting.append(pool.submit(talk.complete, [100 + i, 101, 102], s))
                wait_until(lambda: queued(talk) == len(waiting) or waiting[-1].done())
            response = talk.complete(FACT, s)
            error = refused(response, 409, "2 requests wait for it already", "--deltamem-queue-depth")
            assert error["type"] == "ConflictError"
            assert int(response.headers["Retry-After"]) >= 1
            streamed = talk.complete(FACT, s, stream=True)
            refused(streamed, 409, "2 requests wait for it already")
            assert int(streamed.headers["Retry-After"]) >= 1
            assert outcome(talk.complete(FACT, s, "read"))[2] == "unchanged", "a reader needs no turn"
        return [str(outcome(w.result())[1]) for w in waiting]


def test_parallel_requests_of_a_session_come_in_order_and_too_many_are_sent_away(talk: Talk) -> None:
    """The server was started with --deltamem-queue-depth 2."""
    for _ in range(3):
        versions = crowd(talk, s := new_session())
        if versions != ["2", "3"]:  # else the occupying answer was complete before its client left: set up again
            break
    assert versions == ["1", "2"], "the occupying client left, so that it has no version"
    t = new_session()
    for i in range(2):
        ok(talk.complete([100 + i, 101, 102], t))
    assert distance(talk.probe(s), talk.probe(t)) <= SAME_MEMORY


# --- requests that do not say which answer is the memory --------------------------------------------------------------

AMBIGUOUS: list[dict[str, Any]] = [
    {"n": 2, "temperature": 1},
    {"prompt": [[1, 2, 3], [4, 5, 6]]},
    {"prompt": ["one", "two"]},
    {"use_beam_search": True, "n": 2, "logprobs": None, "return_tokens_as_token_ids": None},
]


@pytest.mark.parametrize("body", AMBIGUOUS, ids=["n", "token prompts", "text prompts", "beam search"])
def test_completions_with_several_answers(talk: Talk, body: dict[str, Any]) -> None:
    s = new_session()
    request = {**completion(FACT, 4), **body}
    response = talk.post("/v1/completions", json=request, headers={"X-Session-ID": s})
    refused(response, 400, "ask for one, or send X-DeltaMem-Mode: read")
    assert talk.version(s) == 0, "a part of it was written before it was refused"
    read = talk.post("/v1/completions", json=request, headers={"X-Session-ID": s, "X-DeltaMem-Mode": "read"})
    assert len(ok(read)["choices"]) == 2
    start = time.monotonic()
    assert outcome(talk.complete(FACT, s)) == (s, "1", "committed")
    assert time.monotonic() - start < QUICKLY


@pytest.mark.parametrize("body", [{"n": 2, "temperature": 1}, {"use_beam_search": True, "n": 2}], ids=["n", "beams"])
def test_chat_with_several_answers(talk: Talk, body: dict[str, Any]) -> None:
    s = new_session()
    for stream in (False, True) if "temperature" in body else (False,):
        request = {**chat("Bo is a cat.", 4), **body, "stream": stream}
        response = talk.post("/v1/chat/completions", json=request, headers={"X-Session-ID": s})
        refused(response, 400, "ask for one, or send X-DeltaMem-Mode: read")
    assert talk.version(s) == 0
    read = talk.post(
        "/v1/chat/completions",
        json={**request, "stream": False},
        headers={"X-Session-ID": s, "X-DeltaMem-Mode": "read"},
    )
    assert len(ok(read)["choices"]) == 2


# --- requests that are wrong ------------------------------------------------------------------------------------------


def test_a_prompt_that_is_too_long(talk: Talk) -> None:
    s = new_session()
    for body in ({}, {"stream": True}):
        refused(talk.complete([1] * 2000, s, **body), 400, "1024")
    start = time.monotonic()
    assert outcome(talk.complete(FACT, s)) == (s, "1", "committed")
    assert time.monotonic() - start < QUICKLY


BAD_IDS = ["a b", "ü", "x" * 129, "a/b", "a\nb", "a\n", "\u0663", "x" * 5_000_000]


@pytest.mark.parametrize("bad", BAD_IDS, ids=lambda b: f"{b[:8]!r}-{len(b)}")
def test_invalid_ids_in_the_body(talk: Talk, bad: str) -> None:
    for body in ({"session_id": bad}, {"vllm_xargs": {"session_id": bad}}):
        response = talk.complete(FACT, **body)
        refused(response, 400, "use 1 to 128 of A-Z a-z 0-9 . _ : -")
        assert len(response.content) < 2000
        refused(talk.complete(FACT, stream=True, **body), 400, "invalid session id")
    refused(talk.chat("Bo is a cat.", session_id=bad), 400, "invalid session id")


@pytest.mark.parametrize("bad", [b"", b"a b", "ü".encode(), b"\xff", b"x" * 129, b"a/b", b"x" * 5_000_000])
def test_invalid_ids_in_the_header(talk: Talk, bad: bytes) -> None:
    headers = [(b"X-Session-ID", bad), (b"Authorization", f"Bearer {API_KEY}".encode())]
    refused(talk.post("/v1/completions", json=completion(FACT, 4), headers=headers), 400, "invalid session id")


def test_an_empty_id_in_the_body_is_none(talk: Talk) -> None:
    """To vLLM an empty ``session_id`` is one not given."""
    s = new_session()
    assert outcome(talk.complete(FACT, session_id="")) == (None, None, None)
    assert outcome(talk.complete(FACT, s, session_id="")) == (s, "1", "committed")


ODD: list[Any] = [
    {"session_id": 7},
    {"session_id": ["a"]},
    {"session_id": {"a": "b"}},
    {"session_id": True},
    {"session_id": None},
    {"vllm_xargs": {"session_id": 7}},
    {"vllm_xargs": {"session_id": ["a"]}},
    {"vllm_xargs": {"session_id": None}},
    {"vllm_xargs": "text"},
    {"vllm_xargs": {"deltamem": None}},
    {"vllm_xargs": {"deltamem": {"ticket": 7}}},
    {"prompt": []},
    {"prompt": ""},
    {"prompt": [-1]},
    {"prompt": [10**9]},
    {"prompt": [[]]},
    {"prompt": None},
    {"max_tokens": 0},
    {"max_tokens": -1},
    {"stop": [""]},
    {"cache_salt": ""},
    {"cache_salt": "x" * 100_000},
    {"kv_transfer_params": {"do_remote_prefill": True}},
    {"logprobs": 10_000},
]


@pytest.mark.parametrize("odd", ODD, ids=lambda o: json.dumps(o)[:50])
def test_odd_bodies_are_no_server_error_and_hold_nothing(talk: Talk, odd: dict[str, Any]) -> None:
    s = new_session()
    for stream in (False, True):
        body = {**completion(FACT, 4, stream=stream), **odd}
        response = talk.post("/v1/completions", json=body, headers={"X-Session-ID": s})
        assert response.status_code in (200, 400, 422), f"{response.status_code} {response.text[:300]}"
    start = time.monotonic()
    assert outcome(talk.complete(OTHER, s))[2] == "committed"
    assert time.monotonic() - start < QUICKLY


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"null", b'"text"', b"\xff\xfe", b'{"session_id": "\\ud800"}', b"[" * 50_000]
)
def test_bodies_that_are_no_request(talk: Talk, raw: bytes) -> None:
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/responses"):
        headers = {"X-Session-ID": new_session(), "Content-Type": "application/json"}
        response = talk.post(path, content=raw, headers=headers)
        assert 400 <= response.status_code < 500, f"{path}: {response.status_code} {response.text[:300]}"


def test_headers_given_twice(talk: Talk) -> None:
    key = ("Authorization", f"Bearer {API_KEY}")
    for name in ("X-Session-ID", "X-DeltaMem-Mode"):
        headers = [key, (name, "read"), (name, "read")]
        refused(talk.post("/v1/completions", json=completion(FACT, 4), headers=headers), 400, "more than once")
