"""The session pool on real tensors: never another session's byte, nothing left behind, many orders in one go."""

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from vllm.v1.request import RequestStatus

from deltamem_vllm.ops.paged import WRITE_ALL, WRITE_OFF
from deltamem_vllm.sessions import worker as worker_module
from deltamem_vllm.sessions.pool import SessionPool, StaleOrder
from deltamem_vllm.sessions.service import SessionService
from deltamem_vllm.sessions.slots import Place
from deltamem_vllm.sessions.steps import Answer, Commit, Seed, Step
from tests.conftest import NIGHTLY
from tests.sessions.harness import make_service
from tests.sessions.pooling import STATE, World, canary, make_pool, page_of, wander, whose, write_page

OPERATIONS = 100_000 if NIGHTLY else 5_000


@pytest.fixture(autouse=True)
def _one_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "get_tensor_model_parallel_rank", lambda: 0)


@contextmanager
def started(slots: int, kind: type[SessionPool] = SessionPool) -> Iterator[World]:
    """A world over a service that runs."""
    service = make_service(state_shape=STATE, layout="L2H1r2")
    running: Future[None] = Future()

    async def serve(_: SessionService) -> None:
        running.set_result(None)
        await asyncio.Event().wait()

    service.start(serve)
    running.result(30)
    try:
        yield World(service, slots, kind=kind)
    finally:
        service.close()


def filled(block: int, slot: int, generation: int, state: torch.Tensor) -> Seed:
    return Seed("r", block, WRITE_ALL, True, Place(slot, generation), state.numpy().tobytes())


# --- canaries ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 3, 8])
@pytest.mark.timeout(1800)
def test_no_slot_and_no_page_shows_another_session(slots: int) -> None:
    with started(slots) as world:
        assert wander(world, OPERATIONS, seed=slots) > OPERATIONS / 20
        assert world.scheduler.stale_orders == 0
        assert world.refused == {}


@pytest.mark.timeout(1800)
def test_orders_for_the_wrong_slot_are_refused_and_harm_only_their_request() -> None:
    with started(3) as world:
        wander(world, OPERATIONS, seed=7, tamper=_point_elsewhere)
        assert world.scheduler.stale_orders > 0
        assert all(message.startswith("StaleOrder") for message in world.refused.values())


class NeverZeroes(SessionPool):
    """PLANTED BUG: what is freed keeps its bytes."""

    def zero(self, places: Any) -> None:
        return


class NeverChecks(SessionPool):
    """PLANTED BUG: follows orders whose slot has changed hands."""

    def _check_new(self, place: Any, newest: Any) -> None:
        return

    @staticmethod
    def _check_same(place: Any, have: int) -> None:
        return


class WrongSlot(SessionPool):
    """PLANTED BUG: reads the slot beside the right one."""

    def _seed(self, seeds: Any) -> list[None]:
        self.states = self.states.roll(1, 0)
        try:
            return super()._seed(seeds)
        finally:
            self.states = self.states.roll(-1, 0)


class FillsTooEarly(SessionPool):
    """PLANTED BUG: fills slots before it has read what earlier orders of the step want from them."""

    def _seed(self, seeds: Any) -> list[None]:
        for seed in seeds:
            if seed.fill is not None:
                self.states[seed.place.slot] = self._local(seed.fill)
        return super()._seed(seeds)


def _point_elsewhere(step: Step) -> None:
    """PLANTED BUG in the scheduler's half: every third order names its neighbour's slot, or an old generation."""
    for seed in step.seeds:
        if seed.place is not None and seed.fill is None:
            if seed.place.generation % 3 == 0:
                seed.place = Place((seed.place.slot + 1) % 3, seed.place.generation)
            elif seed.place.generation % 3 == 1:
                seed.place = Place(seed.place.slot, seed.place.generation - 1)


@pytest.mark.parametrize(
    ("kind", "slots", "tamper"),
    [
        (NeverZeroes, 8, None),
        (NeverChecks, 3, _point_elsewhere),
        (WrongSlot, 3, None),
        (FillsTooEarly, 3, None),
    ],
)
def test_the_canaries_catch_planted_bugs(kind: type[SessionPool], slots: int, tamper: Callable[..., None]) -> None:
    with started(slots, kind) as world, pytest.raises(AssertionError, match="shows"):
        wander(world, 5000, seed=1, tamper=tamper)


# --- deletion ---------------------------------------------------------------------------------------------------------


def grown(world: World, session: int, turns: int) -> None:
    """A session with so many versions, each of which lies in a slot."""
    for _ in range(turns):
        one = world.begin(session)
        world.step()
        world.finish(one)
        world.step()
        world.ask(world.service.outcome(one.ticket))


def test_a_deletion_zeroes_every_version_and_nothing_else() -> None:
    with started(16) as world:
        grown(world, 0, 4)
        grown(world, 1, 3)
        assert [whose(s) for s in world.pool.states].count({0}) == 4, "older versions lie there too"
        world.delete(0)
        assert world.scheduler.busy, "an idle engine must know that zeroing waits"
        world.step()
        assert [whose(s) for s in world.pool.states].count({0}) == 0
        assert [whose(s) for s in world.pool.states].count({1}) == 3
        world.check()
        assert not world.scheduler.busy


@pytest.mark.parametrize("before_its_first_step", [True, False])
def test_a_request_of_a_deleted_session_leaves_nothing(before_its_first_step: bool) -> None:
    """It goes on with the memory it started from, which may even be filled in again; at its end nothing is left."""
    with started(4) as world:
        grown(world, 0, 2)
        one = world.begin(0)
        if not before_its_first_step:
            world.step()
        world.delete(0)
        world.step()
        assert whose(page_of(world.pool, one.block)) == {0}, "it runs from the memory it was granted"
        world.check()
        world.finish(one)
        world.step()
        assert world.ask(world.service.outcome(one.ticket))["status"] == "conflict"
        assert not world.pool.states.any()
        world.step()
        assert not world.scheduler.busy


def test_a_deletion_between_the_end_and_the_commit_leaves_nothing() -> None:
    with started(4) as world:
        grown(world, 0, 1)
        one = world.begin(0)
        world.step()
        world.finish(one)
        world.delete(0)
        world.step()
        world.step()
        assert world.ask(world.service.outcome(one.ticket))["status"] == "conflict"
        assert not world.pool.states.any()


def test_another_servers_deletion_is_noticed_and_zeroed() -> None:
    with started(4) as world:
        grown(world, 0, 2)
        world.service.store.delete(next(iter(world.service.directory._sessions)))
        one = world.begin(0)
        world.step()
        assert not whose(page_of(world.pool, one.block)), "it starts from the empty memory"
        assert not world.pool.states.any()
        world.finish(one, RequestStatus.FINISHED_ABORTED)


# --- orders -----------------------------------------------------------------------------------------------------------


def test_orders_of_one_step_follow_each_other() -> None:
    """One slot, three sessions in one step: each page gets its own, the slot keeps the last."""
    pool = make_pool(1, 8)
    states = [canary(i, i) for i in range(3)]
    seeds = [filled(i, 0, i + 1, state) for i, state in enumerate(states)]
    seeds.insert(2, Seed("r", 5, 9, True, Place(0, 2)))  # the second state once more, while it is there
    assert pool.seed(seeds) == [None] * 4
    for i, state in enumerate(states):
        assert torch.equal(page_of(pool, i), state)
    assert torch.equal(page_of(pool, 5), states[1])
    assert torch.equal(pool.states[0], states[2])
    assert pool.layers[0].masks.limits[:6].tolist() == [WRITE_ALL] * 5 + [9]
    for block in (3, 4, 6, 7):
        assert bool((page_of(pool, block) == 7.0).all()), "a page that was not seeded was touched"
    [later] = pool.seed([Seed("r", 3, WRITE_ALL, True, Place(0, 2))])
    assert isinstance(later, StaleOrder)


def test_takes_of_one_step() -> None:
    pool = make_pool(2, 8)
    states = [canary(i, 3) for i in range(3)]
    for i, state in enumerate(states):
        write_page(pool, i, state)
    orders = [Commit(f"{i}", i, 4, Place(i % 2, i + 1)) for i in range(3)]
    assert pool.take(orders) == [state.numpy().tobytes() for state in states]
    assert torch.equal(pool.states[0], states[2])
    assert torch.equal(pool.states[1], states[1])
    assert pool.generations == [3, 2]


def test_batched_copies_are_the_single_ones() -> None:
    torch.manual_seed(3)
    one, many = make_pool(4, 40), make_pool(4, 40)
    for a, b in zip(one.layers, many.layers, strict=True):
        assert a.pages is not None
        assert b.pages is not None
        a.pages.copy_(torch.rand_like(a.pages))
        b.pages.copy_(a.pages)
    commits = [Commit(f"{i}", i, i % 16 + 1, Place(i % 4, i + 1)) for i in range(32)]
    assert many.take(commits) == [taken for c in commits for taken in one.take([c])]
    assert torch.equal(one.states, many.states)
    seeds = [Seed(f"{i}", i, i, i % 3 > 0, Place(28 % 4 + i % 4, 29 + i % 4)) for i in range(32)]
    assert many.seed(seeds) == [error for s in seeds for error in one.seed([s])] == [None] * 32
    for a, b in zip(one.layers, many.layers, strict=True):
        assert torch.equal(a.pages, b.pages)  # type: ignore[arg-type]


def test_a_wrong_order_harms_only_itself() -> None:
    pool = make_pool(4, 8)
    good = [canary(i, 1) for i in range(3)]
    for i, state in enumerate(good):
        write_page(pool, i, state)
    commits = [
        Commit("a", 0, 1, Place(0, 1)),
        Commit("no such block", 99, 1, Place(1, 2)),
        Commit("no such slot", 1, 1, Place(4, 3)),
        Commit("b", 1, 1, Place(2, 4)),
        Commit("stale", 2, 1, Place(2, 3)),
    ]
    taken = pool.take(commits)
    assert [type(t) for t in taken] == [bytes, ValueError, ValueError, bytes, StaleOrder]
    assert (taken[0], taken[3]) == (good[0].numpy().tobytes(), good[1].numpy().tobytes())
    assert not pool.states[[1, 3]].any()
    errors = pool.seed(
        [
            Seed("a", 4, WRITE_ALL, True, Place(0, 1)),
            Seed("stale", 5, WRITE_ALL, True, Place(0, 9)),
            Seed("no such block", -1, WRITE_ALL, True, None),
            Seed("short", 6, WRITE_ALL, True, Place(3, 9), b"12345678"),
            filled(7, 3, 10, good[2]),
        ]
    )
    assert [type(e) for e in errors] == [type(None), StaleOrder, ValueError, RuntimeError, type(None)]
    assert torch.equal(page_of(pool, 4), good[0])
    assert torch.equal(page_of(pool, 7), good[2])
    assert bool((page_of(pool, 5) == 7.0).all())


def test_a_refused_order_switches_the_memory_off_and_is_counted() -> None:
    with started(2) as world:
        grown(world, 0, 1)
        one = world.begin(0)
        other = world.begin(1)

        def stale(step: Step) -> None:
            for seed in step.seeds:
                if seed.place is not None:
                    seed.place, seed.fill = Place(seed.place.slot, seed.place.generation + 5), None

        world.step(stale)
        assert world.scheduler.stale_orders == 1
        assert list(world.refused) == [one.id]
        assert world.pool.layers[0].masks.limits[one.block] == WRITE_OFF
        assert world.pool.layers[0].masks.limits[other.block] == WRITE_ALL
        outcome = world.ask(world.service.outcome(one.ticket))
        assert (outcome["status"], outcome["version"]) == ("failed", 1)
        assert "StaleOrder: slot" in outcome["error"]
        world.finish(one)
        world.finish(other)
        world.step()
        assert world.ask(world.service.outcome(other.ticket))["status"] == "committed"
        again = world.begin(0)
        world.step()
        assert whose(page_of(world.pool, again.block)) == {0}, "the session goes on from what it had"


def test_a_request_that_cannot_be_planned_runs_without_memory() -> None:
    """Without an order it would run on whatever its first block held before: somebody else's memory."""
    with started(2) as world:
        grown(world, 0, 1)
        one = world.begin(0)
        found, world.scheduler._slots.find = world.scheduler._slots.find, _raise  # type: ignore[method-assign]
        world.step()
        world.scheduler._slots.find = found  # type: ignore[method-assign]
        assert world.pool.layers[0].masks.limits[one.block] == WRITE_OFF
        assert world.ask(world.service.outcome(one.ticket))["status"] == "failed"


def test_zeroing_leaves_what_was_written_since() -> None:
    pool = make_pool(2, 2)
    assert pool.seed([filled(0, 0, 5, canary(0, 1))]) == [None]
    pool.zero([Place(0, 4)])
    assert torch.equal(pool.states[0], canary(0, 1))
    pool.zero([Place(0, 6), Place(1, 7), Place(0, 8)])
    assert not pool.states.any()
    assert pool.generations == [8, 7]


def test_answers_of_several_workers_add_up() -> None:
    a, b = Answer(errors={"x": "why"}, stale={"x"}), Answer(stale={"x", "y"}, errors={"y": "too"})
    both = a.aggregate(b)
    assert both.stale == {"x", "y"}
    assert both.errors == {"x": "why", "y": "too"}


def _raise(*args: Any) -> Any:
    raise RuntimeError("planted")
