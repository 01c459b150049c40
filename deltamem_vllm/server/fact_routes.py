"""Routes for a session's pinned facts, under ``/v1/sessions/{session_id}/facts``."""

import re
import secrets
from typing import Annotated, Any

from fastapi import APIRouter, Header, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from deltamem_vllm.errors import DeltaMemError, SessionError
from deltamem_vllm.server.gateway import Gateway
from deltamem_vllm.server.middleware import error_body
from deltamem_vllm.server.scope import check_id, tenant_of_request
from deltamem_vllm.store.protocol import SessionKey

IfMatch = Annotated[str | None, Header(alias="If-Match", description='`"VERSION"`: only if the session is at it.')]
_MATCH = re.compile(r'(?:W/)?"(\d{1,18})"')


class Fact(BaseModel):
    """A pinned fact."""

    id: str = Field(description="Names it within the session.", examples=["fact-0a1b2c3d4e5f6071"])
    object: str = "session.fact"
    text: str = Field(description="Kept word for word.", examples=["My name is Clara."])
    source: str = Field(description="Where it came from, in the client's words; `message` for a flagged message.")
    created_at: float = Field(description="Unix seconds.")
    expires_at: float | None = Field(description="Unix seconds; null: it stays.")


class Facts(BaseModel):
    """The facts of a session, oldest first."""

    object: str = "list"
    data: list[Fact]
    version: int = Field(description="The session's version.")


class NewFact(BaseModel):
    """A fact to pin. One whose text is pinned already keeps its id, and takes the new source and ttl."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"text": "My name is Clara."}]})

    text: str = Field(description="1 to 2,000 characters.")
    source: str = Field(default="", description="Up to 200 characters.")
    ttl: float | None = Field(default=None, description="Seconds that it stays; null: for good.")


class FactPinned(Fact):
    """A fact that is pinned."""

    version: int = Field(description="The session's version with it.")


class FactDeleted(BaseModel):
    """Receipt of a deletion."""

    id: str
    object: str = "session.fact.deleted"
    deleted: bool = True
    version: int = Field(description="The session's first version without it.")
    erased_at_version: int = Field(
        description="With this version no kept older version holds it any more; deleting the session erases at once."
    )


def make_fact_router() -> APIRouter:
    """The fact routes."""
    router = APIRouter(prefix="/v1/sessions/{session_id}/facts", tags=["sessions"])

    @router.get("", response_model=Facts)
    async def list_facts(session_id: str, request: Request) -> Any:
        """The session's pinned facts; 404 where there is no session."""
        try:
            found = await _ask(request, session_id, "facts")
        except DeltaMemError as e:
            return _error(e)
        return _answer(Facts(data=[Fact(**fact) for fact in found["facts"]], version=found["version"]))

    @router.post("", response_model=FactPinned)
    async def pin_fact(session_id: str, fact: NewFact, request: Request, if_match: IfMatch = None) -> Any:
        """Pin a fact. 429: the session has 200 facts, or 32 KiB of them."""
        try:
            pins = [(fact.text, fact.source, fact.ttl)]
            found = await _change(request, session_id, "pin", if_match, pins=pins)
        except DeltaMemError as e:
            return _error(e)
        return _answer(FactPinned(**found["facts"][0], version=found["version"]))

    @router.delete("/{fact_id}", response_model=FactDeleted)
    async def delete_fact(session_id: str, fact_id: str, request: Request, if_match: IfMatch = None) -> Any:
        """Erase a fact; no prompt is offered it from now on."""
        try:
            found = await _change(request, session_id, "unpin", if_match, fact=fact_id[:64])
        except DeltaMemError as e:
            return _error(e)
        return _answer(FactDeleted(id=fact_id, version=found["version"], erased_at_version=found["until"]))

    return router


async def _change(request: Request, session_id: str, do: str, if_match: str | None, **question: Any) -> Any:
    match = versions(if_match)
    return await _ask(request, session_id, do, request=f"fact-{secrets.token_hex(16)}", match=match, **question)


async def _ask(http: Request, session_id: str, do: str, **question: Any) -> Any:
    gateway: Gateway = http.app.state.deltamem
    key = SessionKey(tenant_of_request().name, check_id(session_id, "session_id"))
    return await gateway.ask(key, do, **question)


def versions(if_match: str | None) -> list[int] | None:
    """The versions that an ``If-Match`` names; none where any will do.

    Raises:
        SessionError: 400; it is no list of versions.
    """
    if if_match is None:
        return None
    if if_match.strip() == "*":
        return []
    found = [_MATCH.fullmatch(tag.strip()) for tag in if_match.split(",")]
    if not all(found):
        raise SessionError(
            f'invalid If-Match {if_match[:64]!r}: send the ETag of the session, as "3"', parameter="If-Match"
        )
    return [int(tag[1]) for tag in found if tag]


def _answer(model: Facts | FactPinned | FactDeleted) -> Response:
    return JSONResponse(model.model_dump(), headers={"ETag": f'"{model.version}"'})


def _error(error: DeltaMemError) -> Response:
    status, headers, body = error_body(error)
    return Response(body, status_code=status, headers=headers)
