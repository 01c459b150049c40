"""URLs name stores; what is not understood is refused with what would be."""

import sys
from pathlib import Path
from typing import Any

import pytest

from deltamem_vllm.errors import ConfigError, CorruptRecord
from deltamem_vllm.store.crypto import SealedCodec, new_key
from deltamem_vllm.store.memory import MemoryStore
from deltamem_vllm.store.protocol import Quota
from deltamem_vllm.store.sqlite import SQLiteStore
from deltamem_vllm.store.url import default_url, open_store
from tests.store.records import KEY, record


def test_four_slashes_are_absolute(tmp_path: Path) -> None:
    store = open_store(f"sqlite:///{tmp_path}/a#b %41.db")
    assert isinstance(store, SQLiteStore)
    assert store.path == tmp_path / "a#b %41.db"
    store.close()


def test_three_slashes_are_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = open_store("sqlite:///sub/s.db")
    assert isinstance(store, SQLiteStore)
    monkeypatch.chdir("/")
    assert store.path == tmp_path / "sub" / "s.db"
    store.close()


def test_memory() -> None:
    assert isinstance(open_store("memory://"), MemoryStore)


@pytest.mark.parametrize(
    ("url", "what"),
    [
        ("postgresql://me:hunter2@host/db?retry=soon", r"retry='soon': it must be seconds"),
        ("postgresql://me:hunter2@[host/db", "is not valid"),
        ("postgresql://me:hunter2@host/db?keep=0", r"keep='0': it must be a whole number from 1 to 1000"),
        ("redis://:hunter2@host?durability=some", "durability=fsync"),
        ("redis://:hunter2@host?namespace=", "not empty"),
        ("redis://:hunter2@host:port", "is not valid"),
        ("sqlite:////tmp/s.db?max_sessions=-1", "max_sessions='-1'"),
        ("sqlite:////tmp/s.db?max_bytes", "name=value"),
        ("memory://?keep=٣", "keep='٣'"),
        ("memory://?accept_plain=1", "without key_file"),
        ("memory://?accept_plain=yes&key_env=X", "use 1 or 0"),
        ("memory://?key_env=X&key_file=Y", "one of them"),
        ("memory://?key_env=DELTAMEM_NO_SUCH", "DELTAMEM_NO_SUCH is not set"),
        ("memory://?key_file=/nowhere", "/nowhere cannot be read"),
        ("memory://?colour=red", "no option but"),
        ("mongodb://me:hunter2@host", "unknown scheme"),
        ("/var/lib/s.db", "is not a URL"),
        ("sqlite://", "names no file"),
        ("sqlite:///", "names no file"),
        ("sqlite://host/s.db", "names no file"),
        ("sqlite:////tmp/", "names no file"),
        ("sqlite:///s.db?mode=ro", "SQLite has no option mode"),
        ("memory://x", "takes no path"),
        ("", "is not a URL"),
    ],
)
def test_refused(url: str, what: str) -> None:
    with pytest.raises(ConfigError, match=what) as caught:
        open_store(url)
    assert "hunter2" not in str(caught.value)


def test_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEYS", f"a {new_key()}")
    store = open_store(f"sqlite:///{tmp_path}/s.db?keep=2&max_sessions=3&max_bytes=1000000&key_env=KEYS")
    assert isinstance(store, SQLiteStore)
    assert isinstance(store.codec, SealedCodec)
    assert (store.keep, store.quota) == (2, Quota(3, 1_000_000))
    store.put(record(1), None)
    store.close()
    store = open_store(f"sqlite:///{tmp_path}/s.db")
    with pytest.raises(CorruptRecord, match="it is encrypted, give the store its key"):
        store.get(KEY)
    store.close()


def test_servers(postgres_url: str, redis_place: tuple[str, str]) -> None:
    for url in (
        f"{postgres_url}?application_name=me&keep=3&statement_timeout=7&retry=0.5",
        f"{redis_place[0]}?namespace={redis_place[1]}&keep=3&retry=0.5&timeout=2&client_name=me",
        f"{redis_place[0].replace('redis', 'valkey')}?namespace={redis_place[1]}x",
    ):
        store = open_store(url)
        assert getattr(store, "leases", None), "15 seconds by default"
        store.put(record(1), None)
        assert store.get(KEY) is not None
        assert store.usage("tenant").sessions == 1
        store.close()


def test_leases(postgres_url: str, redis_place: tuple[str, str]) -> None:
    for place in (f"{postgres_url}?", f"{redis_place[0]}?namespace={redis_place[1]}&"):
        for option, seconds in (("retry=1", 15.0), ("lease=2", 2.0), ("lease=0", None)):
            store: Any = open_store(place + option)
            assert (store.leases and store.leases.seconds) == seconds
            store.close()
        for wrong in ("0.5", "-1", "3601", "long"):
            with pytest.raises(ConfigError, match=f"store option lease='{wrong}': it must be seconds from 1 to 3600"):
                open_store(f"{place}lease={wrong}")


@pytest.mark.parametrize(("scheme", "library"), [("postgresql", "psycopg"), ("rediss", "redis")])
def test_a_missing_library_names_its_extra(scheme: str, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [
        name for name in sys.modules if name.startswith(("deltamem_vllm.store.postgres", "deltamem_vllm.store.redis"))
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)  # type: ignore[arg-type]
    extra = {"psycopg": "postgres", "redis": "redis"}[library]
    with pytest.raises(ConfigError, match=rf"pip install 'deltamem-vllm\[{extra}\]'"):
        open_store(f"{scheme}://host/db")


def test_default_is_the_users_data_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_url() == f"sqlite:///{tmp_path}/deltamem/sessions.db"
    open_store(default_url()).close()
    assert (tmp_path / "deltamem" / "sessions.db").exists()
    for unset in ("", "relative"):  # the specification: a relative path is to be ignored
        monkeypatch.setenv("XDG_DATA_HOME", unset)
        monkeypatch.setenv("HOME", "/home/me")
        assert default_url() == "sqlite:////home/me/.local/share/deltamem/sessions.db"
