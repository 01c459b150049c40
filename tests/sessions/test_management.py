"""What can be done with sessions beside generating, on a real service: copies, rollbacks, imports, deletions."""

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from deltamem_vllm.errors import PreconditionFailed, SessionError
from deltamem_vllm.sessions import changes, management
from deltamem_vllm.sessions.attributes import Attributes, Chain, Fact, Point, pack, unpack
from deltamem_vllm.sessions.changes import change
from deltamem_vllm.sessions.directory import Session
from deltamem_vllm.sessions.management import QUESTIONS
from deltamem_vllm.sessions.service import SessionService
from deltamem_vllm.store import codec
from deltamem_vllm.store.crypto import KeyRing, SealedCodec, new_key
from deltamem_vllm.store.memory import MemoryStore
from deltamem_vllm.store.protocol import Record
from tests.sessions.harness import TENANT, admit, drive, end_of, key, make_service, memory, run, turn

FACT, EVIL, REPLY = [1, 2, 3], [66, 6], [4, 5]
CHAIN = Chain(b"\2" * 8, Point(2, b"\1" * 8, 3))


async def ask(service: SessionService, do: str, session: str = "s", **question: Any) -> Any:
    if do in ("create", "update", "reset", "rollback", "install"):
        question.setdefault("name", secrets.token_hex(8))
        if do not in ("create", "install"):
            question.setdefault("if_match", None)
    return await QUESTIONS[do](service, key(session), **question)


async def fork(service: SessionService, source: str, to: str, version: int | None = None) -> Any:
    found = await ask(service, "export", source, version=version)
    return await ask(service, "install", to, data=found["data"], forked_from=f"{source}@{found['version']}")


def stored(service: SessionService, session: str = "s") -> Record:
    record = service.store.get(key(session))
    assert record is not None
    return record


async def attach(service: SessionService, attributes: Attributes) -> None:
    def make(record: Record | None) -> Record:
        assert record is not None
        return replace(record, attributes=pack(attributes))

    await change(service, key("s"), secrets.token_hex(8), make)


def test_a_poisoned_turn_is_rolled_back_and_what_was_erased_beside_it_stays_erased() -> None:
    async def scenario(service: SessionService) -> None:
        await turn(service, "s", FACT, REPLY)
        await attach(service, Attributes(facts=(Fact("f", "a secret"),), chain=CHAIN))
        clean = stored(service)
        await turn(service, "s", EVIL, REPLY)
        await attach(service, Attributes(metadata={"a": "b"}))
        await ask(service, "rollback", version=2)
        back = stored(service)
        assert back.version == 5
        for field in ("base", "end"):
            assert np.array_equal(getattr(back, field), getattr(clean, field))
        assert (back.window, back.tokens, back.windows) == (clean.window, clean.tokens, clean.windows)
        attributes = unpack(back.attributes)
        assert (attributes.metadata, attributes.facts) == ({"a": "b"}, ()), "an erased fact must not come back"
        assert attributes.chain == CHAIN, "it describes the memory, so it comes with it"
        granted = await admit(service, "s", [*FACT, *REPLY, 9])
        assert granted["window"] == "extend"
        again = await ask(service, "export", version=2)
        assert unpack(codec.decode(again["data"]).attributes).facts == ()

    drive(make_service(), scenario)


def test_a_version_of_an_earlier_life_cannot_be_returned_to() -> None:
    async def scenario(service: SessionService) -> None:
        await turn(service, "s", FACT, REPLY)
        old = service.store.get_version(key("s"), 1)
        await service.delete(key("s"))
        await turn(service, "s", EVIL, REPLY)
        await turn(service, "s", [9], REPLY)
        service.store.get_version = lambda key, version: old  # type: ignore[method-assign]
        for do in ("rollback", "export"):
            with pytest.raises(SessionError, match="does not keep version 1") as refused:
                await ask(service, do, version=1)
            assert refused.value.status == 404

    drive(make_service(), scenario)


def test_reset_forgets_the_memory_and_what_describes_it() -> None:
    async def scenario(service: SessionService) -> None:
        await turn(service, "s", FACT, REPLY)
        await attach(service, Attributes(metadata={"a": "b"}, chain=CHAIN))
        await ask(service, "reset")
        record = stored(service)
        assert not record.base.any()
        assert not record.end.any()
        assert (record.window, record.tokens) == (b"", 0)
        assert unpack(record.attributes) == Attributes(metadata={"a": "b"})
        granted = await admit(service, "s", FACT)
        assert granted["window"] == "new"
        grant = service.claim(granted["ticket"])
        assert grant is not None
        assert grant.base is None
        service.end(grant.ticket, "aborted")

    drive(make_service(), scenario)


async def forks_apart(service: SessionService) -> bool:
    """Whether a fork has a life of its own."""
    await turn(service, "s", FACT, REPLY)
    shown = await fork(service, "s", "t")
    assert (shown["version"], shown["forked_from"]) == (1, "s@1")
    source, copy = stored(service), stored(service, "t")
    assert np.array_equal(source.end, copy.end)
    await turn(service, "t", EVIL, REPLY)
    assert np.array_equal(end_of(service, "s"), source.end)
    await service.delete(key("s"))
    assert stored(service, "t").version == 2
    return source.incarnation != copy.incarnation


def test_a_fork_and_its_source_are_independent() -> None:
    async def scenario(service: SessionService) -> None:
        assert await forks_apart(service)

    drive(make_service(), scenario)


def test_planted_a_fork_that_shares_its_sources_incarnation_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    started = Session.__init__

    def same(session: Session, *args: Any) -> None:
        started(session, *args)
        session.incarnation = "a" * 32

    monkeypatch.setattr(Session, "__init__", same)

    async def scenario(service: SessionService) -> None:
        assert not await forks_apart(service)

    drive(make_service(), scenario)


def test_an_export_tells_nothing_of_where_it_came_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(management, "MAX_IMPORT_NORM", 1e6)  # the toy memory's numbers are large

    async def scenario(service: SessionService) -> None:
        outcome = await turn(service, "s", FACT, REPLY)
        data = (await ask(service, "export"))["data"]
        record = stored(service)
        for secret in (record.incarnation, record.request_id, TENANT):
            assert secret.encode() not in data
        assert outcome["version"] == 1
        assert len(data) <= await QUESTIONS["record_limit"](service)
        with pytest.raises(SessionError, match="exists") as refused:
            await ask(service, "install", data=data)
        assert refused.value.status == 409
        assert await ask(service, "export", "nobody") is None

    drive(make_service(), scenario)


def test_an_encrypted_export_opens_where_the_key_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(management, "MAX_IMPORT_NORM", 1e6)
    ring, other = KeyRing.parse(f"k1 {new_key()}", "here"), KeyRing.parse(f"k1 {new_key()}", "there")
    found: dict[str, bytes] = {}

    async def export(service: SessionService) -> None:
        await turn(service, "s", FACT, REPLY)
        exported = await ask(service, "export", encrypted=True)
        found["sealed"], found["state"] = exported["data"], stored(service).end.tobytes()
        assert len(found["sealed"]) <= await QUESTIONS["record_limit"](service)
        found["stolen"] = service.store.codec.encode(stored(service))  # type: ignore[attr-defined]
        made = await ask(service, "install", "copy", data=found["sealed"])
        assert made["version"] == 1
        assert stored(service, "copy").end.tobytes() == found["state"]
        with pytest.raises(SessionError, match="a record of a store") as refused:
            await ask(service, "install", "thief", data=found["stolen"])
        assert refused.value.status == 422
        plain = (await ask(service, "export"))["data"]
        assert found["state"] in plain
        assert (await ask(service, "install", "plain", data=plain))["version"] == 1

    drive(make_service(MemoryStore(codec=SealedCodec(ring))), export)
    assert found["state"][:32] not in found["sealed"]

    def refusing(why: str) -> Callable[[SessionService], Awaitable[None]]:
        async def scenario(service: SessionService) -> None:
            with pytest.raises(SessionError, match=why) as refused:
                await ask(service, "install", "copy", data=found["sealed"])
            assert refused.value.status == 422

        return scenario

    drive(make_service(MemoryStore(codec=SealedCodec(other))), refusing("does not open with key 'k1'"))
    drive(make_service(), refusing("encrypted, and this server's store has no key"))

    async def without(service: SessionService) -> None:
        await turn(service, "s", FACT, REPLY)
        with pytest.raises(SessionError, match="no encryption key") as refused:
            await ask(service, "export", encrypted=True)
        assert refused.value.status == 409

    drive(make_service(), without)


def test_what_an_import_says_of_itself_is_checked() -> None:
    async def scenario(service: SessionService) -> None:
        await turn(service, "s", FACT, REPLY)
        record = codec.decode((await ask(service, "export"))["data"])
        many = Attributes(metadata={str(i): "" for i in range(17)})
        for attributes, why in ((many, "at most 16"), (Attributes(write="everybody"), "everybody")):
            data = codec.encode(replace(record, attributes=pack(attributes)))
            with pytest.raises(SessionError, match=why):
                await ask(service, "install", "t", data=data)
        assert service.store.get(key("t")) is None

    drive(make_service(), scenario)


def refusing(do: str, **question: Any) -> Callable[[SessionService], Awaitable[None]]:
    async def scenario(service: SessionService) -> None:
        await turn(service, "s", FACT, REPLY)
        with pytest.raises(PreconditionFailed) as refused:
            await ask(service, do, if_match=[7], **question)
        assert refused.value.version == 1
        assert stored(service).version == 1
        assert service.directory.get(key("s")).owner is None
        await ask(service, do, if_match=[7, 1], **question)

    return scenario


@pytest.mark.parametrize(
    ("do", "question"),
    [("update", {"fields": {"ttl": 5.0}}), ("reset", {}), ("rollback", {"version": 1}), ("export", {}), ("delete", {})],
)
def test_if_match(do: str, question: dict[str, Any]) -> None:
    drive(make_service(), refusing(do, **question))


@pytest.mark.parametrize("do", ["reset", "export", "delete"])
def test_planted_ignoring_if_match_is_seen(do: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (changes, management):
        monkeypatch.setattr(module, "check_match", lambda *args, **kwargs: None)
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        drive(make_service(), refusing(do))


def test_a_deletion_on_a_condition_waits_for_the_request_that_writes() -> None:
    async def scenario(service: SessionService) -> None:
        await turn(service, "s", FACT, REPLY)
        granted = await admit(service, "s", EVIL)
        asked = asyncio.ensure_future(ask(service, "delete", if_match=[1]))
        await asyncio.sleep(0)
        assert (await run(service, granted["ticket"], EVIL, REPLY))["version"] == 2
        with pytest.raises(PreconditionFailed):
            await asked
        assert np.array_equal(end_of(service, "s"), memory(memory(None, [*FACT, 4]), [*EVIL, 4]))
        receipt = await ask(service, "delete", if_match=[2])
        assert receipt == {"existed": True, "versions": 2, "unsaved": 0, "host": True}

    drive(make_service(), scenario)
