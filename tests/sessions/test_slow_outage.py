"""A store that is away and keeps who asks it waiting, as one whose connections are tried again: many sessions go on all
the same, each after one wait, and none behind the others."""

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from deltamem_vllm.errors import StoreUnavailable
from deltamem_vllm.sessions import commits, reads, records
from deltamem_vllm.sessions.reads import Reads
from deltamem_vllm.sessions.service import SessionService
from deltamem_vllm.store.memory import MemoryStore
from deltamem_vllm.store.protocol import Expect, Outcomes, Put, Record
from tests.sessions.harness import admit, drive, end_of, key, make_service, memory, run, turn

SESSIONS, WAIT, FAST = 24, 0.6, 0.3
"""Sessions; seconds that the store takes to fail; those that an answer may take once it is known to be away."""


class Slow(MemoryStore):
    """Fails after a while, on every way; one that is not in this process, and cannot be glanced at."""

    glance = None  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()
        self.away = False
        self.asked = 0

    def _fail(self) -> None:
        if self.away:
            self.asked += 1
            time.sleep(WAIT)
            raise StoreUnavailable("no route")

    def put_many(self, puts: Sequence[Put]) -> Outcomes:
        try:
            self._fail()
        except StoreUnavailable as error:
            return [error] * len(puts)
        return super().put_many(puts)

    def get(self, wanted: Any) -> Record | None:
        self._fail()
        return super().get(wanted)

    def head(self, wanted: Any) -> Expect | None:
        self._fail()
        return super().head(wanted)


@pytest.fixture(autouse=True)
def shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (commits, reads):
        monkeypatch.setattr(module, "SLOW_SECONDS", WAIT / 2)
    monkeypatch.setattr(commits, "RETRY_SECONDS", 0.2)


async def timed_turn(service: SessionService, session: str, token: int) -> tuple[str, float]:
    begun = time.monotonic()
    outcome = await turn(service, session, [token], [0])
    return outcome["status"], time.monotonic() - begun


def check_outage() -> None:
    store = Slow()
    names = [f"s{number}" for number in range(SESSIONS)]

    async def scenario(service: SessionService) -> None:
        for name in names:
            await turn(service, name, [1], [0])
        store.away = True
        first = await asyncio.gather(*(timed_turn(service, name, 2) for name in names))
        assert {status for status, _ in first} == {"degraded"}
        longest = max(seconds for _, seconds in first)
        assert longest < 6 * WAIT, f"an answer took {longest:.1f} s: it waited behind others"
        for token in (3, 4):
            answers = await asyncio.gather(*(timed_turn(service, name, token) for name in names))
            assert {status for status, _ in answers} == {"degraded"}
            assert max(seconds for _, seconds in answers) < FAST, "it waited for a store that is known to be away"
        store.away = False
        end = time.monotonic() + 10
        while service.commits.unsaved and time.monotonic() < end:
            await asyncio.sleep(0.02)
        for name in names:
            assert (await turn(service, name, [5], [0]))["status"] == "committed"
            kept = store.get(key(name))
            assert kept is not None
            assert kept.version == 5
            np.testing.assert_array_equal(end_of(service, name), memory(None, [1, 2, 3, 4, 5]))

    drive(make_service(store), scenario, 60)


def test_many_sessions_go_on() -> None:
    check_outage()


@pytest.mark.parametrize("bug", ["reads wait", "commits wait"])
def test_catches_planted_bugs(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reads if bug == "reads wait" else commits, "SLOW_SECONDS", 1000.0)
    with pytest.raises(AssertionError, match=r"waited behind others|known to be away"):
        check_outage()


def test_a_session_that_is_not_in_memory_is_refused_at_once_and_found_again() -> None:
    store = Slow()

    async def scenario(service: SessionService) -> None:
        await turn(service, "s", [1], [0])
        service.directory.get(key("s")).forget()
        store.away = True
        with pytest.raises(StoreUnavailable):
            await admit(service, "s", [2])
        begun, asked = time.monotonic(), store.asked
        for _ in range(20):
            with pytest.raises(StoreUnavailable, match="no route"):
                await admit(service, "s", [2])
        assert time.monotonic() - begun < FAST
        assert store.asked == asked
        store.away = False
        await asyncio.sleep(reads.AWAY_SECONDS)
        granted = await admit(service, "s", [2])
        assert (await run(service, granted["ticket"], [2], [0]))["version"] == 2

    drive(make_service(store), scenario)


def test_a_silent_store_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A read that gets no answer at all: the request goes on from the version that is known here."""
    monkeypatch.setattr(records, "NOTICE_SECONDS", 0.1)

    class Silent(Slow):
        def head(self, wanted: Any) -> Expect | None:
            if self.away:
                time.sleep(2.0)
            return MemoryStore.head(self, wanted)

    store = Silent()

    async def scenario(service: SessionService) -> None:
        await turn(service, "s", [1], [0])
        store.away = True
        begun = time.monotonic()
        granted = await admit(service, "s", [2])
        assert time.monotonic() - begun < 1.0
        assert granted["version"] == 1
        store.away = False
        assert (await run(service, granted["ticket"], [2], [0]))["status"] == "committed"

    drive(make_service(store), scenario)


def test_one_read_at_a_time_finds_out() -> None:
    """While the store is away one read a second goes there, whoever asks, and the first that is answered ends it."""
    calls: list[float] = []
    away = True

    def work() -> str:
        calls.append(time.monotonic())
        if away:
            time.sleep(WAIT)
            raise StoreUnavailable("no route")
        return "here"

    async def scenario() -> None:
        nonlocal away
        made = Reads()
        with pytest.raises(StoreUnavailable):
            await made.read(work)
        end = time.monotonic() + 2.5

        async def ask() -> None:
            while time.monotonic() < end:
                with pytest.raises(StoreUnavailable):
                    await made.read(work)
                await asyncio.sleep(0.01)

        await asyncio.gather(*(ask() for _ in range(8)))
        assert 2 <= len(calls) <= 1 + 2.5 / reads.AWAY_SECONDS
        away = False
        await asyncio.sleep(reads.AWAY_SECONDS)
        assert await made.read(work) == "here"
        assert await asyncio.gather(*(made.read(work) for _ in range(4))) == ["here"] * 4
        made.close()

    asyncio.run(scenario())


def test_a_glance_that_takes_long_is_the_last_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that hangs holds up the event loop once, and then a thread."""
    monkeypatch.setattr(reads, "AWAY_SECONDS", 0.3)

    class Hangs(MemoryStore):
        def glance(self, wanted: Any) -> Expect | None:
            glances.append(time.monotonic())
            time.sleep(reads.LONG_GLANCE if hanging else 0.0)
            return super().glance(wanted)

    glances: list[float] = []
    hanging = True

    async def scenario(service: SessionService) -> None:
        nonlocal hanging
        await turn(service, "s", [1], [0])
        for _ in range(10):
            assert (await admit(service, "s", [2], "read"))["version"] == 1
        assert len(glances) == 1
        hanging = False
        await asyncio.sleep(0.4)
        for _ in range(10):
            assert (await admit(service, "s", [2], "read"))["version"] == 1
        assert len(glances) == 11

    drive(make_service(Hangs()), scenario)


def test_a_store_that_fails_at_once_is_asked_every_time() -> None:
    def work() -> None:
        raise StoreUnavailable("the disk is full")

    async def scenario() -> None:
        made = Reads()
        for _ in range(3):
            with pytest.raises(StoreUnavailable, match="full"):
                await made.read(work)
        assert await made.read(lambda: 7) == 7
        made.close()

    asyncio.run(scenario())
