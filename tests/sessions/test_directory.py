"""Who owns a session, who waits, who is told to come back; and what the directory forgets."""

import asyncio
import time

import pytest

from deltamem_vllm.errors import CapacityError
from deltamem_vllm.sessions.directory import SESSION_BYTES, Directory, Session, Unsaved, size_of
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


ONE = SESSION_BYTES + size_of(record())


def known(directory: Directory) -> set[str]:
    return {key.session for key in directory._sessions}


def test_idle_sessions_are_dropped_oldest_first_and_no_others() -> None:
    async def scenario() -> None:
        directory = Directory(budget=6 * ONE)
        keys = [SessionKey("tenant", f"{i}") for i in range(10)]
        for key in keys[:6]:
            directory.get(key).set_record(record(key=key))
        assert known(directory) == set("012345")
        await directory.get(keys[0]).acquire("writer", 8, 5)
        directory.get(keys[2]).unsaved.append(Unsaved(record(key=keys[2]), None))
        directory.get(keys[1])  # by use: 3, 4, 5, 0, 2, 1; 0 is owned, 2 waits for the store
        for key in keys[6:]:
            directory.get(key).set_record(record(key=key))
            assert directory.used <= directory.budget
        assert known(directory) == set("026789")
        directory.get(keys[0]).release("writer")
        directory.get(keys[2]).unsaved.clear()
        for key in keys[3:6]:
            directory.get(key)
        assert directory.find(keys[9]) is not None
        assert directory.used <= directory.budget

    asyncio.run(scenario())


def test_the_budget_counts_what_comes_and_what_goes() -> None:
    directory = Directory(budget=100 * ONE)
    sessions = [directory.get(SessionKey("tenant", f"{i}")) for i in range(5)]
    assert directory.used == 5 * SESSION_BYTES
    for session in sessions:
        session.set_record(record(key=session.key))
    assert directory.used == 5 * ONE
    sessions[0].set_record(record(2, key=sessions[0].key))
    assert directory.used == 5 * ONE, "a new version takes the place of the one before"
    sessions[1].forget()
    sessions[2].erase()
    directory.drop(sessions[3])
    assert directory.used == 2 * SESSION_BYTES + 2 * ONE
    sessions[3].set_record(record())
    assert directory.used == 2 * SESSION_BYTES + 2 * ONE, "one that is known no more counts no more"


def test_what_was_just_asked_for_stays() -> None:
    """Were it dropped before its caller owns it, the next to ask would own another one of the same name."""

    async def scenario() -> None:
        directory = Directory(budget=1)
        for i in range(5):
            await directory.get(SessionKey("tenant", f"busy{i}")).acquire("writer", 8, 5)
        session = directory.get(KEY)
        assert directory.find(KEY) is session
        assert directory.get(KEY) is session

    asyncio.run(scenario())


def test_many_sessions_in_use_are_passed_over_a_few_at_a_time() -> None:
    async def scenario() -> None:
        directory = Directory(budget=10 * ONE)
        for i in range(1000):
            await directory.get(SessionKey("tenant", f"busy{i}")).acquire("writer", 8, 5)
        start = time.perf_counter()
        for i in range(2000):
            directory.get(SessionKey("tenant", f"idle{i}")).set_record(record())
        assert time.perf_counter() - start < 20, "each look must cost the same, however many are in use"
        assert len(directory) < 1200, "what is idle goes, behind whatever it stands"

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
