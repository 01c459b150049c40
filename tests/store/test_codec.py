"""The codec: what goes in comes out, and nothing else comes out."""

import hashlib
import json
import math
import random
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from blake3 import blake3
from msgspec import structs
from safetensors.numpy import save

from deltamem_vllm.errors import CorruptRecord
from deltamem_vllm.store import codec, parts
from deltamem_vllm.store.codec import decode, encode, parse_layout
from deltamem_vllm.store.protocol import MAX_ATTRIBUTES_BYTES, Record, SessionKey
from tests.conftest import NIGHTLY
from tests.store.old_formats import format1, format3
from tests.store.records import INCARNATION, KEY, record

MUTATIONS = 1_000_000 if NIGHTLY else 20_000
HEAD = struct.Struct("<8sHHIII")


def reseal(body: bytes) -> bytes:
    """A body with its format's right checksum: what someone who can write to the store would leave there."""
    if int.from_bytes(body[8:10], "little") <= 4:
        return body + hashlib.blake2b(body, digest_size=32, person=b"deltamem-rec").digest()
    return body + blake3(body, derive_key_context="deltamem-vllm 2026-11-28 checksum of a session record").digest()


def rebuild(
    made: bytes,
    *,
    metadata: Callable[[bytes], bytes] | None = None,
    payload: bytes | None = None,
    body: bytes | None = None,
) -> bytes:
    """The record with other metadata, another payload or another body, lengths and checksum right."""
    magic, version, reserved, m, w, _ = HEAD.unpack_from(made)
    parts = [
        made[HEAD.size : HEAD.size + m],
        made[HEAD.size + m : HEAD.size + m + w],
        made[HEAD.size + m + w : -32],
    ]
    parts[0] = metadata(parts[0]) if metadata else parts[0]
    if payload is not None:
        window, attributes, _ = codec.split(parts[2])
        body = parts[2][: 8 + len(window) + len(attributes)] + payload
    parts[2] = parts[2] if body is None else body
    return reseal(HEAD.pack(magic, version, reserved, *map(len, parts)) + b"".join(parts))


# --- right records ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["L3H1r8", "L1H1r1", "L36H1r8", "L2H4r16"])
def test_round_trip_is_exact(layout: str) -> None:
    made = record(7, layout=layout)
    back = decode(encode(made), key=KEY)
    for name in Record.__struct_fields__:
        value, expected = getattr(back, name), getattr(made, name)
        if isinstance(expected, np.ndarray):
            assert value.tobytes() == expected.tobytes()
            assert (value if value.base is None else value.base).flags.owndata, "a view of the stored bytes"
            assert value.flags.writeable
        else:
            assert value == expected
            assert type(value) is type(expected)
    assert encode(back) == encode(made)


def test_round_trip_of_the_bounds() -> None:
    key = SessionKey("ü" * 128, "/" * 256)
    made = record(
        2**63 - 1,
        key,
        updated_at=0.0,
        window=b"",
        attributes=b"",
        request_id="x" * 256,
        adapter="",
        model="",
        tokens=0,
        windows=0,
    )
    assert encode(decode(encode(made), key=key)) == encode(made)
    assert encode(record(3, tokens=np.int64(30), created_at=5)) == encode(record(3, created_at=5.0))
    view = record(base=np.zeros((8, 8, 1, 3), np.float32).T)
    assert decode(encode(view)).base.shape == (3, 1, 8, 8)


def test_any_key_is_taken_only_when_asked() -> None:
    other = SessionKey(KEY.tenant, "another")
    assert decode(encode(record(key=other))).key == other
    for key in (SessionKey("another", KEY.session), other):
        with pytest.raises(CorruptRecord, match="belongs to another session"):
            decode(encode(record()), key=key)


def test_layout() -> None:
    assert parse_layout("L36H2r8") == (36, 2, 8, 8)
    for bad in (
        "",
        "L3H1",
        "L0H1r8",
        "L03H1r8",
        "L3H1r8 ",
        "L3H1r8\n",
        "L٣H1r8",
        "L99999H1r8",
        "L9999H9999r9999",
    ):
        with pytest.raises(CorruptRecord, match="layout"):
            parse_layout(bad)


# --- wrong records are neither written nor read -------------------------------------------------------------

state = np.zeros((3, 1, 8, 8), np.float32)


def poisoned(value: float) -> np.ndarray[Any, np.dtype[np.float32]]:
    made = state.copy()
    made[1, 0, 2, 3] = value
    return made


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"end": poisoned(math.nan)}, "end holds nan"),
        ({"end": poisoned(-math.inf)}, "end holds inf"),
        ({"base": poisoned(1.1e6)}, "base holds 1.1e"),
        ({"base": state[:2]}, "layout L3H1r8 needs"),
        ({"base": state.astype(np.float64)}, "base is float64"),
        ({"layout": "L3H1r9"}, "layout L3H1r9 needs"),
        ({"version": 0}, "version 0"),
        ({"version": 2**63}, "version"),
        ({"tokens": -1}, "tokens -1"),
        ({"created_at": math.nan}, "created_at"),
        ({"updated_at": math.inf}, "updated_at"),
        ({"request_id": ""}, "request_id"),
        ({"request_id": "\ud800"}, "request_id"),
        ({"adapter": "x" * 257}, "adapter"),
        ({"incarnation": "XYZ"}, "incarnation"),
        ({"incarnation": INCARNATION + "\n"}, "incarnation"),
        ({"window": bytes(codec.MAX_WINDOW_BYTES + 1)}, "window"),
        ({"attributes": bytes(MAX_ATTRIBUTES_BYTES + 1)}, "attributes of 65537"),
        ({"attributes": bytearray(3)}, "attributes must be bytes"),
    ],
)
def test_encode_refuses(fields: dict[str, Any], what: str) -> None:
    with pytest.raises(CorruptRecord, match=what):
        encode(structs.replace(record(), **fields))


def test_decode_names_what_failed() -> None:
    good = encode(record())
    body = good[:-32]

    def with_head(**changes: int | bytes) -> bytes:
        head = dict(zip(("magic", "version", "reserved", "m", "w", "p"), HEAD.unpack_from(good), strict=True))
        return reseal(HEAD.pack(*(head | changes).values()) + body[HEAD.size :])

    def in_body(new: bytes, at: int) -> bytes:
        body = bytes(codec.unpack(good, 5)[2])
        return rebuild(good, body=body[:at] + new + body[at + len(new) :])

    nan = {"base": state, "end": poisoned(math.nan)}
    for bad, what in (
        (b"", "bytes"),
        (bytes(codec.MAX_RECORD_BYTES + 1), "bytes"),
        (with_head(magic=b"DMEMREC\r"), "magic"),
        (with_head(version=6), "format 6.0; formats 1, 3 and 5 are read here: it is encrypted"),
        (with_head(version=7), "format 7.0; formats 1, 3 and 5 are read here$"),
        (with_head(reserved=1), "format 5.1"),
        (with_head(version=3)[:-32] + good[-32:], "checksum"),
        (with_head(m=2**32 - 1), "metadata of 4294967295"),
        (with_head(w=1), "middle of 1 bytes; the limit is 0"),
        (with_head(version=1, w=2**31), "window of"),
        (with_head(version=1, p=2**31), "payload of"),
        (with_head(p=2**31), "body of"),
        (in_body(b"\xff\xff\xff\xff", 0), "window of 4294967295"),
        (in_body(struct.pack("<I", codec.MAX_WINDOW_BYTES + 1), 0), "window of 16385"),
        (in_body(b"\xff\xff\xff\xff", 4), "attributes of 4294967295"),
        (in_body(struct.pack("<I", MAX_ATTRIBUTES_BYTES + 1), 4), "attributes of 65537"),
        (in_body(struct.pack("<I", MAX_ATTRIBUTES_BYTES), 4), "attributes end at byte"),
        (in_body(struct.pack("<I", 22), 4), "payload"),
        (rebuild(good, body=bytes(7)), "a body of 7 bytes"),
        (rebuild(good, body=bytes(8)), "a payload of 0 bytes"),
        (with_head(m=5), "lengths add up"),
        (good[:-1], "lengths add up"),
        (good[:100] + bytes([good[100] ^ 1]) + good[101:], "checksum"),
        (rebuild(good, metadata=lambda m: m[:-1]), "not JSON"),
        (rebuild(good, metadata=lambda m: b"[" * 9000), "not JSON"),
        (rebuild(good, metadata=lambda m: b"[]"), "exactly the fields"),
        (rebuild(good, metadata=lambda m: m.replace(b'"tokens":10,', b"")), "exactly the fields"),
        (rebuild(good, metadata=lambda m: m.replace(b'"tokens":10', b'"tokens":true')), "tokens is bool"),
        (rebuild(good, metadata=lambda m: m.replace(b'"tokens":10', b'"tokens": 10')), "canonical"),
        (rebuild(good, metadata=lambda m: m.replace(b'"tokens":10', b'"tokens":1,"tokens":10')), "canonical"),
        (rebuild(good, metadata=lambda m: m.replace(b'"version":1', b'"version":0')), "version 0"),
        (rebuild(good, metadata=lambda m: m.replace(b'"tenant":"tenant"', b'"tenant":""')), "key: tenant"),
        (rebuild(good, metadata=lambda m: m.replace(b"L3H1r8", b"L4H1r8")), "cannot hold"),
        (rebuild(good, metadata=lambda m: m.replace(b"L3H1r8", b"L1H3r8")), r"base is|end is"),
        (rebuild(good, payload=bytes(2000)), "payload is not safetensors"),
        (rebuild(good, payload=save(nan)), "end holds nan"),
        (rebuild(good, payload=save({"base": state, "last": state})), "exactly the tensors"),
        (rebuild(good, payload=save({"base": state, "end": state.view(np.int32)})), "end is int32"),
    ):
        with pytest.raises(CorruptRecord, match=what):
            decode(bad, key=KEY)


# --- the short ways are the long ones -------------------------------------------------------------------------


def test_metadata_is_what_json_makes_of_it() -> None:
    """Whatever the texts and numbers: JSON with sorted keys and no spaces, and it comes back the same."""
    rng = random.Random(7)
    letters = 'aZ09/"\\\t\x1f\x7fü€\U0001f600\u2028'
    for _ in range(2000):
        texts = ["".join(rng.choices(letters, k=rng.randint(1, 20))) for _ in range(5)]
        seconds = [rng.choice([rng.random() * 10.0 ** rng.randint(-9, 11), float(rng.randrange(10**9))]) for _ in "cu"]
        made = record(
            rng.randint(1, 2**63 - 1), SessionKey(texts[0], texts[1]), layout="L1H1r1", request_id=texts[2],
            adapter=texts[3], model=texts[4], created_at=seconds[0], updated_at=seconds[1],
            tokens=rng.randrange(2**63), windows=rng.randrange(2**63),
        )  # fmt: skip
        names = ("adapter", "created_at", "incarnation", "layout", "model", "request_id")
        names += ("tokens", "updated_at", "version", "windows")
        fields = {name: getattr(made, name) for name in names} | {"tenant": texts[0], "session": texts[1]}
        expected = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
        assert parts.metadata_of(made) == expected
        assert parts.parse_metadata(expected) == fields
        assert encode(decode(encode(made), key=made.key)) == encode(made)


@pytest.mark.parametrize("layout", ["L3H1r8", "L1H1r1", "L36H1r8", "L2H4r16"])
def test_a_payload_is_what_safetensors_makes_of_it(layout: str) -> None:
    made = record(layout=layout)
    payload = save({"base": made.base, "end": made.end})
    assert b"".join(parts.payload_of(made)) == payload
    longer = struct.pack("<Q", struct.unpack_from("<Q", payload)[0] + 8) + payload[8:]
    at = 8 + struct.unpack_from("<Q", payload)[0]
    longer = longer[:at] + b" " * 8 + longer[at:]
    for data in (payload, longer):  # the latter has another header, which only the library reads
        base, end = parts.parse_payload(data, parse_layout(layout))
        assert (base.tobytes(), end.tobytes()) == (made.base.tobytes(), made.end.tobytes())
        assert base.base.flags.owndata, "a view of the stored bytes"
        assert end.flags.writeable


def test_the_bound_on_entries_is_exact() -> None:
    """A sum of squares decides alone only where it must be right."""
    full = np.full((3, 1, 8, 8), bound := np.float32(parts.MAX_ABS), np.float32)
    for least in (1.0, -1.0):
        assert decode(encode(record(base=full * np.float32(least)))).base[0, 0, 0, 0] == bound * least
        assert decode(encode(record(base=poisoned(least * 1e6)))).base[1, 0, 2, 3] == bound * least
        with pytest.raises(CorruptRecord, match="base holds 1e\\+06"):
            encode(record(base=poisoned(least * float(np.nextafter(bound, np.float32(np.inf))))))


# --- fuzz ---------------------------------------------------------------------------------------------------


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One random damage that always changes the bytes."""
    made = bytearray(data)
    at = rng.randrange(len(made))
    match rng.randrange(6):
        case 0:
            made[at] ^= 1 << rng.randrange(8)
        case 1:
            del made[at:]
        case 2:
            made[at:at] = rng.randbytes(rng.randint(1, 40))
        case 3:
            del made[at : at + rng.randint(1, 40)]
        case 4:
            made[at : at + 4] = rng.choice([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\0\0\xc0\x7f", b"\0\0\0\x80"])
        case _:
            for _ in range(rng.randint(2, 30)):
                made[rng.randrange(len(made))] = rng.randrange(256)
    return bytes(made)


def accepted(read: Callable[[bytes], Record], rounds: int) -> int:
    """How many of ``rounds`` damaged records ``read`` takes. Anything but CorruptRecord fails the test."""
    rng = random.Random(5)
    good = [encode(record(layout=layout)) for layout in ("L3H1r8", "L1H1r2")]
    good += [old(record(layout="L1H1r2")) for old in (format1, format3)]
    taken = 0
    for turn in range(rounds):
        data = good[turn % len(good)]
        bad = mutate(data, rng)
        if bad == data:
            continue
        try:
            read(bad)
        except CorruptRecord:
            continue
        taken += 1
    return taken


def test_fuzz_damage_is_always_refused() -> None:
    assert accepted(lambda data: decode(data, key=KEY), MUTATIONS) == 0


def test_fuzz_with_a_right_checksum_never_crashes() -> None:
    """Behind the checksum every parser meets hostile bytes; what it takes must be a record that could be
    written."""

    def read(data: bytes) -> Record:
        made = decode(reseal(data[:-32]), key=KEY)
        assert encode(made)
        return made

    accepted(read, MUTATIONS)


def test_fuzz_of_the_lengths_inside_a_body() -> None:
    """Every pair of lengths a hostile body can claim: bounded before anything is cut out, and what is taken has the
    same content as what was written."""
    rng = random.Random(6)
    good = bytes(codec.unpack(encode(record(layout="L1H1r2")), 5)[2])
    window, attributes, payload = codec.split(good)
    sizes = [
        0,
        1,
        len(window),
        len(attributes),
        codec.MAX_WINDOW_BYTES,
        MAX_ATTRIBUTES_BYTES,
        len(good),
        2**31,
        2**32 - 1,
    ]
    for _ in range(MUTATIONS):
        lengths = [max(0, min(2**32 - 1, rng.choice(sizes) + rng.randint(-2, 2))) for _ in range(2)]
        body = struct.pack("<II", *lengths) + good[8 : rng.choice([len(good), rng.randrange(8, len(good))])]
        fits = lengths[0] <= codec.MAX_WINDOW_BYTES and lengths[1] <= MAX_ATTRIBUTES_BYTES
        fits = fits and 8 + sum(lengths) <= len(body)
        try:
            parts = codec.split(body)
        except CorruptRecord:
            assert not fits
            continue
        assert fits
        assert [len(part) for part in parts] == [*lengths, len(body) - 8 - sum(lengths)]
        assert b"".join(parts) == body[8:]
    assert codec.split(good) == (window, attributes, payload)


def test_fuzz_catches_a_skipped_checksum(monkeypatch: pytest.MonkeyPatch) -> None:
    """PLANTED BUG: the checksum is not compared."""

    class Anything(bytes):
        def __ne__(self, other: object) -> bool:
            return False

    monkeypatch.setattr(codec, "checksum", lambda *_: Anything(32))
    assert accepted(lambda data: decode(data, key=KEY), 2000) > 0
