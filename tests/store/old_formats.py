"""Records in the formats that are read and no longer written, as earlier versions of this package wrote them."""

import hashlib
import secrets
import struct

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from deltamem_vllm.store import codec
from deltamem_vllm.store.codec import encode
from deltamem_vllm.store.crypto import KeyRing, SealedCodec
from deltamem_vllm.store.protocol import Record, SessionKey


def framed(form: int, metadata: bytes, middle: bytes, last: bytes) -> bytes:
    """The three parts with a header, and with the checksum that all these formats have."""
    head = struct.pack("<8sHHIII", b"DMEMREC\n", form, 0, len(metadata), len(middle), len(last))
    data = head + metadata + middle + last
    return data + hashlib.blake2b(data, digest_size=32, person=b"deltamem-rec").digest()


def parts(made: Record) -> tuple[bytes, bytes, bytes, bytes]:
    """Metadata, body, and of the body window and payload: formats 1 and 2 have no room for attributes."""
    metadata, _, body = codec.unpack(encode(made), 5)
    window, _, payload = codec.split(body)
    return metadata, bytes(body), window, bytes(payload)


def format1(made: Record) -> bytes:
    """Not encrypted, without attributes."""
    metadata, _, window, payload = parts(made)
    return framed(1, metadata, window, payload)


def format2(made: Record, ring: KeyRing) -> bytes:
    """Sealed with the first key, without attributes."""
    metadata, _, window, payload = parts(made)
    return sealed(2, metadata, struct.pack("<I", len(window)) + window + payload, ring)


def format3(made: Record) -> bytes:
    """Not encrypted, with attributes."""
    metadata, body, *_ = parts(made)
    return framed(3, metadata, b"", body)


def format4(made: Record, ring: KeyRing) -> bytes:
    """Sealed with the first key, with attributes."""
    metadata, body, *_ = parts(made)
    return sealed(4, metadata, body, ring)


def sealed(form: int, metadata: bytes, plain: bytes, ring: KeyRing) -> bytes:
    """``plain`` sealed with the first key of the ring."""
    name, key = ring.keys[0]
    middle = name.encode() + b"\0" + secrets.token_bytes(12)
    bound = codec.header(form, metadata, len(middle), len(plain) + 16) + middle
    return framed(form, metadata, middle, AESGCM(key).encrypt(middle[-12:], plain, bound))


class OldCodec:
    """What an earlier version of this package did: formats 1 and 2 only, or 3 and 4."""

    def __init__(self, ring: KeyRing | None = None, *, attributes: bool = False) -> None:
        self._ring = ring
        self._plain, self._sealed = (format3, format4) if attributes else (format1, format2)
        self._forms = (3, 4) if attributes else (1, 2)
        self._reader: codec.RecordCodec = codec.PLAIN if ring is None else SealedCodec(ring)

    def encode(self, record: Record) -> bytes:
        return self._plain(record) if self._ring is None else self._sealed(record, self._ring)

    def decode(self, data: bytes, *, key: SessionKey | None = None) -> Record:
        return self._reader.decode(data, key=key)

    def current(self, data: bytes) -> bool:
        return codec.format_of(data) == self._forms[self._ring is not None]
