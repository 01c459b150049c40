"""Records in the formats that are read and no longer written, as earlier versions of this package wrote them."""

import secrets
import struct

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from deltamem_vllm.store import codec
from deltamem_vllm.store.codec import encode
from deltamem_vllm.store.crypto import KeyRing, SealedCodec
from deltamem_vllm.store.protocol import Record, SessionKey


def parts(made: Record) -> tuple[bytes, bytes, bytes]:
    """Metadata, window and payload; the formats have no room for attributes."""
    metadata, _, body = codec.unpack(encode(made), 3)
    window, _, payload = codec.split(body)
    return metadata, window, payload


def format1(made: Record) -> bytes:
    """Not encrypted."""
    return codec.pack(1, *parts(made))


def format2(made: Record, ring: KeyRing) -> bytes:
    """Sealed with the first key."""
    metadata, window, payload = parts(made)
    plain = struct.pack("<I", len(window)) + window + payload
    name, key = ring.keys[0]
    middle = name.encode() + b"\0" + secrets.token_bytes(12)
    bound = codec.header(2, metadata, len(middle), len(plain) + 16) + middle
    return codec.pack(2, metadata, middle, AESGCM(key).encrypt(middle[-12:], plain, bound))


class OldCodec:
    """What an earlier version of this package did: formats 1 and 2 only."""

    def __init__(self, ring: KeyRing | None = None) -> None:
        self._ring = ring
        self._reader: codec.RecordCodec = codec.PLAIN if ring is None else SealedCodec(ring)

    def encode(self, record: Record) -> bytes:
        return format1(record) if self._ring is None else format2(record, self._ring)

    def decode(self, data: bytes, *, key: SessionKey | None = None) -> Record:
        return self._reader.decode(data, key=key)

    def current(self, data: bytes) -> bool:
        return codec.format_of(data) == (1 if self._ring is None else 2)
