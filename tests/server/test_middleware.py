"""The middleware around a toy application: headers in, headers out, failures instead of responses."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest

from deltamem_vllm.errors import CapacityError, DeltaMemError, SessionError, StoreUnavailable
from deltamem_vllm.server.middleware import SessionMiddleware, error_body
from deltamem_vllm.server.scope import Scope, check_id, current, effective_id

Headers = list[tuple[bytes, bytes]]
App = Callable[[Any, Any, Any], Awaitable[None]]


@dataclass
class Response:
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    parts: list[bytes] = field(default_factory=list)

    @property
    def body(self) -> bytes:
        return b"".join(self.parts)

    @property
    def error(self) -> dict[str, Any]:
        return dict(json.loads(self.body)["error"])


async def call(app: App, headers: Iterable[tuple[bytes, bytes]] = (), header: str = "X-Session-ID") -> Response:
    response, ended = Response(), False

    async def send(message: dict[str, Any]) -> None:
        nonlocal ended
        assert not ended, "a message after the response's end"
        if message["type"] == "http.response.start":
            assert not response.status, "the response began twice"
            response.status = message["status"]
            pairs = [(k.decode(), v.decode()) for k, v in message["headers"]]
            response.headers = dict(pairs)
            assert len(pairs) == len(response.headers), f"a header twice: {pairs}"
        else:
            assert response.status, "a body before its start"
            response.parts.append(message.get("body", b""))
            ended = not message.get("more_body", False)

    scope = {"type": "http", "path": "/", "headers": list(headers)}
    await SessionMiddleware(app, header)(scope, None, send)
    assert current.get() is None, "the request's scope outlived it"
    return response


def exchange(app: App, *headers: tuple[bytes, bytes], header: str = "X-Session-ID") -> Response:
    return asyncio.run(call(app, headers, header))


def answering(
    act: Callable[[Scope, Any], None] = lambda ours, scope: None,
    parts: tuple[bytes, ...] = (b"{}",),
    kind: bytes = b"application/json",
) -> App:
    """An application that does something to the request's scope and then answers."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        ours = current.get()
        assert ours is not None
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
        act(ours, scope)
        for part in parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    return app


def never(scope: Any, receive: Any, send: Any) -> Awaitable[None]:
    raise AssertionError("the application was reached")


# --- ids and modes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad",
    [b"", b" ", b"a b", b"x" * 129, "ü".encode(), b"\xff", b"a/b", b"../x", b"a\n", b"a\0", b"a,b", b"x" * 5_000_000],
    ids=lambda b: f"{b[:12]!r}-{len(b)}",
)
def test_bad_ids_are_refused(bad: bytes) -> None:
    response = exchange(never, (b"x-session-id", bad))
    assert response.status == 400
    assert response.headers["content-type"] == "application/json"
    assert len(response.body) < 1000
    assert "use 1 to 128 of A-Z a-z 0-9 . _ : -" in response.error["message"]
    assert response.error | {"message": ""} == {
        "message": "",
        "type": "BadRequestError",
        "param": "x-session-id",
        "code": 400,
    }


@pytest.mark.parametrize("good", ["a", "x" * 128, "user:42.chat_7-B", "-", "..."])
def test_good_ids_pass(good: str) -> None:
    assert exchange(answering(), (b"x-session-id", good.encode())).status == 200
    assert check_id(good, "session_id") == good


@pytest.mark.parametrize("bad", [None, 7, ["a"], {"a": 1}, b"a", "a\n", "\na", "ü", "٣", "", "a" * 129, True])
def test_ids_from_elsewhere_are_refused_too(bad: Any) -> None:
    with pytest.raises(SessionError, match="invalid session id"):
        check_id(bad, "session_id")


def test_the_effective_id() -> None:
    assert effective_id(None, None, None) is None
    assert effective_id("", None, "") is None
    for body, header, extra in (("a", None, None), ("a", "a", None), ("a", None, "a"), ("a", "a", "a")):
        assert effective_id(body, header, extra) == "a"
    different = (("a", "b", None), ("a", None, "b"), ("a", "a", "b"), ("a", "b", "a"), ("a", "b", "c"))
    for body, header, extra in different:
        with pytest.raises(SessionError, match="different sessions") as e:
            effective_id(body, header, extra)
        said = {word.strip(",:") for word in str(e.value).split()}
        assert {repr(each) for each in (body, header, extra) if each} <= said
    for odd in (7, ["a"], "a b", True):
        with pytest.raises(SessionError, match="invalid session id"):
            effective_id("a", None, odd)


@pytest.mark.parametrize("name", [b"x-session-id", b"x-deltamem-mode"])
def test_a_header_given_twice_is_refused(name: bytes) -> None:
    response = exchange(never, (name, b"read"), (name, b"read"))
    assert response.status == 400
    assert "more than once" in response.error["message"]


@pytest.mark.parametrize(("given", "mode"), [(b"read", "read"), (b" OFF ", "off"), (b"ReadWrite", "readwrite")])
def test_modes(given: bytes, mode: str) -> None:
    seen = []
    assert exchange(answering(lambda ours, _: seen.append(ours.mode)), (b"x-deltamem-mode", given)).status == 200
    assert seen == [mode]


def test_without_headers_a_request_reads_and_writes() -> None:
    seen = []
    exchange(answering(lambda ours, _: seen.append(ours.mode)))
    assert seen == ["readwrite"]


@pytest.mark.parametrize("bad", [b"", b"write", b"read,off", b"x" * 100_000, b"\xff"])
def test_bad_modes_are_refused(bad: bytes) -> None:
    response = exchange(never, (b"x-deltamem-mode", bad))
    assert response.status == 400
    assert "use one of readwrite, read, off" in response.error["message"]
    assert len(response.body) < 1000


def test_a_renamed_header_reaches_vllm_under_its_own_name_and_the_old_one_does_not() -> None:
    seen: list[Headers] = []
    app = answering(lambda _, scope: seen.append([h for h in scope["headers"] if b"session" in h[0]]))
    exchange(app, (b"x-session-id", b"smuggled"), (b"x-conversation", b"mine"), header="X-Conversation")
    exchange(app, (b"x-session-id", b"smuggled"), header="X-Conversation")
    assert seen == [[(b"x-session-id", b"mine")], []]
    assert exchange(never, (b"x-conversation", b"a b"), header="X-Conversation").status == 400


@pytest.mark.parametrize(
    ("path", "served"),
    [
        ("/v1/sessions/mia/", "/v1/sessions/mia"),
        ("/v1/sessions/mia//", "/v1/sessions/mia"),
        ("/base/v1/sessions/mia/fork/", "/base/v1/sessions/mia/fork"),
        ("/v1/sessions/", "/v1/sessions"),
        ("/v1/sessions/mia", "/v1/sessions/mia"),
        ("/v1/models/", "/v1/models/"),
    ],
)
def test_a_sessions_path_is_not_redirected(path: str, served: str) -> None:
    """The metrics that vLLM keeps of HTTP requests would name the path of a redirect."""
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append((scope["path"], scope["raw_path"]))

    scope = {"type": "http", "method": "GET", "path": path, "raw_path": path.encode(), "headers": []}
    asyncio.run(SessionMiddleware(app)(scope, None, None))
    assert seen == [(served, served.encode())]


def test_other_kinds_of_connection_pass_untouched() -> None:
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append((scope["type"], current.get()))

    async def scenario() -> None:
        for kind in ("lifespan", "websocket"):
            scope = {"type": kind, "path": "/v1/realtime", "headers": [(b"x-session-id", b"a b")]}
            await SessionMiddleware(app)(scope, None, None)

    asyncio.run(scenario())
    assert seen == [("lifespan", None), ("websocket", None)]


# --- outcomes ---------------------------------------------------------------------------------------------------------

COMMITTED = {"session": "s", "version": 3, "status": "committed", "error": ""}


def test_an_outcome_becomes_headers() -> None:
    response = exchange(answering(lambda ours, _: ours.outcome.update(COMMITTED)))
    assert response.headers == {
        "content-type": "application/json",
        "x-session-id": "s",
        "x-session-version": "3",
        "x-deltamem-commit": "committed",
    }
    assert response.body == b"{}"


def test_without_an_outcome_nothing_is_added() -> None:
    response = exchange(answering())
    assert response.headers == {"content-type": "application/json"}
    assert exchange(answering(parts=(b"data: x\n\n",), kind=b"text/event-stream")).body == b"data: x\n\n"


def test_a_stream_passes_part_by_part_and_ends_with_the_outcome() -> None:
    """The outcome is known only after the headers are gone."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        ours = current.get()
        assert ours is not None
        ours.admitted = True
        kind = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": kind})
        await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        assert len(seen.parts) == 0
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": True})
        ours.outcome = dict(COMMITTED)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    seen = Response()
    response = exchange(app)
    assert response.parts[:2] == [b"data: 1\n\n", b"data: [DONE]\n\n"]
    assert response.parts[2] == b": x-session-id: s\n: x-session-version: 3\n: x-deltamem-commit: committed\n\n"
    assert "x-session-version" not in response.headers


# --- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [b"text/event-stream", b"application/json"])
@pytest.mark.parametrize(
    ("failure", "status", "name", "retry"),
    [
        (SessionError("no", status=400, parameter="n"), 400, "BadRequestError", None),
        (SessionError("gone", status=404), 404, "NotFoundError", None),
        (SessionError("other adapter", status=422), 422, "UnprocessableEntityError", None),
        (CapacityError("busy", status=409, retry_after=0.2), 409, "ConflictError", "1"),
        (CapacityError("away", status=503, retry_after=5.4), 503, "ServiceUnavailableError", "5"),
    ],
    ids=lambda x: str(x),
)
def test_a_failure_replaces_the_response(
    kind: bytes, failure: DeltaMemError, status: int, name: str, retry: str | None
) -> None:
    app = answering(lambda ours, _: setattr(ours, "failure", failure), (b'data: {"error": 1}\n\n', b"more"), kind)
    response = exchange(app)
    assert response.status == status
    assert response.headers.get("retry-after") == retry
    assert response.headers["content-type"] == "application/json"
    assert (response.error["message"], response.error["type"]) == (str(failure), name)


def test_a_failure_after_the_first_byte_cannot_replace_it() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        ours = current.get()
        assert ours is not None
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"begun", "more_body": True})
        ours.failure = CapacityError("too late")
        await send({"type": "http.response.body", "body": b" and ended", "more_body": False})

    response = exchange(app)
    assert (response.status, response.body) == (200, b"begun and ended")


def test_a_stream_that_talks_before_it_asks_is_still_refused() -> None:
    """The Responses API announces a response, then reaches the engine, and raises what that says."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        ours = current.get()
        assert ours is not None
        kind = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": kind})
        for part in (b"event: response.created\n\n", b"event: response.in_progress\n\n"):
            await send({"type": "http.response.body", "body": part, "more_body": True})
        if refuse:
            ours.failure = CapacityError("busy", status=409)
            raise RuntimeError("Caught handled exception, but response already started.")
        ours.admitted = True
        await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    refuse = True
    response = exchange(app)
    assert (response.status, response.error["type"]) == (409, "ConflictError")
    refuse = False
    response = exchange(app)
    assert response.status == 200
    assert response.parts[:3] == [b"event: response.created\n\n", b"event: response.in_progress\n\n", b"data: 1\n\n"]


def test_an_application_that_raises_is_not_hidden() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("a fault of the application")

    with pytest.raises(RuntimeError, match="a fault of the application"):
        exchange(app)


def test_requests_at_once_do_not_see_each_other() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        ours = current.get()
        assert ours is not None
        await asyncio.sleep(0.001)
        ours.outcome = {"session": ours.mode, "version": 1, "status": "unchanged"}
        await asyncio.sleep(0.001)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def scenario() -> list[Response]:
        modes = [b"read", b"off", b"readwrite"] * 20
        return await asyncio.gather(*(call(app, [(b"x-deltamem-mode", m)]) for m in modes))

    assert [r.headers["x-session-id"] for r in asyncio.run(scenario())] == ["read", "off", "readwrite"] * 20


def test_errors_that_are_not_ours_are_500() -> None:
    assert error_body(RuntimeError("x"))[0] == 500
    assert error_body(StoreUnavailable("x"))[0] == 500  # it reaches the middleware as CapacityError 503 (see control)
