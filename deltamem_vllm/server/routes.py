"""Routes under ``/v1/sessions``, so that vLLM's ``--api-key`` covers them."""

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field

from deltamem_vllm.errors import DeltaMemError, SessionError
from deltamem_vllm.server.gateway import Gateway
from deltamem_vllm.server.middleware import error_body
from deltamem_vllm.server.scope import check_id, tenant_of_request
from deltamem_vllm.store.protocol import SessionKey


class SessionInfo(BaseModel):
    """A session as the API shows it."""

    id: str = Field(description="The session's id.")
    object: str = "session"
    version: int = Field(description="Counts the session's commits.")
    created_at: float = Field(description="Unix seconds.")
    updated_at: float = Field(description="Unix seconds.")
    tokens: int = Field(description="Tokens written to its memory.")
    windows: int = Field(description="Windows opened so far.")
    window_tokens: int = Field(description="Tokens of the present window.")
    state_bytes: int = Field(description="Size of its memory.")
    adapter: str = Field(description="Fingerprint of the adapter that wrote it.")
    durable: bool = Field(description="False while the store does not have the latest version.")
    lost: int = Field(
        default=0, description="Versions told `pending` or `degraded` that the store refused, since the server started."
    )
    busy: bool = Field(description="A request is writing to it right now.")


class SessionDeleted(BaseModel):
    """Receipt of a deletion."""

    id: str
    object: str = "session.deleted"
    deleted: bool = True


def make_router() -> APIRouter:
    """The session routes."""
    router = APIRouter(prefix="/v1/sessions", tags=["sessions"])

    @router.get("/{session_id}", response_model=SessionInfo)
    async def get_session(session_id: str, request: Request) -> Any:
        """What is known of a session; 404 where there is none."""
        try:
            gateway, key = _named(request, session_id)
            found = await gateway.client_of(key).ask("info", tenant=key.tenant, session=key.session)
            if found is None:
                raise _not_found(session_id)
        except DeltaMemError as e:
            return _error(e)
        return JSONResponse(SessionInfo(id=session_id, **found).model_dump(), headers={"ETag": f'"{found["version"]}"'})

    @router.delete("/{session_id}", response_model=SessionDeleted)
    async def delete_session(session_id: str, request: Request) -> Any:
        """Erase a session. A request that is running finishes and commits nothing."""
        try:
            gateway, key = _named(request, session_id)
            if not await gateway.delete(key):
                raise _not_found(session_id)
        except DeltaMemError as e:
            return _error(e)
        return SessionDeleted(id=session_id)

    return router


def _named(request: Request, session_id: str) -> tuple[Gateway, SessionKey]:
    """The session of the request's tenant that a path names. Another tenant's is one that does not exist."""
    gateway: Gateway = request.app.state.deltamem
    return gateway, SessionKey(tenant_of_request().name, check_id(session_id, "session_id"))


def _not_found(session_id: str) -> SessionError:
    return SessionError(f"session {session_id!r} not found", status=404, parameter="session_id")


def _error(error: DeltaMemError) -> Response:
    status, headers, body = error_body(error)
    return Response(body, status_code=status, headers=headers)
