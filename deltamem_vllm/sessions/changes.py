"""Changing a session outside of a generation: its attributes, its memory, its creation.

A change is a version like any other. It waits for the session's turn as a request that writes does, here and among
servers, and is told only once the store has it. What the device holds needs no change: it caches states by content.
"""

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Callable, Collection
from typing import TYPE_CHECKING, Literal

import numpy as np
from msgspec import structs

from deltamem_vllm import metrics
from deltamem_vllm.audit.chain import Event
from deltamem_vllm.errors import CapacityError, PreconditionFailed, SessionError, StaleVersion
from deltamem_vllm.sessions.directory import Session
from deltamem_vllm.sessions.meters import conflicts, timed
from deltamem_vllm.store.protocol import Record, SessionKey

if TYPE_CHECKING:
    from deltamem_vllm.sessions.service import SessionService

Make = Callable[[Record | None], Record | None]
"""From a session's latest record (None: it has none) to its next; None: there is nothing to change."""
Match = Collection[int] | None
"""Versions of which the session must have one; empty: whichever it has. None: no condition."""


async def change(
    service: "SessionService",
    key: SessionKey,
    request_id: str,
    make: Make,
    *,
    if_match: Match = None,
    event: Event | Literal[""] = "",
) -> Record:
    """Make a session's next version, durably.

    Args:
        request_id: names the change, 1 to 256 characters. Where the latest version has this name already the change
            was made before: it is returned, whatever ``if_match`` says.
        make: gives the next record; called while nobody else can write the session, and never twice. It may raise a
            `SessionError`. Version, incarnation, request id and times of what it returns are filled in here; all
            else counts: start from `blank` or from the record that it is given.
        event: what the audit log calls the change; empty: a creation or a commit.

    Returns:
        the session's latest record, in the store.

    Raises:
        SessionError: 404; nothing was there and ``make`` makes nothing. What ``make`` raised.
        PreconditionFailed: 412; ``if_match`` does not have its version.
        CapacityError: 409; the turn did not come, or another writer was first. 503; too much waits for the store.
        QuotaExceeded, StoreUnavailable: 429, 503. Nothing was changed; after the latter, ask again by the same name.
    """
    session = service.directory.get(key)
    with conflicts(service.meters):
        return await _in_turn(service, session, request_id, make, if_match, event)


async def _in_turn(
    service: "SessionService",
    session: Session,
    request_id: str,
    make: Make,
    if_match: Match,
    event: Event | Literal[""],
) -> Record:
    key = session.key
    async with turn(service, session):
        service.commits.check_room(session)
        service.commits.check_audit()
        last = await service.records.latest(session, session.owner)
        deletions = session.deletions
        if last is not None and last.request_id == request_id and not session.unsaved:
            return last
        check_match(key, last, if_match)
        made = make(last)
        if made is None:
            if last is None:
                raise not_found(key)
            return last
        await service.quotas.check(key, last)
        now = time.time()
        record = structs.replace(
            made,
            key=key,
            version=last.version + 1 if last is not None else 1,
            incarnation=session.incarnation,
            request_id=request_id,
            created_at=last.created_at if last is not None else now,
            updated_at=now,
        )
        try:
            await service.commits.store(session, record, last.expect if last is not None else None, deletions, event)
        except StaleVersion as e:
            raise CapacityError(f"{e}; nothing was changed: retry", status=409, retry_after=1.0) from None
        return record


@contextlib.asynccontextmanager
async def turn(service: "SessionService", session: Session) -> AsyncIterator[None]:
    """Have a session to oneself while the block runs, among this server's requests and among servers.

    Raises:
        CapacityError: 409; the turn did not come in time.
    """
    ticket = secrets.token_hex(16)
    async with in_turn(service, session, ticket):
        yield
        session.release(ticket)
        service.leases.done(session)


@contextlib.asynccontextmanager
async def in_turn(service: "SessionService", session: Session, ticket: str) -> AsyncIterator[None]:
    """Become a session's writer, here and among servers, before the block runs; it stays so unless the block fails.

    Raises:
        CapacityError: 409; the turn did not come in time.
    """
    with timed(service.meters, metrics.QUEUE_WAIT):
        await _own(service, session, ticket)
    try:
        yield
    except BaseException:
        _give_back(service, session, ticket)
        raise


async def _own(service: "SessionService", session: Session, ticket: str) -> None:
    until = asyncio.get_running_loop().time() + service.queue_seconds
    await session.acquire(ticket, service.queue_depth, service.queue_seconds)
    try:
        await service.leases.take(session, until)
    except BaseException:
        _give_back(service, session, ticket)
        raise


def _give_back(service: "SessionService", session: Session, ticket: str) -> None:
    service.leases.done(session)
    session.release(ticket)


def blank(service: "SessionService", key: SessionKey) -> Record:
    """The empty memory as a record, for `Make` to start from: no window, no attributes, version 0 of nothing."""
    empty = np.zeros(service.state_shape, np.float32)
    versions = service.commits.versions
    return Record(
        key=key,
        version=0,
        incarnation="",
        request_id="",
        adapter=versions.adapter,
        model=versions.model,
        layout=versions.layout,
        base=empty,
        end=empty,
        window=b"",
        created_at=0.0,
        updated_at=0.0,
        tokens=0,
        windows=0,
    )


def check_match(key: SessionKey, record: Record | None, if_match: Match, *, needed: bool = True) -> None:
    """Hold a session's version against what a client has seen.

    Args:
        needed: what is to be done needs the session: where there is none, that is what the client is told.

    Raises:
        PreconditionFailed: 412, with the present version.
        SessionError: 404; there is no session.
    """
    if if_match is None:
        return
    if record is None:
        if needed:
            raise not_found(key)
        raise PreconditionFailed(f"session {key.session!r} does not exist, and If-Match names a version", version=0)
    if if_match and record.version not in if_match:
        raise PreconditionFailed(
            f"session {key.session!r} is at version {record.version}, not at the one that If-Match names: read it and "
            "try again",
            version=record.version,
        )


def not_found(key: SessionKey) -> SessionError:
    """What a client is told of a session that does not exist."""
    return SessionError(f"session {key.session!r} not found", status=404, parameter="session_id")
