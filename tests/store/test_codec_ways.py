"""The short ways of the codec and the long ones: what is read or checked in one pass is what is read part by part."""

import math
import random
from typing import Any

import pytest
from msgspec import structs

from deltamem_vllm.errors import CorruptRecord
from deltamem_vllm.store import codec, parts
from deltamem_vllm.store.codec import decode, encode
from deltamem_vllm.store.protocol import MAX_ATTRIBUTES_BYTES, Record
from tests.store.records import INCARNATION, KEY, record
from tests.store.test_codec import MUTATIONS, mutate, rebuild, reseal


def test_what_is_surely_right_is_right() -> None:
    """The look at all fields at once takes nothing that a look at each would refuse, and takes what is usual."""
    rng = random.Random(8)
    odd: dict[str, list[Any]] = {
        "version": [0, 1, 2**63 - 1, 2**63], "tokens": [-1, 0, 2**63], "windows": [-1, 0, 2**63],
        "created_at": [-1.0, 0.0, math.nan, 1e12, 5], "updated_at": [math.inf, 1e11],
        "request_id": ["", "x" * 256, "x" * 257, "ü", "a\0b"], "adapter": ["", "x" * 257, "\ud800"],
        "model": ["", "ü" * 129, "\0"], "incarnation": ["XYZ", INCARNATION + "\n", "0" * 65],
        "window": [b"", bytes(codec.MAX_WINDOW_BYTES + 1), bytearray(3)],
        "attributes": [b"", bytes(MAX_ATTRIBUTES_BYTES + 1), bytearray(3)],
    }  # fmt: skip
    assert parts._surely_right(record())
    seen = {True: 0, False: 0}
    for _ in range(3000):
        made = structs.replace(record(), **{name: rng.choice(odd[name]) for name in rng.sample(list(odd), 2)})
        surely = parts._surely_right(made)
        seen[surely] += 1
        if surely:
            parts._check_each_field(made)
    assert min(seen.values()) > 100, seen


def said_of(data: bytes) -> bytes | str:
    """The record that ``decode`` takes, as bytes; or what it says."""
    try:
        return encode(decode(data, key=KEY))
    except CorruptRecord as error:
        return str(error)


def test_fuzz_the_short_way_and_the_long_one_say_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Damaged behind a right checksum: what is read in one pass is what is read part by part, and what the one does
    not take the other names."""
    rng = random.Random(9)
    texts = ("request", "a\\b", "ü", "x\x7f", "e-5")
    good = [
        encode(record(layout="L1H1r2", request_id=text, created_at=at)) for text in texts for at in (0.0, 1e-5, 7e9)
    ]
    cases = good + [reseal(mutate(good[turn % len(good)], rng)[:-32]) for turn in range(MUTATIONS // 4)]
    short = [said_of(data) for data in cases]
    taken = [decode(data, key=KEY) for data in good]
    usual = sum(codec._usual_record(data, KEY) is not None for data in good)
    assert 0 < usual < len(good), "the good records are all of one kind"
    monkeypatch.setattr(codec, "_usual_record", lambda data, key: None)
    assert [said_of(data) for data in cases] == short
    for data, ours in zip(good, taken, strict=True):
        theirs = decode(data, key=KEY)
        assert all(type(getattr(ours, name)) is type(getattr(theirs, name)) for name in Record.__struct_fields__)


def test_of_two_states_that_do_not_fit_the_first_is_named() -> None:
    """Each time: what is said of a record does not depend on the order in which a library hands its parts over."""
    wrong = rebuild(encode(record(layout="L1H1r2")), metadata=lambda m: m.replace(b"L1H1r2", b"L1H3r2"))
    assert {said_of(wrong) for _ in range(50)} == {"base is float32 (1, 1, 2, 2), not float32 (1, 3, 2, 2)"}


def test_fuzz_catches_a_short_way_that_takes_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """PLANTED BUG: metadata in a form that we would not write."""
    spaced = rebuild(encode(record()), metadata=lambda m: m.replace(b'"tokens":10', b'"tokens": 10'))
    assert "canonical" in str(said_of(spaced))
    monkeypatch.setattr(codec, "usual_metadata", lambda data: parts._decode_usual(data))
    assert isinstance(said_of(spaced), bytes)
