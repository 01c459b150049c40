"""Write-behind: the client is told before the store has the version, within bounds, and what is lost is said."""

import asyncio
import logging
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from msgspec import structs

from deltamem_vllm.errors import QuotaExceeded, StoreUnavailable
from deltamem_vllm.sessions import commits
from deltamem_vllm.sessions.service import SessionService
from deltamem_vllm.store.memory import MemoryStore
from deltamem_vllm.store.protocol import Outcomes, Put, Quota
from tests.sessions.harness import admit, drive, end_of, key, make_service, memory, run, turn

LONG = (600.0, 1000)


class Held(MemoryStore):
    """Takes commits while it is open; else they wait, or fail with ``error``."""

    def __init__(self, quota: Quota | None = None) -> None:
        super().__init__(quota=quota)
        self.open = threading.Event()
        self.error: Exception | None = None

    def put_many(self, puts: Sequence[Put]) -> Outcomes:
        assert self.open.wait(20)
        return super().put_many(puts) if self.error is None else [self.error] * len(puts)  # type: ignore[list-item]


async def settled(service: SessionService) -> None:
    async with asyncio.timeout(20):
        while service.commits.unsaved:
            await asyncio.sleep(0.001)


def statuses(outcomes: Sequence[dict[str, object]]) -> list[object]:
    return [outcome["status"] for outcome in outcomes]


def test_the_answer_does_not_wait_and_the_versions_follow_in_order(tmp_path: Path) -> None:
    store = Held()

    async def scenario(service: SessionService) -> None:
        outcomes = [await turn(service, "s", [number], [0]) for number in range(5)]
        assert [(o["status"], o["version"], o["error"]) for o in outcomes] == [("pending", n, "") for n in range(1, 6)]
        found = await service.info(key("s"))
        assert found is not None
        assert (found["version"], found["durable"], found["lost"]) == (5, False, 0)
        assert not service.directory.get(key("s")).idle, "what exists only here must not be dropped"
        assert store.get(key("s")) is None
        store.open.set()
        await settled(service)
        assert [info.version for info in store.history(key("s"))] == [5, 4, 3, 2]
        np.testing.assert_array_equal(end_of(service, "s"), memory(None, range(5)))
        found = await service.info(key("s"))
        assert found is not None
        assert found["durable"]

    drive(make_service(store, write_behind=LONG), scenario)


def test_the_end_saves_everything(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/s.db"

    async def scenario(service: SessionService) -> None:
        outcomes = [await turn(service, f"s{n % 20}", [n], [0]) for n in range(100)]
        assert set(statuses(outcomes)) == {"pending"}

    drive(make_service(url, write_behind=LONG), scenario)

    async def check(service: SessionService) -> None:
        for n in range(20):
            np.testing.assert_array_equal(end_of(service, f"s{n}"), memory(None, range(n, 100, 20)))

    drive(make_service(url), check)


def test_beyond_the_count_a_commit_waits() -> None:
    store = Held()

    async def scenario(service: SessionService) -> None:
        assert statuses([await turn(service, f"s{n}", [n], [0]) for n in range(4)]) == ["pending"] * 4
        waiting = asyncio.create_task(turn(service, "one more", [9], [0]))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        assert service.commits.unsaved == 4
        store.open.set()
        assert (await waiting)["status"] == "committed"
        await settled(service)
        assert (await turn(service, "and on", [9], [0]))["status"] == "pending"

    drive(make_service(store, write_behind=(600.0, 4)), scenario)


def test_beyond_the_time_a_commit_waits() -> None:
    store = Held()

    async def scenario(service: SessionService) -> None:
        assert (await turn(service, "s", [1], [0]))["status"] == "pending"
        service.commits._told[0].told -= 5.0  # type: ignore[operator]
        waiting = asyncio.create_task(turn(service, "another", [2], [0]))
        await asyncio.sleep(0.05)
        assert not waiting.done(), "a version has waited for longer than 5 s"
        store.open.set()
        assert (await waiting)["status"] == "committed"
        await settled(service)
        assert (await turn(service, "s", [3], [0]))["status"] == "pending"

    drive(make_service(store, write_behind=(5.0, 1000)), scenario)


def test_one_session_cannot_run_far_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commits, "MAX_UNSAVED", 8)
    store = Held()

    async def scenario(service: SessionService) -> None:
        assert statuses([await turn(service, "s", [n], [0]) for n in range(4)]) == ["pending"] * 4
        waiting = asyncio.create_task(turn(service, "s", [4], [0]))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        store.open.set()
        assert (await waiting)["status"] == "committed"

    drive(make_service(store, write_behind=LONG), scenario)


def test_while_the_store_is_away_it_is_said() -> None:
    store = Held()
    store.open.set()

    async def scenario(service: SessionService) -> None:
        store.error = StoreUnavailable("away")
        assert (await turn(service, "s", [1], [0]))["status"] == "pending", "nobody knows yet"
        session = service.directory.get(key("s"))
        async with asyncio.timeout(20):
            while session not in service.commits._troubled:
                await asyncio.sleep(0.001)
        assert (await turn(service, "s", [2], [0]))["status"] == "degraded"
        store.error = None
        await service.commits.save_waiting()
        assert (service.commits.unsaved, service.commits.lost) == (0, 0)
        assert (await turn(service, "s", [3], [0]))["status"] == "pending"
        await settled(service)
        np.testing.assert_array_equal(end_of(service, "s"), memory(None, [1, 2, 3]))

    drive(make_service(store, write_behind=LONG), scenario)


@pytest.mark.parametrize("refusal", ["another writer", "quota"])
def test_a_version_that_was_told_and_is_refused_is_a_loss(refusal: str, caplog: pytest.LogCaptureFixture) -> None:
    store = Held()
    store.open.set()

    async def scenario(service: SessionService) -> None:
        await turn(service, "s", [1], [0])
        await settled(service)
        before = store.get(key("s"))
        assert before is not None
        granted = [await admit(service, "s", [2])]
        store.open.clear()
        if refusal == "another writer":
            theirs = structs.replace(before, version=2, request_id="theirs", end=memory(None, [7]))
            MemoryStore.put_many(store, [(theirs, before.expect)])
        else:
            store.error = QuotaExceeded("no room")
        told = [await run(service, granted[0]["ticket"], [2], [0]), await turn(service, "s", [3], [0])]
        assert statuses(told) == ["pending", "pending"]
        with caplog.at_level(logging.ERROR, "vllm.deltamem"):
            store.open.set()
            await settled(service)
        assert "2 version(s) of a session are lost" in caplog.text
        assert service.commits.lost == 2
        store.error = None
        found = await service.info(key("s"))
        assert found is not None
        assert (found["lost"], found["durable"], found["version"]) == (2, True, 2 if refusal != "quota" else 1)
        await turn(service, "s", [4], [0])
        await settled(service)
        truth = memory(None, [7, 4]) if refusal == "another writer" else memory(None, [1, 4])
        np.testing.assert_array_equal(end_of(service, "s"), truth)
        assert service.commits.lost == 2

    drive(make_service(store, write_behind=LONG), scenario)


def test_a_request_that_ran_from_a_lost_version_is_told_of_the_conflict() -> None:
    store = Held()
    store.open.set()

    async def scenario(service: SessionService) -> None:
        await turn(service, "s", [1], [0])
        await settled(service)
        store.open.clear()
        await turn(service, "s", [2], [0])
        granted = await admit(service, "s", [3])
        store.error = QuotaExceeded("no room")
        store.open.set()
        await settled(service)
        store.error = None
        assert (await run(service, granted["ticket"], [3], [0]))["status"] == "conflict"
        np.testing.assert_array_equal(end_of(service, "s"), memory(None, [1]))

    drive(make_service(store, write_behind=LONG), scenario)


@pytest.mark.parametrize(("quota", "waits"), [(Quota(sessions=9), 1), (Quota(bytes=10**6), 4)])
def test_what_a_quota_may_refuse_waits_for_the_store(quota: Quota, waits: int) -> None:
    store = Held(quota)
    store.open.set()

    async def scenario(service: SessionService) -> None:
        outcomes = [await turn(service, "s", [n], [0]) for n in range(6)]
        assert statuses(outcomes) == ["committed"] * waits + ["pending"] * (6 - waits)

    drive(make_service(store, write_behind=LONG), scenario)


def test_a_deletion_takes_what_waits_with_it_and_calls_it_no_loss() -> None:
    store = Held()

    async def scenario(service: SessionService) -> None:
        await turn(service, "s", [1], [0])
        granted = await admit(service, "s", [2])
        deleting = asyncio.create_task(service.delete(key("s")))  # behind the commit that is under way
        await asyncio.sleep(0.01)
        store.open.set()
        assert await deleting
        assert (await run(service, granted["ticket"], [2], [0]))["status"] == "conflict"
        assert (service.commits.unsaved, service.commits.lost) == (0, 0)
        assert store.get(key("s")) is None
        assert (await turn(service, "s", [3], [0]))["version"] == 1
        await settled(service)
        np.testing.assert_array_equal(end_of(service, "s"), memory(None, [3]))

    drive(make_service(store, write_behind=LONG), scenario)
