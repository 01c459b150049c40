"""A real session service, scheduler's half, worker's half and session pool, joined by hand without an engine.

What stands for the forward pass puts a *canary* into a request's page: a state in which every number names its session,
so that a foreign byte shows wherever it turns up.
"""

import asyncio
import itertools
import random
import secrets
from collections.abc import Awaitable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from vllm.v1.request import RequestStatus

from deltamem_vllm.memory.pages import StatePages, WriteMasks
from deltamem_vllm.ops.layout import MemoryShape
from deltamem_vllm.ops.paged_torch import TorchOps
from deltamem_vllm.sessions.grants import EXTRA
from deltamem_vllm.sessions.pool import SessionPool
from deltamem_vllm.sessions.scheduler import SchedulerSide
from deltamem_vllm.sessions.service import SessionService
from deltamem_vllm.sessions.steps import Step
from deltamem_vllm.sessions.worker import WorkerSide
from tests.sessions.harness import ids, key

T = TypeVar("T")
SHAPE = MemoryShape(rank=2, heads=1, rankwise_gates=True, couple_lambda=True, update_mode="standard", normalize_qk=True)
LAYERS, BLOCK = 2, 16
STATE = (LAYERS, 1, 2, 2)
SERIALS = 4096


def make_pool(slots: int, blocks: int, kind: type[SessionPool] = SessionPool) -> SessionPool:
    """A pool over pages of its own; every page is full of 7.0, as if somebody had used it before."""
    masks, kernels = WriteMasks(), TorchOps()
    config: Any = SimpleNamespace(
        cache_config=SimpleNamespace(block_size=BLOCK), compilation_config=SimpleNamespace(static_forward_context={})
    )
    layers = []
    for index in range(LAYERS):
        layer = StatePages(f"{index}.deltamem", index, SHAPE, kernels, masks, config)
        layer.bind_kv_cache(torch.full((blocks, 1, BLOCK, SHAPE.floats_per_token(BLOCK)), 7.0))
        layers.append(layer)
    return kind(layers, list(range(LAYERS)), slots, kernels)


def page_of(pool: SessionPool, block: int) -> torch.Tensor:
    """[layers, H, r, r]: the base of a block in every layer."""
    return torch.stack([layer.base_of(block) for layer in pool.layers])


def write_page(pool: SessionPool, block: int, state: torch.Tensor) -> None:
    """As if a forward pass had left this state after the block's first token."""
    for layer, values in zip(pool.layers, state, strict=True):
        assert layer.pages is not None
        layer.pages[block] = 0.0  # a log of zeros changes nothing
        layer.base_of(block).copy_(values)


def canary(session: int, serial: int) -> torch.Tensor:
    """[layers, H, r, r]: exact in fp32, different everywhere, and each number says whose it is."""
    places = torch.arange(torch.Size(STATE).numel(), dtype=torch.float32).view(STATE)
    return session + 1 + (serial % SERIALS * 16 + places) / (SERIALS * 16)


def whose(values: torch.Tensor) -> set[int]:
    """The sessions whose canaries are among these numbers; zeros are nobody's."""
    return {int(v) - 1 for v in values.flatten().tolist() if v != 0.0}


@dataclass
class Running:
    """A request that has started."""

    id: str
    session: int
    mode: str
    prompt: list[int]
    block: int
    ticket: str
    deleted: bool = False


@dataclass
class World:
    """Sessions of one engine that is stepped by hand.

    Args:
        service: must be started; its loop runs on another thread.
    """

    service: SessionService
    slots: int
    blocks: int = 12
    kind: type[SessionPool] = SessionPool
    running: list[Running] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pool = make_pool(self.slots, self.blocks, self.kind)
        self.worker = WorkerSide(None, None, list(range(LAYERS)))  # type: ignore[arg-type]
        self.worker._pool, self.worker._indices = self.pool, tuple(range(LAYERS))
        self.scheduler = SchedulerSide(self.service, 0, BLOCK, STATE, self.slots)
        self.free = list(range(self.blocks))
        self.refused: dict[str, str] = {}
        self._numbers, self._serials = itertools.count(), itertools.count(1)
        self._coming: list[tuple[Running, Any]] = []

    def ask(self, question: Awaitable[T]) -> T:
        """On the service's own loop."""
        return asyncio.run_coroutine_threadsafe(question, self.service._loop).result(30)  # type: ignore[arg-type]

    def begin(self, session: int, mode: str = "readwrite", prompt: list[int] | None = None) -> Running:
        """Admit a request; it starts with the next step. The session must not have a writer."""
        number = next(self._numbers)
        prompt = prompt if prompt is not None else [number, 1, 2]
        ticket = secrets.token_hex(16)
        self.ask(self.service.admit(ticket, key(f"{session}"), mode, ids(prompt), None, False))  # type: ignore[arg-type]
        made = Running(f"r{number}", session, mode, prompt, self.free.pop(), ticket)
        params = SimpleNamespace(extra_args={EXTRA: {"ticket": ticket}})
        self.scheduler.arrive(SimpleNamespace(request_id=made.id, sampling_params=params))  # type: ignore[arg-type]
        new = SimpleNamespace(req_id=made.id, block_ids=([made.block],), num_computed_tokens=0)
        self._coming.append((made, new))
        return made

    def finish(self, one: Running, how: RequestStatus = RequestStatus.FINISHED_LENGTH_CAPPED) -> None:
        """A request ends; a writer's page holds a new canary then."""
        if one.mode == "readwrite":
            write_page(self.pool, one.block, canary(one.session, next(self._serials)))
        request: Any = SimpleNamespace(
            request_id=one.id, status=how, all_token_ids=[*one.prompt, 3], num_tokens=len(one.prompt) + 1
        )
        self.scheduler.finish(request, [one.block])
        self.running.remove(one)
        self.free.insert(0, one.block)

    def step(self, tamper: Any = None) -> Step:
        """Plan, carry out, receive; requests that came since have started then."""
        new = [n for _, n in self._coming]
        output = SimpleNamespace(
            scheduled_new_reqs=new, scheduled_cached_reqs=SimpleNamespace(req_ids=[], resumed_req_ids=set())
        )
        step = self.scheduler.plan_step(output)
        if tamper is not None:
            tamper(step)
        self.worker.carry_out(step)
        answer = self.worker.take_answer()
        self.worker.take_done()
        self.running += [r for r, _ in self._coming]
        self._coming = []
        if answer is not None:
            self.refused |= answer.errors
            self.scheduler.receive(answer)
        return step

    def delete(self, session: int) -> None:
        self.ask(self.service.delete(key(f"{session}")))
        for one in [*self.running, *(r for r, _ in self._coming)]:
            one.deleted |= one.session == session

    def check(self) -> None:
        """No slot and no page shows a foreign session's number, and what is free is zero."""
        table = self.scheduler._slots
        pending = {place.slot for place in self.scheduler._step.zero}
        alive = {one.id: one.session for one in self.running}
        for name, slot in table._slots.items():
            owners = {alive[o] if isinstance(o, str) else int(o.session) for o in table._owners[name]}  # type: ignore[attr-defined]
            assert whose(self.pool.states[slot]) <= owners, f"slot {slot} of {owners} shows {self.pool.states[slot]}"
        for slot in set(table._free) - pending:
            assert not self.pool.states[slot].any(), f"free slot {slot} shows {self.pool.states[slot]}"
        for one in self.running:
            if one.id not in self.refused:
                shown = whose(page_of(self.pool, one.block))
                assert shown <= {one.session}, f"the page of a request of {one.session} shows {shown}"


def wander(world: World, operations: int, seed: int, sessions: int = 6, tamper: Any = None) -> int:
    """Random requests, ends, deletions and steps; checks after each step. Returns the steps taken."""
    rng = random.Random(seed)
    steps = 0
    prompts: dict[int, list[int]] = {}
    for _ in range(operations):
        session = rng.randrange(sessions)
        busy = {r.session for r in [*world.running, *(r for r, _ in world._coming)] if r.mode == "readwrite"}
        match rng.choices(["begin", "read", "finish", "abort", "delete", "step"], [5, 2, 5, 1, 1, 5])[0]:
            case "begin" if session not in busy and world.free:
                again = prompts.get(session) if rng.random() < 0.3 else None  # a retry runs from an older state
                prompts[session] = world.begin(session, prompt=again).prompt
            case "read" if world.free:
                world.begin(session, "read")
            case "finish" if world.running:
                one = rng.choice(world.running)
                world.finish(one)
                world.step(tamper)
                if one.mode == "readwrite":
                    world.ask(world.service.outcome(one.ticket))
                world.check()
            case "abort" if world.running:
                world.finish(rng.choice(world.running), RequestStatus.FINISHED_ABORTED)
            case "delete":
                world.delete(session)
                prompts.pop(session, None)
            case "step":
                world.step(tamper)
                world.check()
                steps += 1
    return steps
