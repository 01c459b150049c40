"""A session's pinned facts within the session service: read, pinned, unpinned, offered, renewed with each commit.

They lie in the attributes of the session's latest record, so that they move with it. A change of them is a version.
"""

import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

from msgspec import structs

from deltamem_vllm.errors import CorruptRecord, SessionError
from deltamem_vllm.sessions import attributes, changes, facts
from deltamem_vllm.sessions.changes import Match
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


def offered(record: Record | None, query: str, chars: int) -> list[str]:
    """The texts of the facts that a prompt is offered."""
    return [fact.text for fact in facts.choose(_facts(record, time.time()), query, chars)] if chars else []


async def listing(service: "SessionService", key: SessionKey) -> dict[str, Any]:
    """A session's facts.

    Raises:
        SessionError: 404; no such session.
    """
    record = await service.records.latest(service.directory.get(key))
    if record is None:
        raise changes.not_found(key)
    return {"facts": [facts.shown(fact) for fact in _facts(record, time.time())], "version": record.version}


async def pin(
    service: "SessionService", key: SessionKey, name: str, pins: Sequence[Sequence[Any]], if_match: Match = None
) -> dict[str, Any]:
    """Pin facts to a session that exists.

    Raises:
        SessionError: 404, no such session; what `facts.add` refuses. PreconditionFailed: 412. CapacityError: see
            `changes.change`.
    """
    now, new = time.time(), received(pins)

    def make(record: Record | None) -> Record | None:
        if record is None:
            raise changes.not_found(key)
        return _with(record, facts.add(_facts(record, now), new, now)[0])

    made = await changes.change(service, key, name, make, if_match=if_match, event="facts")
    # One with a ttl of next to nothing has expired already, and was pinned all the same.
    pinned = {fact.text.strip(): fact for fact in attributes.unpack(made.attributes).facts}
    return {"facts": [facts.shown(pinned[each.text.strip()]) for each in new], "version": made.version}


async def unpin(
    service: "SessionService", key: SessionKey, name: str, fact: str, if_match: Match = None
) -> dict[str, Any]:
    """Erase a fact.

    Raises:
        SessionError: 404, no such session or fact. PreconditionFailed, CapacityError: as `pin`.
    """
    now = time.time()

    def make(record: Record | None) -> Record | None:
        if record is None:
            raise changes.not_found(key)
        left = facts.remove(_facts(record, now), fact, now)
        if left is None:
            raise SessionError(f"fact {fact[:64]!r} not found", status=404, parameter="fact_id")
        return _with(record, left)

    made = await changes.change(service, key, name, make, if_match=if_match, event="facts")
    return {"version": made.version, "until": made.version + service.store.keep - 1}


QUESTIONS: dict[str, Callable[..., Awaitable[Any]]] = {"facts": listing, "pin": pin, "unpin": unpin}


def _with(record: Record, made: Facts) -> Record | None:
    """The record with these facts; None: it has them."""
    before = attributes.unpack(record.attributes)
    if before.facts == made:
        return None
    return structs.replace(record, attributes=attributes.pack(structs.replace(before, facts=made)))
