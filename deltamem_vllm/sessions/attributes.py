"""What belongs to a session besides its memory, as it lies in ``Record.attributes``: small, typed, bounded.

It moves with the session's versions, except that a rollback of the memory brings none of it back (see the store's
protocol). The encoding is a msgpack map; a field that a later version adds is unknown to an earlier one, which then
refuses the record instead of dropping what it does not understand.
"""

from typing import Annotated

import msgspec

from deltamem_vllm.errors import CorruptRecord

Digest = Annotated[bytes, msgspec.Meta(min_length=8, max_length=8)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]


class Point(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """How far a conversation has been written.

    Attributes:
        messages: how many of the client's messages, the reply not counted.
        link: what those messages are: see `deltamem_vllm.sessions.chain`.
        tokens: tokens that they and the reply came to.
    """

    messages: Count
    link: Digest
    tokens: Count


class Chain(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Which messages of a client's conversation are in the memory.

    Attributes:
        state: digest of the state that this is about. A session whose latest state is another one (it was rolled back,
            reset, written without its messages being known) has no chain.
        end: in that state; a reply follows.
        base: in the state that the present window began from; None: none were.
    """

    state: Digest
    end: Point
    base: Point | None = None


class Fact(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A pinned fact, kept word for word.

    Attributes:
        id: names it within the session.
        text: 1 to 2,000 characters.
        source: where it came from, in the client's words.
        created_at, expires_at: Unix seconds; None: it stays.
    """

    id: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
    text: Annotated[str, msgspec.Meta(min_length=1, max_length=2000)]
    source: Annotated[str, msgspec.Meta(max_length=200)] = ""
    created_at: float = 0.0
    expires_at: float | None = None


class Attributes(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """A session's attributes.

    Attributes:
        metadata: the client's own, up to 16 pairs.
        ttl: seconds of idleness after which the session is gone; None: the server's setting alone.
        write: the session's write policy (`deltamem_vllm.policy`); None: the server's.
        facts: pinned facts, oldest first.
        chain: for history elision; None: unknown.
        forked_from: ``id@version`` of the session it was forked from.
    """

    metadata: dict[
        Annotated[str, msgspec.Meta(min_length=1, max_length=64)], Annotated[str, msgspec.Meta(max_length=512)]
    ] = {}
    ttl: Annotated[float, msgspec.Meta(gt=0)] | None = None
    write: str | None = None
    facts: tuple[Fact, ...] = ()
    chain: Chain | None = None
    forked_from: str | None = None

    def outlived(self, updated_at: float, now: float) -> bool:
        """Whether a session that was last written at ``updated_at`` has outlived its own ttl."""
        return self.ttl is not None and updated_at + self.ttl <= now


EMPTY = Attributes()
_encoder = msgspec.msgpack.Encoder(order="deterministic")
_decoder = msgspec.msgpack.Decoder(Attributes)


def pack(attributes: Attributes) -> bytes:
    """Attributes as bytes for a record; none are ``b""``."""
    return b"" if attributes == EMPTY else _encoder.encode(attributes)


def unpack(data: bytes) -> Attributes:
    """The inverse of :func:`pack`.

    Raises:
        CorruptRecord: bytes that are no attributes, or those of a later version.
    """
    if not data:
        return EMPTY
    try:
        return _decoder.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as e:  # text that is no UTF-8 raises a ValueError
        raise CorruptRecord(f"the session's attributes cannot be read: {e}") from None
