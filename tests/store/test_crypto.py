"""Encryption at rest: what someone who can write to the store's file can do, and what they cannot."""

import base64
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec import structs

from deltamem_vllm.errors import ConfigError, CorruptRecord
from deltamem_vllm.store import codec, crypto, verify
from deltamem_vllm.store.codec import encode
from deltamem_vllm.store.crypto import KeyRing, SealedCodec, new_key
from deltamem_vllm.store.memory import MemoryStore
from deltamem_vllm.store.protocol import Record, SessionKey, StateStore
from deltamem_vllm.store.sqlite import SQLiteStore
from deltamem_vllm.store.verify import Verifier
from tests.conftest import NIGHTLY
from tests.store import conformance, conformance_kept
from tests.store.old_formats import format1, format2, format3
from tests.store.records import KEY, record
from tests.store.test_codec import mutate, reseal

SWAPS = 200_000 if NIGHTLY else 10_000
FUZZ = 500_000 if NIGHTLY else 10_000


def ring(*names: str) -> KeyRing:
    """The same key for the same name, always."""
    return KeyRing(tuple((name, name.encode().ljust(32, b"-")) for name in names))


A, B = ring("a"), ring("b")


# --- the whole suite on sealed stores -----------------------------------------------------------------------


@pytest.fixture
def open_(tmp_path: Path) -> Iterator[conformance.Open]:
    opened: list[StateStore] = []

    def make(**options: Any) -> StateStore:
        opened.append(SQLiteStore(tmp_path / "s.db", codec=SealedCodec(A), **options))
        return opened[-1]

    yield make
    for each in opened:
        each.close()


@pytest.mark.parametrize("check", [*conformance.CHECKS, *conformance_kept.CHECKS], ids=lambda check: check.__name__)
def test_sealed_store(check: conformance.Check, open_: conformance.Open) -> None:
    check(open_)


def test_round_trip_hides_the_states() -> None:
    made = record(7, layout="L36H1r8")
    sealed = SealedCodec(A)
    data = sealed.encode(made)
    assert encode(sealed.decode(data, key=KEY)) == encode(made)
    assert data != sealed.encode(made)
    assert made.end.tobytes()[:16] not in data
    assert made.window not in data
    assert made.attributes not in data
    assert len(data) - len(encode(made)) < 64


# --- swaps, rollbacks, downgrades ---------------------------------------------------------------------------


def rows() -> list[Record]:
    """Versions of one session, of another life of it, of other sessions and tenants."""
    keys = [KEY, SessionKey("tenant", "other"), SessionKey("another", "session")]
    made = [record(version, key, layout="L1H1r2", seed=seed) for seed, key in enumerate(keys) for version in (1, 2, 3)]
    return [*made, *(record(version, layout="L1H1r2", seed=9, incarnation="ff" * 16) for version in (1, 2))]


def attack(stored: dict[int, bytes], at: int, rng: random.Random) -> bytes:
    """Bytes that an attacker without the key can make, for the row ``at``: never those that belong there."""
    own, other = stored[at], stored[rng.choice([each for each in stored if each != at])]
    mine, theirs = (codec.unpack(each, 6) for each in (own, other))
    match rng.randrange(8):
        case 0:  # another row's record
            return other
        case 1:  # another row's sealed bytes under this row's metadata, with their nonce
            return codec.pack(6, mine[0], theirs[1], theirs[2])
        case 2:  # … with this row's nonce
            return codec.pack(6, mine[0], mine[1], theirs[2])
        case 3:  # this row's sealed bytes, its metadata changed
            field = rng.choice([b'"tokens":', b'"windows":', b'"updated_at":'])
            return codec.pack(6, mine[0].replace(field, field + b"1"), mine[1], mine[2])
        case 4:  # downgrade: an unencrypted record of the attacker's own
            made = rows()[at]
            made = structs.replace(made, end=np.full(made.end.shape, rng.random(), np.float32))
            return rng.choice((encode, format1, format3))(made)
        case 5:  # the other row's metadata and sealed bytes, this row's key id and nonce
            return codec.pack(6, theirs[0], mine[1], theirs[2])
        case 6:  # this row's sealed bytes as those of another format
            return codec.pack(rng.choice((2, 4)), *mine)
        case _:  # a bit of the sealed bytes
            bad = bytearray(own)
            bad[-33 - rng.randrange(len(mine[2]))] ^= 1 << rng.randrange(8)
            return reseal(bytes(bad[:-32]))


def accepted(sealed: SealedCodec, count: int) -> int:
    """How many of ``count`` attacks a store would take for the memory of the attacked row."""
    made = rows()
    stored = {index: sealed.encode(each) for index, each in enumerate(made)}
    checks = Verifier(sealed, "test")
    rng = random.Random(count)
    taken = 0
    for _ in range(count):
        at = rng.randrange(len(made))
        row = (made[at].version, made[at].incarnation, made[at].request_id)
        try:
            checks.version(made[at].key, row, attack(stored, at, rng))
        except CorruptRecord:
            continue
        taken += 1
    return taken


def test_no_swap_is_accepted() -> None:
    taken = accepted(SealedCodec(A), SWAPS)
    print(f"{SWAPS} swaps, grafts, edits and downgrades: {taken} accepted")
    assert taken == 0


def test_swaps_catch_dropped_associated_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """PLANTED BUG: the seal vouches for nothing but what it hides."""
    monkeypatch.setattr(crypto, "_associated", lambda *_: b"")
    assert accepted(SealedCodec(A), 500) > 50


def test_swaps_catch_an_accepted_downgrade() -> None:
    """PLANTED BUG: unencrypted records are taken although there is a key."""
    assert accepted(SealedCodec(A, accept_plain=True), 500) > 20


def test_a_rolled_back_row_is_refused_under_a_running_server(tmp_path: Path) -> None:
    store = SQLiteStore(tmp_path / "s.db", codec=SealedCodec(A))
    store.put(record(1), None)
    row = store._writer.execute("SELECT * FROM sessions").fetchone()
    store.put(record(2), record(1).expect)
    store._writer.execute("REPLACE INTO sessions VALUES (?, ?, ?, ?, ?, ?)", row)
    with pytest.raises(CorruptRecord, match="has seen version 2: the store was rolled back"):
        store.get(KEY)
    store.close()


def test_rollback_scan_catches_a_missing_floor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PLANTED BUG: what the process has seen is not remembered."""
    monkeypatch.setattr(verify.Verifier, "seen", lambda *_: None)
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        test_a_rolled_back_row_is_refused_under_a_running_server(tmp_path)


def test_floors_are_bounded_and_follow_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "MAX_FLOORS", 10)
    checks = Verifier(SealedCodec(A), "test")
    for index in range(1000):
        checks.seen(SessionKey("t", f"{index}"), "aa", index + 1)
    assert len(checks._floors) == 10
    key = SessionKey("t", "999")
    checks.seen(key, "aa", 3)
    assert checks.floor(key) == ("aa", 1000)
    checks.seen(key, "bb", 3)
    assert checks.floor(key) == ("bb", 3)
    checks.forget(key)
    assert checks.floor(key) is None


# --- keys ---------------------------------------------------------------------------------------------------


def test_wrong_keys_are_named() -> None:
    data = SealedCodec(A).encode(record())
    with pytest.raises(CorruptRecord, match="sealed with key 'a'; the key ring has b"):
        SealedCodec(B).decode(data)
    impostor = KeyRing((("a", bytes(32)),))
    with pytest.raises(CorruptRecord, match=r"does not open with key 'a'.* is another one"):
        SealedCodec(impostor).decode(data)
    with pytest.raises(CorruptRecord, match="it is encrypted, give the store its key"):
        codec.decode(data)
    with pytest.raises(CorruptRecord, match="is not encrypted, and the store has a key"):
        SealedCodec(A).decode(encode(record()))


def test_rotation(tmp_path: Path) -> None:
    """Plain, then key a, then key b, on one file."""

    def reopen(sealed: codec.RecordCodec) -> SQLiteStore:
        return SQLiteStore(tmp_path / "s.db", codec=sealed)

    check_rotation(reopen)
    data = b"".join(each.read_bytes() for each in tmp_path.iterdir())
    assert record(2).end.tobytes()[:64] not in data, "no byte of the unencrypted records is left"


def check_rotation(reopen: Callable[[codec.RecordCodec], StateStore]) -> None:
    """Used for every store that can be reopened with another codec."""
    store = reopen(codec.PLAIN)
    keys = [SessionKey(f"t{index % 3}", f"{index}") for index in range(7)]
    for key in keys:
        conformance_kept.commit(store, 3, key)
    assert store.reencrypt() == 0
    store.close()

    store = reopen(SealedCodec(A))
    with pytest.raises(CorruptRecord, match="not encrypted"):
        store.get(keys[0])
    with pytest.raises(CorruptRecord, match="not encrypted"):
        store.reencrypt()
    store.close()

    store = reopen(SealedCodec(A, accept_plain=True))
    store.put(record(4, keys[0]), record(3).expect)
    assert store.reencrypt(batch=4) == 21
    assert store.reencrypt(batch=4) == 0
    store.close()

    store = reopen(SealedCodec(ring("b", "a")))
    assert store.reencrypt() == 22
    store.close()

    store = reopen(SealedCodec(B))
    for index, key in enumerate(keys):
        newest = 3 if index else 4
        assert conformance.same(store.get(key), record(newest, key))
        for version in range(1, newest + 1):
            found = store.get_version(key, version)
            assert found is not None
            assert encode(found) == encode(record(version, key))
        assert store.history(key)[0].bytes == conformance.size_in(store, record(newest, key))
    for tenant in ("t0", "t1", "t2"):
        sizes = [info.bytes for key in keys if key.tenant == tenant for info in store.history(key)]
        assert store.usage(tenant).bytes == sum(sizes)
    store.close()


def test_memory_store_is_resealed() -> None:
    store = MemoryStore(codec=SealedCodec(A))
    conformance_kept.commit(store, 3)
    store.codec = store._verify.codec = SealedCodec(ring("b", "a"))
    assert store.reencrypt() == 3
    assert store.reencrypt() == 0
    store.codec = store._verify.codec = SealedCodec(B)
    assert conformance.same(store.get(KEY), record(3))


def test_key_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "keys"
    one, two = new_key(), new_key()
    path.write_text(f"# rotated in March\nnew.2 {one}\n\nold-1   {two}\n")
    path.chmod(0o600)
    made = KeyRing.from_file(path)
    assert made.keys == (("new.2", base64.b64decode(one)), ("old-1", base64.b64decode(two)))
    assert repr(made) == "KeyRing(new.2, old-1)"
    monkeypatch.setenv("KEYS", f"new.2 {one},old-1 {two}")
    assert KeyRing.from_env("KEYS") == made
    assert "read by anyone" not in caplog.text
    path.chmod(0o644)
    KeyRing.from_file(path)
    assert "read by anyone" in caplog.text
    path.chmod(0o666)
    with pytest.raises(ConfigError, match="written by anyone"):
        KeyRing.from_file(path)
    with pytest.raises(ConfigError, match=r"keys2 cannot be read: No such file"):
        KeyRing.from_file(tmp_path / "keys2")
    with pytest.raises(ConfigError, match="KEYS2 is not set"):
        KeyRing.from_env("KEYS2")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "empty"),
        ("# nothing", "empty"),
        ("SECRETSECRETSECRET", "each line must be"),
        ("a SECRET!", "each line must be"),
        ("a " + base64.b64encode(b"SECRET" * 4).decode(), "24 bytes"),
        (f"a {new_key()}\na {new_key()}", "must differ"),
        (f"-a {new_key()}", "a key id has"),
    ],
    ids=[
        "empty",
        "only a comment",
        "no id",
        "no base64",
        "too short",
        "one id twice",
        "an id with a dash",
    ],  # the keys are random
)
def test_bad_key_files_are_named_and_not_shown(text: str, what: str) -> None:
    with pytest.raises(ConfigError, match=what) as caught:
        KeyRing.parse(text, "the file")
    assert "the file" in str(caught.value)
    for part in text.split():
        assert len(part) < 9 or part not in str(caught.value)


# --- fuzz ---------------------------------------------------------------------------------------------------


def test_fuzz_damage_is_always_refused() -> None:
    rng = random.Random(8)
    sealed = SealedCodec(A)
    good = [sealed.encode(record(layout=layout)) for layout in ("L3H1r8", "L1H1r2")]
    good.append(format2(record(layout="L1H1r2"), A))
    for turn in range(FUZZ):
        data = good[turn % 3]
        bad = mutate(data, rng)
        for each in (bad, reseal(bad[:-32])):
            if each != data:
                with pytest.raises(CorruptRecord):
                    sealed.decode(each, key=KEY)
