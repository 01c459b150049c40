"""What API processes ask of a session beside generating with it: listing, creating, changing, copying, erasing.

Every answer is a msgpack map. What creates or changes a session goes through `deltamem_vllm.sessions.changes`.
"""

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from msgspec import structs

from deltamem_vllm.audit.chain import Event
from deltamem_vllm.errors import CorruptRecord, SessionError
from deltamem_vllm.policy import parse_policy
from deltamem_vllm.sessions import windows
from deltamem_vllm.sessions.attributes import Attributes, pack, unpack
from deltamem_vllm.sessions.changes import Make, Match, blank, change, check_match, not_found, turn
from deltamem_vllm.sessions.directory import Session
from deltamem_vllm.store import codec, parts
from deltamem_vllm.store.protocol import MAX_ATTRIBUTES_BYTES, Record, SessionInfo, SessionKey

if TYPE_CHECKING:
    from deltamem_vllm.sessions.service import SessionService

MAX_IMPORT_NORM = 1e4
"""Bound on one layer's norm in an import. Trained memories stay below about 1e2."""
MAX_PAIRS = 16
"""Pairs of metadata."""
NOWHERE = "0" * 32
"""Incarnation of an exported record; no session has it."""
PORTABLE = "export"
"""Whom an exported record belongs to, and who made it: it tells nothing of where it came from but the session's id."""


class _Exists(SessionError):
    """The session that was to be created is there."""


async def info(service: "SessionService", key: SessionKey) -> dict[str, Any] | None:
    """What is known of a session, or None where it has no record."""
    session = service.directory.get(key)
    record = await service.records.latest(session)
    return None if record is None else described(service, session, record)


def described(service: "SessionService", session: Session, record: Record) -> dict[str, Any]:
    """A session as the API shows it; a norm is a layer's Frobenius norm."""
    window, attributes = windows.unpack(record.window), unpack(record.attributes)
    layers = record.end.reshape(len(record.end), -1)
    return {
        "version": record.version,
        "created_at": record.created_at,
        "updated_at": record.updated_at,
        "tokens": record.tokens,
        "windows": record.windows,
        "window_tokens": window.end.count if window is not None else 0,
        "state_bytes": record.end.nbytes,
        "adapter": record.adapter,
        "busy": session.owner is not None,
        "durable": not session.unsaved,
        "lost": service.commits.lost_of(session.key),
        "metadata": attributes.metadata,
        "ttl": attributes.ttl,
        "write": attributes.write,
        "facts": len(attributes.facts),
        "forked_from": attributes.forked_from,
        "state": [
            {"layer": i, "norm": float(norm), "max": float(largest)}
            for i, (norm, largest) in enumerate(
                zip(np.linalg.norm(layers, axis=1), np.abs(layers).max(axis=1), strict=True)
            )
        ],
    }


async def listing(
    service: "SessionService", tenant: str, after: str | None, limit: int, prefix: str | None
) -> list[dict[str, Any]]:
    """A page of the store's sessions."""
    store = service.records.store
    return [_row(i) for i in await service.records.reads.run(lambda: store.list(tenant, after, limit, prefix=prefix))]


async def versions(service: "SessionService", key: SessionKey) -> list[dict[str, Any]]:
    """The versions that the store keeps, newest first."""
    return [_row(each) for each in await service.records.reads.run(service.records.store.history, key, 1000)]


def _row(each: SessionInfo) -> dict[str, Any]:
    return {
        "id": each.key.session,
        "version": each.version,
        "created_at": each.created_at,
        "updated_at": each.updated_at,
        "tokens": each.tokens,
        "windows": each.windows,
        "bytes": each.bytes,
    }


async def create(
    service: "SessionService",
    key: SessionKey,
    name: str,
    metadata: dict[str, str],
    ttl: float | None,
    write: str | None,
) -> dict[str, Any]:
    """A session with an empty memory.

    Args:
        name: of the request: the same creation again under it gets the session as it is now.

    Raises:
        SessionError: 409; it exists.
    """
    attributes = _checked(Attributes(metadata=metadata, ttl=ttl, write=write))
    first = structs.replace(blank(service, key), attributes=pack(attributes))
    return await _install(service, key, name, first, "create")


async def update(
    service: "SessionService", key: SessionKey, name: str, fields: dict[str, Any], if_match: Match
) -> dict[str, Any]:
    """Replace attributes: those of ``metadata``, ``ttl`` and ``write`` that are in ``fields``."""

    def make(record: Record) -> Record | None:
        before = unpack(record.attributes)
        after = _checked(structs.replace(before, **fields))
        return None if after == before else structs.replace(record, attributes=pack(after))

    return await _change(service, key, name, make, if_match, "metadata")


async def reset(service: "SessionService", key: SessionKey, name: str, if_match: Match) -> dict[str, Any]:
    """Empty the memory; what belongs to the session beside it stays."""

    def make(record: Record) -> Record:
        kept = structs.replace(unpack(record.attributes), chain=None)
        return structs.replace(blank(service, key), attributes=pack(kept))

    return await _change(service, key, name, make, if_match, "reset")


async def rollback(
    service: "SessionService", key: SessionKey, name: str, version: int, if_match: Match
) -> dict[str, Any]:
    """Commit the memory of a kept version again. Of its attributes only what describes the memory comes with it.

    Raises:
        SessionError: 404; the version is not kept.
    """
    old = await service.records.reads.run(service.records.store.get_version, key, version)

    def make(record: Record) -> Record:
        if old is None or old.incarnation != record.incarnation:
            raise SessionError(
                f"session {key.session!r} does not keep version {version}: GET /v1/sessions/ID/versions lists those "
                "that it keeps",
                status=404,
                parameter="version",
            )
        service.records.verify(old)
        chain = unpack(old.attributes).chain
        kept = structs.replace(unpack(record.attributes), chain=chain)
        return structs.replace(old, attributes=pack(kept))

    return await _change(service, key, name, make, if_match, "rollback")


async def export(
    service: "SessionService",
    key: SessionKey,
    version: int | None = None,
    if_match: Match = None,
    encrypted: bool = False,
) -> dict[str, Any] | None:
    """A session's latest version, or a kept one, as bytes; None without a session.

    Args:
        encrypted: with the store's newest key, so that only servers that have it can import it.

    Returns:
        version; data: a record that names neither tenant nor incarnation nor requests.

    Raises:
        SessionError: 409; the store has no key. 404; the version is not kept.
    """
    service.commits.check_audit()
    sealing = _sealing(service) if encrypted else codec.PLAIN
    if sealing is None:
        raise SessionError(
            "this server's store has no encryption key (docs/stores.md says how it gets one): ask for a plain export",
            status=409,
            parameter="encrypted",
        )
    record = await service.records.latest(service.directory.get(key))
    if record is None:
        return None
    check_match(key, record, if_match)
    if version is not None and version != record.version:
        kept = await service.records.kept(record, version)
        # As with a rollback: what was erased beside the memory must not come back with an older one.
        beside = structs.replace(unpack(record.attributes), chain=unpack(kept.attributes).chain)
        record = structs.replace(kept, attributes=pack(beside))
    named = SessionKey(PORTABLE, key.session)
    portable = structs.replace(record, key=named, incarnation=NOWHERE, request_id=PORTABLE)
    await service.commits.note("export", key, record.version)
    return {"version": record.version, "data": sealing.encode(portable)}


def _sealing(service: "SessionService") -> codec.RecordCodec | None:
    """The codec that the store encrypts with, if it does."""
    found: codec.RecordCodec = getattr(service.store, "codec", codec.PLAIN)
    return None if found is codec.PLAIN else found


async def install(
    service: "SessionService", key: SessionKey, name: str, data: bytes, forked_from: str | None = None
) -> dict[str, Any]:
    """Create a session from what `export` gave, trusted in nothing.

    Args:
        forked_from: ``id@version`` of the session here that it is a copy of; None: a client gave it.

    Raises:
        SessionError: 409; it exists. 422; the bytes are damaged, encrypted with a key that the store lacks, no export,
            or not of this server's adapter, model or shape.
    """
    sealed = codec.format_of(data) not in (0, *codec.PLAIN_FORMATS)
    opening = _sealing(service) if sealed else codec.PLAIN
    try:
        if opening is None:
            raise CorruptRecord("it is encrypted, and this server's store has no key")
        record = opening.decode(data)
        if sealed and (record.key.tenant, record.incarnation) != (PORTABLE, NOWHERE):
            # Else whoever has got hold of the store's bytes could have any session of anybody opened for them here.
            raise CorruptRecord("it is a record of a store")
        attributes = _checked(unpack(record.attributes))
        windows.unpack(record.window)
    except CorruptRecord as e:
        raise SessionError(f"this is no exported session: {e}", status=422, parameter="body") from None
    service.records.verify(record)
    if forked_from is not None:
        attributes = structs.replace(attributes, forked_from=forked_from)
    else:
        _check_norms(record)
    event: Event = "import" if forked_from is None else "fork"
    return await _install(service, key, name, structs.replace(record, attributes=pack(attributes)), event)


def _check_norms(record: Record) -> None:
    """Refuse a memory that no model has written.

    Raises:
        SessionError: 422.
    """
    for state in (record.base, record.end):
        norm = float(np.linalg.norm(state.reshape(len(state), -1), axis=1).max())
        if not norm <= MAX_IMPORT_NORM:
            raise SessionError(
                f"a layer of the memory has norm {norm:g}; at most {MAX_IMPORT_NORM:g} is taken",
                status=422,
                parameter="body",
            )


async def record_limit(service: "SessionService") -> int:
    """The most bytes that an exported session of this server's shape can have."""
    states = 2 * 4 * int(np.prod(service.state_shape))
    return states + codec.MAX_METADATA_BYTES + parts.MAX_WINDOW_BYTES + MAX_ATTRIBUTES_BYTES + 4096


async def erase(service: "SessionService", key: SessionKey, if_match: Match = None) -> dict[str, Any]:
    """Erase a session everywhere. A request that runs meanwhile finishes and commits nothing.

    Returns:
        existed; versions: how many the store had; unsaved: how many waited for it; host: whether its memory was held
        here.
    """
    session = service.directory.get(key)
    if if_match is None:
        return await _erase(service, session)
    async with turn(service, session):  # nobody may move it on between the comparison and the deletion
        record = await service.records.latest(session)
        check_match(key, record, if_match)
        return await _erase(service, session)


async def _erase(service: "SessionService", session: Session) -> dict[str, Any]:
    store, key = service.records.store, session.key
    service.commits.check_audit()
    async with session.storing, session.loading:
        kept = await service.records.reads.run(store.history, key, 1000)
        existed = await service.records.reads.run(store.delete, key)
        unsaved, host = len(session.unsaved), session.record is not None
        existed = service.commits.abandon(session) or existed
        session.erase()
        service.forget_on_device(key)
        if existed:
            await service.commits.note("delete", key)
    return {"existed": bool(existed), "versions": len(kept), "unsaved": unsaved, "host": host}


async def _change(
    service: "SessionService",
    key: SessionKey,
    name: str,
    make: Callable[[Record], Record | None],
    if_match: Match,
    event: Event,
) -> dict[str, Any]:
    """Change a session that must exist; what it is afterwards."""
    record = await change(service, key, name, _of_existing(key, make), if_match=if_match, event=event)
    return described(service, service.directory.get(key), record)


def _of_existing(key: SessionKey, make: Callable[[Record], Record | None]) -> Make:
    def checked(record: Record | None) -> Record | None:
        if record is None:
            raise not_found(key)
        return make(record)

    return checked


async def _install(
    service: "SessionService", key: SessionKey, name: str, first: Record, event: Event
) -> dict[str, Any]:
    """Create a session whose first version is ``first``."""

    def make(record: Record | None) -> Record:
        if record is not None:
            raise _Exists(f"session {key.session!r} exists: choose another id, or delete it", status=409)
        return first

    try:
        record = await change(service, key, name, make, event=event)
    except _Exists:
        created = await service.records.reads.run(service.records.store.get_version, key, 1)
        latest = await service.records.latest(service.directory.get(key))
        if created is None or latest is None or created.request_id != name:
            raise
        record = latest  # asked again, by a client that has not heard the first answer
    return described(service, service.directory.get(key), record)


def _checked(attributes: Attributes) -> Attributes:
    """Attributes that an API process or an import gave, if they are within their bounds.

    Raises:
        SessionError: 400; they are not.
    """
    if len(attributes.metadata) > MAX_PAIRS:
        raise SessionError(f"metadata of {len(attributes.metadata)} pairs: at most {MAX_PAIRS}", parameter="metadata")
    try:
        parse_policy(attributes.write or "all")
        packed = pack(attributes)
        unpack(packed)
    except (ValueError, CorruptRecord) as e:
        raise SessionError(f"invalid attributes: {e}") from None
    if len(packed) > MAX_ATTRIBUTES_BYTES:
        raise SessionError(f"attributes of {len(packed)} bytes; the limit is {MAX_ATTRIBUTES_BYTES}")
    return attributes


QUESTIONS: dict[str, Callable[..., Awaitable[Any]]] = {
    "info": info,
    "list": listing,
    "versions": versions,
    "create": create,
    "update": update,
    "reset": reset,
    "rollback": rollback,
    "export": export,
    "install": install,
    "record_limit": record_limit,
    "delete": erase,
}
