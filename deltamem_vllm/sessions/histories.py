"""Histories that clients let be left out: what a session's record says of them, and keeps."""

import hashlib
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from deltamem_vllm.errors import CapacityError
from deltamem_vllm.sessions import attributes, chain, pinning
from deltamem_vllm.sessions.attributes import Chain
from deltamem_vllm.sessions.grants import Grant, History
from deltamem_vllm.sessions.masks import unwritten_before
from deltamem_vllm.sessions.meters import turned_away
from deltamem_vllm.store.protocol import Record, SessionKey

if TYPE_CHECKING:
    from deltamem_vllm.sessions.service import SessionService


def digest(state: np.ndarray) -> bytes:
    """8 bytes that name a state in a session's attributes: stored, so what names it must stay as it is."""
    return hashlib.blake2b(np.ascontiguousarray(state).tobytes(), digest_size=16).digest()[:8]


def chain_of(record: Record | None) -> Chain | None:
    """Which messages the record's memory holds, where that is known."""
    if record is None:
        return None
    found = attributes.unpack(record.attributes).chain
    return found if found is not None and found.state == digest(record.end) else None


async def recall(service: "SessionService", key: SessionKey, query: str = "", chars: int = 0) -> dict[str, Any]:
    """What has to be known of a session before a prompt of it is made.

    Args:
        query: what its facts are wanted for, see `deltamem_vllm.sessions.facts.choose`.
        chars: how much of them.

    Returns:
        version; chain and reply, which a resent conversation's beginning is compared with; write: the session's own
        write policy, if any; facts: texts.
    """
    session = service.directory.get(key)
    with turned_away(service.meters):  # a prompt is not even made, and nobody will ask for its admission
        record = await service.records.latest(session)
    found = chain_of(record)
    version = record.version if record is not None else 0
    return {
        "version": version,
        "write": attributes.unpack(record.attributes).write if record is not None else None,
        "facts": pinning.offered(record, query, chars),
        "chain": msgspec.msgpack.encode(found) if found is not None else None,
        "reply": session.reply[1] if session.reply is not None and session.reply[0] == version else None,
    }


def check_rendered_from(history: History, record: Record | None) -> None:
    """Refuse a prompt whose history was left out for a version that is no longer the latest.

    Raises:
        CapacityError: 409; the conversation has to be rendered again.
    """
    version = record.version if record is not None else 0
    if version != history.version:
        raise CapacityError(
            f"the session went from version {history.version} to {version} while its history was being left out: "
            "retry, or send one request of a session at a time",
            status=409,
            retry_after=1.0,
        )


def attributes_after(grant: Grant, last: Record | None, fed: int, state: np.ndarray) -> bytes:
    """The attributes of the version that a request commits.

    Args:
        last: the version before it.
        fed: tokens that went through the model.
        state: the memory after them.
    """
    before = last.attributes if last is not None else b""
    history = grant.history
    if history is None:
        return before
    known = attributes.unpack(before)
    written = fed - unwritten_before(grant.spans, fed)
    made = chain.advance(known.chain, history.cut, history.messages, history.link, written, digest(state))
    return attributes.pack(msgspec.structs.replace(known, chain=made))
