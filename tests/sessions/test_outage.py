"""PostgreSQL goes away under a running service and comes back: requests go on and say so, nothing is lost unsaid."""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest

from deltamem_vllm.errors import CapacityError, StoreUnavailable
from deltamem_vllm.sessions.commits import Commits
from deltamem_vllm.sessions.service import SessionService
from deltamem_vllm.store.url import open_store
from tests.conftest import NIGHTLY
from tests.sessions.harness import admit, drive, key, make_service, memory, run, turn
from tests.store import services

OUTAGE = 60.0 if NIGHTLY else 6.0
SOON = "?retry=1"
RETRY = "" if NIGHTLY else SOON
"""Of the store's URL: a short outage has to see many tries."""
RECOVERY = 5.0
SESSIONS = 6


@pytest.fixture(scope="module")
def postgres() -> Iterator[services.Server]:
    with services.postgres() as server:
        yield server


@pytest.fixture
def proxy(postgres: services.Server) -> Iterator[services.Proxy]:
    made = services.Proxy(postgres.port)
    yield made
    made.close()


def url_of(port: int) -> str:
    return f"postgresql://test@127.0.0.1:{port}/postgres{RETRY}"


@dataclass
class Client:
    """One session's client: what it sent, what it was told."""

    name: str
    version: int = 0
    states: list[np.ndarray] = field(default_factory=lambda: [memory(None, [])])
    told: Counter[str] = field(default_factory=Counter)
    stop: bool = False

    async def work(self, service: SessionService) -> None:
        """Send one new turn after another, until told to stop."""
        number = 0
        while not self.stop:
            number += 1
            prompt = [hash((self.name, number)) % (1 << 20)]
            try:
                granted = await admit(service, self.name, prompt)
            except (CapacityError, StoreUnavailable):  # a 503 with Retry-After
                self.told["refused"] += 1
                await asyncio.sleep(0.05)
                continue
            assert granted["version"] == self.version, "it goes on from another version than it told"
            outcome = await run(service, granted["ticket"], prompt, [0])
            self.told[outcome["status"]] += 1
            if outcome["status"] in ("committed", "pending", "degraded"):
                assert outcome["version"] == self.version + 1
                self.version += 1
                self.states.append(memory(self.states[-1], prompt))
            await asyncio.sleep(0.02)


async def outage(service: SessionService, proxy: services.Proxy, clients: list[Client]) -> float:
    """Clients at work; the store goes, and comes back; returns the seconds until everything was saved."""
    tasks = [asyncio.create_task(client.work(service)) for client in clients]
    try:
        async with asyncio.timeout(20):
            while any(client.version < 3 for client in clients):
                await asyncio.sleep(0.01)
        proxy.down = True
        proxy.cut()
        until = time.monotonic() + OUTAGE
        while time.monotonic() < until:
            await asyncio.sleep(0.05)
            for task in tasks:
                if task.done():
                    task.result()
        with pytest.raises((StoreUnavailable, CapacityError)):
            await turn(service, "of which nothing is in memory", [1], [0])
        found = [await service.info(key(client.name)) for client in clients]
        assert any(info is not None and not info["durable"] for info in found)
        for client in clients:
            client.stop = True
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
    assert service.commits.unsaved > 0
    proxy.down = False
    back = time.monotonic()
    while service.commits.unsaved and time.monotonic() - back < RECOVERY:
        await asyncio.sleep(0.01)
    taken = time.monotonic() - back
    assert not service.commits.unsaved, (
        f"{service.commits.unsaved} versions are not saved {RECOVERY:g} s after the outage"
    )
    return taken


def check(postgres: services.Server, proxy: services.Proxy, ahead: tuple[float, int] | None) -> None:
    """An outage, and what the store has after it: every version that anybody was told of."""
    clients = [Client(f"s{number}") for number in range(SESSIONS)]
    service = make_service(url_of(proxy.port), write_behind=ahead)

    async def scenario(service: SessionService) -> float:
        store = open_store(url_of(postgres.port))
        with contextlib.closing(store):
            for client in clients:
                store.delete(key(client.name))
        taken = await outage(service, proxy, clients)
        assert service.commits.lost == 0, f"{service.commits.lost} versions are lost"
        for client in clients:
            outcome = await turn(service, client.name, [7], [0])
            assert (outcome["status"], outcome["version"]) == ("pending" if ahead else "committed", client.version + 1)
        return taken

    taken = drive(service, scenario, OUTAGE + 90)
    store = open_store(url_of(postgres.port))
    with contextlib.closing(store):
        for client in clients:
            kept = store.get(key(client.name))
            assert kept is not None
            assert kept.version == client.version + 1
            np.testing.assert_array_equal(kept.end, memory(client.states[-1], [7]))
    told: Counter[str] = sum((client.told for client in clients), Counter())
    print(f"outage of {OUTAGE:g} s: {dict(told)}; all saved {taken:.2f} s after it")
    assert told["degraded"] > 0
    assert set(told) <= {"committed", "pending", "degraded", "refused"}, "something was neither kept nor refused"


@pytest.mark.parametrize("ahead", [None, (1.0, 1024)], ids=["sync", "write-behind"])
def test_the_store_goes_and_comes_back(
    postgres: services.Server, proxy: services.Proxy, ahead: tuple[float, int] | None
) -> None:
    check(postgres, proxy, ahead)


@pytest.mark.parametrize("bug", ["no retries", "no order"])
def test_catches_planted_bugs(
    postgres: services.Server, proxy: services.Proxy, bug: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(self: Commits) -> None:
        return

    rightly = Commits._save

    async def newest_first(self: Commits, session: object) -> None:
        session.unsaved.reverse()  # type: ignore[attr-defined]
        await rightly(self, session)  # type: ignore[arg-type]

    if bug == "no retries":
        monkeypatch.setattr(Commits, "keep_trying", never)
    else:
        monkeypatch.setattr(Commits, "_save", newest_first)
    monkeypatch.setattr("tests.sessions.test_outage.OUTAGE", 3.0)
    monkeypatch.setattr("tests.sessions.test_outage.RETRY", SOON)
    monkeypatch.setattr("tests.sessions.test_outage.RECOVERY", 3.0)
    with pytest.raises(AssertionError, match=r"are not saved|are lost|another version than it told"):
        check(postgres, proxy, None)
