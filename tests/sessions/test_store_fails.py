"""A store that fails: what the client is told, what goes on, what is brought there later, what is lost."""

import asyncio
import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec import structs

from deltamem_vllm.errors import CapacityError, CorruptRecord, StaleVersion, StoreUnavailable
from deltamem_vllm.sessions import commits
from deltamem_vllm.sessions.service import SessionService
from deltamem_vllm.store.memory import MemoryStore
from deltamem_vllm.store.protocol import Expect, Outcomes, Put, Record
from tests.sessions.harness import SHAPE, admit, drive, end_of, key, make_service, memory, run, turn


@pytest.fixture(params=["memory", "sqlite"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return "memory://" if request.param == "memory" else f"sqlite:///{tmp_path}/s.db"


class Faulty(MemoryStore):
    """Fails on demand, on either way."""

    def __init__(self) -> None:
        super().__init__()
        self.put_error: Exception | None = None
        self.get_error: Exception | None = None
        self.applies = False  # whether a failing put has been applied all the same (I/O error at COMMIT)

    def put_many(self, puts: Sequence[Put]) -> Outcomes:
        if self.put_error is None:
            return super().put_many(puts)
        if self.applies:
            super().put_many(puts)
        return [self.put_error] * len(puts)  # type: ignore[list-item]

    def get(self, wanted: Any) -> Record | None:
        if self.get_error is not None:
            raise self.get_error
        return super().get(wanted)


@pytest.mark.parametrize("applies", [False, True])
def test_the_session_goes_on_and_its_versions_arrive_later(applies: bool, caplog: pytest.LogCaptureFixture) -> None:
    store = Faulty()

    async def scenario(service: SessionService) -> None:
        await turn(service, "s", [1, 2], [0])
        store.put_error, store.applies = StoreUnavailable("the disk is full. Free space"), applies
        with caplog.at_level(logging.ERROR, "vllm.deltamem"):
            outcome = await turn(service, "s", [3], [0])
        assert (outcome["status"], outcome["version"]) == ("degraded", 2)
        assert "the disk is full" in outcome["error"]
        assert "the disk is full" in caplog.text
        assert (await turn(service, "s", [4], [0]))["status"] == "degraded"
        found = await service.info(key("s"))
        assert found is not None
        assert (found["version"], found["durable"]) == (3, False)
        assert not service.directory.get(key("s")).idle, "what exists only here must not be dropped"
        store.put_error = None
        await service.commits.save_waiting()
        assert service.commits.unsaved == 0
        kept = store.get(key("s"))
        assert kept is not None
        assert kept.version == 3
        assert (await turn(service, "s", [5], [0]))["version"] == 4
        np.testing.assert_array_equal(end_of(service, "s"), memory(None, [1, 2, 3, 4, 5]))

    drive(make_service(store), scenario)


def test_a_commit_after_the_outage_brings_the_waiting_ones_first() -> None:
    store = Faulty()

    async def scenario(service: SessionService) -> None:
        store.put_error = StoreUnavailable("away")
        assert (await turn(service, "s", [1], [0]))["status"] == "degraded"
        store.put_error = None
        outcome = await turn(service, "s", [2], [0])
        assert (outcome["status"], outcome["version"]) == ("committed", 2)
        np.testing.assert_array_equal(end_of(service, "s"), memory(None, [1, 2]))

    drive(make_service(store), scenario)


def test_the_retries_run_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commits, "RETRY_SECONDS", 0.01)
    store = Faulty()

    async def scenario(service: SessionService) -> None:
        store.put_error = StoreUnavailable("away")
        await turn(service, "s", [1], [0])
        store.put_error = None
        for _ in range(200):
            if service.commits.unsaved == 0:
                break
            await asyncio.sleep(0.01)
        kept = store.get(key("s"))
        assert kept is not None
        assert kept.version == 1

    drive(make_service(store), scenario)


def test_another_writer_meanwhile_is_a_conflict_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    store = Faulty()

    async def scenario(service: SessionService) -> None:
        await turn(service, "s", [1], [0])
        before = store.get(key("s"))
        assert before is not None
        store.put_error = StoreUnavailable("away")
        await turn(service, "s", [2], [0])
        store.put_error = None
        store.put(structs.replace(before, version=2, request_id="theirs"), before.expect)
        with caplog.at_level(logging.ERROR, "vllm.deltamem"):
            await service.commits.save_waiting()
        assert "1 version(s) of a session are lost" in caplog.text
        assert (service.commits.unsaved, service.commits.lost) == (0, 1)
        found = await service.info(key("s"))
        assert found is not None
        assert (found["version"], found["lost"], found["durable"]) == (2, 1, True)
        assert (await turn(service, "s", [3], [0]))["version"] == 3, "it goes on from what the store has"

    drive(make_service(store), scenario)


def test_too_many_waiting_versions_refuse_further_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commits, "MAX_UNSAVED", 2)
    store = Faulty()

    async def scenario(service: SessionService) -> None:
        store.put_error = StoreUnavailable("away")
        for token in (1, 2):
            assert (await turn(service, "s", [token], [0]))["status"] == "degraded"
        with pytest.raises(CapacityError, match="wait for the store") as refused:
            await admit(service, "s", [3])
        assert refused.value.status == 503
        assert service.directory.get(key("s")).owner is None
        store.put_error = None
        await service.commits.save_waiting()
        assert (await turn(service, "s", [3], [0]))["version"] == 3

    drive(make_service(store), scenario)


def test_a_deletion_takes_the_waiting_versions_with_it() -> None:
    store = Faulty()

    async def scenario(service: SessionService) -> None:
        await turn(service, "s", [1], [0])
        store.put_error = StoreUnavailable("away")
        await turn(service, "s", [2], [0])
        store.put_error = None
        assert await service.delete(key("s"))
        await service.commits.save_waiting()
        assert store.get(key("s")) is None

    drive(make_service(store), scenario)


def test_what_is_lost_at_the_end_is_said(caplog: pytest.LogCaptureFixture) -> None:
    store = Faulty()

    async def scenario(service: SessionService) -> None:
        store.put_error = StoreUnavailable("away")
        await turn(service, "s", [1], [0])

    with caplog.at_level(logging.ERROR, "vllm.deltamem"):
        drive(make_service(store), scenario)
    assert "1 version(s) never reached the store and are lost" in caplog.text


@pytest.mark.parametrize("error", [StoreUnavailable("away"), CorruptRecord("checksum"), StaleVersion("moved")])
def test_a_store_that_cannot_be_read_refuses_and_frees_the_session(error: Exception) -> None:
    store = Faulty()

    async def scenario(service: SessionService) -> None:
        store.get_error = error
        for _ in range(3):
            with pytest.raises(type(error)):
                await admit(service, "s", [1])
        assert service.directory.get(key("s")).idle
        store.get_error = None
        assert (await turn(service, "s", [1], [0]))["version"] == 1

    drive(make_service(store), scenario)


@pytest.mark.parametrize("bug", ["raises", "answers too little"])
def test_a_bug_in_the_store_costs_its_commits_an_outcome_and_nobody_the_rest(
    bug: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(MemoryStore):
        """PLANTED BUG: stumbles over one session."""

        broken = True

        def put_many(self, puts: Sequence[Put]) -> Outcomes:
            if self.broken and any(record.key.session == "poison" for record, _ in puts):
                if bug == "raises":
                    raise ZeroDivisionError("a bug")
                return []
            return super().put_many(puts)

    store = Broken()

    async def scenario(service: SessionService) -> None:
        for number in range(3):
            poison, *others = await asyncio.gather(
                turn(service, "poison", [number], [0]), *(turn(service, f"s{i}", [number], [0]) for i in range(8))
            )
            assert (poison["status"], poison["version"]) == ("degraded", number + 1)
            assert "a bug in the store" in poison["error"]
            assert [(o["status"], o["version"]) for o in others] == [("committed", number + 1)] * 8
        await service.commits.save_waiting()
        assert service.commits.unsaved == 3
        store.broken = False
        await service.commits.save_waiting()
        assert (service.commits.unsaved, service.commits.lost) == (0, 0)
        np.testing.assert_array_equal(end_of(service, "poison"), memory(None, [0, 1, 2]))

    with caplog.at_level(logging.ERROR, "vllm.deltamem"):
        drive(make_service(store), scenario)
    assert "a bug in the store: 1 group(s)" in caplog.text


def test_a_state_that_cannot_be_saved_takes_no_waiting_version_with_it() -> None:
    store = Faulty()

    async def scenario(service: SessionService) -> None:
        store.put_error = StoreUnavailable("away")
        assert (await turn(service, "s", [1], [0]))["status"] == "degraded"
        granted = await admit(service, "s", [2])
        service.claim(granted["ticket"])
        service.commit(granted["ticket"], [2], np.full(SHAPE, np.nan, np.float32))
        assert (await service.outcome(granted["ticket"]))["status"] == "failed"
        store.put_error = None
        await service.commits.save_waiting()
        np.testing.assert_array_equal(end_of(service, "s"), memory(None, [1]))

    drive(make_service(store), scenario)


def test_deleting_what_only_this_process_has_is_a_deletion() -> None:
    store = Faulty()

    async def scenario(service: SessionService) -> None:
        store.put_error = StoreUnavailable("away")
        await turn(service, "s", [1], [0])
        assert await service.delete(key("s"))
        assert service.commits.unsaved == 0
        assert await service.info(key("s")) is None
        assert not await service.delete(key("s"))

    drive(make_service(store), scenario)


def test_a_reader_that_the_store_answers_late_does_not_take_the_session_back() -> None:
    class Late(Faulty):
        """Answers ``head`` as of when it was asked, when it is let."""

        glance = None  # type: ignore[assignment]

        def __init__(self) -> None:
            super().__init__()
            self.asked, self.answer = threading.Event(), threading.Event()
            self.late = False

        def head(self, wanted: Any) -> Expect | None:
            found = super().head(wanted)
            if self.late:
                self.late = False
                self.asked.set()
                assert self.answer.wait(20)
            return found

    store = Late()

    async def scenario(service: SessionService) -> None:
        await turn(service, "s", [1], [0])
        granted = await admit(service, "s", [2])
        store.late = True
        reading = asyncio.create_task(service.info(key("s")))
        await asyncio.to_thread(store.asked.wait, 20)
        store.put_error = StoreUnavailable("away")
        assert (await run(service, granted["ticket"], [2], [0]))["status"] == "degraded"
        store.answer.set()
        found = await reading
        assert found is not None
        assert found["version"] == 2, "what the reader was told is older than what the session has become"
        store.put_error = None
        assert (await turn(service, "s", [3], [0]))["version"] == 3
        np.testing.assert_array_equal(end_of(service, "s"), memory(None, [1, 2, 3]))

    drive(make_service(store), scenario)


def test_an_outage_cannot_fill_the_memory() -> None:
    store = Faulty()

    async def scenario(service: SessionService) -> None:
        store.put_error = StoreUnavailable("away")
        answers = [
            (await asyncio.gather(turn(service, f"s{i}", [i], [0]), return_exceptions=True))[0] for i in range(40)
        ]
        refused = [answer for answer in answers if isinstance(answer, CapacityError)]
        assert {(error.status, "--deltamem-host-bytes" in str(error)) for error in refused} == {(503, True)}
        degraded = [answer["status"] for answer in answers if isinstance(answer, dict)]
        assert set(degraded) == {"degraded"}
        assert service.commits.unsaved == len(degraded)
        store.put_error = None
        await service.commits.save_waiting()
        assert (await turn(service, "one more", [1], [0]))["status"] == "committed"

    drive(make_service(store, host_bytes=2000), scenario)
