"""The audit log: what a chain shows, what it survives, and what a failing disk does to it."""

import errno
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from deltamem_vllm.audit import chain
from deltamem_vllm.audit.chain import ROOT, Head, verify
from deltamem_vllm.audit.log import AuditLog, audit_file, label, read_key
from deltamem_vllm.cli import app
from deltamem_vllm.errors import ConfigError, StoreUnavailable
from deltamem_vllm.store.protocol import SessionKey

KEY = bytes(range(32))
ANNA = SessionKey("tenant-canary", "anna-canary")
WAIT = 60


def fill(path: Path, count: int = 20, **options: Any) -> None:
    """A whole chain; entries one by one, each durable before the next."""
    log = AuditLog(path, KEY, **options)
    for number in range(1, count + 1):
        log.append("commit", ANNA, number, f"request-{number}").result(WAIT)
    log.close()


def lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def test_a_chain_is_whole_and_names_nobody(tmp_path: Path) -> None:
    fill(tmp_path / "log")
    end, faults = verify(tmp_path / "log")
    assert (end.seq, faults) == (20, [])
    first = json.loads(lines(tmp_path / "log")[0])
    assert first["prev"] == ROOT
    assert {"seq", "time", "event", "tenant", "session", "version", "request", "prev", "hash"} == set(first)
    assert first["session"] == label(KEY, "tenant-canary", "anna-canary")
    assert b"canary" not in (tmp_path / "log").read_bytes()
    assert (tmp_path / "log").stat().st_mode & 0o077 == 0


def test_a_chain_goes_on_after_a_restart_and_over_files(tmp_path: Path) -> None:
    for _ in range(3):
        fill(tmp_path / "log", 30, segment_bytes=4000)
    assert len(chain.segments(tmp_path / "log")) > 5
    end, faults = verify(tmp_path / "log")
    assert (end.seq, faults) == (90, [])
    oldest = chain.segments(tmp_path / "log")[0]
    oldest.unlink()
    assert "follows entry 0" in str(verify(tmp_path / "log")[1][0])


EDITS: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "edit": lambda ls: [*ls[:5], ls[5].replace(b'"version":6', b'"version":7'), *ls[6:]],
    "edit with its own hash": lambda ls: [*ls[:5], _remade(ls[5], version=7), *ls[6:]],
    "deletion": lambda ls: ls[:5] + ls[6:],
    "deletion of the first": lambda ls: ls[1:],
    "insertion": lambda ls: [*ls[:5], _remade(ls[4], seq=6), *ls[5:]],
    "repetition": lambda ls: [*ls[:5], ls[4], *ls[5:]],
    "exchange": lambda ls: [*ls[:5], ls[6], ls[5], *ls[7:]],
    "cut in the middle": lambda ls: [*ls[:5], ls[5][:40], *ls[6:]],
    "blanks": lambda ls: [*ls[:5], ls[5].replace(b'":', b'": '), *ls[6:]],
    "an empty line": lambda ls: [*ls[:5], b"\n", *ls[5:]],
    "renumbered": lambda ls: [*ls[:5], *(_remade(raw, seq=i + 6) for i, raw in enumerate(ls[6:]))],
}


def _remade(raw: bytes, **fields: Any) -> bytes:
    """An entry as one would forge it: edited, with the right hash of its own."""
    entry = {**json.loads(raw), **fields}
    entry["hash"] = chain.digest(entry)
    return chain.canonical(entry) + b"\n"


@pytest.mark.parametrize("edit", EDITS)
def test_every_change_within_a_chain_is_found(tmp_path: Path, edit: str) -> None:
    fill(tmp_path / "log")
    (tmp_path / "log").write_bytes(b"".join(EDITS[edit](lines(tmp_path / "log"))))
    faults = verify(tmp_path / "log")[1]
    assert faults
    assert min(fault.line for fault in faults) in ((1,) if "first" in edit else (6, 7)), faults


def test_a_hash_without_the_one_before_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PLANTED BUG: entries are hashed by themselves, so that what was edited can be hashed again unnoticed."""
    fill(tmp_path / "log")
    good = lines(tmp_path / "log")

    def alone(fields: Any) -> str:
        return right({name: value for name, value in fields.items() if name != "prev"})

    right = chain.digest
    forged = [*good[:5], _remade(good[5], version=7), *good[6:]]
    (tmp_path / "log").write_bytes(b"".join(forged))
    assert verify(tmp_path / "log")[1]
    monkeypatch.setattr(chain, "digest", alone)
    fill(tmp_path / "bad")
    # Whoever edits an entry can now make the whole rest fit, without one hash of the rest changing.
    bad = lines(tmp_path / "bad")
    edited = json.loads(_remade(bad[5], version=7))
    after = json.loads(bad[6])
    assert edited["hash"] != after["prev"]
    assert json.loads(_remade(bad[6], prev=edited["hash"]))["hash"] == after["hash"], "the bug is not there"


def test_the_end_cut_off_needs_a_head(tmp_path: Path) -> None:
    fill(tmp_path / "log")
    head = verify(tmp_path / "log")[0].hash
    assert verify(tmp_path / "log", head)[1] == []
    (tmp_path / "log").write_bytes(b"".join(lines(tmp_path / "log")[:15]))
    assert verify(tmp_path / "log")[1] == []
    assert "head" in str(verify(tmp_path / "log", head)[1][0])


def test_commands(tmp_path: Path) -> None:
    key = read_key(tmp_path / "log")
    assert read_key(tmp_path / "log") == key
    fill(tmp_path / "log")
    run = CliRunner().invoke
    said = run(app, ["audit", "verify", str(tmp_path / "log")])
    assert (said.exit_code, "20 entries" in said.output, "nothing wrong" in said.output) == (0, True, True)
    assert run(app, ["audit", "verify", str(tmp_path / "log"), "--head", "0" * 63 + "1"]).exit_code == 1
    assert run(app, ["audit", "verify", str(tmp_path / "none")]).exit_code == 1
    assert run(app, ["audit", "label", str(tmp_path / "log"), "t", "s"]).output.strip() == label(key, "t", "s")
    assert run(app, ["audit", "label", str(tmp_path / "none"), "t", "s"]).exit_code == 2
    (tmp_path / "log").write_bytes(b"".join(lines(tmp_path / "log")[1:]))
    assert run(app, ["audit", "verify", str(tmp_path / "log")]).exit_code == 1
    assert audit_file("/a/log", 0) == Path("/a/log")
    assert audit_file("/a/log", 2) == Path("/a/log.2")


def test_one_writer_and_no_log_that_is_not_ours(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "log", KEY)
    with pytest.raises(ConfigError, match="another server writes it"):
        AuditLog(tmp_path / "log", KEY)
    log.close()
    (tmp_path / "other").write_text("hello\n")
    with pytest.raises(ConfigError, match="last line is no JSON"):
        AuditLog(tmp_path / "other", KEY)
    with pytest.raises(ConfigError, match="No such file"):
        AuditLog(tmp_path / "none" / "log", KEY)


@pytest.mark.parametrize("cut", [1, 40, 10_000])
def test_a_torn_end_is_repaired_and_said(tmp_path: Path, cut: int) -> None:
    fill(tmp_path / "log", 5)
    whole = (tmp_path / "log").read_bytes()
    (tmp_path / "log").write_bytes(whole + whole[:cut].replace(b"\n", b" "))
    assert verify(tmp_path / "log")[1]
    fill(tmp_path / "log", 1)
    end, faults = verify(tmp_path / "log")
    assert (end.seq, faults) == (7, [])
    note = json.loads(lines(tmp_path / "log")[5])
    assert note["event"] == "repair"
    assert note["dropped_bytes"] == min(cut, len(whole))


def test_kill_9_loses_nothing_that_was_said(tmp_path: Path) -> None:
    said, rng = 0, random.Random(1)
    for round_ in range(4):
        child = subprocess.Popen(
            [sys.executable, "-m", "tests.audit.appending", str(tmp_path / "log")], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        for _ in range(rng.randint(5, 150)):
            assert child.stdout.readline()
            said += 1
        child.kill()
        said += len([line for line in child.stdout.read().splitlines(keepends=True) if line.endswith("\n")])
        child.wait(WAIT)
        with (tmp_path / "log").open("ab") as opened:  # what a kill amid a write would leave
            opened.write(b'{"event":"com' if round_ % 2 else b"")
    fill(tmp_path / "log", 1)
    end, faults = verify(tmp_path / "log")
    assert not faults
    assert end.seq >= said + 1


def test_no_entry_is_called_durable_before_it_is_synced(tmp_path: Path) -> None:
    """By order: the file's bytes at each sync hold all that is told afterwards. PLANTED BUG: no sync at all."""
    synced = [0]

    def sync(fd: int) -> None:
        os.fsync(fd)
        synced[0] = os.fstat(fd).st_size

    def told_too_early(log: AuditLog) -> bool:
        for number in range(10):
            log.append("commit", ANNA, number).result(WAIT)
            if synced[0] != (tmp_path / "log").stat().st_size:
                return True
        return False

    log = AuditLog(tmp_path / "log", KEY, sync=sync)
    assert not told_too_early(log)
    log.close()
    broken = AuditLog(tmp_path / "log", KEY, sync=lambda fd: None)
    assert told_too_early(broken)
    broken.close()


class Disk:
    """A disk that fails while told to, after having written half."""

    def __init__(self) -> None:
        self.full = False

    def sync(self, fd: int) -> None:
        if self.full:
            os.ftruncate(fd, os.fstat(fd).st_size - 10)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(fd)


@pytest.mark.parametrize("required", [False, True])
def test_a_disk_that_fails_is_counted_and_where_required_changes_wait(
    tmp_path: Path, required: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("deltamem_vllm.audit.log.RETRY_SECONDS", 0.01)
    disk = Disk()
    log = AuditLog(tmp_path / "log", KEY, required=required, sync=disk.sync)
    log.append("create", ANNA, 1).result(WAIT)
    log.check()
    disk.full = True
    waiting = log.append("commit", ANNA, 2)
    while log.failures < 3:
        assert not waiting.done()
    if required:
        with pytest.raises(StoreUnavailable, match=r"audit log cannot be written.*No space left"):
            log.check()
    else:
        log.check()
    more = [log.append("commit", ANNA, version) for version in range(3, 10)]
    disk.full = False
    for future in (waiting, *more):
        future.result(WAIT)
    log.check()
    log.close()
    end, faults = verify(tmp_path / "log")
    assert (end.seq, faults) == (9, [])
    assert "cannot be written" in caplog.text


def test_entries_beyond_what_can_wait_are_counted_in_the_chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deltamem_vllm.audit.log.RETRY_SECONDS", 0.01)
    monkeypatch.setattr("deltamem_vllm.audit.log.MAX_WAITING", 3)
    disk = Disk()
    disk.full = True
    log = AuditLog(tmp_path / "log", KEY, sync=disk.sync)
    sent = [log.append("commit", ANNA, version) for version in range(8)]
    assert log.lost == 5
    disk.full = False
    for future in sent:
        future.result(WAIT)
    log.append("commit", ANNA, 9).result(WAIT)
    log.close()
    entries = [json.loads(raw) for raw in lines(tmp_path / "log")]
    assert sum(entry.get("lost_before", 0) for entry in entries) == 5
    assert verify(tmp_path / "log")[0] == Head(4, entries[-1]["hash"])
