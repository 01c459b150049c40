"""Bugs planted on purpose in a server, each in the sessions whose id begins with its name.

So one server shows for every bug that the comparisons see it, and in its other sessions that nothing else is wrong.

* ``always-new``: every prompt opens a new window, so that what is resent is written again.
* ``only-the-end``: of a window's boundaries only the last is looked at.
* ``by-count``: a boundary matches by its count, whatever the tokens before it are.
* ``commit-aborted``: a request is committed although its client has left.
* ``cut-early``: an answer that a stop string may end is committed one token short.
* ``runs-on``: of an answer that a stop string has ended, what the engine completed before it heard of it is committed.
* ``reads-commit``: a request that may only read commits.
* ``no-turns``: requests of one session do not wait for each other.
"""

from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any

from msgspec.structs import replace

from tests.engine.after_import import after_import
from tests.server.late import aborts_come_late

_planning: ContextVar[str] = ContextVar("planning", default="")


def _bug(session: str) -> str:
    return session.partition(".")[0]


def _plant_service(service: Any) -> None:
    windows, Service = service.windows, service.SessionService
    plan, grant = windows.plan, Service._grant

    async def planted_grant(self: Any, session: Any, ticket: str, mode: str, *rest: Any) -> Any:
        bug = _bug(session.key.session)
        token = _planning.set(bug)
        try:
            return await grant(self, session, ticket, "readwrite" if bug == "reads-commit" else mode, *rest)
        finally:
            _planning.reset(token)

    def planted_plan(window: Any, tokens: Any) -> Any:
        bug = _planning.get()
        found = plan(window, tokens)
        if bug == "always-new" or (bug == "only-the-end" and found.kind == "replace"):
            return windows.NEW
        if bug == "by-count" and window is not None:
            counts = [b.count for b in window.boundaries if b.count <= len(tokens)]
            if counts:
                digests = windows.prefix_digests(tokens, counts)  # as if they had matched: a later check would see it
                keep = tuple(windows.Boundary(*each) for each in zip(counts, digests, strict=True))
                return windows.Plan("extend" if counts[-1] == window.end.count else "replace", keep, counts[-1])
        return found

    windows.plan, Service._grant = planted_plan, planted_grant


def _plant_directory(directory: Any) -> None:
    owned = directory.Directory.owned

    @asynccontextmanager
    async def planted_owned(self: Any, session: Any, *rest: Any) -> Any:
        if _bug(session.key.session) == "no-turns":
            yield
            return
        async with owned(self, session, *rest):
            yield

    directory.Directory.owned = planted_owned


def _plant_scheduler(scheduler: Any) -> None:
    Side, Status = scheduler.SchedulerSide, scheduler.RequestStatus
    finish, take = Side.finish, Side._take

    def planted_finish(self: Any, request: Any, blocks: list[int]) -> bool:
        grant, status = self._grants.get(request.request_id), request.status
        planted = grant is not None and _bug(grant.key.session) == "commit-aborted"
        if planted and status == Status.FINISHED_ABORTED and request.num_output_tokens > 0:
            request.status = Status.FINISHED_LENGTH_CAPPED
        if grant is not None and _bug(grant.key.session) == "runs-on":
            self._grants[request.request_id] = replace(grant, held_for_verdict=False)
        try:
            return bool(finish(self, request, blocks))
        finally:
            request.status = status

    def planted_take(self: Any, request: str, held: Any, fed: int) -> bool:
        early = held.grant.held_for_verdict and _bug(held.grant.key.session) == "cut-early"
        return bool(take(self, request, held, fed - 1 if early else fed))

    Side.finish, Side._take = planted_finish, planted_take


aborts_come_late()
after_import("deltamem_vllm.sessions.directory", _plant_directory)
after_import("deltamem_vllm.sessions.service", _plant_service)
after_import("deltamem_vllm.sessions.scheduler", _plant_scheduler)
