"""A record as bytes that verify themselves.

    magic 8 | format u16 | reserved u16 | metadata length u32 | middle length u32 | body length u32
    metadata   canonical JSON: all fields of the record but base, end, window and attributes
    middle     nothing in format 5; in format 6 what opens the body
    body       window length u32 | attributes length u32 | window | attributes | payload; in format 6 sealed
    checksum   blake3-256 (keyed by the context below) of everything before it

The payload is safetensors with the tensors base and end, [L, H, r, r] fp32. All integers are little-endian.
Lengths are checked against bounds and against each other before anything is parsed or allocated; the metadata
is parsed only once the checksum is right. Nothing is unpickled. A record read under another session's key is
refused, because the key is part of it. Format 6, in ``crypto``, seals the body with AES-GCM; it shares the
parts, bounds and checks of this module.

Older formats are read as they always were and never written: ``reencrypt`` stores such a record in the present
format. Formats 3 and 4 are 5 and 6 with another checksum, blake2b-256 (person "deltamem-rec"), which took most of the
time of a commit and of a restore. Formats 1 and 2 have that checksum too and came before attributes: format 1 has the
window as its middle and the payload as its body.
"""

import hashlib
import struct
from typing import Protocol, TypeAlias

from blake3 import blake3

from deltamem_vllm.errors import CorruptRecord
from deltamem_vllm.store.parts import (
    MAX_STATE_BYTES,
    MAX_WINDOW_BYTES,
    SAFETENSORS_OVERHEAD,
    bound,
    check,
    check_fields,
    key_of,
    metadata_of,
    parse_layout,
    parse_metadata,
    parse_payload,
    payload_of,
    usual_metadata,
    usual_payload,
)
from deltamem_vllm.store.protocol import MAX_ATTRIBUTES_BYTES, Record, SessionKey

FORMAT = 5
FIRST_FORMAT = 1
PLAIN_FORMATS, SEALED_FORMATS = (1, 3, FORMAT), (2, 4, 6)
MAX_METADATA_BYTES = 16 * 1024

_MAGIC = b"DMEMREC\n"
_HEAD = struct.Struct("<8sHHIII")
_USUAL_HEAD = struct.Struct("<12sIII")  # the same, magic and format in one piece
_USUAL_START = _HEAD.pack(_MAGIC, FORMAT, 0, 0, 0, 0)[:12]
_SUM_BYTES = 32
_SUM_CONTEXT = "deltamem-vllm 2026-11-28 checksum of a session record"
_SEAL_OVERHEAD = MAX_WINDOW_BYTES + 64  # format 2 has the window, its length and a tag in there too
_BODY = struct.Struct("<II")
_TAG_BYTES = 16
MAX_PAYLOAD_BYTES = 2 * MAX_STATE_BYTES + SAFETENSORS_OVERHEAD + _SEAL_OVERHEAD
"""Bound on the last part of a record of format 1 or 2."""
MAX_BODY_BYTES = (
    _BODY.size + MAX_WINDOW_BYTES + MAX_ATTRIBUTES_BYTES + 2 * MAX_STATE_BYTES + SAFETENSORS_OVERHEAD + _TAG_BYTES
)
_MIDDLE = {1: ("window", MAX_WINDOW_BYTES), 2: ("middle", MAX_WINDOW_BYTES)} | {
    form: ("middle", 0 if form in PLAIN_FORMATS else 128) for form in (3, 4, 5, 6)
}
_LAST = {form: ("payload", MAX_PAYLOAD_BYTES) if form < 3 else ("body", MAX_BODY_BYTES) for form in _MIDDLE}
MAX_RECORD_BYTES = _HEAD.size + MAX_METADATA_BYTES + MAX_WINDOW_BYTES + MAX_BODY_BYTES + _SUM_BYTES

Buffer: TypeAlias = bytes | memoryview


class RecordCodec(Protocol):
    """How a store turns records into bytes and back: :data:`PLAIN`, or ``crypto.SealedCodec``."""

    def encode(self, record: Record) -> bytes:
        """A record's bytes. Raises ``CorruptRecord`` if the record is not valid."""

    def decode(self, data: bytes, *, key: SessionKey | None = None) -> Record:
        """The inverse; verifies everything, the key included. Raises ``CorruptRecord``."""

    def current(self, data: bytes) -> bool:
        """Whether :meth:`encode` would seal in the same way: same format, same encryption key."""


def encode(record: Record) -> bytes:
    """A record's bytes. The same record always gives the same bytes.

    Raises:
        CorruptRecord: the record is not valid; the message names the field.
    """
    metadata, body = parts_of(record)
    return pack(FORMAT, metadata, b"", *body)


def decode(data: bytes, *, key: SessionKey | None = None) -> Record:
    """The inverse of :func:`encode`, verifying everything.

    Args:
        data: stored bytes, trusted in nothing.
        key: the key it was stored under; a record of another session is refused. None takes any (import,
        inspection).

    Returns:
        a record that owns its arrays.

    Raises:
        CorruptRecord: naming what failed.
    """
    record = _usual_record(data, key)
    if record is not None:
        return record
    form = format_of(data)
    if form == FIRST_FORMAT:
        metadata, window, payload = unpack(data, FIRST_FORMAT)
        return record_of(metadata, window, b"", payload, key)
    metadata, _, body = unpack(data, form if form in PLAIN_FORMATS else FORMAT)
    return record_of(metadata, *split(body), key)


def _usual_record(data: bytes, key: SessionKey | None) -> Record | None:
    """A record of the present format as :func:`encode` writes it, everything verified; None of all others, be they
    wrong or only unusual: what then follows finds out, part by part, and says it.

    One pass, because a restore is mostly this, and takes as long as there are lines of Python in it.
    """
    size = len(data)
    if not _HEAD.size + _BODY.size + _SUM_BYTES < size <= MAX_RECORD_BYTES:
        return None
    start, metadata_bytes, middle_bytes, body_bytes = _USUAL_HEAD.unpack_from(data)
    body_at, sum_at = _HEAD.size + metadata_bytes, size - _SUM_BYTES
    if start != _USUAL_START or middle_bytes or metadata_bytes > MAX_METADATA_BYTES or body_at + body_bytes != sum_at:
        return None
    if body_bytes < _BODY.size or checksum(memoryview(data)[:sum_at]) != data[sum_at:]:
        return None
    known = usual_metadata(data[_HEAD.size : body_at])
    window_bytes, attributes_bytes = _BODY.unpack_from(data, body_at)
    if known is None or window_bytes > MAX_WINDOW_BYTES or attributes_bytes > MAX_ATTRIBUTES_BYTES:
        return None
    window_at = body_at + _BODY.size
    attributes_at = window_at + window_bytes
    payload_at = attributes_at + attributes_bytes
    states = usual_payload(data, payload_at, sum_at, parse_layout(known.layout))
    if states is None:
        return None
    base, end = states
    return Record(
        key=key_of(known.tenant, known.session, key), version=known.version, incarnation=known.incarnation,
        request_id=known.request_id, adapter=known.adapter, model=known.model, layout=known.layout, base=base, end=end,
        window=data[window_at:attributes_at], created_at=known.created_at, updated_at=known.updated_at,
        tokens=known.tokens, windows=known.windows, attributes=data[attributes_at:payload_at],
    )  # fmt: skip


class Plain:
    """Format 5, as a :class:`RecordCodec`: a checksum against damage, nothing against an attacker."""

    encode = staticmethod(encode)
    decode = staticmethod(decode)

    def current(self, data: bytes) -> bool:
        return format_of(data) == FORMAT


PLAIN: RecordCodec = Plain()


def parts_of(record: Record) -> tuple[bytes, list[Buffer]]:
    """Metadata of a record that is valid, and its body in pieces.

    Raises:
        CorruptRecord: it is not; the message names the field.
    """
    check(record)
    metadata = metadata_of(record)
    bound("metadata", len(metadata), MAX_METADATA_BYTES)
    lengths = _BODY.pack(len(record.window), len(record.attributes))
    return metadata, [lengths, record.window, record.attributes, *payload_of(record)]


def split(body: Buffer) -> tuple[bytes, bytes, memoryview]:
    """Window, attributes and payload of a body: lengths bounded, the parts not yet looked at, the payload not copied.

    Raises:
        CorruptRecord: naming what failed.
    """
    if len(body) < _BODY.size:
        raise CorruptRecord(f"a body of {len(body)} bytes cannot say what is in it")
    window_bytes, attributes_bytes = _BODY.unpack_from(body)
    bound("window", window_bytes, MAX_WINDOW_BYTES)
    bound("attributes", attributes_bytes, MAX_ATTRIBUTES_BYTES)
    attributes_at = _BODY.size + window_bytes
    payload_at = attributes_at + attributes_bytes
    if payload_at > len(body):
        raise CorruptRecord(f"window and attributes end at byte {payload_at} of a body of {len(body)}")
    parts = memoryview(body)
    return bytes(parts[_BODY.size : attributes_at]), bytes(parts[attributes_at:payload_at]), parts[payload_at:]


def pack(form: int, metadata: bytes, middle: bytes, *last: Buffer) -> bytes:
    """Three parts with header and checksum; the last one, which is large, may come in pieces of bytes."""
    data = b"".join((header(form, metadata, len(middle), sum(map(len, last))), middle, *last))
    return data + checksum(data, form)


def header(form: int, metadata: bytes, middle_bytes: int, last_bytes: int) -> bytes:
    """The head of a record up to and including its metadata."""
    return _HEAD.pack(_MAGIC, form, 0, len(metadata), middle_bytes, last_bytes) + metadata


def format_of(data: bytes) -> int:
    """The format number in a record's header; 0 for what is no record."""
    if len(data) < _HEAD.size or not data.startswith(_MAGIC):
        return 0
    return int(_HEAD.unpack_from(data)[1])


def unpack(data: bytes, form: int) -> tuple[bytes, bytes, memoryview]:
    """The inverse of :func:`pack`: lengths bounded, checksum right, the parts not yet looked at; the last one, which is
    large, is not copied.

    Raises:
        CorruptRecord: naming what failed.
    """
    if not _HEAD.size + _SUM_BYTES < len(data) <= MAX_RECORD_BYTES:
        raise CorruptRecord(f"a record has up to {MAX_RECORD_BYTES} bytes and a header, not {len(data)} bytes")
    magic, version, reserved, metadata_bytes, middle_bytes, last_bytes = _HEAD.unpack_from(data)
    if magic != _MAGIC:
        raise CorruptRecord(f"magic {magic!r} is not that of a deltamem record")
    if version != form or reserved:
        plain = form in PLAIN_FORMATS
        hint = ": it is encrypted, give the store its key" if plain and version in SEALED_FORMATS else ""
        *others, last_read = PLAIN_FORMATS if plain else SEALED_FORMATS
        read = f"{', '.join(map(str, others))} and {last_read}"
        raise CorruptRecord(f"record format {version}.{reserved}; formats {read} are read here{hint}")
    (middle, middle_limit), (last, last_limit) = _MIDDLE[form], _LAST[form]
    bound("metadata", metadata_bytes, MAX_METADATA_BYTES)
    bound(middle, middle_bytes, middle_limit)
    bound(last, last_bytes, last_limit)
    middle_at = _HEAD.size + metadata_bytes
    last_at = middle_at + middle_bytes
    sum_at = last_at + last_bytes
    if len(data) != sum_at + _SUM_BYTES:
        raise CorruptRecord(f"the lengths add up to {sum_at + _SUM_BYTES} bytes, the record has {len(data)}")
    parts = memoryview(data)
    if checksum(parts[:sum_at], form) != data[sum_at:]:
        raise CorruptRecord("checksum does not match the stored bytes")
    return data[_HEAD.size : middle_at], data[middle_at:last_at], parts[last_at:sum_at]


def record_of(metadata: bytes, window: bytes, attributes: bytes, payload: Buffer, key: SessionKey | None) -> Record:
    """The record that its parts make, everything verified.

    Raises:
        CorruptRecord: naming what failed.
    """
    fields = parse_metadata(metadata)
    own = key_of(fields.pop("tenant"), fields.pop("session"), key)
    base, end = parse_payload(payload, parse_layout(fields["layout"]))
    record = Record(key=own, base=base, end=end, window=window, attributes=attributes, **fields)
    check_fields(record)
    if metadata_of(record) != metadata:
        raise CorruptRecord("metadata is not in its canonical form")
    return record


def checksum(data: Buffer, form: int = FORMAT) -> bytes:
    """What stands at the end of a record of format ``form`` whose other bytes are ``data``."""
    if form >= FORMAT:
        return blake3(data, derive_key_context=_SUM_CONTEXT).digest()
    return hashlib.blake2b(data, digest_size=_SUM_BYTES, person=b"deltamem-rec").digest()
