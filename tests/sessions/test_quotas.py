"""Quotas at admission: whoever is over it is told before an answer is generated; the store decides at commit."""

import asyncio
from typing import Any

import pytest

from deltamem_vllm.errors import CapacityError, QuotaExceeded, StoreUnavailable
from deltamem_vllm.sessions.control import encode_error, raise_error
from deltamem_vllm.sessions.service import SessionService
from deltamem_vllm.store.memory import MemoryStore
from deltamem_vllm.store.protocol import Quota, Usage
from tests.sessions.harness import admit, drive, key, make_service, run, turn


class Asked(MemoryStore):
    """Counts how often it is asked what a tenant uses."""

    def __init__(self, **limits: int) -> None:
        super().__init__(quota=Quota(**limits))
        self.asked = 0
        self.error: Exception | None = None

    def usage(self, tenant: str) -> Usage:
        self.asked += 1
        if self.error is not None:
            raise self.error
        return super().usage(tenant)


def test_a_session_too_many_is_refused_before_its_answer() -> None:
    store = Asked(sessions=2)

    async def scenario(service: SessionService) -> None:
        for name in ("a", "b", "a"):
            assert (await turn(service, name, [1], [0]))["status"] == "committed"
        with pytest.raises(QuotaExceeded, match=r"2 of 2 sessions are used\. Delete one, or raise .*max_sessions") as e:
            await admit(service, "c", [1])
        assert e.value.status == 429
        assert service.directory.get(key("c")).idle, "the refused one must not keep the session"
        await admit(service, "c", [1], "read")
        await service.delete(key("a"))
        assert (await turn(service, "c", [1], [0]))["status"] == "committed", "room is noticed at once"

    drive(make_service(store), scenario)


def test_a_tenants_own_limit_holds_beside_the_stores() -> None:
    store = Asked(sessions=3)

    async def scenario(service: SessionService) -> None:
        service.quotas.note("default", [1, None])
        assert (await turn(service, "a", [1], [0]))["status"] == "committed"
        with pytest.raises(
            QuotaExceeded, match=r"1 of 1 sessions are used\. Delete one, or raise the tenant's max_sess"
        ):
            await admit(service, "b", [1])
        service.quotas.note("default", [5, None])
        for name in ("b", "c"):
            assert (await turn(service, name, [1], [0]))["status"] == "committed"
        with pytest.raises(QuotaExceeded, match=r"3 of 3 sessions are used.*the store's"):
            await admit(service, "d", [1])
        service.quotas.note("default", None)
        service.quotas.note("somebody else", [1, 1])
        assert (await turn(service, "c", [1], [0]))["status"] == "committed"

    drive(make_service(store), scenario)


def test_bytes_are_refused_as_long_as_versions_add_to_them() -> None:
    room = MemoryStore()

    async def measure(service: SessionService) -> int:
        await turn(service, "s", [1], [0])
        return room.usage("default").bytes

    size = drive(make_service(room), measure)
    store = Asked(bytes=4 * size + size // 2)

    async def scenario(service: SessionService) -> None:
        for number in range(4):
            assert (await turn(service, "s", [number], [0]))["status"] == "committed"
        with pytest.raises(QuotaExceeded, match=r"bytes more: .* are used\. Delete a session, or raise .*max_bytes"):
            await admit(service, "t", [1])
        for number in range(4):
            assert (await turn(service, "s", [number], [0]))["status"] == "committed", "it takes over an old one's room"

    drive(make_service(store), scenario)


def test_the_client_gets_429() -> None:
    with pytest.raises(CapacityError, match="2 of 2") as e:
        raise_error(encode_error(QuotaExceeded("2 of 2 sessions are used")))
    assert e.value.status == 429


def test_the_store_is_asked_for_new_sessions_only_and_not_for_each() -> None:
    store = Asked(sessions=1000)

    async def scenario(service: SessionService) -> None:
        for number in range(200):
            await turn(service, f"s{number % 50}", [number], [0])
        assert 1 <= store.asked <= 50
        asked = store.asked
        for number in range(50):
            await turn(service, f"s{number}", [number], [0])
        assert store.asked == asked

    drive(make_service(store), scenario)


def test_without_a_quota_nobody_is_asked() -> None:
    store = Asked()

    async def scenario(service: SessionService) -> None:
        await turn(service, "s", [1], [0])
        assert store.asked == 0

    drive(make_service(store), scenario)


def test_a_store_that_does_not_answer_refuses_nobody() -> None:
    store = Asked(sessions=1)
    store.error = StoreUnavailable("away")

    async def scenario(service: SessionService) -> None:
        assert (await turn(service, "s", [1], [0]))["status"] == "committed"
        granted = await admit(service, "t", [1])
        outcome = await run(service, granted["ticket"], [1], [0])
        assert (outcome["status"], "1 of 1 sessions" in outcome["error"]) == ("failed", True), (
            "the store stays the truth"
        )

    drive(make_service(store), scenario)


def test_two_at_once_for_the_last_place() -> None:
    store = Asked(sessions=1)

    async def scenario(service: SessionService) -> None:
        outcomes: list[Any] = await asyncio.gather(
            turn(service, "a", [1], [0]), turn(service, "b", [1], [0]), return_exceptions=True
        )
        won = [o for o in outcomes if isinstance(o, dict) and o["status"] == "committed"]
        assert len(won) == 1
        assert store.usage("default").sessions == 1

    drive(make_service(store), scenario)
