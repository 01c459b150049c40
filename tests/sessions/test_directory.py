"""Who owns a session, who waits, who is told to come back; and what the directory forgets."""

import asyncio

import pytest

from deltamem_vllm.errors import CapacityError
from deltamem_vllm.sessions.directory import Directory, Session
from deltamem_vllm.store.protocol import SessionKey
from tests.store.records import record

KEY = SessionKey("tenant", "session")


def test_waiters_come_in_order() -> None:
    async def scenario() -> list[str]:
        session, order = Session(KEY), []

        async def work(name: str) -> None:
            await session.acquire(name, depth=8, seconds=5)
            order.append(name)
            await asyncio.sleep(0.001)
            session.release(name)

        tasks = []
        for i in range(8):
            tasks.append(asyncio.create_task(work(f"{i}")))
            await asyncio.sleep(0)
        await asyncio.gather(*tasks)
        assert session.idle
        return order

    assert asyncio.run(scenario()) == [f"{i}" for i in range(8)]


def test_a_newcomer_does_not_overtake_a_waiter() -> None:
    async def scenario() -> None:
        session = Session(KEY)
        await session.acquire("a", 8, 5)
        second = asyncio.create_task(session.acquire("b", 8, 5))
        await asyncio.sleep(0)
        session.release("a")  # "b" owns it from here on, though its task has not run yet
        assert session.owner == "b"
        third = asyncio.create_task(session.acquire("c", 8, 5))
        await second
        assert not third.done()
        session.release("b")
        await third
        assert session.owner == "c"

    asyncio.run(scenario())


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_the_queue_has_a_depth(depth: int) -> None:
    async def scenario() -> None:
        session = Session(KEY)
        await session.acquire("owner", depth, 5)
        waiting = [asyncio.create_task(session.acquire(f"{i}", depth, 5)) for i in range(depth)]
        await asyncio.sleep(0)
        with pytest.raises(CapacityError, match=f"{depth} requests wait for it already.*--deltamem-queue-depth") as e:
            await session.acquire("one too many", depth, 5)
        assert (e.value.status, e.value.retry_after) == (409, 1.0)
        session.release("owner")
        for i, task in enumerate(waiting):
            await task
            session.release(f"{i}")
        assert session.idle

    asyncio.run(scenario())


def test_waiting_has_a_deadline_and_leaves_no_trace() -> None:
    async def scenario() -> None:
        session = Session(KEY)
        await session.acquire("owner", 8, 5)
        with pytest.raises(CapacityError, match=r"stayed busy for 0\.02 s.*--deltamem-queue-seconds") as e:
            await session.acquire("late", 8, 0.02)
        assert e.value.status == 409
        session.release("owner")
        assert session.idle, "the one who gave up must not be handed the session"

    asyncio.run(scenario())


def test_a_cancelled_waiter_steps_out_of_the_line() -> None:
    async def scenario() -> None:
        session = Session(KEY)
        await session.acquire("owner", 8, 5)
        gone = asyncio.create_task(session.acquire("gone", 8, 5))
        behind = asyncio.create_task(session.acquire("behind", 8, 5))
        await asyncio.sleep(0)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        session.release("owner")
        await behind
        assert session.owner == "behind"

    asyncio.run(scenario())


def test_cancelled_in_the_moment_its_turn_comes_the_session_is_not_lost() -> None:
    async def scenario() -> None:
        session = Session(KEY)
        await session.acquire("owner", 8, 5)
        gone = asyncio.create_task(session.acquire("gone", 8, 5))
        behind = asyncio.create_task(session.acquire("behind", 8, 5))
        await asyncio.sleep(0)
        session.release("owner")
        gone.cancel()  # its turn has come, but it has not run yet
        with pytest.raises(asyncio.CancelledError):
            await gone
        await asyncio.wait_for(behind, 1)
        assert session.owner == "behind"

    asyncio.run(scenario())


def test_only_the_owner_releases() -> None:
    async def scenario() -> None:
        session = Session(KEY)
        await session.acquire("owner", 8, 5)
        session.release("stranger")
        assert session.owner == "owner"
        session.release("owner")
        session.release("owner")
        assert session.idle

    asyncio.run(scenario())


def test_owned_keeps_on_success_and_releases_on_error() -> None:
    async def scenario() -> None:
        directory = Directory(budget=1)
        session = directory.get(KEY)
        async with directory.owned(session, "a", 8, 5):
            pass
        assert session.owner == "a"
        session.release("a")

        async def fail() -> None:
            async with directory.owned(session, "b", 8, 5):
                raise RuntimeError("the store is away")

        with pytest.raises(RuntimeError, match="the store is away"):
            await fail()
        assert session.idle

    asyncio.run(scenario())


def test_trim_drops_idle_sessions_oldest_first_and_no_others() -> None:
    async def scenario() -> None:
        one = record().base.nbytes + record().end.nbytes
        directory = Directory(budget=2 * one)
        keys = [SessionKey("tenant", f"{i}") for i in range(6)]
        for key in keys:
            directory.get(key).set_record(record(key=key))
        await directory.get(keys[0]).acquire("writer", 8, 5)  # now the most recently used, and busy
        directory.get(keys[1])
        await directory.get(keys[2]).acquire("writer", 8, 5)
        for _ in range(256):
            directory.trim()
        # By use: 3, 4, 5, 0, 1, 2. Four of them had to go; 0 and 2 are owned.
        assert [k.session for k in directory._sessions] == ["0", "2"]

    asyncio.run(scenario())


def test_erase_starts_another_life() -> None:
    session = Session(KEY)
    session.set_record(record())
    before = session.incarnation
    session.erase()
    assert (session.record, session.loaded, session.deletions) == (None, True, 1)
    assert session.incarnation != before
    session.forget()
    assert not session.loaded
