"""The session service through its real socket, as API processes talk to it."""

import asyncio
import random
import secrets
import shutil
import stat
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq.asyncio

from deltamem_vllm.config import resolve
from deltamem_vllm.errors import CapacityError, CorruptRecord, SessionError, StoreUnavailable
from deltamem_vllm.sessions.control import BlockingControlClient, ControlClient, encode_error, raise_error
from deltamem_vllm.sessions.service import SessionService
from tests.sessions.harness import TENANT, ids, key, make_service, memory, serving


def talk(service: SessionService, folder: Path, scenario: Callable[[ControlClient], Awaitable[None]]) -> None:
    async def whole(address: str) -> None:
        client = ControlClient(address)
        try:
            await asyncio.wait_for(scenario(client), 30)
        finally:
            client.close()

    with serving(service, folder) as address:
        asyncio.run(whole(address))


async def ask_admit(client: ControlClient, session: str, prompt: list[int], mode: str = "readwrite") -> dict[str, Any]:
    question: dict[str, Any] = {"tenant": TENANT, "session": session, "mode": mode, "salt": None, "held": False}
    ticket = secrets.token_hex(16)
    return {"ticket": ticket, **await client.ask("admit", ticket=ticket, tokens=ids(prompt).tobytes(), **question)}


async def turn(service: SessionService, client: ControlClient, session: str, prompt: list[int]) -> dict[str, Any]:
    granted = await ask_admit(client, session, prompt)
    grant = service.claim(granted["ticket"])  # what the scheduler's thread does
    assert grant is not None
    service.commit(grant.ticket, prompt, memory(grant.base, prompt))
    return dict(await client.ask("outcome", ticket=grant.ticket))


def test_admit_claim_commit_outcome_info_delete(tmp_path: Path) -> None:
    service = make_service(f"sqlite:///{tmp_path}/s.db")

    async def scenario(client: ControlClient) -> None:
        assert await client.ask("info", tenant=TENANT, session="s") is None
        assert await turn(service, client, "s", [1, 2]) == {
            "status": "committed", "version": 1, "error": "", "session": "s",
        }  # fmt: skip
        info = await client.ask("info", tenant=TENANT, session="s")
        assert (info["version"], info["tokens"], info["busy"]) == (1, 2, False)
        granted = await ask_admit(client, "s", [1, 2, 3])
        assert (granted["version"], granted["window"], granted["matched"]) == (1, "extend", 2)
        assert (await client.ask("info", tenant=TENANT, session="s"))["busy"]
        await client.ask("verdict", ticket=granted["ticket"], tokens=None)
        assert (await client.ask("outcome", ticket=granted["ticket"]))["status"] == "aborted"
        gone = {"existed": True, "versions": 1, "unsaved": 0, "host": True}
        assert await client.ask("delete", tenant=TENANT, session="s") == gone
        nothing = {"existed": False, "versions": 0, "unsaved": 0, "host": False}
        assert await client.ask("delete", tenant=TENANT, session="s") == nothing

    talk(service, tmp_path, scenario)


def test_an_outcome_is_told_once_it_is_durable_and_not_before(tmp_path: Path) -> None:
    service = make_service(f"sqlite:///{tmp_path}/s.db")

    async def scenario(client: ControlClient) -> None:
        granted = await ask_admit(client, "s", [1, 2])
        asked = asyncio.create_task(client.ask("outcome", ticket=granted["ticket"]))
        await asyncio.sleep(0.05)
        assert not asked.done()
        assert service.claim(granted["ticket"]) is not None
        service.commit(granted["ticket"], [1, 2], memory(None, [1, 2]))
        assert (await asked)["status"] == "committed"
        record = service.store.get(key("s"))
        assert record is not None
        np.testing.assert_array_equal(record.end, memory(None, [1, 2]))

    talk(service, tmp_path, scenario)


def test_errors_arrive_as_what_they_were(tmp_path: Path) -> None:
    service = make_service(queue_depth=0)

    async def scenario(client: ControlClient) -> None:
        owner = await ask_admit(client, "s", [1])
        with pytest.raises(CapacityError, match="0 requests wait for it already") as busy:
            await ask_admit(client, "s", [1])
        assert (busy.value.status, busy.value.retry_after) == (409, 1.0)
        await client.ask("verdict", ticket=owner["ticket"], tokens=None)
        await turn(service, client, "s", [1])
        service.directory.get(key("s")).forget()
        service.records.adapter = "another"
        with pytest.raises(SessionError, match="written with adapter") as other:
            await ask_admit(client, "s", [1])
        assert (other.value.status, other.value.parameter) == (422, "session_id")
        with pytest.raises(CapacityError, match="unknown question 'dance'") as unknown:
            await client.ask("dance")
        assert unknown.value.status == 500
        with pytest.raises(CapacityError, match="tenant"):
            await client.ask("info", tenant="", session="s")
        assert await client.ask("info", tenant=TENANT, session="t") is None, "it answers after an error as before"

    talk(service, tmp_path, scenario)


@pytest.mark.parametrize("error", [StoreUnavailable("the disk is full"), CorruptRecord("checksum")])
def test_a_store_error_is_503_with_retry_after(error: Exception) -> None:
    with pytest.raises(CapacityError, match=str(error)) as e:
        raise_error(encode_error(error))
    assert (e.value.status, e.value.retry_after) == (503, 5.0)


def test_answers_that_only_look_like_errors_pass() -> None:
    for answer in (None, [], {"error": ""}, {"error": "text", "status": "failed"}, {"existed": True}):
        assert raise_error(answer) == answer


def test_many_questions_at_once_each_get_their_own_answer(tmp_path: Path) -> None:
    service = make_service(f"sqlite:///{tmp_path}/s.db")

    async def scenario(client: ControlClient) -> None:
        outcomes = await asyncio.gather(*(turn(service, client, f"s{i}", [i]) for i in range(100)))
        assert [o["session"] for o in outcomes] == [f"s{i}" for i in range(100)]
        assert {o["version"] for o in outcomes} == {1}

    talk(service, tmp_path, scenario)


def test_two_api_processes_share_one_line(tmp_path: Path) -> None:
    service = make_service()

    async def scenario(client: ControlClient) -> None:
        other = ControlClient(client.address)
        try:
            first = await ask_admit(client, "s", [1])
            waiting = asyncio.create_task(ask_admit(other, "s", [2]))
            await asyncio.sleep(0.05)
            assert not waiting.done()
            await client.ask("verdict", ticket=first["ticket"], tokens=None)
            assert (await waiting)["version"] == 0
        finally:
            other.close()

    talk(service, tmp_path, scenario)


def test_a_request_that_waits_can_be_withdrawn(tmp_path: Path) -> None:
    service = make_service()

    async def scenario(client: ControlClient) -> None:
        owner = await ask_admit(client, "s", [1])
        question: dict[str, Any] = {"tenant": TENANT, "session": "s", "mode": "readwrite", "salt": None, "held": False}
        waiting = asyncio.create_task(client.ask("admit", ticket="gone", tokens=b"", **question))
        await asyncio.sleep(0.05)
        await client.ask("verdict", ticket="gone", tokens=None)
        waiting.cancel()
        await client.ask("verdict", ticket=owner["ticket"], tokens=None)
        await asyncio.wait_for(ask_admit(client, "s", [2]), 2)

    talk(service, tmp_path, scenario)


def test_a_question_that_is_cancelled_as_its_answer_arrives_is_cancelled(tmp_path: Path) -> None:
    """Else a request goes on whose client has left."""

    async def scenario(client: ControlClient) -> None:
        asked = asyncio.create_task(client.ask("info", tenant=TENANT, session="s"))
        while not client._waiting:
            await asyncio.sleep(0)
        [answer] = client._waiting.values()
        answer.set_result(b"\xc0")
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked

    talk(make_service(), tmp_path, scenario)


def test_nobody_answers(tmp_path: Path) -> None:
    async def scenario() -> None:
        client = ControlClient(f"ipc://{tmp_path}/nobody")
        with pytest.raises(CapacityError, match=r"did not answer 'info' within 0\.1 s") as e:
            await client.ask("info", timeout=0.1, tenant=TENANT, session="s")
        assert e.value.status == 503
        client.close()

    asyncio.run(scenario())


def test_garbage_on_the_socket_does_not_end_the_service(tmp_path: Path) -> None:
    service = make_service()

    async def scenario(client: ControlClient) -> None:
        context = zmq.asyncio.Context()
        socket = context.socket(zmq.DEALER)
        socket.linger = 0
        socket.connect(client.address)
        rng = random.Random(1)
        for size in (0, 1, 3, 100, 10_000):
            await socket.send_multipart([b"number", rng.randbytes(size)])
        for frames in ([b""], [b"one"], [b"a", b"b", b"c"], [b""] * 5):
            await socket.send_multipart(frames)
        await asyncio.sleep(0.1)
        assert await client.ask("info", timeout=5, tenant=TENANT, session="s") is None
        socket.close()
        context.term()

    talk(service, tmp_path, scenario)


def test_blocking_client(tmp_path: Path) -> None:
    with serving(make_service(), tmp_path) as address:
        client = BlockingControlClient(address)
        assert client.ask("info", tenant=TENANT, session="s") is None
        with pytest.raises(CapacityError, match="unknown question"):
            client.ask("dance")
        assert not client.ask("delete", tenant=TENANT, session="s")["existed"]
        client.close()


def test_only_the_servers_user_reaches_the_socket(tmp_path: Path) -> None:
    settings = resolve({"adapter": str(tmp_path), "store": "memory://"}).with_control()
    try:
        assert stat.S_IMODE(Path(settings.control).stat().st_mode) == 0o700
        assert settings.control_address(3) == f"ipc://{settings.control}/engine-3"
        assert resolve({"adapter": "x", "store": "memory://"}).with_control().control != settings.control
    finally:
        shutil.rmtree(settings.control)


def test_a_question_to_an_engine_that_has_ended_fails_soon(tmp_path: Path) -> None:
    """Its socket is gone without a word, and an admission may wait for the better part of a minute."""
    ended = False

    async def ask() -> float:
        nonlocal ended
        client = ControlClient(f"ipc://{tmp_path}/nobody", lambda: ended)
        waiting = asyncio.ensure_future(client.ask("admit", timeout=600))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        ended, begun = True, time.monotonic()
        with pytest.raises(CapacityError, match="the engine has ended") as refused:
            await waiting
        assert refused.value.status == 503
        client.close()
        return time.monotonic() - begun

    assert asyncio.run(ask()) < 60
