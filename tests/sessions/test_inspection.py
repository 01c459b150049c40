"""A session's memory in numbers, on a real service."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deltamem_vllm.audit.chain import verify
from deltamem_vllm.audit.log import AuditLog
from deltamem_vllm.errors import SessionError, StoreUnavailable
from deltamem_vllm.sessions import inspection, management
from deltamem_vllm.sessions.inspection import state
from deltamem_vllm.sessions.service import SessionService
from tests.sessions.harness import SHAPE, drive, end_of, key, make_service, turn

FACT, REPLY = [1, 2, 3], [4, 5]


def values(found: Any) -> np.ndarray:
    return np.frombuffer(found["values"], np.float32).reshape(-1, *SHAPE[1:])


def test_it_is_the_memory_of_the_version_that_is_asked_for() -> None:
    async def scenario(service: SessionService) -> None:
        assert await state(service, key("s")) is None
        await turn(service, "s", FACT, REPLY)
        first = end_of(service, "s")
        await turn(service, "s", [*FACT, *REPLY, 6], [7])
        record = service.store.get(key("s"))
        assert record is not None
        now = await state(service, key("s"))
        assert now is not None
        assert (now["version"], now["shape"], now["tokens"]) == (2, SHAPE[:3], record.tokens)
        assert np.array_equal(values(now), record.end)
        assert now["norm"] == pytest.approx(np.linalg.norm(record.end))
        for each, end, base in zip(now["layers"], record.end, record.base, strict=True):
            assert each["norm"] == pytest.approx(np.linalg.norm(end))
            assert each["max"] == np.abs(end).max()
            assert each["change"] == pytest.approx(np.linalg.norm(end - base))
        before = await state(service, key("s"), version=1)
        assert before is not None
        assert (before["version"], np.array_equal(values(before), first)) == (1, True)
        with pytest.raises(SessionError, match="does not keep version 3") as e:
            await state(service, key("s"), version=3)
        assert e.value.status == 404
        assert (await management.versions(service, key("s")))[0]["version"] == 2, "nothing was changed"

    drive(make_service(), scenario)


def test_a_version_of_an_earlier_life_is_not_shown() -> None:
    async def scenario(service: SessionService) -> None:
        await turn(service, "s", FACT, REPLY)
        old = service.store.get(key("s"))
        assert old is not None
        await management.erase(service, key("s"))
        await turn(service, "s", [9], [8])
        now = await state(service, key("s"), version=1)
        assert now is not None
        assert not np.array_equal(values(now), old.end)

    drive(make_service(), scenario)


def test_an_answer_is_bounded_and_the_next_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(service: SessionService) -> None:
        await turn(service, "s", FACT, REPLY)
        for most in (1, 4, 7):
            monkeypatch.setattr(inspection, "MAX_VALUES", most)
            parts = [await state(service, key("s"), first=first) for first in range(3)]
            assert [len(values(part)) for part in parts] == [1, 1, 0]
            assert np.array_equal(np.concatenate([values(part) for part in parts]), end_of(service, "s"))
            assert all(part is not None and len(part["layers"]) == SHAPE[0] for part in parts)
        only_norms = await state(service, key("s"), values=False)
        assert only_norms is not None
        assert (len(only_norms["values"]), len(only_norms["layers"])) == (0, SHAPE[0])

    drive(make_service(), scenario)


def test_whoever_reads_values_is_in_the_audit_log(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "log", bytes(32), required=True)

    async def scenario(service: SessionService) -> None:
        await turn(service, "s", FACT, REPLY)
        await state(service, key("s"), values=False)
        assert '"event":"inspect"' not in (tmp_path / "log").read_text()
        await state(service, key("s"))
        assert (tmp_path / "log").read_text().count('"event":"inspect"') == 1
        log._error = OSError(28, "No space left on device")
        with pytest.raises(StoreUnavailable, match="audit log"):
            await state(service, key("s"))
        assert await state(service, key("s"), values=False) is not None
        log._error = None

    drive(make_service(audit=log), scenario)
    assert verify(tmp_path / "log")[1] == []
