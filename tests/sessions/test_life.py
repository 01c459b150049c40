"""The session service from start to end: restarts, closing, and what must not grow."""

import asyncio
from pathlib import Path

import numpy as np
import pytest

from deltamem_vllm.sessions.service import SessionService
from deltamem_vllm.sessions.windows import WRITE_ALL
from deltamem_vllm.store.protocol import Expect
from tests.sessions.harness import admit, drive, end_of, make_service, memory, run, turn


@pytest.fixture(params=["memory", "sqlite"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return "memory://" if request.param == "memory" else f"sqlite:///{tmp_path}/s.db"


def test_it_survives_a_restart(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/s.db"

    async def first(service: SessionService) -> None:
        await turn(service, "s", [1, 2], [3])

    async def second(service: SessionService) -> None:
        granted = await admit(service, "s", [1, 2, 3, 4])
        assert (granted["version"], granted["window"], granted["matched"]) == (1, "extend", 2)
        await run(service, granted["ticket"], [1, 2, 3, 4], [0])
        np.testing.assert_array_equal(end_of(service, "s"), memory(None, [1, 2, 3, 4]))

    drive(make_service(url), first)
    drive(make_service(url), second)


def test_closing_waits_for_commits_under_way(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/s.db"
    service = make_service(url)

    async def scenario(service: SessionService) -> None:
        for i in range(50):
            granted = await admit(service, f"{i}", [i])
            service.claim(granted["ticket"])
            service.commit(granted["ticket"], [i], memory(None, [i]))
        await asyncio.sleep(0)  # their commits begin, none is waited for

    drive(service, scenario)

    async def check(service: SessionService) -> None:
        for i in range(50):
            np.testing.assert_array_equal(end_of(service, f"{i}"), memory(None, [i]))

    drive(make_service(url), check)


def test_calls_after_the_end_do_no_harm() -> None:
    service = make_service()

    async def scenario(service: SessionService) -> str:
        return str((await admit(service, "s", [1]))["ticket"])

    ticket = drive(service, scenario)
    assert service.claim(ticket) is not None
    service.end(ticket, "aborted")
    service.commit(ticket, [1], memory(None, [1]))


def test_a_control_server_that_cannot_start_is_said_at_start() -> None:
    service = make_service()

    async def broken(service: SessionService) -> None:
        raise OSError("Address already in use")

    with pytest.raises(OSError, match="Address already in use"):
        service.start(broken)


def test_unlimited_writes_are_the_plans_default() -> None:
    async def scenario(service: SessionService) -> None:
        grant = service.claim((await admit(service, "s", [1]))["ticket"])
        assert grant is not None
        assert (grant.write_limit, grant.expect) == (WRITE_ALL, None)
        service.end(grant.ticket, "aborted")
        await turn(service, "s", [2], [0])
        grant = service.claim((await admit(service, "s", [1]))["ticket"])
        assert grant is not None
        assert grant.expect == Expect(1, grant.incarnation)

    drive(make_service(), scenario)
