"""Power loss: images of the disk in which whatever was not synced may be missing, reordered or torn by
sector.

A SQLite VFS records each write, truncation and sync of the real store's files, with the acknowledgements
between them. An image is a cut through that history: all that a completed sync had covered, and a random
part of the rest.
"""

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import apsw
import pytest

from deltamem_vllm.errors import CorruptRecord
from deltamem_vllm.store import sqlite, sqlite_log
from deltamem_vllm.store.codec import encode
from deltamem_vllm.store.protocol import Expect, SessionKey
from deltamem_vllm.store.sqlite import SQLiteStore
from tests.conftest import NIGHTLY
from tests.store.committer import SESSIONS, version_of
from tests.store.records import INCARNATION

IMAGES = 12_000 if NIGHTLY else 150
SECTOR = 512


@dataclass
class History:
    """What reached the operating system, in order: (file, "write", offset, bytes), (file, "cut", size, b""),
    (file, "sync", 0, b""), (file, "gone", 0, b"") and ("", "ack", session, version)."""

    events: list[tuple[str, str, int, Any]] = field(default_factory=list)


class RecordingFile(apsw.VFSFile):
    def __init__(self, history: History, filename: Any, flags: list[int]) -> None:
        self.name = Path(filename.filename() if isinstance(filename, apsw.URIFilename) else filename).name
        self.history = history
        super().__init__("", filename, flags)

    def xWrite(self, data: Any, offset: int) -> None:
        super().xWrite(data, offset)
        self.history.events.append((self.name, "write", offset, bytes(data)))

    def xTruncate(self, newsize: int) -> None:
        super().xTruncate(newsize)
        self.history.events.append((self.name, "cut", newsize, b""))

    def xSync(self, flags: int) -> None:
        super().xSync(flags)
        self.history.events.append((self.name, "sync", 0, b""))


class RecordingVFS(apsw.VFS):
    def __init__(self, history: History) -> None:
        self.history = history
        super().__init__("recording", "")

    def xOpen(self, name: Any, flags: list[int]) -> Any:
        return RecordingFile(self.history, name, flags)

    def xDelete(self, filename: str, syncdir: bool) -> None:
        super().xDelete(filename, syncdir)
        self.history.events.append((Path(filename).name, "gone", 0, b""))


def record_history(path: Path, rounds: int, synchronous: str, beside: bool) -> History:
    """Commit with the real store, checkpointing often, and return all that it did to its files.

    Args:
        beside: checkpoints are made as they are served, by a thread; else by the commits.
    """
    history = History()
    vfs = RecordingVFS(history)
    store = SQLiteStore(path, vfs="recording")
    store._writer.execute(f"PRAGMA synchronous = {synchronous}")
    if not beside:
        store._writer.execute("PRAGMA wal_autocheckpoint = 40")
    rng = random.Random(rounds)
    versions = dict.fromkeys(range(SESSIONS), 0)
    for _ in range(rounds):
        group = []
        for session in rng.sample(range(SESSIONS), rng.randint(1, 3)):
            versions[session] += 1
            expect = Expect(versions[session] - 1, INCARNATION) if versions[session] > 1 else None
            group.append((version_of(session, versions[session]), expect))
        assert store.put_many(group) == [None] * len(group)
        history.events += [("", "ack", int(made.key.session), made.version) for made, _ in group]
        while rng.random() < 0.3 and store._log._wanted.is_set():  # some commits wait for the thread, others do not
            time.sleep(0.001)
    assert beside == (store._log._thread is not None)
    store.close()
    vfs.unregister()
    return history


def image(history: History, cut: int, rng: random.Random, folder: Path) -> dict[int, int]:
    """Write the disk's files as a power loss after ``cut`` events may leave them; returns the acknowledged
    versions."""
    synced: dict[str, int] = {}
    acknowledged = dict.fromkeys(range(SESSIONS), 0)
    for index, (name, what, at, value) in enumerate(history.events[:cut]):
        if what == "sync":
            synced[name] = index
        elif what == "ack":
            acknowledged[at] = value
    files: dict[str, bytearray] = {}
    keep = rng.choice([0.0, 0.5, 0.9, 1.0])
    first_ack = next(index for index, event in enumerate(history.events) if event[1] == "ack")
    for index, (name, what, at, value) in enumerate(history.events[:cut]):
        if what == "gone" and (index < first_ack or rng.random() < keep):
            # before the first acknowledgement the new log's first sync has synced the directory too
            files.pop(name, None)
        if what not in ("write", "cut"):
            continue
        data = files.setdefault(name, bytearray())
        safe = index < synced.get(name, -1)
        if what == "cut":
            if safe or rng.random() < keep:
                del data[at:]
            continue
        for start in range(at, at + len(value), SECTOR):
            if safe or rng.random() < keep:
                piece = value[start - at : start - at + SECTOR]
                data.extend(bytes(max(0, start + len(piece) - len(data))))
                data[start : start + len(piece)] = piece
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return acknowledged


def lost(path: Path, acknowledged: dict[int, int]) -> list[str]:
    """What is wrong with an image: sessions whose acknowledged version is missing, torn or unreadable."""
    store = SQLiteStore(path)
    wrong = []
    for session, version in acknowledged.items():
        try:
            found = store.get(SessionKey("tenant", f"{session}"))
        except CorruptRecord as error:
            wrong.append(f"session {session}: {error}")
            continue
        there = found.version if found else 0
        if there < version:
            wrong.append(f"session {session}: version {version} was acknowledged, {there} is there")
        elif found and encode(found) != encode(version_of(session, there)):
            wrong.append(f"session {session}: version {there} is torn")
    store.close()
    return wrong


def check_images(folder: Path, count: int, synchronous: str, beside: bool = False) -> None:
    history = record_history(folder / "s.db", 60, synchronous, beside)
    rng = random.Random(count)
    opened = next(index for index, event in enumerate(history.events) if event[1] == "ack")
    for turn in range(count):
        there = folder / f"{turn}"
        there.mkdir()
        acknowledged = image(history, rng.randint(opened, len(history.events)), rng, there)
        assert lost(there / "s.db", acknowledged) == []
        for each in there.iterdir():
            each.unlink()
        there.rmdir()


def test_power_loss_loses_no_acknowledged_commit(tmp_path: Path) -> None:
    check_images(tmp_path, IMAGES, "FULL")


@pytest.fixture
def short_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_log, "LOG_PAGES", 40)
    monkeypatch.setattr(sqlite_log, "FEW_PAGES", 10)


@pytest.mark.usefixtures("short_log")
def test_power_loss_while_a_thread_folds_the_log(tmp_path: Path) -> None:
    check_images(tmp_path, IMAGES, "FULL", beside=True)


@pytest.mark.usefixtures("short_log")
def test_catches_a_thread_that_does_not_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PLANTED BUG: the log is begun anew while what was in it is not on the disk elsewhere."""

    def careless(store: SQLiteStore) -> apsw.Connection:
        connection = store._connect(apsw.SQLITE_OPEN_READWRITE)
        connection.execute("PRAGMA synchronous = OFF").fetchall()
        return connection

    keeper = sqlite_log.LogKeeper

    def made(connect: Callable[[], apsw.Connection], writing: threading.Lock) -> sqlite_log.LogKeeper:
        return keeper(lambda: careless(connect.__self__), writing)  # type: ignore[attr-defined]

    monkeypatch.setattr(sqlite, "LogKeeper", made)
    with pytest.raises(
        (AssertionError, CorruptRecord), match=r"was acknowledged|malformed|different versions|checksum"
    ):
        check_images(tmp_path, 300, "FULL", beside=True)


@pytest.mark.parametrize("synchronous", ["NORMAL", "OFF"])
def test_catches_weaker_synchronisation(synchronous: str, tmp_path: Path) -> None:
    """PLANTED BUG: COMMIT does not sync the log."""
    with pytest.raises(
        (AssertionError, CorruptRecord), match=r"was acknowledged|malformed|different versions|checksum"
    ):
        check_images(tmp_path, 150, synchronous)
