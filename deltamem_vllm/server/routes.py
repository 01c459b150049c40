"""Routes for sessions, under ``/v1``, so that vLLM's ``--api-key`` covers them.

A session is asked of the engine that serves it; the store's listing of any engine will do. What is copied from one
session to another is read from the first one's engine and created at the second one's.
"""

import hashlib
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Query, Request, Response

from deltamem_vllm.errors import SessionError
from deltamem_vllm.server import models
from deltamem_vllm.server.models import (
    Erased,
    SessionCreate,
    SessionDeleted,
    SessionFork,
    SessionInfo,
    SessionList,
    SessionMemory,
    SessionRollback,
    SessionRow,
    SessionUpdate,
)
from deltamem_vllm.server.routing import (
    Id,
    Idempotency,
    Match,
    Route,
    ask,
    changed,
    gateway_of,
    named,
    not_found,
    refusals,
    tenant,
)

Named = Annotated[str | None, Query(pattern=models.ID, description="Id of the new session; made if absent.")]
Kept = Annotated[int | None, Query(ge=1, le=2**53, description="A kept version; the latest if absent.")]


def make_router() -> APIRouter:
    """The session routes."""
    router = APIRouter(prefix="/v1/sessions", tags=["sessions"], route_class=Route)

    @router.get("", response_model=SessionList, responses=refusals(400, 503))
    async def list_sessions(
        request: Request,
        after: Annotated[str | None, Query(pattern=models.ID, description="The last id of the page before.")] = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        prefix: Annotated[str | None, Query(pattern=models.ID, description="Only ids that begin so.")] = None,
    ) -> Any:
        """The sessions in the store, in the order of their ids. One that the store does not have yet may be missing."""
        gateway = gateway_of(request)
        rows = await gateway.clients[0].ask("list", tenant=tenant(), after=after, limit=limit + 1, prefix=prefix)
        page = [SessionRow(**row) for row in rows[:limit]]
        first, last = (page[0].id, page[-1].id) if page else (None, None)
        return SessionList(data=page, has_more=len(rows) > limit, first_id=first, last_id=last)

    @router.post("", response_model=SessionInfo, status_code=201, responses=refusals(400, 409, 429, 503))
    async def create_session(
        request: Request, response: Response, idempotency: Idempotency, body: SessionCreate | None = None
    ) -> Any:
        """Create a session with an empty memory. A session that a generation request names need not be created."""
        body = body or SessionCreate()
        name, made = named("create", idempotency, body.model_dump_json())
        fields = body.model_dump(exclude={"id"})
        return await changed(request, response, body.id or made, "create", name=name, **fields)

    @router.post(
        "/import",
        response_model=SessionInfo,
        status_code=201,
        responses=refusals(400, 409, 413, 422, 429, 503),
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
            }
        },
    )
    async def import_session(request: Request, response: Response, idempotency: Idempotency, id: Named = None) -> Any:
        """Create a session from an export. It must be of this server's adapter and model, and is verified."""
        gateway = gateway_of(request)
        data = await _body(request, await gateway.clients[0].ask("record_limit"))
        name, made = named("import", idempotency, hashlib.blake2b(data).hexdigest())
        return await changed(request, response, id or made, "install", name=name, data=data)

    @router.get("/{session_id}", response_model=SessionInfo, responses=refusals(400, 404, 422, 503))
    async def get_session(session_id: Id, request: Request, response: Response) -> Any:
        """What is known of a session."""
        found = await ask(request, session_id, "info")
        if found is None:
            raise not_found(session_id)
        response.headers["ETag"] = f'"{found["version"]}"'
        return SessionInfo(id=session_id, **found)

    @router.get("/{session_id}/versions", response_model=SessionList, responses=refusals(400, 404, 503))
    async def list_versions(session_id: Id, request: Request) -> Any:
        """The versions that can be returned to, newest first."""
        rows = await ask(request, session_id, "versions")
        if not rows:
            raise not_found(session_id)
        return SessionList(data=[SessionRow(object="session.version", **row) for row in rows])

    @router.patch("/{session_id}", response_model=SessionInfo, responses=refusals(400, 404, 409, 412, 422, 429, 503))
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
        name, _ = named("update", idempotency, body.model_dump_json(exclude_unset=True))
        return await changed(request, response, session_id, "update", name=name, fields=fields, if_match=match)

    @router.post(
        "/{session_id}/fork",
        response_model=SessionInfo,
        status_code=201,
        responses=refusals(400, 404, 409, 412, 422, 429, 503),
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
        name, made = named("fork", idempotency, f"{session_id} {body.model_dump_json()}")
        source = await ask(request, session_id, "export", version=body.version, if_match=match)
        if source is None:
            raise not_found(session_id)
        origin = f"{session_id}@{source['version']}"
        return await changed(
            request, response, body.id or made, "install", name=name, data=source["data"], forked_from=origin
        )

    @router.post(
        "/{session_id}/reset", response_model=SessionInfo, responses=refusals(400, 404, 409, 412, 422, 429, 503)
    )
    async def reset_session(
        session_id: Id, request: Request, response: Response, match: Match, idempotency: Idempotency
    ) -> Any:
        """Empty the memory. Kept versions can still be returned to; DELETE erases."""
        name, _ = named("reset", idempotency, "")
        return await changed(request, response, session_id, "reset", name=name, if_match=match)

    @router.post(
        "/{session_id}/rollback", response_model=SessionInfo, responses=refusals(400, 404, 409, 412, 422, 429, 503)
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
        name, _ = named("rollback", idempotency, str(body.version))
        return await changed(request, response, session_id, "rollback", name=name, version=body.version, if_match=match)

    @router.get(
        "/{session_id}/export",
        response_class=Response,
        responses={
            200: {
                "description": "The session as bytes that verify themselves.",
                "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
            },
            **refusals(400, 404, 409, 412, 422, 503),
        },
    )
    async def export_session(
        session_id: Id,
        request: Request,
        match: Match,
        version: Kept = None,
        encrypted: Annotated[
            bool, Query(description="With the store's key: to be imported where it is known.")
        ] = False,
    ) -> Response:
        """A session to take elsewhere: memory, window, metadata and facts."""
        found = await ask(request, session_id, "export", version=version, if_match=match, encrypted=encrypted)
        if found is None:
            raise not_found(session_id)
        headers = {"ETag": f'"{found["version"]}"', "Cache-Control": "no-store"}
        return Response(found["data"], media_type="application/octet-stream", headers=headers)

    @router.get("/{session_id}/state", response_model=SessionMemory, responses=refusals(400, 404, 422, 503))
    async def get_state(
        session_id: Id,
        request: Request,
        response: Response,
        version: Kept = None,
        values: Annotated[bool, Query(description="False: norms only.")] = True,
        first: Annotated[int, Query(ge=0, le=10_000, description="The layer whose values come first.")] = 0,
    ) -> Any:
        """The memory itself, in numbers. Of a large one each answer has the values of some layers."""
        found = await ask(request, session_id, "state", version=version, values=values, first=first)
        if found is None:
            raise not_found(session_id)
        response.headers["Cache-Control"] = "no-store"
        return _memory(session_id, found)

    @router.delete("/{session_id}", response_model=SessionDeleted, responses=refusals(400, 404, 409, 412, 422, 503))
    async def delete_session(session_id: Id, request: Request, match: Match) -> Any:
        """Erase a session. A request that is running finishes and commits nothing."""
        gone = await ask(request, session_id, "delete", if_match=match)
        await gateway_of(request).wake()
        if not gone["existed"]:
            raise not_found(session_id)
        erased = Erased(store_versions=gone["versions"], unsaved_versions=gone["unsaved"], host_memory=gone["host"])
        return SessionDeleted(id=session_id, erased=erased)

    return router


def _memory(session_id: str, found: dict[str, Any]) -> SessionMemory:
    """What `deltamem_vllm.sessions.inspection.state` found, for people."""
    count, heads, rank = found["shape"]
    layers, first = found["layers"], found["first"]
    values = np.frombuffer(found["values"], np.float32).reshape(-1, heads, rank, rank)
    for layer, of_layer in zip(layers[first:], values.tolist(), strict=False):
        layer["values"] = [[[float(f"{x:.6g}") for x in row] for row in head] for head in of_layer]
    after = first + len(values)
    return SessionMemory(
        id=session_id,
        version=found["version"],
        updated_at=found["updated_at"],
        tokens=found["tokens"],
        heads=heads,
        rank=rank,
        norm=found["norm"],
        layers=layers,
        next=after if first < after < count else None,
    )


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
