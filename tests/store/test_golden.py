"""Bytes that earlier versions of this package wrote must be read for ever. The files in ``golden`` are never made
again: a new format or schema adds a file."""

import shutil
from pathlib import Path

import apsw
import pytest

from deltamem_vllm.store import codec, crypto, sqlite_schema
from deltamem_vllm.store.codec import PLAIN, decode, encode
from deltamem_vllm.store.crypto import SealedCodec
from deltamem_vllm.store.protocol import Record, SessionKey, Usage
from deltamem_vllm.store.sqlite import SQLiteStore
from tests.store import conformance
from tests.store.old_formats import format1, format3
from tests.store.records import KEY, record
from tests.store.test_crypto import A

GOLDEN = Path(__file__).parent / "golden"


def test_every_format_and_schema_has_a_golden_file() -> None:
    assert (codec.FORMAT, crypto.FORMAT) == (5, 6)
    assert {each.name for each in GOLDEN.iterdir()} == {
        "record-format1.bin",
        "record-format2.bin",
        "record-format3.bin",
        "record-format4.bin",
        "record-format5.bin",
        "record-format6.bin",
        *(f"schema{version}.db" for version in range(1, len(sqlite_schema.MIGRATIONS))),
    }


def test_format_1() -> None:
    data = (GOLDEN / "record-format1.bin").read_bytes()
    assert codec.format_of(data) == 1
    assert conformance.same(decode(data, key=KEY), record(7, attributes=b""))
    assert format1(record(7)) == data, "the tests write other bytes than version 1 did"


def test_format_2() -> None:
    data = (GOLDEN / "record-format2.bin").read_bytes()
    assert conformance.same(SealedCodec(A).decode(data, key=KEY), record(7, attributes=b""))
    assert codec.format_of(data) == 2


def test_format_3() -> None:
    data = (GOLDEN / "record-format3.bin").read_bytes()
    assert codec.format_of(data) == 3
    assert conformance.same(decode(data, key=KEY), record(7))
    assert format3(record(7)) == data, "the tests write other bytes than that version did"


def test_format_4() -> None:
    data = (GOLDEN / "record-format4.bin").read_bytes()
    assert codec.format_of(data) == 4
    assert conformance.same(SealedCodec(A).decode(data, key=KEY), record(7))


def test_format_5() -> None:
    data = (GOLDEN / "record-format5.bin").read_bytes()
    assert codec.format_of(data) == 5
    assert conformance.same(decode(data, key=KEY), record(7))
    assert encode(record(7)) == data, "the codec writes other bytes than it did"


def test_format_6() -> None:
    data = (GOLDEN / "record-format6.bin").read_bytes()
    assert codec.format_of(data) == 6
    assert conformance.same(SealedCodec(A).decode(data, key=KEY), record(7))


def open_old(folder: Path, codec: codec.RecordCodec = PLAIN) -> SQLiteStore:
    path = folder / "s.db"
    if not path.exists():
        shutil.copy(GOLDEN / "schema1.db", path)
    return SQLiteStore(path, codec=codec)


def old_record(version: int, key: SessionKey) -> Record:
    return record(version, key, layout="L1H1r2", attributes=b"")


def check_sessions(store: SQLiteStore) -> None:
    for tenant in ("tenant", "other"):
        infos = store.list(tenant)
        assert [(info.key.session, info.version) for info in infos] == [("s0", 1), ("s1", 2), ("s2", 3)]
        for info in infos:
            assert conformance.same(store.get(info.key), old_record(info.version, info.key))
            assert store.history(info.key) == [info]
        assert store.usage(tenant) == Usage(3, sum(info.bytes for info in infos))


def test_schema_1_is_migrated(tmp_path: Path) -> None:
    shutil.copy(GOLDEN / "schema1.db", tmp_path / "old.db")  # opening it makes files beside it
    before = apsw.Connection(str(tmp_path / "old.db"))
    assert before.pragma("user_version") == 1
    before.close()
    store = open_old(tmp_path)
    assert store._writer.pragma("user_version") == 2
    assert store._writer.pragma("integrity_check") == "ok"
    check_sessions(store)
    key = SessionKey("tenant", "s2")
    store.put(record(4, key, layout="L1H1r2"), record(3).expect)
    assert store.reencrypt() == 6, "the file's own records are of format 1, and the new one is not"
    assert [info.version for info in store.history(key)] == [4, 3]
    assert store.expire(1e10, 0.0) == 6
    store.close()
    assert b"request-0-1" not in (tmp_path / "s.db").read_bytes(), "the migration leaves no copy of a row behind"


def test_schema_1_is_migrated_and_encrypted(tmp_path: Path) -> None:
    store = open_old(tmp_path, SealedCodec(A, accept_plain=True))
    assert store.reencrypt() == 6
    store.close()
    store = open_old(tmp_path, SealedCodec(A))
    check_sessions(store)
    store.close()


def test_a_migration_that_fails_leaves_the_old_schema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = (*sqlite_schema.MIGRATIONS[:1], sqlite_schema.MIGRATIONS[1] + "CREATE TABLE sessions (x);")
    with monkeypatch.context() as patch:
        patch.setattr(sqlite_schema, "MIGRATIONS", broken)
        with pytest.raises(Exception, match="already exists"):
            open_old(tmp_path)
    store = open_old(tmp_path)
    check_sessions(store)
    store.close()
