"""The scheduler's half of the connector: what each request starts from, and what becomes of it.

Everything here runs on the engine's scheduling thread: no store, no socket, no hashing of prompts. Those are the
session service's work; it is asked and told without waiting.
"""

import logging
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from vllm.v1.request import Request, RequestStatus

from deltamem_vllm import metrics
from deltamem_vllm.ops.paged import WRITE_ALL, WRITE_OFF
from deltamem_vllm.sessions.grants import EXTRA, ZERO, Grant, state_digest
from deltamem_vllm.sessions.marks import Marks
from deltamem_vllm.sessions.meters import Sample, gauge
from deltamem_vllm.sessions.service import VERDICT_SECONDS, SessionService
from deltamem_vllm.sessions.slots import SlotTable
from deltamem_vllm.sessions.steps import Answer, Commit, Seed, Step
from deltamem_vllm.sessions.tickets import count_tokens

logger = logging.getLogger("vllm.deltamem")

_COMPLETE = (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED, RequestStatus.FINISHED_REPETITION)


@dataclass
class Held:
    """A finished request whose blocks we keep until its state is taken, or it is clear that it will not be."""

    grant: Grant
    tokens: list[int]  # all of its tokens, sampled ones included
    blocks: list[int]
    deadline: float = 0.0


@dataclass
class Parts:
    """A session state arriving from the pipeline stages."""

    fed: list[int]
    grant: Grant
    state: np.ndarray
    missing: set[int] = field(default_factory=set)


class SchedulerSide:
    """Follows requests through the scheduler.

    Args:
        service: this engine's session service.
        group: index of the KV-cache group that holds the state pages.
        block_size: tokens per block of the block manager.
        state_shape: [layers, H, r, r] of a session.
        slots: size of the session pool.
    """

    def __init__(
        self, service: SessionService, group: int, block_size: int, state_shape: tuple[int, ...], slots: int
    ) -> None:
        self._service, self.group = service, group
        self._block_size, self._state_shape = block_size, state_shape
        self._slots = SlotTable(slots)
        self._grants: dict[str, Grant] = {}
        self._off: set[str] = set()
        self._marks = Marks(block_size)
        self._step = Step()
        self._held: dict[str, Held] = {}
        self._taking: dict[str, Parts] = {}
        self.stale_orders = 0
        """Orders that a worker refused because they named a slot of another generation: 0, or a bug was contained."""
        self._begun: set[str] = set()  # requests whose prompts were counted
        self._meters = service.meters
        service.watched.append(self._gauges)

    # ------------------------------------------------------------------ a request comes

    def arrive(self, request: Request) -> None:
        """Find out what an arriving request was granted."""
        params = request.sampling_params
        ours = (params.extra_args or {}).get(EXTRA) if params is not None else None
        if not isinstance(ours, dict):
            self._meters.add(metrics.REQUESTS, "none")
            return
        if ours.get("mode") == "off":
            self._off.add(request.request_id)
            self._meters.add(metrics.REQUESTS, "off")
            return
        grant = self._service.claim(ours.get("ticket", ""))
        if grant is not None:
            self._grants[request.request_id] = grant
            self._meters.add(metrics.REQUESTS, grant.mode)
            self._marks.follow(request.request_id, grant.spans)
            return
        # Too late: run it without memory, under a salt of its own, and commit nothing.
        logger.warning("request %s came with a session ticket that has expired", request.request_id)
        self._off.add(request.request_id)
        request.cache_salt = f"expired-{uuid.uuid4().hex}"
        request.block_hashes.clear()
        request.update_block_hashes()

    def plan_step(self, output: Any) -> Step:
        """The orders that go with one scheduler output: seeds for everything that starts or starts again.

        Workers carry out commits, zeroing and seeds in this order, so slots are given out in the same order.
        """
        if self._held:
            self._hear_verdicts()
        while self._service.erased:
            self._step.zero += self._slots.release(self._service.erased.popleft())
        for new in output.scheduled_new_reqs:  # V2's model runner lists resumed requests here too
            self._count_prompt(new.req_id, new.num_computed_tokens)
            self._seed(new.req_id, new.block_ids[self.group], new.num_computed_tokens)
            self._step.marks += self._marks.given(new.req_id, new.block_ids[self.group], anew=True)
        cached = output.scheduled_cached_reqs
        for i, request in enumerate(cached.req_ids if cached.resumed_req_ids or self._marks.any else ()):
            if cached.new_block_ids[i] is None:
                continue
            blocks, resumed = cached.new_block_ids[i][self.group], request in cached.resumed_req_ids
            if resumed:
                self._seed(request, blocks, cached.num_computed_tokens[i])
            self._step.marks += self._marks.given(request, blocks, anew=resumed)
        step, self._step = self._step, Step()
        return step

    def _seed(self, request: str, blocks: list[int], computed: int) -> None:
        if not blocks:
            return
        try:
            self._step.seeds.append(self._plan_seed(request, blocks, computed))
        except Exception as e:  # without an order it would run on whatever its first block held before
            logger.exception("a request could not be given its memory")
            self._step.seeds.append(Seed(request, blocks[0], WRITE_OFF, write_base=False))
            self._unseeded(request, f"{type(e).__name__}: {e}")

    def _plan_seed(self, request: str, blocks: list[int], computed: int) -> Seed:
        grant = self._grants.get(request)
        seed = Seed(request, blocks[0], WRITE_ALL, write_base=computed == 0)
        if grant is not None:
            seed.limit = grant.write_limit
            source = "cached" if computed else "empty" if grant.base is None else "device"
            if source == "device" and grant.base is not None:
                # A deleted session's running request may need its state once more, but only as long as it runs.
                owner = request if self._service.was_deleted(grant.ticket) else grant.key
                seed.place = self._slots.find(grant.base_digest, owner)
                if seed.place is None:
                    seed.place, seed.fill = self._slots.take(grant.base_digest, owner), grant.base.tobytes()
                    source = "host"
            self._meters.add(metrics.SEEDS, source)
        elif request in self._off:
            seed.limit, seed.write_base = WRITE_OFF, False
        return seed

    def _count_prompt(self, request: str, computed: int) -> None:
        """A request begins to run; one that was preempted and begins again is not counted again."""
        grant = self._grants.get(request)
        if grant is not None and request not in self._begun:
            self._begun.add(request)
            self._meters.add(metrics.SESSION_PROMPT_TOKENS, by=grant.prompt_tokens)
            self._meters.add(metrics.SESSION_CACHED_TOKENS, by=computed)

    def _gauges(self) -> list[Sample]:
        """For scrapes; called from another thread, and reads whole numbers only."""
        used = len(self._slots)
        return [
            gauge(metrics.SESSIONS, self._slots.owners, "device"),
            gauge(metrics.SESSION_SLOTS, used, "used"),
            gauge(metrics.SESSION_SLOTS, self._slots.size - used, "free"),
            gauge(metrics.EVICTIONS, self._slots.evictions, "device"),
            gauge(metrics.ORDERS_REFUSED, self.stale_orders),
        ]

    def _unseeded(self, request: str, why: str) -> None:
        """A request runs without its memory: it commits nothing, and no other may take its blocks for good."""
        self._service.distrust_cached_blocks()
        if (grant := self._grants.pop(request, None)) is not None:
            self._free(grant.base_digest)
            self._service.end(grant.ticket, "failed", why)

    # ------------------------------------------------------------------ a request ends

    def finish(self, request: Request, blocks: list[int]) -> bool:
        """A request ended. True if its blocks must be kept until its state has been taken."""
        self._off.discard(request.request_id)
        self._begun.discard(request.request_id)
        self._marks.leave(request.request_id)
        self._step.zero += self._slots.release(request.request_id)
        grant = self._grants.pop(request.request_id, None)
        if grant is None:
            return False
        if not grant.commits:
            count_tokens(self._meters, grant, request.num_tokens - 1)
            self._service.end(grant.ticket, "unchanged")
            return False
        held = Held(grant, list(request.all_token_ids), list(blocks), time.monotonic() + VERDICT_SECONDS)
        complete = request.status in _COMPLETE
        if grant.held_for_verdict and blocks and (complete or request.status == RequestStatus.FINISHED_ABORTED):
            self._held[request.request_id] = held
            return True
        if complete:
            # The last sampled token has not been fed. Exact even where the device has already run past it.
            return self._take(request.request_id, held, request.num_tokens - 1)
        self._service.end(grant.ticket, "aborted")
        return False

    def _take(self, request: str, held: Held, fed: int) -> bool:
        if fed < held.grant.prompt_tokens or (fed - 1) // self._block_size >= len(held.blocks):
            why = f"{fed} tokens fed, of a prompt of {held.grant.prompt_tokens}"
            self._service.end(held.grant.ticket, "failed", why)
            return False
        if self._service.was_deleted(held.grant.ticket):  # no slot shall hold its state again
            self._service.end(held.grant.ticket, "conflict", "the session was deleted while the request ran")
            return False
        block = held.blocks[(fed - 1) // self._block_size]
        count = (fed - 1) % self._block_size + 1
        self._step.commits.append(Commit(request, block, count, self._slots.take(request, held.grant.key)))
        layers = set(range(self._state_shape[0]))
        self._taking[request] = Parts(held.tokens[:fed], held.grant, np.empty(self._state_shape, np.float32), layers)
        return True

    def _hear_verdicts(self) -> None:
        """Requests with stop strings: commit where the answer ended, or nothing where the client has none."""
        for request, held in list(self._held.items()):
            given, fed = self._service.verdict(held.grant.ticket)
            if not given and time.monotonic() < held.deadline:
                continue
            del self._held[request]
            if fed is None or not self._take(request, held, min(fed, len(held.tokens) - 1)):
                if fed is None:
                    self._service.end(held.grant.ticket, "aborted")
                self._step.release.append(request)

    def receive(self, answer: Answer) -> None:
        """States that workers took, and what went wrong."""
        self.stale_orders += len(answer.stale)
        self._meters.add(metrics.HOOK_ERRORS, by=answer.hook_errors)
        if answer.sample.gates or answer.sample.outputs:
            self._service.note_sample(answer.sample)
        for request, message in answer.errors.items():
            parts = self._taking.pop(request, None)
            if parts is not None:
                self._free(request)
                self._service.end(parts.grant.ticket, "failed", message)
                continue
            self._unseeded(request, message)
        for request, pieces in answer.states.items():
            parts = self._taking.get(request)
            if parts is None:
                continue
            for layers, payload in pieces:
                piece = np.frombuffer(payload, np.float32).reshape(len(layers), *self._state_shape[1:])
                parts.state[list(layers)] = piece
                parts.missing.difference_update(layers)
            if not parts.missing:
                del self._taking[request]
                digest = state_digest(parts.state if parts.state.any() else None)
                if digest == ZERO:
                    self._free(request)
                elif (doubled := self._slots.rename(request, digest)) is not None:
                    self._step.zero.append(doubled)
                self._service.commit(parts.grant.ticket, parts.fed, parts.state)

    def _free(self, name: str) -> None:
        if (place := self._slots.drop(name)) is not None:
            self._step.zero.append(place)

    @property
    def busy(self) -> bool:
        """Orders wait for a step that may not come by itself."""
        step = self._step
        return bool(step.commits or step.zero or step.release or self._held or self._service.erased)
