"""ASGI middleware: reads our request headers, adds our response headers, turns our failures into responses.

It runs inside vLLM's authentication. The start of a response is held back until its first byte, so that a request
that is refused on its way to the engine gets its proper status, streaming or not.
"""

import json
from collections.abc import Callable
from typing import Any

from deltamem_vllm.errors import CapacityError, PreconditionFailed, SessionError
from deltamem_vllm.server.roles import WRITE_HEADER, requested
from deltamem_vllm.server.scope import (
    COMMIT_HEADER,
    MODE_HEADER,
    VERSION_HEADER,
    Scope,
    check_id,
    check_mode,
    current,
)

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
        has_key: whether a request's ASGI scope carries an API key of the server; None if it asks for none.
    """

    def __init__(
        self, app: Any, session_header: str = "X-Session-ID", has_key: Callable[[Any], bool] | None = None
    ) -> None:
        self.app = app
        self.has_key = has_key
        self.header = session_header.lower().encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        ours = Scope(stranger=self.has_key is not None and not self.has_key(scope))
        try:
            sessions = [v.decode("latin-1") for k, v in scope["headers"] if k == self.header]
            modes = [v.decode("latin-1") for k, v in scope["headers"] if k == MODE_HEADER.lower().encode()]
            writes = [v.decode("latin-1") for k, v in scope["headers"] if k == WRITE_HEADER.lower().encode()]
            if len(sessions) > 1 or len(modes) > 1 or len(writes) > 1:
                raise SessionError("the session, mode or write header was given more than once: send each once")
            if sessions:
                ours.header_id = check_id(sessions[0], self.header.decode())
            if modes:
                ours.mode = check_mode(modes[0])
            if writes:
                ours.writes = requested(writes[0])
        except SessionError as e:
            await _respond(send, e)
            return
        if self.header != b"x-session-id":
            kept = [(k, v) for k, v in scope["headers"] if k not in (self.header, b"x-session-id")]
            scope = {**scope, "headers": kept + [(b"x-session-id", s.encode("latin-1")) for s in sessions]}
        token = current.set(ours)
        try:
            await self.app(scope, receive, _Sender(send, ours))
        finally:
            current.reset(token)


class _Sender:
    """Passes a response on, with our headers, or replaces it by our failure."""

    def __init__(self, send: Any, ours: Scope) -> None:
        self._send, self._ours = send, ours
        self._start: dict[str, Any] | None = None
        self._replaced = False
        self._streams = False

    async def __call__(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            return
        if self._replaced:
            return
        if self._start is not None:
            start, self._start = self._start, None
            if self._ours.failure is not None:
                self._replaced = True
                await _respond(self._send, self._ours.failure)
                return
            headers = list(start.get("headers", []))
            self._streams = any(k.lower() == b"content-type" and v.startswith(b"text/event-stream") for k, v in headers)
            await self._send({**start, "headers": headers + self._headers()})
        if self._streams and not message.get("more_body", False) and self._ours.outcome:
            # A stream's headers are gone before its outcome is known: say it in a closing comment.
            comment = "".join(f": {k.decode()}: {v.decode()}\n" for k, v in self._headers()) + "\n"
            message = {**message, "body": message.get("body", b"") + comment.encode()}
        await self._send(message)

    def _headers(self) -> list[tuple[bytes, bytes]]:
        outcome = self._ours.outcome
        if not outcome:
            return []
        found = {
            "X-Session-ID": outcome.get("session"),
            VERSION_HEADER: outcome.get("version"),
            COMMIT_HEADER: outcome.get("status"),
        }
        return [(k.lower().encode(), str(v).encode()) for k, v in found.items() if v is not None]


async def _respond(send: Any, error: BaseException) -> None:
    status, headers, body = error_body(error)
    raw = [(k.encode(), v.encode()) for k, v in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
