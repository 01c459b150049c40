"""The session service when things go wrong: deletions at any moment, other writers and servers, a store that fails."""

import asyncio
import dataclasses
import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deltamem_vllm.errors import CorruptRecord, SessionError, StaleVersion, StoreUnavailable
from deltamem_vllm.sessions.service import SessionService
from deltamem_vllm.store.memory import MemoryStore
from deltamem_vllm.store.protocol import Outcomes, Put, Record
from tests.sessions.harness import admit, drive, end_of, key, make_service, memory, run, turn


@pytest.fixture(params=["memory", "sqlite"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return "memory://" if request.param == "memory" else f"sqlite:///{tmp_path}/s.db"


# --- deletion ---------------------------------------------------------------------------------------------------------


def test_delete(store_url: str) -> None:
    async def scenario(service: SessionService) -> None:
        assert not await service.delete(key("s"))
        await turn(service, "s", [1, 2], [0])
        record = service.store.get(key("s"))
        assert record is not None
        assert await service.delete(key("s"))
        assert service.store.get(key("s")) is None
        assert await service.info(key("s")) is None
        assert len(service.erased_states) == 2, "the pool must be told which states to zero"
        again = await admit(service, "s", [1, 2])
        assert (again["version"], again["window"]) == (0, "new")
        grant = service.claim(again["ticket"])
        assert grant is not None
        assert grant.base is None
        assert grant.incarnation != record.incarnation

    drive(make_service(store_url), scenario)


@pytest.mark.parametrize("existed", [True, False])
def test_delete_while_a_request_runs(store_url: str, existed: bool) -> None:
    async def scenario(service: SessionService) -> None:
        if existed:
            await turn(service, "s", [1, 2], [0])
        granted = await admit(service, "s", [3, 4])
        assert await service.delete(key("s")) is existed
        outcome = await run(service, granted["ticket"], [3, 4], [0])
        assert outcome["status"] == "conflict"
        assert "was deleted while the request ran" in outcome["error"]
        assert service.store.get(key("s")) is None, "the deleted session has come back"
        assert (await turn(service, "s", [5], [0]))["version"] == 1
        np.testing.assert_array_equal(end_of(service, "s"), memory(None, [5]))

    drive(make_service(store_url), scenario)


class Slow(MemoryStore):
    """Holds commits back until it is told to go on."""

    def __init__(self) -> None:
        super().__init__()
        self.reached, self.go = threading.Event(), threading.Event()

    def put_many(self, puts: Sequence[Put]) -> Outcomes:
        self.reached.set()
        assert self.go.wait(10)
        return super().put_many(puts)


@pytest.mark.parametrize("existed", [True, False])
def test_delete_while_a_commit_is_on_its_way_to_the_store(existed: bool) -> None:
    store = Slow()

    async def scenario(service: SessionService) -> None:
        if existed:
            store.go.set()
            await turn(service, "s", [1, 2], [0])
            store.reached.clear()
            store.go.clear()
        granted = await admit(service, "s", [3, 4])
        committing = asyncio.create_task(run(service, granted["ticket"], [3, 4], [0]))
        await asyncio.get_running_loop().run_in_executor(None, store.reached.wait, 5)
        deleting = asyncio.create_task(service.delete(key("s")))
        await asyncio.sleep(0.1)
        store.go.set()
        outcome, deleted = await committing, await deleting
        assert service.store.get(key("s")) is None, f"{outcome} came after the deletion ({deleted}) and stayed"
        assert outcome["status"] == ("committed" if deleted else "conflict")
        assert await service.info(key("s")) is None
        assert (await turn(service, "s", [5], [0]))["status"] == "committed"
        np.testing.assert_array_equal(end_of(service, "s"), memory(None, [5]))

    drive(make_service(store), scenario)


# --- other writers, other servers, a store that fails -----------------------------------------------------------------


def test_an_outside_writer_is_noticed_and_then_followed(store_url: str) -> None:
    async def scenario(service: SessionService) -> None:
        await turn(service, "s", [1, 2], [0])
        granted = await admit(service, "s", [3])
        outside = service.store.get(key("s"))
        assert outside is not None
        moved = make_record(outside, version=2, end=memory(outside.end, [77]))
        service.store.put(moved, outside.expect)
        outcome = await run(service, granted["ticket"], [3], [0])
        assert outcome["status"] == "conflict"
        assert outcome["version"] == 1, "the version it had started from"
        np.testing.assert_array_equal(end_of(service, "s"), moved.end)
        assert (await turn(service, "s", [3], [0]))["version"] == 3
        np.testing.assert_array_equal(end_of(service, "s"), memory(moved.end, [3]))

    drive(make_service(store_url), scenario)


def make_record(record: Record, **changes: Any) -> Record:
    return dataclasses.replace(record, request_id="another server", **changes)


@pytest.mark.parametrize("what", ["adapter", "model", "layout"])
def test_a_memory_of_another_server_is_refused_and_kept(what: str, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/s.db"

    async def write(service: SessionService) -> None:
        await turn(service, "s", [1, 2], [0])

    async def refuse(service: SessionService) -> None:
        for mode in ("readwrite", "read"):
            with pytest.raises(SessionError, match=f"written with {what} .* delete the session") as e:
                await admit(service, "s", [3], mode)
            assert e.value.status == 422
        with pytest.raises(SessionError, match=what):
            await service.info(key("s"))
        assert (await turn(service, "t", [1], [0]))["version"] == 1
        np.testing.assert_array_equal(end_of(service, "s"), memory(None, [1, 2]))
        with pytest.raises(SessionError, match=what):  # still: it was not made free for all by the refusal
            await admit(service, "s", [3])

    drive(make_service(url), write)
    changed: dict[str, Any] = {"adapter": "another", "model": "another", "layout": "L1H1r2"}
    options = {what: changed[what]} | ({"state_shape": (1, 1, 2, 2)} if what == "layout" else {})
    other = make_service(url, **options)

    async def refuse_and_delete(service: SessionService) -> None:
        if what == "layout":
            with pytest.raises(SessionError, match="layout"):
                await admit(service, "s", [3])
        else:
            await refuse(service)
        assert await service.delete(key("s")), "the remedy that the message names"
        assert (await admit(service, "s", [3]))["version"] == 0

    drive(other, refuse_and_delete)


class Faulty(MemoryStore):
    """Fails on demand, on either way."""

    def __init__(self) -> None:
        super().__init__()
        self.put_error: Exception | None = None
        self.get_error: Exception | None = None
        self.applies = False  # whether a failing put has been applied all the same (I/O error at COMMIT)

    def put_many(self, puts: Sequence[Put]) -> Outcomes:
        if self.put_error is None:
            return super().put_many(puts)
        if self.applies:
            super().put_many(puts)
        return [self.put_error] * len(puts)  # type: ignore[list-item]

    def get(self, wanted: Any) -> Record | None:
        if self.get_error is not None:
            raise self.get_error
        return super().get(wanted)


@pytest.mark.parametrize("applies", [False, True])
def test_a_store_that_fails_costs_the_turn_and_not_the_session(applies: bool, caplog: pytest.LogCaptureFixture) -> None:
    store = Faulty()

    async def scenario(service: SessionService) -> None:
        await turn(service, "s", [1, 2], [0])
        store.put_error, store.applies = StoreUnavailable("the disk is full. Free space"), applies
        with caplog.at_level(logging.ERROR, "vllm.deltamem"):
            outcome = await turn(service, "s", [3], [0])
        assert (outcome["status"], outcome["version"]) == ("failed", 1)
        assert "the disk is full" in outcome["error"]
        assert "the disk is full" in caplog.text
        store.put_error = None
        start = await admit(service, "s", [4])
        there = 2 if applies else 1
        assert start["version"] == there, "the session must go on from what the store has"
        assert (await run(service, start["ticket"], [4], [0]))["version"] == there + 1
        np.testing.assert_array_equal(end_of(service, "s"), memory(None, [1, 2, 3, 4] if applies else [1, 2, 4]))

    drive(make_service(store), scenario)


@pytest.mark.parametrize("error", [StoreUnavailable("away"), CorruptRecord("checksum"), StaleVersion("moved")])
def test_a_store_that_cannot_be_read_refuses_and_frees_the_session(error: Exception) -> None:
    store = Faulty()

    async def scenario(service: SessionService) -> None:
        store.get_error = error
        for _ in range(3):
            with pytest.raises(type(error)):
                await admit(service, "s", [1])
        assert service.directory.get(key("s")).idle
        store.get_error = None
        assert (await turn(service, "s", [1], [0]))["version"] == 1

    drive(make_service(store), scenario)


def test_a_commit_thread_that_crashed_is_an_outcome() -> None:
    class Broken(MemoryStore):
        def put_many(self, puts: Sequence[Put]) -> Outcomes:
            return []

    async def scenario(service: SessionService) -> None:
        for _ in range(2):
            outcome = await turn(service, "s", [1], [0])
            assert outcome["status"] == "failed"
            assert "crashed" in outcome["error"]

    drive(make_service(Broken()), scenario)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_state_that_is_not_finite_is_refused(bad: float) -> None:
    async def scenario(service: SessionService) -> None:
        await turn(service, "s", [1, 2], [0])
        granted = await admit(service, "s", [3])
        service.claim(granted["ticket"])
        state = memory(None, [1])
        state[0, 0, 0, 1] = bad
        service.commit(granted["ticket"], [3], state)
        outcome = await service.outcome(granted["ticket"])
        assert outcome["status"] == "failed"
        assert "not finite" in outcome["error"]
        np.testing.assert_array_equal(end_of(service, "s"), memory(None, [1, 2]))
        assert (await turn(service, "s", [4], [0]))["version"] == 2

    drive(make_service(), scenario)


def test_tokens_that_are_not_the_plans_are_refused() -> None:
    async def scenario(service: SessionService) -> None:
        await turn(service, "s", [1, 2], [3, 4])
        granted = await admit(service, "s", [1, 2, 3, 5])
        service.claim(granted["ticket"])
        service.commit(granted["ticket"], [9, 9, 9, 9], memory(None, []))
        outcome = await service.outcome(granted["ticket"])
        assert outcome["status"] == "failed"
        assert "do not begin with" in outcome["error"]
        np.testing.assert_array_equal(end_of(service, "s"), memory(None, [1, 2, 3]))

    drive(make_service(), scenario)
