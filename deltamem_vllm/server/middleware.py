"""ASGI middleware: reads our request headers, adds our response headers, turns our failures into responses.

It runs inside vLLM's authentication. The start of a response is held back until its first byte, so that a request
that is refused on its way to the engine gets its proper status, streaming or not.
"""

import json
from typing import Any

from deltamem_vllm.errors import CapacityError, DeltaMemError, PreconditionFailed, SessionError
from deltamem_vllm.server import elision
from deltamem_vllm.server.drain import Drain
from deltamem_vllm.server.elision import HISTORY_HEADER
from deltamem_vllm.server.roles import WRITE_HEADER, requested
from deltamem_vllm.server.scope import (
    COMMIT_HEADER,
    ELIDED_HEADER,
    MODE_HEADER,
    VERSION_HEADER,
    Scope,
    check_id,
    check_mode,
    current,
    no_key,
    parse_match,
)
from deltamem_vllm.server.tenants import OneTenant, Tenants, bearer, is_open
from deltamem_vllm.server.usage import with_elided, with_elided_events

HELD = 4
"""Parts of a stream that wait for the engine to be reached: the Responses API tells of a response before it asks."""

_STATUS_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    409: "ConflictError",
    412: "PreconditionFailedError",
    413: "RequestTooLargeError",
    415: "UnsupportedMediaTypeError",
    422: "UnprocessableEntityError",
    429: "RateLimitError",
}


def error_body(error: BaseException) -> tuple[int, dict[str, str], bytes]:
    """An error of ours as (status, headers, OpenAI-style JSON body)."""
    status = getattr(error, "status", 500)
    headers = {"content-type": "application/json"}
    if isinstance(error, CapacityError):
        headers["retry-after"] = str(max(1, round(error.retry_after)))
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, PreconditionFailed) and error.version:
        headers["etag"] = f'"{error.version}"'
    body = {
        "message": str(error),
        "type": _STATUS_TYPES.get(status, "ServiceUnavailableError" if status == 503 else "InternalServerError"),
        "param": getattr(error, "parameter", None),
        "code": status,
    }
    return status, headers, json.dumps({"error": body}).encode()


class SessionMiddleware:
    """Wraps every HTTP request of the server.

    Args:
        app: the application inside.
        session_header: name of the header that vLLM's own code does not know; renamed to ``X-Session-ID`` for it.
        tenants: tells whose request it is.
        drain: counts the responses under way, and knows when no more are begun.
        reserved: ids that no session can have.
    """

    def __init__(
        self,
        app: Any,
        session_header: str = "X-Session-ID",
        tenants: Tenants | None = None,
        drain: Drain | None = None,
        reserved: frozenset[str] = frozenset(),
    ) -> None:
        self.app = app
        self.drain = drain if drain is not None else Drain()
        self.tenants = tenants if tenants is not None else OneTenant()
        self.header = session_header.lower().encode()
        self.reserved = reserved

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        refusal = self.drain.refusal(scope["path"].removeprefix(scope.get("root_path", "")))
        if refusal is not None:
            await _turn_away(scope, send, refusal)
            return
        with self.drain.serving():
            await self._serve(scope, receive, send)

    async def _serve(self, scope: Any, receive: Any, send: Any) -> None:
        ours = Scope(tenant=self.tenants.of(bearer(scope["headers"])), reserved=self.reserved)
        if ours.tenant is None and self._guarded(scope):
            await _turn_away(scope, send, no_key("this server needs an API key, and the request has none of its"))
            return
        if scope["type"] == "websocket":  # none of vLLM's has sessions
            await self.app(scope, receive, send)
            return
        try:
            sessions = [v.decode("latin-1") for k, v in scope["headers"] if k == self.header]
            modes = [v.decode("latin-1") for k, v in scope["headers"] if k == MODE_HEADER.lower().encode()]
            writes = [v.decode("latin-1") for k, v in scope["headers"] if k == WRITE_HEADER.lower().encode()]
            histories = [v.decode("latin-1") for k, v in scope["headers"] if k == HISTORY_HEADER.lower().encode()]
            if max(map(len, (sessions, modes, writes, histories))) > 1:
                raise SessionError("a session, mode, write or history header was given more than once: send each once")
            if sessions:
                ours.header_id = check_id(sessions[0], self.header.decode())
                ours.ids.add(ours.header_id)
            if modes:
                ours.mode = check_mode(modes[0])
            matches = [v.decode("latin-1") for k, v in scope["headers"] if k == b"if-match"]
            ours.if_match = parse_match(",".join(matches) if matches else None)
            if writes:
                ours.writes = requested(writes[0])
            if histories:
                ours.history = elision.requested(histories[0])
        except SessionError as e:
            await _respond(send, e)
            return
        path = scope["path"]
        if "/v1/sessions/" in path and path.endswith("/"):
            # Else it would be redirected, and vLLM's HTTP metrics have a label for the path of a redirect, id and all.
            raw = scope.get("raw_path") or path.encode()
            scope = {**scope, "path": path.rstrip("/"), "raw_path": raw.rstrip(b"/")}
        if self.header != b"x-session-id":
            kept = [(k, v) for k, v in scope["headers"] if k not in (self.header, b"x-session-id")]
            scope = {**scope, "headers": kept + [(b"x-session-id", s.encode("latin-1")) for s in sessions]}
        token = current.set(ours)
        sender = _Sender(send, ours)
        try:
            await self.app(scope, receive, sender)
        except Exception:
            if not await sender.settle():
                raise
        finally:
            current.reset(token)

    def _guarded(self, scope: Any) -> bool:
        """Whether it is ours to refuse this request to a stranger."""
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        preflight = scope["type"] == "http" and scope["method"] == "OPTIONS"  # a browser sends it without the key
        return self.tenants.guard_everything and not preflight and not is_open(path)


async def _turn_away(scope: Any, send: Any, why: DeltaMemError) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})  # before it was accepted: the handshake gets 403
    else:
        await _respond(send, why, close=isinstance(why, CapacityError))


class _Sender:
    """Passes a response on, with our headers, or replaces it by our failure."""

    def __init__(self, send: Any, ours: Scope) -> None:
        self._send, self._ours = send, ours
        self._start: dict[str, Any] | None = None
        self._replaced = False
        self._streams = False
        self._held: list[dict[str, Any]] = []

    async def __call__(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            return
        if self._replaced:
            return
        if self._start is not None:
            if await self.settle():
                return
            headers = list(self._start.get("headers", []))
            self._streams = any(k.lower() == b"content-type" and v.startswith(b"text/event-stream") for k, v in headers)
            if self._streams and message.get("more_body") and not self._ours.admitted and len(self._held) < HELD:
                self._held.append(message)
                return
            if self._elided and not self._streams and not message.get("more_body"):
                message = {**message, "body": with_elided(message.get("body", b""), self._ours.elided_tokens)}
                headers = [(k, v) for k, v in headers if k.lower() != b"content-length"]
                headers.append((b"content-length", str(len(message["body"])).encode()))
            start, self._start = self._start, None
            # Whether a short stream's outcome is known already is chance: it is said at the end of every stream.
            await self._send({**start, "headers": headers + ([] if self._streams else self._headers())})
            for each in self._held:
                await self._send(each)
            self._held = []
        if self._streams and self._elided:
            message = {**message, "body": with_elided_events(message.get("body", b""), self._ours.elided_tokens)}
        if self._streams and not message.get("more_body", False) and self._ours.outcome:
            # A stream's headers are gone before its outcome is known: say it in a closing comment.
            comment = "".join(f": {k.decode()}: {v.decode()}\n" for k, v in self._headers()) + "\n"
            message = {**message, "body": message.get("body", b"") + comment.encode()}
        await self._send(message)

    @property
    def _elided(self) -> bool:
        return self._ours.admitted and self._ours.elided_messages > 0

    async def settle(self) -> bool:
        """Answer with our failure if there is one and nothing has left; whether that is the response."""
        if self._ours.failure is not None and self._start is not None:
            self._start, self._replaced = None, True
            await _respond(self._send, self._ours.failure)
        return self._replaced

    def _headers(self) -> list[tuple[bytes, bytes]]:
        outcome = self._ours.outcome
        if not outcome:
            return []
        found = {
            "X-Session-ID": outcome.get("session"),
            VERSION_HEADER: outcome.get("version"),
            COMMIT_HEADER: outcome.get("status"),
            ELIDED_HEADER: self._ours.elided_tokens if self._ours.elided_messages else None,
        }
        return [(k.lower().encode(), str(v).encode()) for k, v in found.items() if v is not None]


async def _respond(send: Any, error: BaseException, close: bool = False) -> None:
    """Send an error; ``close``: and have the client connect anew for its next request, to whoever serves then."""
    status, headers, body = error_body(error)
    if close:
        headers["connection"] = "close"
    raw = [(k.encode(), v.encode()) for k, v in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
