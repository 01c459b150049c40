"""Routes for a session's pinned facts, under ``/v1/sessions/{session_id}/facts``."""

from typing import Annotated, Any

from fastapi import APIRouter, Path, Request, Response

from deltamem_vllm.server.models import Fact, FactDeleted, FactPinned, Facts, NewFact
from deltamem_vllm.server.routing import Id, Idempotency, Match, Route, ask, changing, named, refusals

FactId = Annotated[str, Path(description="The fact's id.", json_schema_extra={"pattern": r"^[!-~]{1,64}$"})]


def make_fact_router() -> APIRouter:
    """The fact routes."""
    router = APIRouter(prefix="/v1/sessions/{session_id}/facts", tags=["sessions"], route_class=Route)

    @router.get("", response_model=Facts, responses=refusals(400, 404, 422, 503))
    async def list_facts(session_id: Id, request: Request, response: Response) -> Any:
        """The session's pinned facts."""
        found = await ask(request, session_id, "facts")
        response.headers["ETag"] = f'"{found["version"]}"'
        return Facts(data=[Fact(**fact) for fact in found["facts"]], version=found["version"])

    @router.post("", response_model=FactPinned, responses=refusals(400, 404, 409, 412, 413, 422, 429, 503))
    async def pin_fact(
        session_id: Id, fact: NewFact, request: Request, response: Response, match: Match, idempotency: Idempotency
    ) -> Any:
        """Pin a fact. 429: the session has 200 facts, or 32 KiB of them."""
        name, _ = named("pin", idempotency, fact.model_dump_json())
        pins = [(fact.text, fact.source, fact.ttl)]
        found = await changing(request, response, session_id, "pin", name=name, pins=pins, if_match=match)
        return FactPinned(**found["facts"][0], version=found["version"])

    @router.delete("/{fact_id}", response_model=FactDeleted, responses=refusals(400, 404, 409, 412, 422, 429, 503))
    async def delete_fact(session_id: Id, fact_id: FactId, request: Request, response: Response, match: Match) -> Any:
        """Erase a fact; no prompt is offered it from now on."""
        name, _ = named("unpin", None, "")
        found = await changing(request, response, session_id, "unpin", name=name, fact=fact_id, if_match=match)
        return FactDeleted(id=fact_id, version=found["version"], erased_at_version=found["until"])

    return router
