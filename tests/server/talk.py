"""An HTTP client in a session's words."""

import itertools
import json
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx

from deltamem_vllm.server.tenants import ServerKeys
from tests.pages import Page, read

API_KEY = "a-key-for-tests"
_found = ServerKeys([API_KEY]).of(API_KEY)
assert _found is not None
TENANT = _found.name
"""Whose sessions the server's are."""
Logprobs = list[dict[int, float]]
_names = itertools.count(1)


def new_session() -> str:
    """An id that no other test uses."""
    return f"session-{next(_names)}"


class Talk(httpx.Client):
    """Asks one server.

    Args:
        base_url: the server's.
        key: API key; None for none.
    """

    def __init__(self, base_url: str, key: str | None = API_KEY) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        super().__init__(base_url=base_url, headers=headers, timeout=120)

    def complete(
        self, prompt: Any, session: str | None = None, mode: str | None = None, n: int = 8, **body: Any
    ) -> httpx.Response:
        """POST /v1/completions, greedy, ``n`` tokens whatever they are."""
        return self.post("/v1/completions", json=completion(prompt, n, **body), headers=memory_headers(session, mode))

    def chat(
        self, messages: Any, session: str | None = None, mode: str | None = None, n: int = 8, **body: Any
    ) -> httpx.Response:
        """POST /v1/chat/completions; a text is one user message."""
        return self.post("/v1/chat/completions", json=chat(messages, n, **body), headers=memory_headers(session, mode))

    @contextmanager
    def streamed(
        self, prompt: Any, session: str | None = None, mode: str | None = None, n: int = 8, **body: Any
    ) -> Iterator[httpx.Response]:
        """A streamed completion; leaving the block disconnects."""
        body = completion(prompt, n, stream=True, **body)
        with self.stream("POST", "/v1/completions", json=body, headers=memory_headers(session, mode)) as response:
            yield response

    def metrics(self) -> Page:
        """What ``/metrics`` shows now."""
        return read(self.get("/metrics").text)

    def version(self, session: str) -> int:
        """The session's version by GET; 0 where there is none."""
        response = self.get(f"/v1/sessions/{session}")
        if response.status_code == 404:
            return 0
        assert response.status_code == 200, response.text
        return int(response.json()["version"])

    def probe(self, session: str | None, prompt: Sequence[int] = tuple(range(40, 60)), n: int = 8) -> Logprobs:
        """What the memory does to an unrelated prompt; changes nothing."""
        return logprobs(self.complete(list(prompt), session, "read", n))


def completion(prompt: Any, n: int, **body: Any) -> dict[str, Any]:
    ours = {"model": "m", "prompt": prompt, "max_tokens": n, "temperature": 0, "ignore_eos": True}
    return {**ours, "logprobs": 20, "return_tokens_as_token_ids": True, **body}


def chat(messages: Any, n: int, **body: Any) -> dict[str, Any]:
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    return {"model": "m", "messages": messages, "max_tokens": n, "temperature": 0, "ignore_eos": True, **body}


def memory_headers(session: str | None, mode: str | None) -> dict[str, str]:
    headers = {} if session is None else {"X-Session-ID": session}
    return headers if mode is None else {**headers, "X-DeltaMem-Mode": mode}


def ok(response: httpx.Response) -> dict[str, Any]:
    """The body of a response that must be a success."""
    assert response.status_code == 200, f"{response.status_code} {response.text[:500]}"
    body: dict[str, Any] = response.json()
    return body


def token_ids(response: httpx.Response) -> list[int]:
    """What a completion sampled."""
    return [_number(t) for t in ok(response)["choices"][0]["logprobs"]["tokens"]]


def logprobs(response: httpx.Response) -> Logprobs:
    """What a completion's tokens were chosen from."""
    found = ok(response)["choices"][0]["logprobs"]["top_logprobs"]
    return [{_number(k): v for k, v in each.items()} for each in found]


def distance(a: Logprobs, b: Logprobs) -> float:
    """Largest |Δ log-probability|; a token that only one side lists must lie below the other side's list."""
    worst = math.inf if len(a) != len(b) or not a else 0.0
    for x, y in zip(a, b, strict=False):
        for p, q in ((x, y), (y, x)):
            worst = max([worst] + [abs(v - q[k]) if k in q else max(0.0, v - min(q.values())) for k, v in p.items()])
    return worst


def refused(response: httpx.Response, status: int, *words: str) -> dict[str, Any]:
    """An error in OpenAI's format that says all of ``words``; returns it."""
    assert response.status_code == status, f"{response.status_code} {response.text[:500]}"
    error: dict[str, Any] = response.json()["error"]
    assert error["code"] == status
    assert isinstance(error["type"], str)
    for word in words:
        assert re.search(word, error["message"]), error
    return error


def outcome(response: httpx.Response) -> tuple[str | None, str | None, str | None]:
    """Session, version and commit as a response's headers say."""
    return tuple(response.headers.get(n) for n in ("X-Session-ID", "X-Session-Version", "X-DeltaMem-Commit"))  # type: ignore[return-value]


def closing(stream: str) -> dict[str, str]:
    """What a stream's SSE comments say."""
    return dict(re.findall(r"^: ([a-z-]+): (.*)$", stream, re.MULTILINE))


def chunks(stream: str) -> list[dict[str, Any]]:
    """A stream's data events but the last, which must be [DONE]."""
    data = re.findall(r"^data: (.*)$", stream, re.MULTILINE)
    assert data[-1] == "[DONE]", data[-1]
    return [json.loads(d) for d in data[:-1]]


def _number(token: str) -> int:
    return int(token.split(":")[1])
