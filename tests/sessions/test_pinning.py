"""Facts within the session service: windows that do not see what was offered, pins at commit, erasure in memory."""

import asyncio
import gc
import json
import random
import secrets
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deltamem_vllm.audit.chain import verify
from deltamem_vllm.audit.log import AuditLog
from deltamem_vllm.errors import SessionError, StoreUnavailable
from deltamem_vllm.sessions import facts, pinning, windows
from deltamem_vllm.sessions.facts import Pin
from deltamem_vllm.sessions.histories import recall
from deltamem_vllm.sessions.masks import OPEN, conversation, insertion, place, sign, with_offer
from deltamem_vllm.sessions.service import SessionService
from deltamem_vllm.store.protocol import Record
from tests.sessions.harness import drive, ids, key, make_service, memory, turn

SESSION = "anna"


async def offered_turn(
    service: SessionService, prompt: list[int], offer: tuple[int, int] | None, reply: list[int], pins: Any = ()
) -> dict[str, Any]:
    """A turn whose prompt holds something offered; the toy engine writes all but that."""
    spans = (offer,) if offer else ()
    ticket = secrets.token_hex(8)
    granted = await service.admit(
        ticket, key(SESSION), "readwrite", ids(prompt), None, False, spans, offered=spans, pins=pins
    )
    grant = service.claim(ticket)
    assert grant is not None
    fed = [*prompt, *reply[:-1]]
    service.commit(ticket, fed, memory(grant.base, list(conversation(fed, (), grant.offered))))
    return {**granted, **await service.outcome(ticket)}


def put(prompt: list[int], at: int, block: list[int]) -> tuple[list[int], tuple[int, int] | None]:
    made = [*prompt[:at], *block, *prompt[at:]]
    return made, ((at, at + len(block)) if block else None)


def test_a_growing_conversation_is_one_window_whatever_is_offered() -> None:
    """Twenty conversations of random turns: other facts, at another place, in every turn; against none at all."""

    async def scenario(service: SessionService) -> None:
        for seed in range(20):
            rng = random.Random(seed)
            history: list[int] = []
            await service.delete(key(SESSION))
            for number in range(6):
                new = [rng.randrange(1000) for _ in range(rng.randint(1, 5))]
                block = [rng.randrange(1000) for _ in range(rng.randint(0, 4))]
                prompt, offer = put(history + new, len(history), block)
                reply = [rng.randrange(1000) for _ in range(rng.randint(1, 4))]
                made = await offered_turn(service, prompt, offer, reply)
                assert made["window"] == ("extend" if number else "new"), (seed, number)
                history += [*new, *reply]
                record = service.directory.get(key(SESSION)).record
                assert record is not None
                assert np.array_equal(record.end, memory(None, history[:-1])), "not every token was written once"
                assert record.tokens == len(history) - 1

    drive(make_service(), scenario)


def test_windows_that_see_what_was_offered_are_caught() -> None:
    """PLANTED BUG: the block counts as conversation."""
    first, offer = put([1, 2, 3], 0, [9, 9])
    plan = windows.plan(None, sign(first, (offer,) if offer else ()))
    window = windows.advance(plan, sign([*first, 4], ((0, 2),)), len(first))
    later, at = put([1, 2, 3, 4, 5], 4, [9, 9])
    assert at is not None
    assert windows.plan(window, sign(later, (at,))).kind == "new"
    right = windows.advance(windows.NEW, conversation([*first, 4], ((0, 2),), ((0, 2),)), 3)
    assert windows.plan(right, conversation(later, (at,), (at,))).kind == "extend"


@pytest.mark.parametrize("seed", range(50))
def test_places_of_what_is_offered(seed: int) -> None:
    rng = random.Random(seed)
    own = [rng.randrange(3) for _ in range(rng.randint(0, 12))]
    block = [rng.randrange(3) for _ in range(rng.randint(1, 6))]
    at = rng.randint(0, len(own))
    prompt = [*own[:at], *block, *own[at:]]
    span = insertion(own, prompt)
    assert span is not None
    assert [*prompt[: span[0]], *prompt[span[1] :]] == own
    assert list(conversation(prompt, (), (span,))) == own
    spans = ((2, 5), (7, OPEN)) if rng.random() < 0.5 else ((0, 3),)
    both = with_offer(spans, span)
    assert np.array_equal(conversation(prompt, both, (span,)), sign(own, spans))
    for count in range(len(own) + 1):
        assert list(conversation(prompt[: place((span,), count)], (), (span,))) == own[:count]
    assert (place((span,), OPEN), place((span,), -1)) == (OPEN, -1)  # write limits: all, nothing
    assert insertion(own, own) is None
    assert insertion([5, *own], prompt[:-1]) is None


def test_pins_come_with_the_commit_and_are_refused_before_it() -> None:
    async def scenario(service: SessionService) -> None:
        await offered_turn(service, [1, 2], None, [3], (Pin("my name is clara", "message"),))
        shown = await ask(service, "facts")
        assert [fact["text"] for fact in shown["facts"]] == ["my name is clara"]
        many = [[f"fact {i}", "", None] for i in range(facts.MAX_FACTS - 1)]
        full = await ask(service, "pin", name="r", pins=many)
        assert (await ask(service, "pin", name="r", pins=many))["version"] == full["version"]
        with pytest.raises(SessionError, match="201 facts") as refused:
            await offered_turn(service, [1, 2], None, [3], (Pin("one more"),))
        assert refused.value.status == 429
        gone = await ask(service, "unpin", name="s", fact=shown["facts"][0]["id"], if_match=[full["version"]])
        assert gone["version"] == full["version"] + 1
        await turn(service, SESSION, [1, 2, 3, 4], [5])
        assert len((await ask(service, "facts"))["facts"]) == facts.MAX_FACTS - 1
        assert (await recall(service, key(SESSION), "fact 7", 7))["facts"] == ["fact 7"]

    drive(make_service(), scenario)


def test_a_fact_may_expire_at_once() -> None:
    async def scenario(service: SessionService) -> None:
        await turn(service, SESSION, [1, 2], [3])
        made = await ask(service, "pin", name="r", pins=[["Bo is a cat.", "", 1e-300]])
        assert (made["facts"][0]["text"], made["version"]) == ("Bo is a cat.", 2)
        assert (await ask(service, "facts"))["facts"] == []

    drive(make_service(), scenario)


async def ask(service: SessionService, do: str, **question: Any) -> Any:
    return await pinning.QUESTIONS[do](service, key(SESSION), **question)


def test_nothing_of_a_deleted_session_stays_in_the_service() -> None:
    """Every object of the process that could hold its record: directory, tickets, commits, the device pool's orders."""
    canary = "canary-" + secrets.token_hex(8)

    def held() -> list[str]:
        gc.collect()
        found = []
        for thing in gc.get_objects():
            # A record holds nothing that could hold itself, so that Python lists only who holds the record.
            for each in (thing, *gc.get_referents(thing)):
                if isinstance(each, Record) and canary.encode() in each.attributes:
                    found.append(type(thing).__name__)
        return found

    async def scenario(service: SessionService) -> None:
        await offered_turn(service, [1, 2], None, [3], (Pin(canary),))
        assert held(), "the canary is not there: the test shows nothing"
        kept = service.directory.get(key(SESSION)).record  # PLANTED BUG: somebody keeps the record
        await service.delete(key(SESSION))
        assert held()
        del kept
        await asyncio.sleep(0)
        assert not held()
        assert list(service.erased) == [key(SESSION)]

    drive(make_service(), scenario)


def test_changes_are_logged_and_refused_where_they_cannot_be(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "log", bytes(32), required=True)

    async def scenario(service: SessionService) -> None:
        await turn(service, SESSION, [1, 2], [3])
        await turn(service, SESSION, [1, 2, 3, 4], [5])
        await ask(service, "pin", name="r", pins=[["x", "", None]])
        log._error = OSError(28, "No space left on device")
        for change in (
            turn(service, SESSION, [1, 2, 3, 4], [6]),
            ask(service, "pin", name="s", pins=[["y", "", None]]),
            service.delete(key(SESSION)),
        ):
            with pytest.raises(StoreUnavailable, match="audit log"):
                await change
        await turn(service, SESSION, [1, 2, 3, 4], [6], "read")
        log._error = None
        await service.delete(key(SESSION))

    drive(make_service(audit=log), scenario)
    entries = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [(entry["event"], entry["version"]) for entry in entries] == [
        ("create", 1),
        ("commit", 2),
        ("facts", 3),
        ("delete", 0),
    ]
    assert verify(tmp_path / "log")[1] == []
