"""A record as bytes that verify themselves.

    magic 8 | format u16 | reserved u16 | metadata length u32 | middle length u32 | body length u32
    metadata   canonical JSON: all fields of the record but base, end, window and attributes
    middle     nothing in format 3; in format 4 what opens the body
    body       window length u32 | attributes length u32 | window | attributes | payload; in format 4 sealed
    checksum   blake2b-256 (person "deltamem-rec") of everything before it

The payload is safetensors with the tensors base and end, [L, H, r, r] fp32. All integers are little-endian.
Lengths are checked against bounds and against each other before anything is parsed or allocated; the metadata
is parsed only once the checksum is right. Nothing is unpickled. A record read under another session's key is
refused, because the key is part of it. Format 4, in ``crypto``, seals the body with AES-GCM; it shares the
parts, bounds and checks of this module.

Formats 1 and 2 came before attributes. They are read as they always were, with no attributes, and never
written: ``reencrypt`` stores such a record in the present format. Format 1 has the window as its middle and the
payload as its body.
"""

import hashlib
import json
import math
import re
import struct
from typing import Any, Protocol

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from deltamem_vllm.errors import CorruptRecord
from deltamem_vllm.store.protocol import MAX_ATTRIBUTES_BYTES, Array, Record, SessionKey

FORMAT = 3
FIRST_FORMAT = 1
PLAIN_FORMATS, SEALED_FORMATS = (1, 3), (2, 4)
MAX_METADATA_BYTES = 16 * 1024
MAX_WINDOW_BYTES = 16 * 1024
MAX_STATE_BYTES = 32 * 1024 * 1024
"""Bound on one state. Qwen3-4B has 9,216 B; the largest layout we can imagine stays far below."""
MAX_ABS = 1e6
"""Bound on a state's entries. Trained memories stay below about 1e2; more than this is an attack or a bug."""

_MAGIC = b"DMEMREC\n"
_HEAD = struct.Struct("<8sHHIII")
_SUM_BYTES = 32
_SAFETENSORS_OVERHEAD = 1024  # its header for two tensors takes about 200 bytes
_SEAL_OVERHEAD = MAX_WINDOW_BYTES + 64  # format 2 has the window, its length and a tag in there too
_BODY = struct.Struct("<II")
_TAG_BYTES = 16
MAX_PAYLOAD_BYTES = 2 * MAX_STATE_BYTES + _SAFETENSORS_OVERHEAD + _SEAL_OVERHEAD
"""Bound on the last part of a record of format 1 or 2."""
MAX_BODY_BYTES = (
    _BODY.size + MAX_WINDOW_BYTES + MAX_ATTRIBUTES_BYTES + 2 * MAX_STATE_BYTES + _SAFETENSORS_OVERHEAD + _TAG_BYTES
)
_MIDDLE = {1: ("window", MAX_WINDOW_BYTES), 2: ("middle", MAX_WINDOW_BYTES), 3: ("middle", 0), 4: ("middle", 128)}
_LAST = {form: ("payload", MAX_PAYLOAD_BYTES) if form < FORMAT else ("body", MAX_BODY_BYTES) for form in _MIDDLE}
MAX_RECORD_BYTES = _HEAD.size + MAX_METADATA_BYTES + MAX_WINDOW_BYTES + MAX_BODY_BYTES + _SUM_BYTES

_LAYOUT = re.compile(r"L([1-9]\d{0,3})H([1-9]\d{0,3})r([1-9]\d{0,3})", re.ASCII)
_INCARNATION = re.compile(r"[0-9a-f]{8,64}", re.ASCII)
_INT_MAX = 2**63 - 1
_FIELDS: dict[str, type] = {
    "adapter": str,
    "created_at": float,
    "incarnation": str,
    "layout": str,
    "model": str,
    "request_id": str,
    "session": str,
    "tenant": str,
    "tokens": int,
    "updated_at": float,
    "version": int,
    "windows": int,
}


def parse_layout(layout: str) -> tuple[int, int, int, int]:
    """The shape [L, H, r, r] of a state whose layout is ``L<layers>H<heads>r<rank>``.

    Raises:
        CorruptRecord: another form, or a state over ``MAX_STATE_BYTES``.
    """
    found = _LAYOUT.fullmatch(layout)
    if found is None:
        raise CorruptRecord(f"layout {layout[:64]!r} is not of the form L36H1r8")
    layers, heads, rank = map(int, found.groups())
    if 4 * layers * heads * rank * rank > MAX_STATE_BYTES:
        raise CorruptRecord(f"layout {layout!r} needs more than {MAX_STATE_BYTES} bytes per state")
    return layers, heads, rank, rank


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
    return pack(FORMAT, metadata, b"", body)


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
    if format_of(data) == FIRST_FORMAT:
        metadata, window, payload = unpack(data, FIRST_FORMAT)
        return record_of(metadata, window, b"", payload, key)
    metadata, _, body = unpack(data, FORMAT)
    return record_of(metadata, *split(body), key)


class Plain:
    """Format 3, as a :class:`RecordCodec`: a checksum against damage, nothing against an attacker."""

    encode = staticmethod(encode)
    decode = staticmethod(decode)

    def current(self, data: bytes) -> bool:
        return format_of(data) == FORMAT


PLAIN: RecordCodec = Plain()


def parts_of(record: Record) -> tuple[bytes, bytes]:
    """Metadata and body of a record that is valid.

    Raises:
        CorruptRecord: it is not; the message names the field.
    """
    _check(record)
    metadata = _canonical(record)
    payload = save({"base": np.ascontiguousarray(record.base), "end": np.ascontiguousarray(record.end)})
    if len(metadata) > MAX_METADATA_BYTES:
        raise CorruptRecord(f"metadata of {len(metadata)} bytes; the limit is {MAX_METADATA_BYTES}")
    lengths = _BODY.pack(len(record.window), len(record.attributes))
    return metadata, b"".join((lengths, record.window, record.attributes, payload))


def split(body: bytes) -> tuple[bytes, bytes, bytes]:
    """Window, attributes and payload of a body: lengths bounded, the parts not yet looked at.

    Raises:
        CorruptRecord: naming what failed.
    """
    if len(body) < _BODY.size:
        raise CorruptRecord(f"a body of {len(body)} bytes cannot say what is in it")
    window_bytes, attributes_bytes = _BODY.unpack_from(body)
    _bound((("window", window_bytes, MAX_WINDOW_BYTES), ("attributes", attributes_bytes, MAX_ATTRIBUTES_BYTES)))
    attributes_at = _BODY.size + window_bytes
    payload_at = attributes_at + attributes_bytes
    if payload_at > len(body):
        raise CorruptRecord(f"window and attributes end at byte {payload_at} of a body of {len(body)}")
    return body[_BODY.size : attributes_at], body[attributes_at:payload_at], body[payload_at:]


def pack(form: int, metadata: bytes, middle: bytes, last: bytes) -> bytes:
    """Three parts with header and checksum."""
    data = b"".join((header(form, metadata, len(middle), len(last)), middle, last))
    return data + _checksum(data)


def header(form: int, metadata: bytes, middle_bytes: int, last_bytes: int) -> bytes:
    """The head of a record up to and including its metadata."""
    return _HEAD.pack(_MAGIC, form, 0, len(metadata), middle_bytes, last_bytes) + metadata


def format_of(data: bytes) -> int:
    """The format number in a record's header; 0 for what is no record."""
    if len(data) < _HEAD.size or not data.startswith(_MAGIC):
        return 0
    return int(_HEAD.unpack_from(data)[1])


def unpack(data: bytes, form: int) -> tuple[bytes, bytes, bytes]:
    """The inverse of :func:`pack`: lengths bounded, checksum right, the parts not yet looked at.

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
        read = " and ".join(map(str, PLAIN_FORMATS if plain else SEALED_FORMATS))
        raise CorruptRecord(f"record format {version}.{reserved}; formats {read} are read here{hint}")
    (middle, middle_limit), (last, last_limit) = _MIDDLE[form], _LAST[form]
    metadata = ("metadata", metadata_bytes, MAX_METADATA_BYTES)
    _bound((metadata, (middle, middle_bytes, middle_limit), (last, last_bytes, last_limit)))
    middle_at = _HEAD.size + metadata_bytes
    last_at = middle_at + middle_bytes
    sum_at = last_at + last_bytes
    if len(data) != sum_at + _SUM_BYTES:
        raise CorruptRecord(f"the lengths add up to {sum_at + _SUM_BYTES} bytes, the record has {len(data)}")
    if _checksum(data[:sum_at]) != data[sum_at:]:
        raise CorruptRecord("checksum does not match the stored bytes")
    return data[_HEAD.size : middle_at], data[middle_at:last_at], data[last_at:sum_at]


def record_of(metadata: bytes, window: bytes, attributes: bytes, payload: bytes, key: SessionKey | None) -> Record:
    """The record that its parts make, everything verified.

    Raises:
        CorruptRecord: naming what failed.
    """
    fields = _parse_metadata(metadata)
    try:
        own = SessionKey(fields.pop("tenant"), fields.pop("session"))
    except ValueError as error:
        raise CorruptRecord(f"key: {error}") from None
    if key is not None and own != key:
        raise CorruptRecord(f"the record stored for session {key.session!r} belongs to another session")
    base, end = _parse_payload(payload, parse_layout(fields["layout"]))
    record = Record(key=own, base=base, end=end, window=window, attributes=attributes, **fields)
    _check(record)
    if _canonical(record) != metadata:
        raise CorruptRecord("metadata is not in its canonical form")
    return record


def _bound(sizes: tuple[tuple[str, int, int], ...]) -> None:
    """Refuse a part that is over its limit; (name, bytes, limit) of each."""
    for name, size, limit in sizes:
        if size > limit:
            raise CorruptRecord(f"{name} of {size} bytes; the limit is {limit}")


def _checksum(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_SUM_BYTES, person=b"deltamem-rec").digest()


def _canonical(record: Record) -> bytes:
    """All fields but the states, the window and the attributes as JSON with sorted keys and no spaces."""
    key = {"tenant": record.key.tenant, "session": record.key.session}
    fields = {name: kind(getattr(record, name)) for name, kind in _FIELDS.items() if name not in key} | key
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def _parse_metadata(data: bytes) -> dict[str, Any]:
    """The fields of a record's metadata, exactly those of ``_FIELDS`` and with their types."""
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CorruptRecord(f"metadata is not JSON: {error}") from None
    if not isinstance(fields, dict) or fields.keys() != _FIELDS.keys():
        raise CorruptRecord(f"metadata must have exactly the fields {', '.join(_FIELDS)}")
    for name, kind in _FIELDS.items():
        if type(fields[name]) is not kind:
            raise CorruptRecord(f"metadata field {name} is {type(fields[name]).__name__}, not {kind.__name__}")
    return fields


def _parse_payload(data: bytes, shape: tuple[int, int, int, int]) -> tuple[Array, Array]:
    """base and end, [L, H, r, r] fp32, copied out of a safetensors payload."""
    states = 2 * 4 * math.prod(shape)
    if not states < len(data) <= states + _SAFETENSORS_OVERHEAD:
        raise CorruptRecord(f"a payload of {len(data)} bytes cannot hold two states of shape {shape}")
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise CorruptRecord(f"payload is not safetensors: {error}") from None
    if tensors.keys() != {"base", "end"}:
        raise CorruptRecord("payload must have exactly the tensors base and end")
    for name, tensor in tensors.items():
        if tensor.dtype != np.float32 or tensor.shape != shape:
            raise CorruptRecord(f"{name} is {tensor.dtype} {tensor.shape}, not float32 {shape}")
    return tensors["base"].copy(), tensors["end"].copy()


def _check(record: Record) -> None:
    """Refuse a record with a field out of its bounds; used on both sides, so that what is written can be
    read."""
    shape = parse_layout(record.layout)
    for name, state in (("base", record.base), ("end", record.end)):
        if state.dtype != np.float32 or state.shape != shape:
            raise CorruptRecord(f"{name} is {state.dtype} {state.shape}; layout {record.layout} needs float32 {shape}")
        largest = float(np.abs(state).max())
        if not largest <= MAX_ABS:  # also true for NaN
            raise CorruptRecord(f"{name} holds {largest:g}; entries must be finite and at most {MAX_ABS:g}")
    for name, limit in (("window", MAX_WINDOW_BYTES), ("attributes", MAX_ATTRIBUTES_BYTES)):
        part = getattr(record, name)
        if not isinstance(part, bytes):
            raise CorruptRecord(f"{name} must be bytes, not {type(part).__name__}")
        _bound(((name, len(part), limit),))
    for name, least in (("version", 1), ("tokens", 0), ("windows", 0)):
        if not least <= getattr(record, name) <= _INT_MAX:
            raise CorruptRecord(f"{name} {getattr(record, name)} is not in [{least}, 2**63)")
    for name in ("created_at", "updated_at"):
        if not 0 <= getattr(record, name) < 1e12:
            raise CorruptRecord(f"{name} {getattr(record, name)} is not a time in seconds")
    for name, least in (("request_id", 1), ("adapter", 0), ("model", 0)):
        try:
            size = len(getattr(record, name).encode())
        except UnicodeEncodeError:
            raise CorruptRecord(f"{name} is not valid Unicode") from None
        if not least <= size <= 256:
            raise CorruptRecord(f"{name} must have {least} to 256 bytes of UTF-8, not {size}")
        if "\0" in getattr(record, name):  # PostgreSQL's text cannot hold it
            raise CorruptRecord(f"{name} holds a NUL")
    if not _INCARNATION.fullmatch(record.incarnation):
        raise CorruptRecord(f"incarnation {record.incarnation[:64]!r} is not 8 to 64 lower-case hex digits")
