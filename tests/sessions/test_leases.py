"""Two services on one PostgreSQL: leases decide before anything is generated, and fail to compare-and-set."""

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import psycopg
import pytest

from deltamem_vllm.errors import CapacityError
from deltamem_vllm.sessions import leases as engine_leases
from deltamem_vllm.sessions.service import SessionService
from deltamem_vllm.store.postgres import PostgresStore
from tests.sessions.harness import Scenario, admit, drive_services, end_of, key, make_service, memory, on, run, turn
from tests.store import services
from tests.store.services import Proxy

_names = itertools.count(1)


@pytest.fixture(scope="module")
def place() -> Iterator[str]:
    """The URL of a PostgreSQL server."""
    with services.postgres() as server:
        yield f"postgresql://test@127.0.0.1:{server.port}/postgres?retry=1"


@pytest.fixture
def session() -> str:
    return f"session-{next(_names)}"


def drive_two(place: str, scenario: Scenario, lease: str = "15", **options: Any) -> None:
    url = f"{place}&lease={lease}"
    drive_services(make_service(url, **options), make_service(url, **options), scenario)


async def until(what: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen"
        await asyncio.sleep(0.01)


def somebody_else(place: str, lease: float = 0.01) -> PostgresStore:
    """Another engine's store, whose own leases hinder nobody for long."""
    return PostgresStore(place.replace("?retry=1", ""), lease_seconds=lease)


def check_the_second_waits(place: str, session: str, lease: str = "15", patience: float = 0.5) -> None:
    async def scenario(first: SessionService, second: SessionService) -> None:
        ours = await on(first, admit(first, session, [1]))
        theirs = on(second, turn(second, session, [2], [0]))
        await asyncio.wait({theirs}, timeout=patience)
        assert not theirs.done(), "it runs although the first server writes the session"
        assert (await on(first, run(first, ours["ticket"], [1], [0])))["status"] == "committed"
        outcome = await theirs
        assert (outcome["status"], outcome["version"]) == ("committed", 2)
        np.testing.assert_array_equal(end_of(first, session), memory(None, [1, 2]))

    drive_two(place, scenario, lease)


def test_the_second_waits_for_the_first(place: str, session: str) -> None:
    check_the_second_waits(place, session)


def test_catches_that_there_are_no_leases(place: str, session: str) -> None:
    """PLANTED BUG: no leases, which is also what lease=0 means: both generate, and one in vain."""
    with pytest.raises(AssertionError, match="it runs although"):
        check_the_second_waits(place, session, lease="0", patience=20)


def test_who_waited_in_vain_is_told_for_how_long(place: str, session: str) -> None:
    async def scenario(first: SessionService, second: SessionService) -> None:
        ours = await on(first, admit(first, session, [1]))
        start = time.monotonic()
        with pytest.raises(
            CapacityError, match=r"another server on the same store.*--deltamem-queue-seconds"
        ) as caught:
            await on(second, admit(second, session, [2]))
        assert caught.value.status == 409
        assert 10 - (time.monotonic() - start) <= caught.value.retry_after <= 15
        assert caught.value.retry_after == int(caught.value.retry_after)
        assert time.monotonic() - start > 0.4
        assert second.directory.get(key(session)).owner is None, "the next request here must not wait for it"
        assert (await on(second, admit(second, session, [2], "read")))["version"] == 0, "readers take no lease"
        assert (await on(first, run(first, ours["ticket"], [1], [0])))["status"] == "committed"
        assert (await on(second, turn(second, session, [2], [0])))["status"] == "committed"

    drive_two(place, scenario, queue_seconds=0.5)


@pytest.mark.parametrize("how", ["aborted", "failed", "withdrawn", "never claimed"])
def test_a_lease_ends_with_its_request(place: str, session: str, how: str) -> None:
    async def scenario(first: SessionService, second: SessionService) -> None:
        ours = (await on(first, admit(first, session, [1])))["ticket"]
        if how in ("aborted", "failed"):
            assert first.claim(ours)
            first.end(ours, how)
        else:
            first._call(first.give_verdict, ours, None)
        assert (await on(second, turn(second, session, [2], [0])))["version"] == 1
        await until(lambda: first.leases.held == second.leases.held == 0)

    drive_two(place, scenario)


def test_who_leaves_while_waiting_takes_nothing_along(place: str, session: str) -> None:
    async def scenario(first: SessionService, second: SessionService) -> None:
        ours = await on(first, admit(first, session, [1]))
        for _ in range(5):
            theirs = asyncio.run_coroutine_threadsafe(second.admit("t", key(session), "readwrite", *REST), second._loop)
            await asyncio.sleep(0.05)
            second._call(second.give_verdict, "t", None)
            await until(theirs.done)
            assert theirs.cancelled()
        assert (await on(first, run(first, ours["ticket"], [1], [0])))["status"] == "committed"
        assert (await on(first, turn(first, session, [2], [0])))["version"] == 2
        assert second.leases.held == 0

    drive_two(place, scenario)


REST: Any = (np.asarray([9], np.int32), None, False)


def test_a_lease_is_renewed_while_its_request_runs(place: str, session: str) -> None:
    other = somebody_else(place)
    assert other.leases is not None
    leases = other.leases

    async def scenario(first: SessionService, second: SessionService) -> None:
        ours = await on(first, admit(first, session, [1]))
        least = 6.0

        def renewed() -> bool:
            nonlocal least
            found = leases.acquire(key(session))
            assert not found.ours
            least = min(least, found.seconds)
            return found.seconds > least + 0.5

        await until(renewed)
        assert least > 2, "renewed at the last moment"
        assert (await on(first, run(first, ours["ticket"], [1], [0])))["status"] == "committed"

    drive_two(place, scenario, lease="6")
    other.close()


def test_a_stop_gives_everything_back(place: str, session: str) -> None:
    other = somebody_else(place)
    assert other.leases is not None

    async def scenario(first: SessionService, second: SessionService) -> None:
        assert other.leases is not None
        await on(first, admit(first, session, [1]))
        await on(second, admit(second, f"{session}-2", [1]))
        assert not other.leases.acquire(key(session)).ours

    drive_two(place, scenario, lease="600")
    assert other.leases.renew([key(session), key(f"{session}-2")]) == []
    other.close()


@pytest.mark.parametrize("successor", ["commits", "gives up"])
def test_who_lost_its_lease_cannot_commit(place: str, session: str, successor: str) -> None:
    """As after a long pause, or a crash of the store that lost the leases."""

    async def scenario(first: SessionService, second: SessionService) -> None:
        await on(first, turn(first, session, [1], [0]))
        ours = await on(first, admit(first, session, [2]))
        with psycopg.connect(place.replace("?retry=1", ""), autocommit=True) as admin:
            admin.execute("DELETE FROM deltamem_leases")
        theirs = await on(second, admit(second, session, [3]))
        outcome = await on(first, run(first, ours["ticket"], [2], [0]))
        assert outcome["status"] == "conflict"
        assert "another server, whose lease" in outcome["error"]
        if successor == "commits":
            assert (await on(second, run(second, theirs["ticket"], [3], [0])))["status"] == "committed"
            np.testing.assert_array_equal(end_of(first, session), memory(None, [1, 3]))
        else:
            assert second.claim(theirs["ticket"])
            second.end(theirs["ticket"], "aborted")
        assert (await on(first, turn(first, session, [4], [0])))["status"] == "committed"

    drive_two(place, scenario)


def test_a_deletion_waits_for_nobody(place: str, session: str) -> None:
    async def scenario(first: SessionService, second: SessionService) -> None:
        await on(first, turn(first, session, [1], [0]))
        ours = await on(first, admit(first, session, [2]))
        assert await on(second, second.delete(key(session)))
        fresh = await on(second, turn(second, session, [3], [0]))
        assert (fresh["status"], fresh["version"]) == ("committed", 1)
        assert (await on(first, run(first, ours["ticket"], [2], [0])))["status"] == "conflict"
        np.testing.assert_array_equal(end_of(second, session), memory(None, [3]))
        assert (await on(first, turn(first, session, [4], [0])))["version"] == 2

    drive_two(place, scenario)


def test_a_busy_server_lets_others_have_their_turn(place: str, session: str) -> None:
    """Both servers have a queue for the session that never runs empty."""
    order: list[int] = []

    async def scenario(first: SessionService, second: SessionService) -> None:
        async def client(number: int, service: SessionService) -> None:
            for _ in range(8):
                granted = await on(service, admit(service, session, [number]))
                await asyncio.sleep(0.05)  # what an answer takes at the least
                outcome = await on(service, run(service, granted["ticket"], [number], [0]))
                assert outcome["status"] == "committed"
                order.append(number)

        await asyncio.gather(*(client(number, service) for number, service in enumerate([first, second] * 3)))

    drive_two(place, scenario, queue_seconds=25.0)
    assert sorted(order) == sorted([*range(6)] * 8)
    servers = [number % 2 for number in order]
    longest = max(len(list(group)) for _, group in itertools.groupby(servers))
    assert longest < 24, "one server had all its turns before the other had one"
    print(f"at most {longest} turns in a row on one server of two that were both busy")


def test_catches_a_server_that_keeps_its_lease(place: str, session: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PLANTED BUG: a lease stays as long as its server has requests."""
    monkeypatch.setattr(engine_leases, "MAX_TURNS", 1000)
    with pytest.raises(AssertionError, match="one server had all its turns"):
        test_a_busy_server_lets_others_have_their_turn(place, session)


@pytest.mark.parametrize("successor", ["commits", "gives up"])
def test_while_the_store_is_away_requests_go_on(place: str, session: str, successor: str) -> None:
    """The first server cannot reach the store for longer than its lease; the second one can."""
    proxy = Proxy(int(place.split("@127.0.0.1:")[1].split("/")[0]))
    away = place.replace(f":{proxy.target}/", f":{proxy.port}/").replace("retry=1", "retry=0.2&lease=1")

    async def scenario(first: SessionService, second: SessionService) -> None:
        assert (await on(first, turn(first, session, [1], [0])))["status"] == "committed"
        ours = await on(first, admit(first, session, [2]))
        proxy.down = True
        proxy.cut()
        assert (await on(first, run(first, ours["ticket"], [2], [0])))["status"] == "degraded"
        start = time.monotonic()
        assert (await on(first, turn(first, session, [3], [0])))["status"] == "degraded"
        assert time.monotonic() - start < 3
        theirs = await on(second, admit(second, session, [5]))  # once the lease has run out
        proxy.down = False
        here = first.directory.get(key(session))
        if successor == "commits":
            outcome = await on(second, run(second, theirs["ticket"], [5], [0]))
            assert (outcome["status"], outcome["version"]) == ("committed", 2)
            await until(lambda: not here.unsaved)
            expected = [1, 5]
        else:
            await asyncio.sleep(1.5)  # the first one tries to save what waits
            assert len(here.unsaved) == 2, "what waits must not be given up for a request that may fail"
            assert second.claim(theirs["ticket"])
            second.end(theirs["ticket"], "aborted")
            await until(lambda: not here.unsaved)
            expected = [1, 2, 3]
        np.testing.assert_array_equal(end_of(second, session), memory(None, expected))
        assert (await on(first, turn(first, session, [7], [0])))["status"] == "committed"
        np.testing.assert_array_equal(end_of(second, session), memory(None, [*expected, 7]))
        await until(lambda: first.leases.held == second.leases.held == 0)

    drive_services(make_service(away), make_service(f"{place}&lease=1"), scenario)
    proxy.close()
