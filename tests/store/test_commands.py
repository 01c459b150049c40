"""`deltamem store …`, as an operator runs it."""

import json
import sqlite3
import stat
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from deltamem_vllm.cli import app
from deltamem_vllm.store.crypto import new_key
from deltamem_vllm.store.protocol import SessionKey, StateStore
from deltamem_vllm.store.url import open_store
from tests.store.records import record

runner = CliRunner()
NOW = time.time()


def fill(store: StateStore) -> None:
    """Tenant a: s0 to s4, s0 with versions 1 to 3 and idle for a day; tenant b: s0."""
    for number in range(5):
        age = 86400.0 if number == 0 else 0.0
        store.put(record(1, SessionKey("a", f"s{number}"), updated_at=NOW - age), None)
    for version in (2, 3):
        store.put(record(version, SessionKey("a", "s0"), updated_at=NOW - 86400), record(version - 1).expect)
    store.put(record(1, SessionKey("b", "s0"), updated_at=NOW), None)


@pytest.fixture(params=["sqlite", "postgres", "redis"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        made = f"sqlite:///{tmp_path}/s.db"
    elif request.param == "postgres":
        made = request.getfixturevalue("postgres_url")
    else:
        place, namespace = request.getfixturevalue("redis_place")
        made = f"{place}?namespace={namespace.replace('*', '%2A')}"
    with closing(open_store(made)) as store:
        fill(store)
    return made


def call(url: str, *arguments: str, code: int = 0) -> Any:
    """Run a command with ``--json``; returns its objects, or for an error what it says."""
    result = runner.invoke(app, ["store", *arguments, "--store", url, "--json"])
    assert result.exit_code == code, result.output
    return result.stderr if code == 2 else [json.loads(line) for line in result.stdout.splitlines()]


def test_every_command_on_every_store(url: str) -> None:
    assert call(url, "check") == [{"sessions": 6, "versions": 8, "damages": 0}]
    listed = call(url, "list")
    assert [(e["tenant"], e["session"], e["version"]) for e in listed] == [
        *(("a", f"s{number}", 3 if number == 0 else 1) for number in range(5)),
        ("b", "s0", 1),
    ]
    assert [e["session"] for e in call(url, "list", "--tenant", "a", "--after", "s1", "--limit", "2")] == ["s2", "s3"]
    assert len(call(url, "list", "--limit", "3")) == 3
    used = call(url, "usage")
    assert [(e["tenant"], e["sessions"]) for e in used] == [("a", 5), ("b", 1)]
    assert used[1]["bytes"] == listed[-1]["bytes"]

    done = call(url, "rollback", "a", "s0", "1")
    assert done == [{"tenant": "a", "session": "s0", "version": 4, "content_of": 1}]
    with closing(open_store(url)) as store:
        kept = store.get(SessionKey("a", "s0"))
        assert kept is not None
        assert kept.version == 4
        np.testing.assert_array_equal(kept.end, record(1).end)
    assert "does not keep version 9; kept are 4, 3, 2, 1" in call(url, "rollback", "a", "s0", "9", code=2)
    assert "no session 'none'" in call(url, "rollback", "a", "none", "1", code=2)

    assert call(url, "delete", "a", "s1") == [{"tenant": "a", "session": "s1", "deleted": True}]
    assert "no session 's1'; see: deltamem store list" in call(url, "delete", "a", "s1", code=2)
    assert call(url, "reencrypt") == [{"reencrypted": 0}]
    assert call(url, "expire", "--older-than", "1d") == [{"deleted": 0}], "the rolled-back one was written just now"
    assert call(url, "expire", "--older-than", "0s") == [{"deleted": 5}]
    assert call(url, "check") == [{"sessions": 0, "versions": 0, "damages": 0}]
    assert call(url, "usage") == call(url, "list") == []


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with closing(open_store(f"sqlite:///{tmp_path}/s.db")) as store:
        fill(store)
    return tmp_path / "s.db"


def test_check_finds_damage(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        [blob] = connection.execute("SELECT blob FROM versions WHERE session = 's0' AND version = 2").fetchone()
        bad = blob[:-50] + bytes([blob[-50] ^ 1]) + blob[-49:]
        connection.execute("UPDATE versions SET blob = ? WHERE session = 's0' AND version = 2", (bad,))
        connection.execute("UPDATE tenants SET sessions = 7 WHERE tenant = 'b'")
        connection.commit()
    result = runner.invoke(app, ["store", "check", "--store", f"sqlite:///{path}"])
    assert result.exit_code == 1
    damaged, counts, last = result.stdout.splitlines()
    assert damaged.startswith("damaged: tenant 'a', version 2: session 's0'")
    assert "checksum" in damaged
    assert "7 sessions" in counts
    assert last == "6 sessions, 8 versions: 2 damaged"


@pytest.mark.parametrize(
    ("text", "deleted"), [("90000", 0), ("25h", 0), ("1.5d", 0), ("3600", 1), ("60m", 1), ("23h", 1), ("0.5d", 1)]
)
def test_expire_understands_times(path: Path, text: str, deleted: int) -> None:
    assert call(f"sqlite:///{path}", "expire", "--older-than", text) == [{"deleted": deleted}]


@pytest.mark.parametrize("text", ["", "soon", "-1", "1 week", "1e9"])
def test_expire_refuses_other_times(path: Path, text: str) -> None:
    assert "give seconds, or a number with s, m, h or d" in call(
        f"sqlite:///{path}", "expire", f"--older-than={text}", code=2
    )


def test_the_store_comes_from_the_environment_too(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELTAMEM_STORE", f"sqlite:///{path}")
    result = runner.invoke(app, ["store", "usage"])
    assert result.exit_code == 0
    assert result.stdout.split() == [
        "a",
        "5",
        "sessions",
        result.stdout.split()[3],
        "bytes",
        "b",
        *result.stdout.split()[6:],
    ]


def test_a_store_that_is_not_there_is_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "there is no store at" in call(f"sqlite:///{tmp_path}/typo.db", "check", code=2)
    assert not (tmp_path / "typo.db").exists()
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.delenv("DELTAMEM_STORE", raising=False)
    result = runner.invoke(app, ["store", "check"])
    assert result.exit_code == 2
    assert f"{tmp_path}/deltamem/sessions.db" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["check", "--store", "mysql://x"], "unknown scheme"),
        (["check", "--store", "postgresql://127.0.0.1:1/x?retry=0.1"], "cannot be reached"),
        (["list", "--store", "memory://", "--after", "x"], "--after needs --tenant"),
        (["backup", "/nowhere", "--store", "memory://"], "pg_dump"),
        (["delete", "", "s", "--store", "memory://"], "tenant must have"),
    ],
)
def test_errors_are_one_line(arguments: list[str], words: str) -> None:
    result = runner.invoke(app, ["store", *arguments])
    assert result.exit_code == 2
    assert words in result.stderr
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1


def test_keys_are_rotated(path: Path, tmp_path: Path) -> None:
    keys, old, new = tmp_path / "keys", f"one {new_key()}", f"two {new_key()}"
    keys.touch(0o600)
    keys.write_text(f"{old}\n", encoding="ascii")
    url = f"sqlite:///{path}?key_file={keys}"
    assert call(f"{url}&accept_plain=1", "reencrypt") == [{"reencrypted": 8}]
    keys.write_text(f"{new}\n{old}\n", encoding="ascii")
    assert call(url, "reencrypt") == [{"reencrypted": 8}]
    keys.write_text(f"{new}\n", encoding="ascii")
    assert call(url, "check") == [{"sessions": 6, "versions": 8, "damages": 0}]
    keys.write_text(f"{old}\n", encoding="ascii")
    assert call(url, "check", code=1)[-1]["damages"] == 8


def test_a_backup_is_a_store(path: Path, tmp_path: Path) -> None:
    url, target = f"sqlite:///{path}", tmp_path / "copy.db"
    with closing(open_store(url)) as writer:  # beside a server that goes on
        [told] = call(url, "backup", str(target))
        writer.put(record(1, SessionKey("b", "later")), None)
    assert told == {"file": str(target), "bytes": target.stat().st_size}
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert call(f"sqlite:///{target}", "check") == [{"sessions": 6, "versions": 8, "damages": 0}]
    before = target.read_bytes()
    assert "File exists" in call(url, "backup", str(target), code=2)
    assert target.read_bytes() == before
    assert "No such file" in call(url, "backup", str(tmp_path / "missing" / "copy.db"), code=2)
