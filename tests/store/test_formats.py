"""From formats without attributes, and from those with another checksum, to the present ones: what is stored is read,
upgraded by ``reencrypt``, and cannot be passed off as another format."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from deltamem_vllm.errors import CorruptRecord
from deltamem_vllm.store import codec, crypto
from deltamem_vllm.store.codec import PLAIN, RecordCodec, decode, encode
from deltamem_vllm.store.crypto import SealedCodec
from deltamem_vllm.store.memory import MemoryStore
from deltamem_vllm.store.postgres import PostgresStore
from deltamem_vllm.store.protocol import MAX_ATTRIBUTES_BYTES, Record, SessionKey, StateStore, Usage
from deltamem_vllm.store.redis import RedisStore
from deltamem_vllm.store.sqlite import SQLiteStore
from tests.store import conformance
from tests.store.conformance_kept import commit
from tests.store.old_formats import OldCodec, format1, format2, format3, format4
from tests.store.records import KEY, record
from tests.store.test_crypto import A, B

Reopen = Callable[[RecordCodec], StateStore]
FACTS = b"The user is called Ada Lovelace."


@pytest.fixture(params=["sqlite", "memory", "postgres", "redis"])
def reopen(request: pytest.FixtureRequest, tmp_path: Path) -> Reopen:
    match request.param:
        case "memory":
            store = MemoryStore()

            def again(codec: RecordCodec) -> StateStore:
                store.codec = store._verify.codec = codec
                store._closed = False
                return store

            return again
        case "postgres":
            url = request.getfixturevalue("postgres_url")
            return lambda codec: PostgresStore(url, codec=codec)
        case "redis":
            url, namespace = request.getfixturevalue("redis_place")
            return lambda codec: RedisStore(url, namespace=namespace, codec=codec)
        case _:
            return lambda codec: SQLiteStore(tmp_path / "s.db", codec=codec)


@pytest.mark.parametrize("old", [b"", b"as they were"], ids=["without attributes", "with attributes"])
@pytest.mark.parametrize("sealed", [False, True], ids=["plain", "sealed"])
def test_reencrypt_upgrades_the_old_formats(reopen: Reopen, sealed: bool, old: bytes) -> None:
    keys = [SessionKey(tenant, "s") for tenant in ("one", "two")]
    store = reopen(OldCodec(A if sealed else None, attributes=bool(old)))
    for key in keys:
        commit(store, 2, key, attributes=old)
    store.close()

    store = reopen(SealedCodec(A) if sealed else PLAIN)
    for key, version in itertools.product(keys, (1, 2)):  # read before the upgrade
        assert conformance.same(store.get_version(key, version), record(version, key, attributes=old))
    store.put(record(3, keys[0], attributes=FACTS), record(2).expect)
    assert store.reencrypt(batch=2) == 4
    assert store.reencrypt(batch=2) == 0
    for key in keys:
        last = 3 if key == keys[0] else 2
        made = [record(version, key, attributes=FACTS if version == 3 else old) for version in range(1, last + 1)]
        for each in made:
            assert conformance.same(store.get_version(key, each.version), each)
        sizes = [conformance.size_in(store, each) for each in reversed(made)]
        assert [info.bytes for info in store.history(key)] == sizes
        assert store.usage(key.tenant) == Usage(1, sum(sizes))
    store.close()


def test_attributes_lie_inside_the_seal(tmp_path: Path) -> None:
    """With a key no byte of them is in the store's files; without one they are, so the search would find them."""
    for name, made in (("plain", PLAIN), ("sealed", SealedCodec(A))):
        store = SQLiteStore(tmp_path / name / "s.db", codec=made)
        store.put(record(1, attributes=FACTS), None)
        found = store.get(KEY)
        assert found is not None
        assert found.attributes == FACTS
        store.close()
        data = b"".join(each.read_bytes() for each in (tmp_path / name).iterdir())
        assert (FACTS in data) == (name == "plain")


def test_attributes_of_another_version_do_not_open() -> None:
    """An attacker who can write to the store cannot give a session the attributes it had before."""
    sealed = SealedCodec(A)
    old, new = (sealed.encode(record(version, attributes=FACTS * (version == 1))) for version in (1, 2))
    mine, theirs = codec.unpack(new, 6), codec.unpack(old, 6)
    with pytest.raises(CorruptRecord, match="does not open"):
        sealed.decode(codec.pack(6, mine[0], theirs[1], theirs[2]))


def relabelled(data: bytes, form: int) -> bytes:
    return codec.pack(form, *codec.unpack(data, codec.format_of(data)))


@pytest.mark.parametrize("window", [b"", bytes(40)])
def test_a_record_cannot_be_passed_off_as_another_format(window: bytes) -> None:
    made = record(1, window=window)
    sealed = SealedCodec(A, accept_plain=True)
    plain = {1: format1(made), 3: format3(made), 5: encode(made)}
    closed = {2: format2(made, A), 4: format4(made, A), 6: sealed.encode(made)}
    for form, other in itertools.permutations(closed, 2):
        with pytest.raises(CorruptRecord, match="does not open"):
            sealed.decode(relabelled(closed[form], other))
    for form, other in itertools.permutations(plain, 2):
        if {form, other} == {3, 5}:  # one content in two frames: whoever makes the checksum anew has changed nothing
            assert conformance.same(decode(relabelled(plain[form], other)), made)
            continue
        with pytest.raises(CorruptRecord):
            decode(relabelled(plain[form], other))
    for (_, data), other in [*itertools.product(closed.items(), plain), *itertools.product(plain.items(), closed)]:
        with pytest.raises(CorruptRecord):
            sealed.decode(relabelled(data, other))
    for form, data in (plain | closed).items():  # the number alone
        for other in {1, 2, 3, 4, 5, 6} - {form}:
            with pytest.raises(CorruptRecord):
                sealed.decode(data[:8] + bytes([other]) + data[9:])


def test_relabelling_catches_a_seal_that_does_not_vouch_for_the_format(monkeypatch: pytest.MonkeyPatch) -> None:
    """PLANTED BUG: the associated data are those of one format, whatever the record's. The sealed bytes then open, and
    only their lengths stand between an attacker and another content."""
    real = crypto._associated
    monkeypatch.setattr(crypto, "_associated", lambda form, *rest: real(2, *rest))
    with pytest.raises((AssertionError, pytest.fail.Exception), match=r"pattern did not match"):
        test_a_record_cannot_be_passed_off_as_another_format(bytes(40))


def test_attributes_are_bounded_and_exact() -> None:
    for codec_ in (PLAIN, SealedCodec(A)):
        for size in (0, 1, MAX_ATTRIBUTES_BYTES):
            made = record(1, attributes=b"\0" * size, window=b"")
            back = codec_.decode(codec_.encode(made), key=KEY)
            assert (back.attributes, back.window) == (made.attributes, b"")
            assert encode(back) == encode(made)
        with pytest.raises(CorruptRecord, match="attributes of 65537 bytes; the limit is 65536"):
            codec_.encode(record(1, attributes=bytes(MAX_ATTRIBUTES_BYTES + 1)))
        with pytest.raises(CorruptRecord, match="attributes must be bytes, not str"):
            codec_.encode(record(1, attributes="facts"))


def test_every_bound_fits_into_a_record() -> None:
    """The longest of everything can be written, read, and is within the limit that the stores read by."""
    layout = "L8192H1r32"  # 32 MiB
    made = record(1, layout=layout, attributes=bytes(MAX_ATTRIBUTES_BYTES), window=bytes(codec.MAX_WINDOW_BYTES))
    for data, reader in ((PLAIN.encode(made), PLAIN), (SealedCodec(A).encode(made), SealedCodec(A))):
        assert len(data) <= codec.MAX_RECORD_BYTES
        assert reader.decode(data).attributes == made.attributes


def test_unencrypted_records_of_either_format_need_accept_plain() -> None:
    made: Record = record(1, attributes=b"")
    for data in (format1(made), format3(made), encode(made)):
        with pytest.raises(CorruptRecord, match="is not encrypted, and the store has a key"):
            SealedCodec(A).decode(data)
        assert conformance.same(SealedCodec(A, accept_plain=True).decode(data), made)
    for data in (format2(made, A), format4(made, A), SealedCodec(A).encode(made)):
        assert conformance.same(SealedCodec(A).decode(data, key=KEY), made)
        with pytest.raises(CorruptRecord, match="it is encrypted, give the store its key"):
            decode(data)


def test_only_the_present_formats_are_current() -> None:
    made = record()
    assert not PLAIN.current(format1(made))
    assert not PLAIN.current(format3(made))
    assert PLAIN.current(encode(made))
    assert not SealedCodec(A).current(format2(made, A))
    assert not SealedCodec(A).current(format4(made, A))
    assert not SealedCodec(B).current(SealedCodec(A).encode(made))
    assert SealedCodec(A).current(SealedCodec(A).encode(made))
    assert not SealedCodec(A).current(encode(made))
