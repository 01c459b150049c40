"""Whose request it is: key files, vLLM's own keys, and the command that makes keys."""

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from deltamem_vllm.cli import app
from deltamem_vllm.errors import CapacityError, ConfigError
from deltamem_vllm.server.tenants import (
    FileKeys,
    OneTenant,
    ServerKeys,
    Tenant,
    bearer,
    digest_of,
    is_open,
    read_key_file,
)
from deltamem_vllm.sessions.rates import Rates

runner = CliRunner()
A, B = "key of a", "key of b"


def write(path: Path, tenants: Any) -> Path:
    """A key file, put in place in one step."""
    beside = path.with_suffix(".new")
    beside.write_text(tenants if isinstance(tenants, str) else json.dumps({"tenants": tenants}))
    beside.chmod(0o600)
    beside.replace(path)
    return path


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


# --- who --------------------------------------------------------------------------------------------------------------


def test_without_keys_everybody_is_one_tenant() -> None:
    assert OneTenant().of(None) == OneTenant().of("anything") == Tenant("default")


def test_each_of_vllms_keys_is_a_tenant() -> None:
    keys = ServerKeys([A, B])
    names = [getattr(keys.of(key), "name", None) for key in (A, B, "other", "", None)]
    assert names[:2] == [f"key-{hashlib.sha256(key.encode()).hexdigest()[:16]}" for key in (A, B)]
    assert names[2:] == [None, None, None]


def test_a_key_file(tmp_path: Path) -> None:
    quotas = {"max_sessions": 5, "max_bytes": 6, "commits_per_minute": 7}
    tenants = {"a": {"keys": [digest_of(A), digest_of("next key of a")], **quotas}, "b": {"keys": [digest_of(B)]}}
    keys = FileKeys(write(tmp_path / "keys", {**tenants, "locked-out": {"keys": []}}))
    assert keys.of(A) == keys.of("next key of a") == Tenant("a", 5, 6, 7)
    assert keys.of(B) == Tenant("b")
    assert [keys.of(key) for key in (None, "", "a", digest_of(A), f"{A} ", "ключ", "\udcff")] == [None] * 7


DIGEST = digest_of(A)
BROKEN: dict[str, tuple[Any, str]] = {
    "no json": ("{", "not the JSON"),
    "a list": ("[]", "valid dictionary"),
    "deep": ("[" * 100_000, "not the JSON"),
    "other names": ({"a": {"keys": [], "colour": "blue"}}, "tenants.a.colour"),
    "a plain key": ({"a": {"keys": [A]}}, r"tenants.a.keys.0: String should match"),
    "upper case": ({"a": {"keys": [DIGEST.upper()]}}, "tenants.a.keys.0"),
    "a line end": ({"a": {"keys": [DIGEST + "\n"]}}, "tenants.a.keys.0"),
    "a bad name": ({"a/b": {"keys": []}}, "tenants.a/b"),
    "a long name": ({"a" * 65: {"keys": []}}, "tenants.a"),
    "no name": ({"": {"keys": []}}, "tenants."),
    "a text for a number": ({"a": {"keys": [], "max_bytes": "5"}}, "tenants.a.max_bytes"),
    "zero": ({"a": {"keys": [], "commits_per_minute": 0}}, "tenants.a.commits_per_minute"),
    "one key twice": ({"a": {"keys": [DIGEST]}, "b": {"keys": [DIGEST]}}, "listed twice, by 'a' and by 'b'"),
    "one tenant twice": ('{"tenants": {"a": {"keys": []}, "a": {"keys": []}}}', "a name comes twice"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_key_file_is_refused_and_not_shown(name: str, tmp_path: Path) -> None:
    content, words = BROKEN[name]
    with pytest.raises(ConfigError, match=words) as e:
        read_key_file(write(tmp_path / "keys", content))
    assert A not in str(e.value), "a key that was put there by mistake would be logged"


def test_a_key_file_that_is_missing_or_anybodys(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        FileKeys(tmp_path / "keys")
    write(tmp_path / "keys", {}).chmod(0o602)
    with pytest.raises(ConfigError, match="can be written by anyone"):
        FileKeys(tmp_path / "keys")


def in_place(path: Path, tenants: Any) -> None:
    path.write_text(json.dumps({"tenants": tenants}))


@pytest.mark.parametrize("change", [write, in_place])
def test_a_changed_file_is_read_again_within_two_seconds(change: Callable[[Path, Any], Any], tmp_path: Path) -> None:
    path = write(tmp_path / "keys", {"a": {"keys": [digest_of(A)]}})
    keys = FileKeys(path)
    for lost, found in ((A, B), (B, A)) * 2:
        change(path, {"a": {"keys": [digest_of(found)]}})
        start = time.monotonic()
        while keys.of(lost) is not None:
            time.sleep(0.01)
        assert time.monotonic() - start < 2
        assert keys.of(found) == Tenant("a")


def test_a_change_within_one_tick_of_the_file_systems_clock_is_seen(tmp_path: Path) -> None:
    clock = Clock()
    path = write(tmp_path / "keys", {"a": {"keys": [digest_of(A)]}})
    keys = FileKeys(path, clock)
    before = path.stat()
    in_place(path, {"a": {"keys": [digest_of(B)]}})  # as many bytes
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    clock.now += 1
    assert (keys.of(A), keys.of(B)) == (None, Tenant("a"))


def test_a_file_is_looked_at_once_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, looks = Clock(), 0
    keys = FileKeys(write(tmp_path / "keys", {}), clock)
    look = keys._signature

    def counted() -> Any:
        nonlocal looks
        looks += 1
        return look()

    monkeypatch.setattr(keys, "_signature", counted)
    for _ in range(1000):
        clock.now += 0.01
        keys.of(A)
    assert 9 <= looks <= 11


@pytest.mark.parametrize("trouble", ["broken", "gone", "anybody's"])
def test_a_file_that_breaks_changes_nothing_and_is_reported(
    trouble: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    path = write(tmp_path / "keys", {"a": {"keys": [digest_of(A)]}})
    keys = FileKeys(path, clock)
    if trouble == "gone":
        path.unlink()
    elif trouble == "broken":
        write(path, "{")
    else:
        path.chmod(0o666)
    logging.getLogger("vllm").propagate = True  # vLLM's own handler would have it alone
    with caplog.at_level(logging.INFO):
        for _ in range(5):
            clock.now += 1
            assert keys.of(A) == Tenant("a")
        assert [r.levelname for r in caplog.records] == ["ERROR"]
        assert "the keys read before stay in force" in caplog.text
        write(path, {"b": {"keys": [digest_of(B)]}})
        clock.now += 1
        assert (keys.of(A), keys.of(B)) == (None, Tenant("b"))
        assert "read again: 1 key(s)" in caplog.text


@pytest.mark.parametrize(
    ("headers", "key"),
    [
        ([(b"authorization", b"Bearer k")], "k"),
        ([(b"Authorization", b"bearer k")], "k"),
        ([(b"authorization", b"Bearer ")], None),
        ([(b"authorization", b"Bearer")], None),
        ([(b"authorization", b"Basic k")], None),
        ([(b"authorization", b"k")], None),
        ([(b"authorization", b"")], None),
        ([(b"authorization", b"Bearer k"), (b"authorization", b"Bearer l")], None),
        ([], None),
    ],
    ids=str,
)
def test_where_a_key_is_looked_for(headers: list[tuple[bytes, bytes]], key: str | None) -> None:
    assert bearer(headers) == key


def test_open_paths() -> None:
    assert all(map(is_open, ("/health", "/metrics", "/metrics/", "/version", "/ping")))
    closed = (
        "",
        "/",
        "/v1/models",
        "/invocations",
        "/health/",
        "/healthx",
        "/Health",
        "/ping/x",
        "/metricsx",
        "//health",
    )
    assert not any(map(is_open, closed))


# --- rates ------------------------------------------------------------------------------------------------------------


def test_a_bucket_holds_a_minutes_worth_and_fills_steadily() -> None:
    clock = Clock()
    rates = Rates(clock)

    def spent() -> int:
        count = 0
        while True:
            try:
                rates.spend("a", 6)
            except CapacityError as e:
                last.append((e.status, e.retry_after))
                return count
            count += 1

    last: list[tuple[int, float]] = []
    assert spent() == 6
    assert last == [(429, 10)]
    rates.spend("b", 6)
    clock.now += 25
    assert spent() == 2
    assert last[-1][1] == 5
    clock.now += last[-1][1]
    assert spent() == 1, "Retry-After must be long enough"
    clock.now += 3600
    assert spent() == 6


# --- the command ------------------------------------------------------------------------------------------------------


def keys(*arguments: Any, code: int = 0) -> Any:
    result = runner.invoke(app, ["keys", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


def test_keys_are_made_shown_once_listed_and_revoked(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    first, second = (keys("new", "acme", path).stdout.strip() for _ in range(2))
    other = keys("new", "zeta", path).stdout.strip()
    assert len({first, second, other}) == 3
    assert path.stat().st_mode & 0o777 == 0o600
    assert not any(key in path.read_text() for key in (first, second, other))
    ring = FileKeys(path)
    assert [ring.of(key) for key in (first, second, other)] == [Tenant("acme"), Tenant("acme"), Tenant("zeta")]

    content = json.loads(path.read_text())
    content["tenants"]["acme"]["max_sessions"] = 5000
    path.write_text(json.dumps(content))
    path.chmod(0o640)
    lines = keys("list", path).stdout.splitlines()
    assert lines[0] == f"acme  {digest_of(first)[:15]}…  {digest_of(second)[:15]}…  max_sessions=5,000"

    keys("revoke", "acme", digest_of(first)[:15] + "…", path)
    ring = FileKeys(path)
    assert [ring.of(key) for key in (first, second, other)] == [None, Tenant("acme", 5000), Tenant("zeta")]
    assert path.stat().st_mode & 0o777 == 0o640
    assert [p.name for p in tmp_path.iterdir()] == ["keys.json"]


def test_what_the_command_refuses_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    assert "No such file" in keys("list", path, code=1).stderr
    keys("new", "acme", path)
    before = path.read_text()
    assert "0 keys of tenant 'acme' begin with" in keys("revoke", "acme", "ffffffffffffffffff", path, code=1).stderr
    assert "0 keys of tenant 'zeta'" in keys("revoke", "zeta", "", path, code=1).stderr
    assert "tenants" in keys("new", "a/b", path, code=1).stderr
    assert path.read_text() == before
    path.write_text("{")
    keys("new", "acme", path, code=1)
    assert path.read_text() == "{"


def test_commands_at_once_lose_no_key(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    from deltamem_vllm.server import commands

    def add(i: int) -> None:
        with commands._changing(path) as content:
            content["tenants"].setdefault(f"t{i % 3}", {}).setdefault("keys", []).append(digest_of(str(i)))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(40)))
    ring = FileKeys(path)
    assert [ring.of(str(i)) for i in range(40)] == [Tenant(f"t{i % 3}") for i in range(40)]
