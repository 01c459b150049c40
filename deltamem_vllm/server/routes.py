"""Routes under ``/v1/sessions``, so that vLLM's ``--api-key`` covers them.

A session is asked of the engine that serves it; the store's listing of any engine will do. What is copied from one
session to another is read from the first one's engine and created at the second one's.
"""

import hashlib
import re
import secrets
from collections.abc import Callable, Coroutine
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Path, Query, Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from deltamem_vllm.errors import DeltaMemError, SessionError
from deltamem_vllm.server import models
from deltamem_vllm.server.gateway import Gateway
from deltamem_vllm.server.middleware import error_body
from deltamem_vllm.server.models import (
    Erased,
    ErrorBody,
    SessionCreate,
    SessionDeleted,
    SessionFork,
    SessionInfo,
    SessionList,
    SessionRollback,
    SessionRow,
    SessionUpdate,
)
from deltamem_vllm.server.scope import Scope, check_id, current, parse_match, tenant_of_request
from deltamem_vllm.store.protocol import SessionKey

CHANGE_TIMEOUT = 10.0
"""Seconds that a change may take beyond its wait for the session's turn."""

_WHY = {
    400: "The request is not valid.",
    404: "There is no such session, or it does not keep that version.",
    409: "The session is busy, or exists already; `Retry-After` says when to try again.",
    412: "The session is at another version than `If-Match` names; `ETag` says at which.",
    413: "The body is larger than any exported session of this server.",
    422: "The memory was written with another adapter, model or shape, or is damaged.",
    429: "The tenant has no room left.",
    503: "The store or the engine is away, nothing was changed; `Retry-After` says when to try again.",
}


def _refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
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
Named = Annotated[str | None, Query(pattern=models.ID, description="Id of the new session; made if absent.")]
Kept = Annotated[int | None, Query(ge=1, le=2**53, description="A kept version; the latest if absent.")]


class _Route(APIRoute):
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


def make_router() -> APIRouter:
    """The session routes."""
    router = APIRouter(prefix="/v1/sessions", tags=["sessions"], route_class=_Route)

    @router.get("", response_model=SessionList, responses=_refusals(400, 503))
    async def list_sessions(
        request: Request,
        after: Annotated[str | None, Query(pattern=models.ID, description="The last id of the page before.")] = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        prefix: Annotated[str | None, Query(pattern=models.ID, description="Only ids that begin so.")] = None,
    ) -> Any:
        """The sessions in the store, in the order of their ids. One that the store does not have yet may be missing."""
        gateway = _gateway(request)
        rows = await gateway.clients[0].ask("list", tenant=_tenant(), after=after, limit=limit + 1, prefix=prefix)
        page = [SessionRow(**row) for row in rows[:limit]]
        first, last = (page[0].id, page[-1].id) if page else (None, None)
        return SessionList(data=page, has_more=len(rows) > limit, first_id=first, last_id=last)

    @router.post("", response_model=SessionInfo, status_code=201, responses=_refusals(400, 409, 429, 503))
    async def create_session(
        request: Request, response: Response, idempotency: Idempotency, body: SessionCreate | None = None
    ) -> Any:
        """Create a session with an empty memory. A session that a generation request names need not be created."""
        body = body or SessionCreate()
        name, made = _named("create", idempotency, body.model_dump_json())
        fields = body.model_dump(exclude={"id"})
        return await _changed(request, response, body.id or made, "create", name=name, **fields)

    @router.post(
        "/import",
        response_model=SessionInfo,
        status_code=201,
        responses=_refusals(400, 409, 413, 422, 429, 503),
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
            }
        },
    )
    async def import_session(request: Request, response: Response, idempotency: Idempotency, id: Named = None) -> Any:
        """Create a session from an export. It must be of this server's adapter and model, and is verified."""
        gateway = _gateway(request)
        data = await _body(request, await gateway.clients[0].ask("record_limit"))
        name, made = _named("import", idempotency, hashlib.blake2b(data).hexdigest())
        return await _changed(request, response, id or made, "install", name=name, data=data)

    @router.get("/{session_id}", response_model=SessionInfo, responses=_refusals(400, 404, 422, 503))
    async def get_session(session_id: Id, request: Request, response: Response) -> Any:
        """What is known of a session."""
        found = await _ask(request, session_id, "info")
        if found is None:
            raise _not_found(session_id)
        response.headers["ETag"] = f'"{found["version"]}"'
        return SessionInfo(id=session_id, **found)

    @router.get("/{session_id}/versions", response_model=SessionList, responses=_refusals(400, 404, 503))
    async def list_versions(session_id: Id, request: Request) -> Any:
        """The versions that can be returned to, newest first."""
        rows = await _ask(request, session_id, "versions")
        if not rows:
            raise _not_found(session_id)
        return SessionList(data=[SessionRow(object="session.version", **row) for row in rows])

    @router.patch("/{session_id}", response_model=SessionInfo, responses=_refusals(400, 404, 409, 412, 422, 429, 503))
    async def update_session(
        session_id: Id,
        body: SessionUpdate,
        request: Request,
        response: Response,
        match: Match,
        idempotency: Idempotency,
    ) -> Any:
        """Replace metadata, ttl or write policy; null takes the latter two away."""
        fields = body.model_dump(include=body.model_fields_set)
        name, _ = _named("update", idempotency, body.model_dump_json(exclude_unset=True))
        return await _changed(request, response, session_id, "update", name=name, fields=fields, if_match=match)

    @router.post(
        "/{session_id}/fork",
        response_model=SessionInfo,
        status_code=201,
        responses=_refusals(400, 404, 409, 412, 422, 429, 503),
    )
    async def fork_session(
        session_id: Id,
        request: Request,
        response: Response,
        match: Match,
        idempotency: Idempotency,
        body: SessionFork | None = None,
    ) -> Any:
        """Copy a session, or a version that it keeps, to a new one. From then on the two are independent."""
        body = body or SessionFork()
        name, made = _named("fork", idempotency, f"{session_id} {body.model_dump_json()}")
        source = await _ask(request, session_id, "export", version=body.version, if_match=match)
        if source is None:
            raise _not_found(session_id)
        origin = f"{session_id}@{source['version']}"
        return await _changed(
            request, response, body.id or made, "install", name=name, data=source["data"], forked_from=origin
        )

    @router.post(
        "/{session_id}/reset", response_model=SessionInfo, responses=_refusals(400, 404, 409, 412, 422, 429, 503)
    )
    async def reset_session(
        session_id: Id, request: Request, response: Response, match: Match, idempotency: Idempotency
    ) -> Any:
        """Empty the memory. Kept versions can still be returned to; DELETE erases."""
        name, _ = _named("reset", idempotency, "")
        return await _changed(request, response, session_id, "reset", name=name, if_match=match)

    @router.post(
        "/{session_id}/rollback", response_model=SessionInfo, responses=_refusals(400, 404, 409, 412, 422, 429, 503)
    )
    async def roll_back_session(
        session_id: Id,
        body: SessionRollback,
        request: Request,
        response: Response,
        match: Match,
        idempotency: Idempotency,
    ) -> Any:
        """Go on from the memory of a kept version, as a new version. Metadata and facts stay as they are."""
        name, _ = _named("rollback", idempotency, str(body.version))
        return await _changed(
            request, response, session_id, "rollback", name=name, version=body.version, if_match=match
        )

    @router.get(
        "/{session_id}/export",
        response_class=Response,
        responses={
            200: {
                "description": "The session as bytes that verify themselves.",
                "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
            },
            **_refusals(400, 404, 412, 422, 503),
        },
    )
    async def export_session(session_id: Id, request: Request, match: Match, version: Kept = None) -> Response:
        """A session to take elsewhere: memory, window, metadata and facts, not encrypted."""
        found = await _ask(request, session_id, "export", version=version, if_match=match)
        if found is None:
            raise _not_found(session_id)
        headers = {"ETag": f'"{found["version"]}"', "Cache-Control": "no-store"}
        return Response(found["data"], media_type="application/octet-stream", headers=headers)

    @router.delete("/{session_id}", response_model=SessionDeleted, responses=_refusals(400, 404, 409, 412, 422, 503))
    async def delete_session(session_id: Id, request: Request, match: Match) -> Any:
        """Erase a session. A request that is running finishes and commits nothing."""
        gone = await _ask(request, session_id, "delete", if_match=match)
        await _gateway(request).wake()
        if not gone["existed"]:
            raise _not_found(session_id)
        erased = Erased(store_versions=gone["versions"], unsaved_versions=gone["unsaved"], host_memory=gone["host"])
        return SessionDeleted(id=session_id, erased=erased)

    return router


def _tenant() -> str:
    """Whose request is being served: the one place where the routes learn it."""
    return tenant_of_request().name


async def _ask(request: Request, session_id: str, do: str, **question: Any) -> Any:
    """Ask the engine of the tenant's session that a path names."""
    gateway, key = _gateway(request), SessionKey(_tenant(), check_id(session_id, "session_id"))
    timeout = gateway.queue_seconds + CHANGE_TIMEOUT
    return await gateway.client_of(key).ask(do, timeout=timeout, tenant=key.tenant, session=key.session, **question)


async def _changed(request: Request, response: Response, session_id: str, do: str, **question: Any) -> SessionInfo:
    await _gateway(request).spend(current.get() or Scope(tenant=None))
    found = await _ask(request, session_id, do, **question)
    response.headers["ETag"] = f'"{found["version"]}"'
    if response.status_code == 201 or do in ("create", "install"):
        response.headers["Location"] = f"/v1/sessions/{session_id}"
    return SessionInfo(id=session_id, **found)


def _named(do: str, idempotency: str | None, said: str) -> tuple[str, str]:
    """A request's name, and the id of the session that it makes if it names none. Both follow from an idempotency key;
    the name also from what is asked, so that the key with another request is another one."""
    if idempotency is None:
        return f"{do}-{secrets.token_hex(16)}", f"session-{secrets.token_hex(12)}"
    made = hashlib.blake2b(f"{do} {_tenant()} {idempotency}".encode(), digest_size=12).hexdigest()
    name = hashlib.blake2b(f"{idempotency}\0{said}".encode(), digest_size=16).hexdigest()
    return f"{do}-{name}", f"session-{made}"


async def _body(request: Request, limit: int) -> bytes:
    """The body of an import.

    Raises:
        SessionError: 413; it is larger than ``limit`` bytes, or says so: then none of it is read.
    """
    said = request.headers.get("content-length", "")
    data = bytearray()
    if not (said.isdigit() and int(said) > limit):
        async for part in request.stream():
            data += part
            if len(data) > limit:
                break
        else:
            return bytes(data)
    raise SessionError(f"an exported session has up to {limit} bytes here", status=413, parameter="body")


def _gateway(request: Request) -> Gateway:
    gateway: Gateway = request.app.state.deltamem
    return gateway


def _not_found(session_id: str) -> SessionError:
    return SessionError(f"session {session_id!r} not found", status=404, parameter="session_id")
