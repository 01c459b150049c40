"""An engine that is stepped by hand, in one process with its core: what happens *between* two of its steps.

``vllm.LLM`` steps its engine in a process of its own, where a test can only guess how far it is. Everything else is the
same: vLLM's scheduler, model runner and detokenizer, the session service on its thread, the store on disk.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections.abc import Awaitable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from deltamem_vllm.server.tenants import DEFAULT_TENANT
from deltamem_vllm.sessions import scheduler as scheduler_module
from deltamem_vllm.sessions.grants import EXTRA
from deltamem_vllm.store.protocol import SessionKey
from tests.engine.asking import Ask

T = TypeVar("T")
PATIENCE = 30.0
IDLE_STEPS = 20
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
"""Environment variables of a `SessionLLM` whose engine core is to be in its own process."""


@dataclass(frozen=True)
class Aborted:
    """A request that was taken back.

    Attributes:
        tokens: sampled and seen by the client before; None where the request was complete, so that nothing was aborted.
        seconds: from the abort reaching the engine until its session was free.
        outcome: what became of its ticket.
        blocks: KV blocks that are in use afterwards.
    """

    tokens: int | None
    seconds: float
    outcome: dict[str, Any]
    blocks: int


class Stepped:
    """Steps the engine of a `SessionLLM` that was made with `IN_PROCESS`."""

    def __init__(self, session_llm: Any) -> None:
        self.engine = session_llm.llm.llm_engine
        self.core = self.engine.engine_core.engine_core
        self.service = self.core.scheduler.connector._service
        self._names = itertools.count(1)

    def turn(self, ask: Ask, params: Any) -> tuple[Any, dict[str, Any]]:
        """A whole request: vLLM's output and the outcome."""
        request, ticket = self._begin(ask, params, held=False)
        output = None
        while output is None or not output.finished:
            output = self._step(request) or output
        return output, self._outcome(ticket) if ticket else {}

    def abort(self, ask: Ask, params: Any, after: int) -> Aborted:
        """Begin a request and take it back after so many engine steps, as the gateway does when a client leaves."""
        request, ticket = self._begin(ask, params, held=bool(params.stop))
        tokens = 0
        for _ in range(after):
            output = self._step(request)
            if output is not None:
                tokens = len(output.outputs[0].token_ids)
                if output.finished:
                    return Aborted(None, 0.0, self._outcome(ticket), self._blocks_in_use())
        assert ask.session is not None
        session = self.service.directory.get(SessionKey(DEFAULT_TENANT, ask.session))
        assert session.owner == ticket, "the session was not the request's to begin with"
        begun = time.monotonic()
        self.engine.abort_request([request], internal=True)
        self._ask_soon(self._verdict(ticket, None))
        while session.owner is not None:
            self.engine.step()  # as the engine's busy loop would
            assert time.monotonic() - begun < PATIENCE, "the session of an aborted request is still taken"
        seconds = time.monotonic() - begun
        return Aborted(tokens, seconds, self._outcome(ticket), self._blocks_in_use())

    def run_on(self, ask: Ask, params: Any, kept: int | None) -> tuple[Any, dict[str, Any]]:
        """A request of which the engine hears how it has ended only once it has completed it; see `Engine.run_on`."""
        request, ticket = self._begin(ask, params, held=True)
        output = None
        while output is None or not output.finished:
            output = self._step(request) or output
        for _ in range(IDLE_STEPS):
            self.engine.step()  # as the engine's busy loop would
        assert ask.session is not None
        session = self.service.directory.get(SessionKey(DEFAULT_TENANT, ask.session))
        assert session.owner == ticket, "its end was not waited for"
        self._ask_soon(self._verdict(ticket, None if kept is None else len(ask.ids) + kept - 1))
        return output, self._outcome(ticket)

    @staticmethod
    def plant(bug: str) -> None:
        """PLANTED BUG ``commit-aborted``: an aborted request's memory is kept. ``none`` removes it."""
        from vllm.v1.request import RequestStatus

        complete = [s for s in scheduler_module._COMPLETE if s != RequestStatus.FINISHED_ABORTED]
        more = [RequestStatus.FINISHED_ABORTED] if bug == "commit-aborted" else []
        scheduler_module._COMPLETE = (*complete, *more)  # type: ignore[assignment]

    def _begin(self, ask: Ask, params: Any, held: bool) -> tuple[str, str]:
        ticket, prompt = "", {"prompt_token_ids": list(ask.ids)}
        if ask.session is not None:
            ticket = secrets.token_hex(16)
            key, ids = SessionKey(DEFAULT_TENANT, ask.session), np.asarray(ask.ids, np.int32)
            grant = self._ask_soon(self.service.admit(ticket, key, ask.mode, ids, None, held)).result(PATIENCE)
            params.extra_args = {EXTRA: {"ticket": ticket}}
            prompt["cache_salt"] = grant["salt"]
        name = f"stepped-{next(self._names)}"
        return self.engine.add_request(name, prompt, params), ticket

    def _step(self, request: str) -> Any:
        outputs = self.engine.step()
        return next((o for o in outputs if request.startswith(o.request_id)), None)

    async def _verdict(self, ticket: str, tokens: int | None) -> None:
        self.service.give_verdict(ticket, tokens)

    def _outcome(self, ticket: str) -> dict[str, Any]:
        asked, end = self._ask_soon(self.service.outcome(ticket)), time.monotonic() + PATIENCE
        while not asked.done():
            self.engine.step()
            assert time.monotonic() < end, "no outcome"
        while self.core.scheduler.has_requests():  # held blocks are freed in a step of their own
            self.engine.step()
        return dict(asked.result())

    def _blocks_in_use(self) -> int:
        pool = self.core.scheduler.kv_cache_manager.block_pool
        return int(pool.num_gpu_blocks - pool.get_num_free_blocks())

    def _ask_soon(self, question: Awaitable[T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(question, self.service._loop)  # type: ignore[arg-type]
