"""Changing a session outside of a generation: turns, conditions, durability, retries; with planted bugs."""

import asyncio
import secrets
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from deltamem_vllm.errors import CapacityError, PreconditionFailed, SessionError, StoreError, StoreUnavailable
from deltamem_vllm.sessions import changes
from deltamem_vllm.sessions.attributes import Attributes, pack, unpack
from deltamem_vllm.sessions.changes import Make, Match, blank, change, in_turn
from deltamem_vllm.sessions.service import SessionService
from deltamem_vllm.store.memory import MemoryStore
from deltamem_vllm.store.protocol import Record
from tests.sessions.harness import admit, drive, end_of, key, make_service, memory, run, turn

PROMPT, REPLY = [1, 2, 3], [4, 5]


def noting(text: str) -> Make:
    """A change that writes a word into the session's metadata; creates the session if need be."""

    def make(record: Record | None) -> Record:
        assert service_of_test is not None
        start = blank(service_of_test, key("s")) if record is None else record
        return replace(start, attributes=pack(Attributes(metadata={"note": text})))

    return make


service_of_test: SessionService | None = None


def driven(scenario, store="memory://", **options) -> None:  # type: ignore[no-untyped-def]
    global service_of_test
    service_of_test = make_service(store, **options)
    drive(service_of_test, scenario)


async def changed(service: SessionService, make: Make, if_match: Match = None) -> Record:
    return await change(service, key("s"), secrets.token_hex(8), make, if_match=if_match)


def test_a_change_is_the_next_version_and_keeps_what_it_does_not_touch() -> None:
    async def scenario(service: SessionService) -> None:
        await turn(service, "s", PROMPT, REPLY)
        before = end_of(service, "s")
        record = await changed(service, noting("a"))
        assert (record.version, unpack(record.attributes).metadata) == (2, {"note": "a"})
        stored = service.store.get(key("s"))
        assert stored is not None
        assert stored.attributes == record.attributes
        assert np.array_equal(stored.end, before)
        assert (await turn(service, "s", [*PROMPT, *REPLY, 6], REPLY))["version"] == 3
        stored = service.store.get(key("s"))
        assert stored is not None
        assert stored.attributes == record.attributes
        assert np.array_equal(stored.end, memory(None, [*PROMPT, *REPLY, 6, *REPLY[:-1]])), "the window went on"

    driven(scenario)


def test_a_turn_lasts_unless_what_follows_fails() -> None:
    async def scenario(service: SessionService) -> None:
        session = service.directory.get(key("s"))
        async with in_turn(service, session, "a"):
            pass
        assert session.owner == "a"
        session.release("a")
        with pytest.raises(RuntimeError, match="the store is away"):
            async with in_turn(service, session, "b"):
                raise RuntimeError("the store is away")
        assert session.idle

    driven(scenario)


def test_a_change_can_create_and_need_not_change() -> None:
    async def scenario(service: SessionService) -> None:
        with pytest.raises(SessionError, match="not found") as refused:
            await changed(service, lambda record: None)
        assert refused.value.status == 404
        assert (await changed(service, noting("a"))).version == 1
        assert (await changed(service, lambda record: None)).version == 1
        assert service.directory.get(key("s")).owner is None

    driven(scenario)


def test_a_change_waits_for_the_request_that_writes() -> None:
    async def scenario(service: SessionService) -> None:
        granted = await admit(service, "s", PROMPT)
        waiting = asyncio.ensure_future(changed(service, noting("a")))
        done, _ = await asyncio.wait({waiting}, timeout=0.1)
        assert not done
        assert (await run(service, granted["ticket"], PROMPT, REPLY))["version"] == 1
        record = await waiting
        assert record.version == 2
        assert np.array_equal(record.end, memory(None, [*PROMPT, *REPLY[:-1]]))

    driven(scenario)


def test_a_change_whose_turn_does_not_come_is_refused() -> None:
    async def scenario(service: SessionService) -> None:
        await admit(service, "s", PROMPT)
        with pytest.raises(CapacityError) as refused:
            await changed(service, noting("a"))
        assert refused.value.status == 409

    driven(scenario, queue_seconds=0.05)


def test_the_turn_comes_back_however_a_change_ends() -> None:
    def fails(record: Record | None) -> Record:
        raise SessionError("no", status=400)

    async def scenario(service: SessionService) -> None:
        with pytest.raises(SessionError, match="no"):
            await changed(service, fails)
        await changed(service, noting("a"))
        with pytest.raises(StoreError):
            await changed(service, lambda r: replace(r, end=np.full_like(r.end, np.nan)))  # type: ignore[union-attr]
        assert service.directory.get(key("s")).owner is None
        assert (await changed(service, noting("b"))).version == 2

    driven(scenario)


async def race(service: SessionService, count: int = 16) -> int:
    """How many of ``count`` changes from one version succeed."""
    version = (await changed(service, noting("start"))).version
    tries = [changed(service, noting(f"n{i}"), (version,)) for i in range(count)]
    outcomes = await asyncio.gather(*tries, return_exceptions=True)
    won = [each for each in outcomes if isinstance(each, Record)]
    assert all(each.version == version + 1 for each in outcomes if isinstance(each, PreconditionFailed))
    return len(won)


def test_of_changes_that_name_one_version_exactly_one_wins() -> None:
    async def scenario(service: SessionService) -> None:
        assert await race(service) == 1

    driven(scenario, queue_depth=16)


def test_planted_a_service_that_ignores_if_match_lets_all_win(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(service: SessionService) -> None:
        assert await race(service) > 1

    monkeypatch.setattr(changes, "check_match", lambda *args: None)
    driven(scenario, queue_depth=16)


def test_a_change_told_again_by_its_name_is_made_once() -> None:
    async def scenario(service: SessionService) -> None:
        first = await change(service, key("s"), "by-name", noting("a"))
        again = await change(service, key("s"), "by-name", noting("b"), if_match=(7,))
        assert (first.version, again.version) == (1, 1)
        assert unpack(again.attributes).metadata == {"note": "a"}

    driven(scenario)


class Away(MemoryStore):
    """A store that cannot be reached for a while, and that may have taken the last commit all the same."""

    away = False
    takes = False

    def put_many(self, puts):  # type: ignore[no-untyped-def]
        if self.away:
            if self.takes:
                super().put_many(puts)
            return [StoreUnavailable("away")] * len(puts)
        return super().put_many(puts)


@pytest.mark.parametrize("takes", [False, True])
def test_while_the_store_is_away_nothing_is_changed_or_told(takes: bool) -> None:
    store = Away()

    async def scenario(service: SessionService) -> None:
        await turn(service, "s", PROMPT, REPLY)
        store.away, store.takes = True, takes
        with pytest.raises(StoreUnavailable):
            await change(service, key("s"), "by-name", noting("a"))
        store.away = False
        session = service.directory.get(key("s"))
        assert (session.owner, len(session.unsaved)) == (None, 0)
        again = await change(service, key("s"), "by-name", noting("a"))
        assert again.version == 2
        assert (await turn(service, "s", [9], REPLY))["version"] == 3

    driven(scenario, store)


def test_a_change_goes_to_the_store_behind_versions_that_wait() -> None:
    store = Away()

    async def scenario(service: SessionService) -> None:
        await turn(service, "s", PROMPT, REPLY)
        store.away = True
        assert (await turn(service, "s", [7], REPLY))["status"] == "degraded"
        with pytest.raises(StoreUnavailable):
            await changed(service, noting("a"))
        assert len(service.directory.get(key("s")).unsaved) == 1, "the version that was told still waits"
        store.away = False
        record = await changed(service, noting("b"))
        assert record.version == 3
        assert np.array_equal(record.end, memory(memory(None, [*PROMPT, 4]), [7, 4]))
        assert service.commits.lost == 0

    driven(scenario, store)


def test_a_session_deleted_while_it_is_changed_stays_deleted(tmp_path: Path) -> None:
    async def scenario(service: SessionService) -> None:
        await turn(service, "s", PROMPT, REPLY)
        check = service.quotas.check

        async def deleted_meanwhile(*args) -> None:  # type: ignore[no-untyped-def]
            await service.delete(key("s"))
            await check(*args)

        service.quotas.check = deleted_meanwhile  # type: ignore[method-assign]
        with pytest.raises(CapacityError, match="deleted") as refused:
            await changed(service, noting("a"))
        assert refused.value.status == 409
        assert service.store.get(key("s")) is None

    driven(scenario, f"sqlite:///{tmp_path}/s.db")
