"""URLs name stores; what is not understood is refused with what would be."""

from pathlib import Path

import pytest

from deltamem_vllm.errors import ConfigError
from deltamem_vllm.store.memory import MemoryStore
from deltamem_vllm.store.sqlite import SQLiteStore
from deltamem_vllm.store.url import default_url, open_store


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
        ("postgresql://me:hunter2@host/db", "postgresql:// is not served yet; use one of sqlite:"),
        ("redis://:hunter2@host", "redis:// is not served yet"),
        ("mongodb://me:hunter2@host", "unknown scheme"),
        ("/var/lib/s.db", "is not a URL"),
        ("sqlite://", "names no file"),
        ("sqlite:///", "names no file"),
        ("sqlite://host/s.db", "names no file"),
        ("sqlite:////tmp/", "names no file"),
        ("sqlite:///s.db?mode=ro", "takes only a path"),
        ("memory://x", "takes no path"),
        ("", "is not a URL"),
    ],
)
def test_refused(url: str, what: str) -> None:
    with pytest.raises(ConfigError, match=what) as caught:
        open_store(url)
    assert "hunter2" not in str(caught.value)


def test_default_is_the_users_data_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_url() == f"sqlite:///{tmp_path}/deltamem/sessions.db"
    open_store(default_url()).close()
    assert (tmp_path / "deltamem" / "sessions.db").exists()
    for unset in ("", "relative"):  # the specification: a relative path is to be ignored
        monkeypatch.setenv("XDG_DATA_HOME", unset)
        monkeypatch.setenv("HOME", "/home/me")
        assert default_url() == "sqlite:////home/me/.local/share/deltamem/sessions.db"
