"""What the routes under ``/v1/sessions`` share: their parameters, how they ask an engine, how errors are answered."""

import hashlib
import re
import secrets
from collections.abc import Callable, Coroutine
from typing import Annotated, Any

from fastapi import Depends, Header, Path, Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from deltamem_vllm.errors import DeltaMemError, SessionError
from deltamem_vllm.server import models
from deltamem_vllm.server.gateway import Gateway
from deltamem_vllm.server.middleware import error_body
from deltamem_vllm.server.models import ErrorBody, SessionInfo
from deltamem_vllm.server.scope import Scope, check_id, current, parse_match, tenant_of_request
from deltamem_vllm.store.protocol import SessionKey

_WHY = {
    400: "The request is not valid.",
    404: "There is no such session, or it does not keep that version.",
    409: "The session is busy (`Retry-After` says when to try again), or exists already; or nothing encrypts here.",
    412: "The session is at another version than `If-Match` names; `ETag` says at which.",
    413: "The body is larger than any exported session of this server.",
    422: "The memory was written with another adapter, model or shape, or is damaged.",
    429: "The tenant has no room left.",
    503: "The store or the engine is away, nothing was changed; `Retry-After` says when to try again.",
}


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    refusals: dict[int | str, dict[str, Any]] = {s: {"model": ErrorBody, "description": _WHY[s]} for s in statuses}
    return {401: {"description": "The API key is missing or wrong."}, **refusals}


def _match(
    if_match: Annotated[
        str,  # noqa: RUF013 (a header cannot be null, and OpenAPI must not say so)
        Header(
            alias="If-Match",
            description="Only if the session is at this version: its ETag, or `*`.",
            json_schema_extra={"pattern": r'^(\*|"[0-9]{1,15}"(, ?"[0-9]{1,15}")*)$'},
            examples=['"7"'],
        ),
    ] = None,  # type: ignore[assignment]
) -> list[int] | None:
    return parse_match(if_match)


def _idempotency(
    key: Annotated[
        str,  # noqa: RUF013 (a header cannot be null, and OpenAPI must not say so)
        Header(
            alias="Idempotency-Key",
            description="The same request again with the same key is carried out once.",
            json_schema_extra={"pattern": r"^[!-~]{1,255}$"},
        ),
    ] = None,  # type: ignore[assignment]
) -> str | None:
    if key is not None and not re.fullmatch(r"[!-~]{1,255}", key):
        raise SessionError(
            "Idempotency-Key must be 1 to 255 printable ASCII characters, without spaces", parameter="Idempotency-Key"
        )
    return key


Id = Annotated[str, Path(description="The session's id.", json_schema_extra={"pattern": models.ID})]
Match = Annotated[list[int] | None, Depends(_match)]
Idempotency = Annotated[str | None, Depends(_idempotency)]


class Route(APIRoute):
    """Answers our errors in OpenAI's format."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def answered(request: Request) -> Response:
            try:
                return await handle(request)
            except HTTPException as e:  # a body that is no JSON at all: its own answer has another format
                error: DeltaMemError = SessionError(str(e.detail), status=e.status_code)
            except DeltaMemError as e:
                error = e
            status, headers, body = error_body(error)
            return Response(body, status_code=status, headers=headers)

        return answered


def tenant() -> str:
    """Whose request is being served: the one place where the routes learn it."""
    return tenant_of_request().name


async def ask(request: Request, session_id: str, do: str, **question: Any) -> Any:
    """Ask the engine of the tenant's session that a path names."""
    return await gateway_of(request).ask(SessionKey(tenant(), check_id(session_id, "session_id")), do, **question)


async def changing(request: Request, response: Response, session_id: str, do: str, **question: Any) -> dict[str, Any]:
    """Ask for a change: it counts against the tenant's quota, and its answer has the new version as ETag."""
    await gateway_of(request).spend(current.get() or Scope(tenant=None))
    found: dict[str, Any] = await ask(request, session_id, do, **question)
    response.headers["ETag"] = f'"{found["version"]}"'
    return found


async def changed(request: Request, response: Response, session_id: str, do: str, **question: Any) -> SessionInfo:
    """The session as a change left it."""
    found = await changing(request, response, session_id, do, **question)
    if response.status_code == 201 or do in ("create", "install"):
        response.headers["Location"] = f"/v1/sessions/{session_id}"
    return SessionInfo(id=session_id, **found)


def named(do: str, idempotency: str | None, said: str) -> tuple[str, str]:
    """A request's name, and the id of the session that it makes if it names none. Both follow from an idempotency key;
    the name also from what is asked, so that the key with another request is another one."""
    if idempotency is None:
        return f"{do}-{secrets.token_hex(16)}", f"session-{secrets.token_hex(12)}"
    made = hashlib.blake2b(f"{do} {tenant()} {idempotency}".encode(), digest_size=12).hexdigest()
    name = hashlib.blake2b(f"{idempotency}\0{said}".encode(), digest_size=16).hexdigest()
    return f"{do}-{name}", f"session-{made}"


def gateway_of(request: Request) -> Gateway:
    gateway: Gateway = request.app.state.deltamem
    return gateway


def not_found(session_id: str) -> SessionError:
    return SessionError(f"session {session_id!r} not found", status=404, parameter="session_id")
