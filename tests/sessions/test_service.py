"""The session service on its own loop: admission, commits, and everything that can come between them."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from msgspec import structs

from deltamem_vllm.errors import CapacityError, SessionError
from deltamem_vllm.sessions import tickets as tickets_module
from deltamem_vllm.sessions.service import SessionService
from deltamem_vllm.store.memory import MemoryStore
from deltamem_vllm.store.protocol import Outcomes, Put
from tests.sessions.harness import admit, drive, end_of, ids, key, make_service, memory, run, turn


@pytest.fixture(params=["memory", "sqlite"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return "memory://" if request.param == "memory" else f"sqlite:///{tmp_path}/s.db"


# --- one session ------------------------------------------------------------------------------------------------------


def test_a_conversation(store_url: str) -> None:
    async def scenario(service: SessionService) -> None:
        assert await service.info(key("s")) is None
        first = await turn(service, "s", [1, 2, 3], [4, 5])
        assert first == {"status": "committed", "version": 1, "error": "", "session": "s"}
        info = await service.info(key("s"))
        assert info is not None
        assert (info["version"], info["tokens"], info["windows"], info["window_tokens"]) == (1, 4, 1, 4)
        assert info["state_bytes"] == memory(None, []).nbytes
        assert not info["busy"]

        grown = await admit(service, "s", [1, 2, 3, 4, 5, 6])  # everything resent, and one more
        assert (grown["window"], grown["matched"], grown["version"]) == ("extend", 4, 1)
        assert (await run(service, grown["ticket"], [1, 2, 3, 4, 5, 6], [7]))["version"] == 2
        np.testing.assert_array_equal(end_of(service, "s"), memory(None, [1, 2, 3, 4, 5, 6]))

        fresh = await admit(service, "s", [9, 9])
        assert (fresh["window"], fresh["matched"]) == ("new", 0)
        assert (await run(service, fresh["ticket"], [9, 9], [8]))["version"] == 3
        np.testing.assert_array_equal(end_of(service, "s"), memory(None, [1, 2, 3, 4, 5, 6, 9, 9]))
        info = await service.info(key("s"))
        assert info is not None
        assert (info["tokens"], info["windows"], info["window_tokens"]) == (8, 2, 2)

    drive(make_service(store_url), scenario)


def test_turns_keep_what_belongs_to_the_session_besides_its_memory(store_url: str) -> None:
    async def scenario(service: SessionService) -> None:
        await turn(service, "s", [1, 2, 3], [4, 5])
        made = service.store.get(key("s"))
        assert made is not None
        assert made.attributes == b""
        told = structs.replace(made, version=2, request_id="told", attributes=b"pinned facts")
        service.store.put(told, made.expect)
        for prompt in ([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 7], [9, 9]):  # extends, replaces, opens a window
            assert (await turn(service, "s", prompt, [8]))["status"] == "committed"
            found = service.store.get(key("s"))
            assert found is not None
            assert found.attributes == b"pinned facts"
        assert found.version == 5

    drive(make_service(store_url), scenario)


def test_a_retry_leaves_what_one_request_leaves(store_url: str) -> None:
    async def scenario(service: SessionService) -> None:
        for _ in range(3):
            await turn(service, "s", [1, 2, 3], [4, 5])
        np.testing.assert_array_equal(end_of(service, "s"), memory(None, [1, 2, 3, 4]))
        info = await service.info(key("s"))
        assert info is not None
        assert (info["version"], info["tokens"], info["windows"]) == (3, 4, 1)

    drive(make_service(store_url), scenario)


def test_reading_changes_nothing_and_owns_nothing(store_url: str) -> None:
    async def scenario(service: SessionService) -> None:
        await turn(service, "s", [1, 2, 3], [4])
        writer = await admit(service, "s", [7])
        reads = [await admit(service, "s", [5], "read") for _ in range(20)]  # beside a writer, and beyond any depth
        for granted in reads:
            grant = service.claim(granted["ticket"])
            assert grant is not None
            assert not grant.commits
            np.testing.assert_array_equal(grant.base, memory(None, [1, 2, 3]))
            assert grant.write_limit == 0
            service.end(grant.ticket, "unchanged")
            outcome = await service.outcome(grant.ticket)
            assert (outcome["status"], outcome["version"]) == ("unchanged", 1)
        assert (await run(service, writer["ticket"], [7], [8]))["version"] == 2

    drive(make_service(store_url, queue_depth=0), scenario)


def test_a_reader_that_extends_the_window_writes_only_what_was_written() -> None:
    async def scenario(service: SessionService) -> None:
        await turn(service, "s", [1, 2, 3], [4])
        granted = await admit(service, "s", [1, 2, 3, 4, 5], "read")
        grant = service.claim(granted["ticket"])
        assert grant is not None
        assert (grant.base, grant.write_limit) == (None, 3)
        writer = await admit(service, "s", [1, 2, 3, 4, 5])
        assert writer["salt"] != granted["salt"]

    drive(make_service(), scenario)


def test_two_writers_in_order(store_url: str) -> None:
    async def scenario(service: SessionService) -> None:
        first = await admit(service, "s", [1, 2])
        waiting = asyncio.create_task(admit(service, "s", [3, 4]))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        assert (await run(service, first["ticket"], [1, 2], [0]))["version"] == 1
        second = await waiting
        assert second["version"] == 1, "the second must start from what the first left"
        assert (await run(service, second["ticket"], [3, 4], [0]))["version"] == 2
        np.testing.assert_array_equal(end_of(service, "s"), memory(None, [1, 2, 3, 4]))

    drive(make_service(store_url), scenario)


def test_many_writers_lose_no_turn(store_url: str) -> None:
    async def scenario(service: SessionService) -> None:
        outcomes = await asyncio.gather(*(turn(service, f"s{i % 4}", [10 + i, 100 + i], [0]) for i in range(32)))
        assert {o["status"] for o in outcomes} == {"committed"}
        for s in range(4):
            assert sorted(o["version"] for o in outcomes if o["session"] == f"s{s}") == list(range(1, 9))
            tokens = [t for i in range(s, 32, 4) for t in (10 + i, 100 + i)]
            np.testing.assert_array_equal(end_of(service, f"s{s}"), memory(None, tokens))

    drive(make_service(store_url), scenario)


def test_beyond_the_depth_and_the_deadline() -> None:
    async def scenario(service: SessionService) -> None:
        owner = await admit(service, "s", [1])
        waiting = asyncio.create_task(admit(service, "s", [2]))
        await asyncio.sleep(0)
        with pytest.raises(CapacityError, match="1 requests wait"):
            await admit(service, "s", [3])
        with pytest.raises(CapacityError, match=r"stayed busy for 0\.2 s"):
            await waiting
        assert (await run(service, owner["ticket"], [1], [9]))["status"] == "committed"
        assert (await turn(service, "s", [4], [9]))["version"] == 2

    drive(make_service(queue_depth=1, queue_seconds=0.2), scenario)


def test_salts_follow_the_memory() -> None:
    async def scenario(service: SessionService) -> None:
        empty = await admit(service, "s", [1, 2], "read")
        again = await admit(service, "s", [1, 2], "read")
        other = await admit(service, "t", [1, 2], "read")
        assert empty["salt"] == again["salt"] != other["salt"]
        await turn(service, "s", [5, 6], [0])
        grown = await admit(service, "s", [1, 2], "read")
        assert grown["salt"] != empty["salt"], "blocks made from the old memory must not serve the new one"
        theirs = await service.admit("theirs", key("s"), "read", ids([1, 2]), "client's", False)
        assert theirs["salt"] != grown["salt"]

    drive(make_service(), scenario)


# --- tickets ----------------------------------------------------------------------------------------------------------


def test_a_ticket_is_claimed_once() -> None:
    async def scenario(service: SessionService) -> None:
        granted = await admit(service, "s", [1])
        assert service.claim(granted["ticket"]) is not None
        assert service.claim(granted["ticket"]) is None
        assert service.claim("made up") is None

    drive(make_service(), scenario)


def test_a_reading_ticket_serves_all_samples_of_its_request() -> None:
    async def scenario(service: SessionService) -> None:
        ticket = (await admit(service, "s", [1], "read"))["ticket"]
        assert service.claim(ticket) is service.claim(ticket) is not None
        service.end(ticket, "unchanged")
        await service.outcome(ticket)
        assert service.claim(ticket) is None

    drive(make_service(), scenario)


def test_a_ticket_cannot_be_used_for_two_requests() -> None:
    async def scenario(service: SessionService) -> None:
        await service.admit("ticket", key("s"), "readwrite", ids([1]), None, False)
        with pytest.raises(SessionError, match="in use"):
            await service.admit("ticket", key("t"), "readwrite", ids([1]), None, False)
        assert service.directory.get(key("t")).idle

    drive(make_service(), scenario)


@pytest.mark.parametrize("ticks", range(8))
def test_a_request_withdrawn_while_it_waits_never_holds_the_session(ticks: int) -> None:
    """At whatever moment around its turn the word comes."""

    async def scenario(service: SessionService) -> None:
        owner = await admit(service, "s", [1])
        waiting = asyncio.create_task(service.admit("gone", key("s"), "readwrite", ids([2]), None, False))
        await asyncio.sleep(0.01)
        service.give_verdict(owner["ticket"], None)  # hands the session on
        for _ in range(ticks):
            await asyncio.sleep(0)
        service.give_verdict("gone", None)
        await asyncio.wait({waiting})
        assert (await asyncio.wait_for(admit(service, "s", [3]), 2))["version"] == 0

    drive(make_service(), scenario)


def test_an_unclaimed_ticket_is_withdrawn_on_word_of_the_api_process() -> None:
    async def scenario(service: SessionService) -> None:
        granted = await admit(service, "s", [1])
        waiting = asyncio.create_task(admit(service, "s", [2]))
        await asyncio.sleep(0)
        service.give_verdict(granted["ticket"], None)
        assert (await asyncio.wait_for(waiting, 1))["version"] == 0
        assert service.claim(granted["ticket"]) is None, "a withdrawn ticket must not run"
        assert (await service.outcome(granted["ticket"]))["status"] == "aborted"

    drive(make_service(), scenario)


def test_an_unclaimed_ticket_expires(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tickets_module, "CLAIM_SECONDS", 0.1)

    async def scenario(service: SessionService) -> None:
        granted = await admit(service, "s", [1])
        assert (await turn(service, "s", [2], [0]))["version"] == 1
        assert service.claim(granted["ticket"]) is None
        outcome = await service.outcome(granted["ticket"])
        assert outcome["status"] == "aborted"
        assert "not claimed within 0.1 s" in outcome["error"]

    drive(make_service(), scenario)


def test_a_verdict_waits_for_the_scheduler_and_withdraws_nothing_that_runs() -> None:
    async def scenario(service: SessionService) -> None:
        granted = await admit(service, "s", [1, 2], held=True)
        grant = service.claim(granted["ticket"])
        assert grant is not None
        assert grant.held_for_verdict
        assert service.verdict(grant.ticket) == (False, None)
        service.give_verdict(grant.ticket, 3)
        assert service.verdict(grant.ticket) == (True, 3)
        service.give_verdict("made up", 3)
        assert service.verdict("made up") == (True, None), "an unknown ticket must not be waited for"
        other = await admit(service, "t", [1])
        service.claim(other["ticket"])
        service.give_verdict(other["ticket"], None)
        assert service.directory.get(key("t")).owner == other["ticket"], "it runs; its end comes from the scheduler"
        service.end(other["ticket"], "aborted")
        assert (await service.outcome(other["ticket"]))["status"] == "aborted"

    drive(make_service(), scenario)


@pytest.mark.parametrize("status", ["aborted", "failed", "unchanged"])
def test_an_end_without_a_commit_frees_the_session(status: str) -> None:
    async def scenario(service: SessionService) -> None:
        await turn(service, "s", [1], [0])
        granted = await admit(service, "s", [2])
        service.claim(granted["ticket"])
        service.end(granted["ticket"], status, "why")
        outcome = await service.outcome(granted["ticket"])
        assert outcome == {"status": status, "version": 1, "error": "why", "session": "s"}
        assert (await service.outcome(granted["ticket"]))["status"] == "unknown", "an outcome is told once"
        assert (await turn(service, "s", [3], [0]))["version"] == 2

    drive(make_service(), scenario)


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
        assert set(service.erased) == {key("s")}, "the pool must be told whose states to zero"
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
        import threading

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
