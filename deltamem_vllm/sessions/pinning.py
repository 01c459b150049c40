"""A session's pinned facts within the session service: read, pinned, unpinned, offered, renewed with each commit.

They lie in the attributes of the session's latest record, so that they move with it. A change of them is a version.
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from deltamem_vllm.errors import CorruptRecord, SessionError
from deltamem_vllm.sessions import attributes, changes, facts
from deltamem_vllm.sessions.facts import Facts, Pin
from deltamem_vllm.store.protocol import Record, SessionKey

if TYPE_CHECKING:
    from deltamem_vllm.sessions.service import SessionService

_FACTS = b"facts"  # as the encoding names them: nothing is decoded for a session that has none


def received(pins: Sequence[Sequence[Any]]) -> tuple[Pin, ...]:
    """Pins as they travel: (text, source, ttl)."""
    return tuple(Pin(*pin) for pin in pins)


def check(record: Record | None, pins: Sequence[Pin]) -> None:
    """Refuse pins that a commit could not keep.

    Raises:
        SessionError: 400, 413, 429; see `facts.add`.
    """
    now = time.time()
    facts.add(_facts(record, now), pins, now)


def renew(packed: bytes, pins: Sequence[Pin], now: float) -> bytes:
    """A record's attributes at a commit; see `facts.renewed`."""
    if not pins and _FACTS not in packed:
        return packed
    try:
        before = attributes.unpack(packed)
    except CorruptRecord:
        if pins:
            raise
        return packed  # of a later version, say: what is not understood is left as it is
    after = facts.renewed(before, pins, now)
    return packed if after is before else attributes.pack(after)


def _facts(record: Record | None, now: float) -> Facts:
    if record is None or _FACTS not in record.attributes:
        return ()
    return facts.alive(attributes.unpack(record.attributes).facts, now)


async def answer(service: "SessionService", key: SessionKey, q: dict[str, Any]) -> Any:
    """A question of `deltamem_vllm.sessions.control`.

    Raises:
        SessionError: 404, no such session or fact; 412; what `facts.add` refuses. CapacityError: see `changes.change`.
    """
    match q["do"]:
        case "offer":
            record = await service.records.latest(service.directory.get(key))
            chosen = facts.choose(_facts(record, time.time()), q["query"], q["chars"])
            return {"texts": [fact.text for fact in chosen]}
        case "facts":
            record = await service.records.latest(service.directory.get(key))
            if record is None:
                raise changes.not_found(key)
            living = _facts(record, time.time())
            return {"facts": [facts.shown(fact) for fact in living], "version": record.version}
        case "pin":
            return await _pin(service, key, q["request"], received(q["pins"]), q["match"])
        case _:
            return await _unpin(service, key, q["request"], q["fact"], q["match"])


async def _pin(
    service: "SessionService", key: SessionKey, request: str, pins: Sequence[Pin], match: Sequence[int] | None
) -> dict[str, Any]:
    def make(record: Record | None) -> Record | None:
        if record is None:
            raise changes.not_found(key)
        return _with(record, facts.add(_facts(record, now), pins, now)[0])

    now = time.time()
    made = await changes.change(service, key, request, make, if_match=match, event="facts")
    pinned = {fact.text.strip(): fact for fact in _facts(made, now)}
    return {"facts": [facts.shown(pinned[pin.text.strip()]) for pin in pins], "version": made.version}


async def _unpin(
    service: "SessionService", key: SessionKey, request: str, fact: str, match: Sequence[int] | None
) -> dict[str, Any]:
    def make(record: Record | None) -> Record | None:
        left = facts.remove(_facts(record, now), fact, now) if record is not None else None
        if record is None:
            raise changes.not_found(key)
        if left is None:
            raise SessionError(f"fact {fact!r} not found", status=404, parameter="fact_id")
        return _with(record, left)

    now = time.time()
    made = await changes.change(service, key, request, make, if_match=match, event="facts")
    return {"version": made.version, "until": made.version + service.store.keep - 1}


def _with(record: Record, made: Facts) -> Record | None:
    """The record with these facts; None: it has them."""
    before = attributes.unpack(record.attributes)
    if before.facts == made:
        return None
    return dataclasses.replace(record, attributes=attributes.pack(msgspec.structs.replace(before, facts=made)))
