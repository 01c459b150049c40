"""Other writers, other servers, and states that must not be stored."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec import structs

from deltamem_vllm import metrics
from deltamem_vllm.errors import SessionError
from deltamem_vllm.sessions.service import SessionService
from deltamem_vllm.store.parts import MAX_ABS
from deltamem_vllm.store.protocol import Record
from tests.sessions.harness import admit, drive, end_of, key, make_service, memory, run, turn


@pytest.fixture(params=["memory", "sqlite"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return "memory://" if request.param == "memory" else f"sqlite:///{tmp_path}/s.db"


def test_an_outside_writer_is_noticed_and_then_followed(store_url: str) -> None:
    async def scenario(service: SessionService) -> None:
        await turn(service, "s", [1, 2], [0])
        granted = await admit(service, "s", [3])
        outside = service.store.get(key("s"))
        assert outside is not None
        moved = make_record(outside, version=2, end=memory(outside.end, [77]))
        service.store.put(moved, outside.expect)
        outcome = await run(service, granted["ticket"], [3], [0])
        assert outcome["status"] == "conflict"
        assert outcome["version"] == 1, "the version it had started from"
        np.testing.assert_array_equal(end_of(service, "s"), moved.end)
        assert (await turn(service, "s", [3], [0]))["version"] == 3
        np.testing.assert_array_equal(end_of(service, "s"), memory(moved.end, [3]))

    drive(make_service(store_url), scenario)


def make_record(record: Record, **changes: Any) -> Record:

    return structs.replace(record, request_id="another server", **changes)


@pytest.mark.parametrize("what", ["adapter", "model", "layout"])
def test_a_memory_of_another_server_is_refused_and_kept(what: str, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/s.db"

    async def write(service: SessionService) -> None:
        await turn(service, "s", [1, 2], [0])

    async def refuse(service: SessionService) -> None:
        for mode in ("readwrite", "read"):
            with pytest.raises(SessionError, match=f"written with {what} .* delete the session") as e:
                await admit(service, "s", [3], mode)
            assert e.value.status == 422
        with pytest.raises(SessionError, match=what):
            await service.info(key("s"))
        assert (await turn(service, "t", [1], [0]))["version"] == 1
        np.testing.assert_array_equal(end_of(service, "s"), memory(None, [1, 2]))
        with pytest.raises(SessionError, match=what):  # still: it was not made free for all by the refusal
            await admit(service, "s", [3])

    drive(make_service(url), write)
    changed: dict[str, Any] = {"adapter": "another", "model": "another", "layout": "L1H1r2"}
    options = {what: changed[what]} | ({"state_shape": (1, 1, 2, 2)} if what == "layout" else {})
    other = make_service(url, **options)

    async def refuse_and_delete(service: SessionService) -> None:
        if what == "layout":
            with pytest.raises(SessionError, match="layout"):
                await admit(service, "s", [3])
        else:
            await refuse(service)
        assert await service.delete(key("s")), "the remedy that the message names"
        assert (await admit(service, "s", [3]))["version"] == 0

    drive(other, refuse_and_delete)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, -1.001 * MAX_ABS])
def test_a_state_that_is_not_finite_is_refused(bad: float) -> None:
    """Or nearly so. It is the adapter's doing, and no error of the store."""

    async def scenario(service: SessionService) -> None:
        await turn(service, "s", [1, 2], [0])
        granted = await admit(service, "s", [3])
        service.claim(granted["ticket"])
        state = memory(None, [1])
        state[0, 0, 0, 1] = bad
        service.commit(granted["ticket"], [3], state)
        outcome = await service.outcome(granted["ticket"])
        assert outcome["status"] == "failed"
        assert "not finite" in outcome["error"]
        assert metrics.STORE_ERRORS.name not in {name for name, _, _ in service.meters.samples()}
        np.testing.assert_array_equal(end_of(service, "s"), memory(None, [1, 2]))
        assert (await turn(service, "s", [4], [0]))["version"] == 2

    drive(make_service(), scenario)


def test_tokens_that_are_not_the_plans_are_refused() -> None:
    async def scenario(service: SessionService) -> None:
        await turn(service, "s", [1, 2], [3, 4])
        granted = await admit(service, "s", [1, 2, 3, 5])
        service.claim(granted["ticket"])
        service.commit(granted["ticket"], [9, 9, 9, 9], memory(None, []))
        outcome = await service.outcome(granted["ticket"])
        assert outcome["status"] == "failed"
        assert "do not begin with" in outcome["error"]
        np.testing.assert_array_equal(end_of(service, "s"), memory(None, [1, 2, 3]))

    drive(make_service(), scenario)
