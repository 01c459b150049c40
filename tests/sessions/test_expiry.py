"""Sessions expire: the idle ones, nothing that is in use, and nothing of them is left here."""

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from msgspec import structs

from deltamem_vllm.errors import SessionError, StoreUnavailable
from deltamem_vllm.sessions import expiry, management
from deltamem_vllm.sessions.service import SessionService
from deltamem_vllm.store.memory import MemoryStore
from deltamem_vllm.store.protocol import Expect, Keys, Outcomes, Put, SessionKey, WouldWait
from tests.sessions.harness import admit, drive, end_of, key, make_service, memory, run, turn


class Aged(MemoryStore):
    """Stores everything as of ``age`` seconds ago; fails on demand."""

    def __init__(self) -> None:
        super().__init__()
        self.age = 0.0
        self.put_error: Exception | None = None
        self.delete_error: Exception | None = None
        self.head_error = False

    def head(self, wanted: SessionKey) -> Expect | None:
        if self.head_error:
            raise StoreUnavailable("away")
        return super().head(wanted)

    def glance(self, wanted: SessionKey) -> Expect | None:
        if self.head_error:
            raise WouldWait
        return super().glance(wanted)

    def put_many(self, puts: Sequence[Put]) -> Outcomes:
        if self.put_error is not None:
            return [self.put_error] * len(puts)  # type: ignore[list-item]
        return super().put_many([(structs.replace(r, updated_at=r.updated_at - self.age), e) for r, e in puts])

    def delete_idle(self, keys: Sequence[SessionKey], until: float) -> Keys:
        gone = super().delete_idle(keys, until)
        if self.delete_error is not None:
            raise self.delete_error
        return gone


async def sweep(service: SessionService) -> int:
    return await service.expiry.sweep()


def test_what_was_idle_for_too_long_is_gone_everywhere() -> None:
    store = Aged()

    async def scenario(service: SessionService) -> None:
        store.age = 1000.0
        await turn(service, "old", [1], [0])
        before = service.directory.get(key("old")).incarnation
        store.age = 0.0
        await turn(service, "young", [2], [0])
        assert await sweep(service) == 1
        assert [info.key.session for info in store.list("default")] == ["young"]
        assert service.directory.find(key("old")) is None
        assert list(service.erased) == [key("old")], "its states must leave the device too"
        assert await service.info(key("old")) is None
        assert (await turn(service, "old", [3], [0]))["version"] == 1
        np.testing.assert_array_equal(end_of(service, "old"), memory(None, [3]))
        assert service.directory.get(key("old")).incarnation != before
        assert await sweep(service) == 0

    drive(make_service(store, ttl=600.0), scenario)


def test_what_is_in_use_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expiry, "BATCH", 3)
    store = Aged()

    async def scenario(service: SessionService) -> None:
        store.age = 2000.0
        for number in range(8):  # the longest idle, and more than a batch
            await turn(service, f"busy{number}", [number], [0])
        store.age = 1000.0
        for number in range(8):
            await turn(service, f"idle{number}", [number], [0])
        granted = [await admit(service, f"busy{number}", [9]) for number in range(7)]
        store.put_error = StoreUnavailable("away")
        assert (await turn(service, "busy7", [9], [0]))["status"] == "degraded"
        store.put_error = None
        assert await sweep(service) == 8
        assert [info.key.session for info in store.list("default")] == [f"busy{n}" for n in range(8)]
        for each in granted:
            assert (await run(service, each["ticket"], [9], [0]))["status"] == "committed"

    drive(make_service(store, ttl=600.0), scenario)


def test_a_request_that_comes_meanwhile_starts_a_new_session() -> None:
    store = Aged()

    async def scenario(service: SessionService) -> None:
        store.age = 1000.0
        await turn(service, "s", [1], [0])
        store.age = 0.0
        for _ in range(20):
            sweeping = asyncio.create_task(sweep(service))
            await asyncio.sleep(0)
            outcome = await turn(service, "s", [2], [0])
            assert outcome["status"] == "committed", "whether before or after the sweep, it is no conflict"
            await sweeping
            store.age = 1000.0
            await turn(service, "s", [1], [0])
            store.age = 0.0

    drive(make_service(store, ttl=600.0), scenario)


def test_the_sweep_runs_by_itself_and_survives_a_store_that_is_away(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/s.db"

    async def scenario(service: SessionService) -> None:
        broken = service.store.idle

        def away(until: float, limit: int = 1000) -> Keys:
            service.store.idle = broken  # type: ignore[method-assign]
            raise StoreUnavailable("away")

        service.store.idle = away  # type: ignore[method-assign]
        start = time.monotonic()
        await turn(service, "s", [1], [0])
        while service.store.usage("default").sessions:
            assert time.monotonic() - start < 25
            await asyncio.sleep(0.05)
        assert time.monotonic() - start >= 1.0
        assert await service.info(key("s")) is None

    drive(make_service(url, ttl=1.0), scenario)


def test_a_sweep_whose_outcome_is_not_known_forgets_what_it_tried() -> None:
    store = Aged()

    async def scenario(service: SessionService) -> None:
        store.age = 1000.0
        await turn(service, "s", [1], [0])
        store.age, store.delete_error = 0.0, StoreUnavailable("cut after the deletion")
        with pytest.raises(StoreUnavailable):
            await sweep(service)
        store.delete_error = None
        assert service.directory.get(key("s")).record is None
        assert await service.info(key("s")) is None
        assert (await turn(service, "s", [3], [0]))["version"] == 1

    drive(make_service(store, ttl=600.0), scenario)


def test_the_pause_between_sweeps_differs_between_engines() -> None:
    async def scenario(service: SessionService) -> None:
        pauses = [service.expiry.pause() for _ in range(100)]
        assert all(30 <= pause <= 90 for pause in pauses)
        assert max(pauses) - min(pauses) > 10

    drive(make_service(ttl=86400.0), scenario)


def test_without_a_ttl_nothing_expires() -> None:
    store = Aged()

    async def scenario(service: SessionService) -> None:
        store.age = 1e9
        await turn(service, "old", [1], [0])
        assert await sweep(service) == 0
        assert (await turn(service, "old", [2], [0]))["version"] == 2

    drive(make_service(store), scenario)


# --- a session's own ttl ----------------------------------------------------------------------------------------------


async def told(service: SessionService, name: str, ttl: float | None) -> None:
    """A session with a memory, and a ttl of its own."""
    await management.create(service, key(name), f"create-{name}", {}, ttl, None)
    await turn(service, name, [1], [0])


async def as_seen(service: SessionService, name: str, how: str) -> int:
    """The version that a session has to somebody."""
    match how:
        case "info":
            found = await management.info(service, key(name))
            return 0 if found is None else int(found["version"])
        case "read" | "readwrite":
            granted = await admit(service, name, [5], how)
            return int(granted["version"])
        case "export":
            exported = await management.export(service, key(name))
            return 0 if exported is None else int(exported["version"])
        case _:
            with pytest.raises(SessionError, match="not found"):
                await management.reset(service, key(name), "reset", None)
            return 0


@pytest.mark.parametrize("held", [True, False], ids=["in host memory", "in the store only"])
@pytest.mark.parametrize("how", ["info", "read", "readwrite", "export", "change"])
def test_nobody_gets_a_session_that_has_outlived_its_ttl(how: str, held: bool) -> None:
    store = Aged()

    async def scenario(service: SessionService) -> None:
        store.age = 100.0
        await told(service, "short", 50.0)
        if not held:
            service.directory.get(key("short")).forget()
        else:
            record = store.get(key("short"))
            service.directory.get(key("short")).set_record(record)
        before = service.directory.get(key("short")).incarnation
        store.age = 0.0
        assert await as_seen(service, "short", how) == 0
        assert store.get(key("short")) is None
        assert service.directory.get(key("short")).incarnation != before, "its cached blocks must be nobody's"
        assert key("short") in service.erased, "its states must leave the device too"

    drive(make_service(store), scenario)


def test_a_session_lives_as_long_as_it_is_written() -> None:
    store = Aged()

    async def scenario(service: SessionService) -> None:
        for ttl, age in ((50.0, 49.0), (None, 1e9), (1e9, 1e6)):
            store.age = age
            await told(service, f"{ttl}", ttl)
            service.directory.get(key(f"{ttl}")).forget()
        store.age = 0.0
        for ttl in (50.0, None, 1e9):
            assert (await turn(service, f"{ttl}", [2], [0]))["version"] == 3

    drive(make_service(store), scenario)


def test_a_running_request_keeps_its_session_from_readers() -> None:
    """It began in time, so it commits, and the session has a new lease of life."""
    store = Aged()

    async def scenario(service: SessionService) -> None:
        await told(service, "s", 50.0)
        granted = await admit(service, "s", [3])
        record = service.directory.get(key("s")).record
        assert record is not None
        old = structs.replace(record, updated_at=record.updated_at - 100)
        service.directory.get(key("s")).set_record(old)
        assert await as_seen(service, "s", "info") == 2
        assert (await run(service, granted["ticket"], [3], [0]))["status"] == "committed"

    drive(make_service(store), scenario)


def test_the_sweep_takes_what_is_in_host_memory() -> None:
    store = Aged()

    async def scenario(service: SessionService) -> None:
        store.age = 100.0
        for name, ttl in (("short", 50.0), ("long", 500.0), ("none", None)):
            await told(service, name, ttl)
            service.directory.get(key(name)).set_record(store.get(key(name)))
        assert await sweep(service) == 1
        assert [info.key.session for info in store.list("default")] == ["long", "none"]
        assert list(service.erased) == [key("short")]

    drive(make_service(store), scenario)


def test_another_servers_version_is_not_deleted() -> None:
    """What is known here is old, and the session lives on elsewhere."""
    store = Aged()

    async def scenario(service: SessionService) -> None:
        await told(service, "s", 50.0)
        known = store.get(key("s"))
        assert known is not None
        newer = structs.replace(known, version=known.version + 1)
        assert store.put_many([(newer, known.expect)]) == [None]
        session = service.directory.get(key("s"))
        store.head_error = True
        session.set_record(structs.replace(known, updated_at=known.updated_at - 100))
        assert await as_seen(service, "s", "info") == 3

    drive(make_service(store), scenario)
