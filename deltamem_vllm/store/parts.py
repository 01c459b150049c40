"""What is in a record, as bytes and back: its fields as canonical JSON, its states as safetensors, and the bounds on
all of them. The frame around them is ``codec``.

A commit and a restore pass through here once each, with the hot path short: JSON whose form is fixed is written by
one format string and read into one typed struct; the safetensors header, which depends on the shape alone, is made once
per shape and compared; a sum of squares shows in one pass that no entry is too large. Whatever does not fit the short
path takes the long one, which says what is wrong.
"""

import functools
import math
import re
from json.encoder import encode_basestring_ascii as quoted
from typing import Annotated, Any

import msgspec
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from deltamem_vllm.errors import CorruptRecord
from deltamem_vllm.store.protocol import MAX_ATTRIBUTES_BYTES, Array, Record, SessionKey

MAX_WINDOW_BYTES = 16 * 1024
MAX_STATE_BYTES = 32 * 1024 * 1024
"""Bound on one state. Qwen3-4B has 9,216 B; the largest layout we can imagine stays far below."""
MAX_ABS = 1e6
"""Bound on a state's entries. Trained memories stay below about 1e2; more than this is an attack or a bug."""
SAFETENSORS_OVERHEAD = 1024  # its header for two tensors takes about 200 bytes

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
_Text = Annotated[str, msgspec.Meta(max_length=256)]
_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=_INT_MAX)]


class Metadata(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    """A record's metadata, as `usual_metadata` has verified it; fields as of `Record` and its key."""

    adapter: _Text
    created_at: float
    incarnation: str
    layout: str
    model: _Text
    request_id: _Name
    session: str
    tenant: str
    tokens: _Count
    updated_at: float
    version: Annotated[int, msgspec.Meta(ge=1, le=_INT_MAX)]
    windows: _Count


_decode_json = msgspec.json.Decoder().decode
_decode_usual = msgspec.json.Decoder(Metadata).decode
_encode_json = msgspec.json.Encoder().encode
_FP32 = np.dtype("<f4")
_SURELY_SMALL = MAX_ABS**2 / 4
"""Where the sum of an array's squares is at most this, no entry exceeds ``MAX_ABS``, whatever the sum's rounding."""
Shape = tuple[int, int, int, int]
STATES = ("base", "end")
"""As they lie in a payload."""


@functools.lru_cache(maxsize=256)
def parse_layout(layout: str) -> Shape:
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


def metadata_of(record: Record) -> bytes:
    """All fields of a checked record but the states, the window and the attributes, as JSON with sorted keys and no
    spaces."""
    return (
        f'{{"adapter":{quoted(record.adapter)},"created_at":{float(record.created_at)!r},'
        f'"incarnation":{quoted(record.incarnation)},"layout":{quoted(record.layout)},'
        f'"model":{quoted(record.model)},"request_id":{quoted(record.request_id)},'
        f'"session":{quoted(record.key.session)},"tenant":{quoted(record.key.tenant)},'
        f'"tokens":{int(record.tokens)},"updated_at":{float(record.updated_at)!r},'
        f'"version":{int(record.version)},"windows":{int(record.windows)}}}'
    ).encode("ascii")


def usual_metadata(data: bytes) -> Metadata | None:
    """Metadata whose fields are all there and within their bounds, in the one form that `metadata_of` gives them; None
    where that cannot be said at a glance, be it wrong or only unusual. The key in it is not looked at.

    Texts of plain ASCII that need no escapes, and times from a millisecond to the year 33658, are written in the same
    way by the JSON library as by us.
    """
    if not data.isascii() or b"\\" in data or b"\x7f" in data:
        return None
    try:
        known = _decode_usual(data)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    if _encode_json(known) != data or not _INCARNATION.fullmatch(known.incarnation):
        return None
    for seconds in (known.created_at, known.updated_at):
        if not (1e-3 <= seconds < 1e12 or seconds == 0.0):
            return None
    return known


def parse_metadata(data: bytes) -> dict[str, Any]:
    """The fields of a record's metadata, exactly those of ``_FIELDS`` and with their types.

    Raises:
        CorruptRecord: naming what failed.
    """
    try:
        fields = _decode_json(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise CorruptRecord(f"metadata is not JSON: {error}") from None
    if not isinstance(fields, dict) or fields.keys() != _FIELDS.keys():
        raise CorruptRecord(f"metadata must have exactly the fields {', '.join(_FIELDS)}")
    for name, kind in _FIELDS.items():
        if type(fields[name]) is not kind:
            raise CorruptRecord(f"metadata field {name} is {type(fields[name]).__name__}, not {kind.__name__}")
    return fields


def key_of(tenant: str, session: str, expected: SessionKey | None) -> SessionKey:
    """The key that metadata names.

    Args:
        expected: the only key that is accepted; None: any that is valid.

    Raises:
        CorruptRecord: another one, or none that is valid.
    """
    if expected is not None and tenant == expected.tenant and session == expected.session:
        return expected  # it was checked when it was made
    try:
        own = SessionKey(tenant, session)
    except ValueError as error:
        raise CorruptRecord(f"key: {error}") from None
    if expected is not None:
        raise CorruptRecord(f"the record stored for session {expected.session!r} belongs to another session")
    return own


def payload_of(record: Record) -> tuple[bytes, memoryview, memoryview]:
    """What ``safetensors.save`` makes of base and end, as pieces to be joined: its header, and both states' bytes."""
    base, end = np.ascontiguousarray(record.base), np.ascontiguousarray(record.end)
    return _safetensors_header(base.shape), base.data.cast("B"), end.data.cast("B")


def parse_payload(data: bytes | memoryview, shape: Shape) -> tuple[Array, Array]:
    """base and end, [L, H, r, r] fp32, copied out of a safetensors payload: views of one array that nobody else has.

    What numpy does to an array of this size lets other threads run meanwhile, and waits for them: twice as often where
    each state is copied and summed up by itself.

    Raises:
        CorruptRecord: naming what failed.
    """
    count = math.prod(shape)
    if not 8 * count < len(data) <= 8 * count + SAFETENSORS_OVERHEAD:
        raise CorruptRecord(f"a payload of {len(data)} bytes cannot hold two states of shape {shape}")
    both: Array | None = usual_payload(data, 0, len(data), shape)
    if both is None:
        both = np.stack(_load(data, shape))
        for name, state in zip(STATES, both, strict=True):
            _check_entries(name, state)
    base, end = both
    return base, end


def usual_payload(data: bytes | memoryview, start: int, stop: int, shape: Shape) -> Array | None:
    """base and end, [2, L, H, r, r] fp32, copied out of a payload in the middle of ``data``; None where it is not as
    `payload_of` writes it, or an entry may be out of its bounds."""
    header = _safetensors_header(shape)
    at = start + len(header)
    if stop - at != 8 * math.prod(shape) or bytes(data[start:at]) != header:
        return None
    both: Array = np.ndarray((2, *shape), _FP32, data, at).copy()
    return both if np.vdot(both, both) <= _SURELY_SMALL else None


def _load(data: bytes | memoryview, shape: Shape) -> list[Array]:
    """base and end, out of a payload whose header is not the one that `payload_of` writes."""
    try:
        tensors = load(bytes(data))
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise CorruptRecord(f"payload is not safetensors: {error}") from None
    if tensors.keys() != set(STATES):
        raise CorruptRecord("payload must have exactly the tensors base and end")
    for name in STATES:  # in this order: the library has one that changes from call to call
        tensor = tensors[name]
        if tensor.dtype != np.float32 or tensor.shape != shape:
            raise CorruptRecord(f"{name} is {tensor.dtype} {tensor.shape}, not float32 {shape}")
    return [tensors[name] for name in STATES]


@functools.lru_cache(maxsize=64)
def _safetensors_header(shape: tuple[int, ...]) -> bytes:
    """What ``safetensors.save`` writes before two states of this shape, base first."""
    empty = np.zeros(shape, np.float32)
    return bytes(save({"base": empty, "end": empty})[: -2 * empty.nbytes])


def bound(name: str, size: int, limit: int) -> None:
    """Refuse a part that is over its limit."""
    if size > limit:
        raise CorruptRecord(f"{name} of {size} bytes; the limit is {limit}")


def excess(state: np.ndarray) -> float | None:
    """The largest magnitude among a state's entries where that is over `MAX_ABS`, or nan; else None."""
    if np.vdot(state, state) <= _SURELY_SMALL:
        return None
    largest = float(np.abs(state).max())
    return None if largest <= MAX_ABS else largest


def check(record: Record) -> None:
    """Refuse a record with a field out of its bounds.

    Raises:
        CorruptRecord: naming the field.
    """
    shape, base, end = parse_layout(record.layout), record.base, record.end
    if not (
        base.shape == end.shape == shape
        and base.dtype == end.dtype == _FP32
        and np.vdot(base, base) <= _SURELY_SMALL
        and np.vdot(end, end) <= _SURELY_SMALL
    ):
        for name, state in zip(STATES, (base, end), strict=True):
            if state.dtype != _FP32 or state.shape != shape:
                wrong = f"{name} is {state.dtype} {state.shape}"
                raise CorruptRecord(f"{wrong}; layout {record.layout} needs float32 {shape}")
            _check_entries(name, state)
    check_fields(record)


def _check_entries(name: str, state: Array) -> None:
    if (largest := excess(state)) is not None:
        raise CorruptRecord(f"{name} holds {largest:g}; entries must be finite and at most {MAX_ABS:g}")


def check_fields(record: Record) -> None:
    """`check` without the states; used on both sides, so that what is written can be read.

    Raises:
        CorruptRecord: naming the field.
    """
    if not _surely_right(record):
        _check_each_field(record)


def _surely_right(record: Record) -> bool:
    """Whether a look at all fields at once finds them within their bounds; texts of plain ASCII only."""
    request_id, adapter, model = record.request_id, record.adapter, record.model
    texts = request_id + adapter + model
    return (
        texts.isascii()
        and "\0" not in texts
        and 1 <= len(request_id) <= 256
        and len(adapter) <= 256
        and len(model) <= 256
        and type(record.window) is type(record.attributes) is bytes
        and len(record.window) <= MAX_WINDOW_BYTES
        and len(record.attributes) <= MAX_ATTRIBUTES_BYTES
        and 1 <= record.version <= _INT_MAX
        and 0 <= record.tokens <= _INT_MAX
        and 0 <= record.windows <= _INT_MAX
        and 0 <= record.created_at < 1e12
        and 0 <= record.updated_at < 1e12
        and _INCARNATION.fullmatch(record.incarnation) is not None
    )


def _check_each_field(record: Record) -> None:
    for name, part, limit in (
        ("window", record.window, MAX_WINDOW_BYTES),
        ("attributes", record.attributes, MAX_ATTRIBUTES_BYTES),
    ):
        if not isinstance(part, bytes):
            raise CorruptRecord(f"{name} must be bytes, not {type(part).__name__}")
        bound(name, len(part), limit)
    for name, number, least in (
        ("version", record.version, 1),
        ("tokens", record.tokens, 0),
        ("windows", record.windows, 0),
    ):
        if not least <= number <= _INT_MAX:
            raise CorruptRecord(f"{name} {number} is not in [{least}, 2**63)")
    for name, seconds in (("created_at", record.created_at), ("updated_at", record.updated_at)):
        if not 0 <= seconds < 1e12:
            raise CorruptRecord(f"{name} {seconds} is not a time in seconds")
    for name, text, least in (
        ("request_id", record.request_id, 1),
        ("adapter", record.adapter, 0),
        ("model", record.model, 0),
    ):
        try:
            size = len(text) if text.isascii() else len(text.encode())
        except UnicodeEncodeError:
            raise CorruptRecord(f"{name} is not valid Unicode") from None
        if not least <= size <= 256:
            raise CorruptRecord(f"{name} must have {least} to 256 bytes of UTF-8, not {size}")
        if "\0" in text:  # PostgreSQL's text cannot hold it
            raise CorruptRecord(f"{name} holds a NUL")
    if not _INCARNATION.fullmatch(record.incarnation):
        raise CorruptRecord(f"incarnation {record.incarnation[:64]!r} is not 8 to 64 lower-case hex digits")
