"""The log of a SQLite store is folded by a thread of its own: it stays short, and nothing else changes."""

import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apsw
import pytest

from deltamem_vllm.errors import StoreError
from deltamem_vllm.store import sqlite_log
from deltamem_vllm.store.protocol import Expect, SessionKey
from deltamem_vllm.store.sqlite import SQLiteStore
from deltamem_vllm.store.sqlite_log import LogKeeper
from tests.store.committer import version_of
from tests.store.records import INCARNATION

LOG_PAGES = 40
COMMITS = 400
WAIT = 20.0


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SQLiteStore]:
    """A store whose log is long after some twenty commits."""
    monkeypatch.setattr(sqlite_log, "LOG_PAGES", LOG_PAGES)
    monkeypatch.setattr(sqlite_log, "FEW_PAGES", LOG_PAGES // 4)
    made = SQLiteStore(tmp_path / "s.db")
    yield made
    made.close()


def commit(store: SQLiteStore, commits: int) -> None:
    """Commit, one by one; when the thread has work to do, it gets a moment now and then."""
    rng = random.Random(commits)
    for version in range(1, commits + 1):
        store.put(version_of(0, version), Expect(version - 1, INCARNATION) if version > 1 else None)
        if rng.random() < 0.1:
            idle(store)


def idle(store: SQLiteStore) -> None:
    """Wait until the thread has nothing to do."""
    end = time.monotonic() + WAIT
    while store._log._wanted.is_set():
        assert time.monotonic() < end, "the thread is stuck"
        time.sleep(0.001)


def log_pages(store: SQLiteStore) -> int:
    """Pages in the log's file: it is begun anew in place, so that its size is the most there ever were."""
    page = store._writer.pragma("page_size")
    return int(Path(f"{store.path}-wal").stat().st_size // page)


def test_the_log_stays_short_and_no_commit_folds_it(store: SQLiteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    folding: set[str] = set()
    fold = LogKeeper._fold

    def noting(self: LogKeeper, connection: apsw.Connection) -> None:
        folding.add(threading.current_thread().name)
        fold(self, connection)

    monkeypatch.setattr(LogKeeper, "_fold", noting)
    commit(store, COMMITS)
    idle(store)
    assert folding == {"deltamem-log"}
    assert log_pages(store) < sqlite_log.TOO_MANY_PAGES
    assert log_pages(store) < COMMITS, "it was never begun anew"
    assert store.head(SessionKey("tenant", "0")) == Expect(COMMITS, INCARNATION)


def test_catches_a_log_that_is_folded_but_never_begun_anew(store: SQLiteStore) -> None:
    """PLANTED BUG: some page is always left."""
    reader = apsw.Connection(str(store.path))
    store.put(version_of(1, 1), None)
    reader.execute("BEGIN; SELECT * FROM sessions").fetchall()  # who reads keeps the log as it is
    commit(store, COMMITS)
    assert log_pages(store) > COMMITS
    reader.close()


def test_a_thread_that_does_not_get_on_leaves_it_to_the_commits(
    store: SQLiteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_log, "TOO_MANY_PAGES", 2 * LOG_PAGES)
    monkeypatch.setattr(LogKeeper, "_fold", lambda self, connection: None)
    commit(store, COMMITS)
    assert log_pages(store) < COMMITS


def test_a_system_without_room_for_a_thread(store: SQLiteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", full)
    monkeypatch.setattr(sqlite_log, "TOO_MANY_PAGES", 2 * LOG_PAGES)
    commit(store, COMMITS)
    assert store._log._thread is None
    assert log_pages(store) < COMMITS


def test_an_error_of_the_thread_is_no_commits_error(store: SQLiteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def fail(self: LogKeeper, connection: apsw.Connection) -> int:
        tries.append(1)
        raise apsw.FullError("planned")

    with monkeypatch.context() as broken:
        broken.setattr(LogKeeper, "_left", fail)
        commit(store, COMMITS)
        idle(store)
    assert len(tries) > 1, "it is not tried again"
    commits = store.head(SessionKey("tenant", "0"))
    assert commits is not None
    store.put(version_of(0, commits.version + 1), commits)
    idle(store)
    grown = log_pages(store)
    for version in range(commits.version + 2, commits.version + 40):
        store.put(version_of(0, version), Expect(version - 1, INCARNATION))
    assert log_pages(store) == grown, "the log was not begun anew once the disk was well again"


def deletions_refused(store: SQLiteStore) -> list[str]:
    """What deletions say while commits go on and the log is folded all the time."""
    refused, done = [], threading.Event()

    def busy() -> None:
        commit(store, COMMITS // 4)
        done.set()

    committing = threading.Thread(target=busy)
    committing.start()
    turn = 0
    while not done.is_set():
        turn += 1
        key = SessionKey("tenant", f"{turn}")
        store.put(version_of(turn, 1), None)
        try:
            store.delete(key)
        except StoreError as error:
            refused.append(str(error))
    committing.join()
    assert turn > 10
    assert store._log._thread is not None, "the log was never long"
    return refused


class SlowFile(apsw.VFSFile):
    """A file whose syncs take a while, so that folding the log does."""

    def __init__(self, filename: Any, flags: list[int]) -> None:
        super().__init__("", filename, flags)

    def xSync(self, flags: int) -> None:
        time.sleep(0.005)
        super().xSync(flags)


class SlowVFS(apsw.VFS):
    def __init__(self) -> None:
        super().__init__("slow", "")

    def xOpen(self, name: Any, flags: list[int]) -> Any:
        return SlowFile(name, flags)


@pytest.fixture
def slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SQLiteStore]:
    """A store on a slow disk, with a SQLite that waits for no lock, as builds without blocking locks do here."""
    monkeypatch.setattr(sqlite_log, "LOG_PAGES", 2)  # each deletion empties the log: few commits lie between
    vfs = SlowVFS()
    made = SQLiteStore(tmp_path / "slow.db", vfs="slow")
    made._writer.set_busy_timeout(0)
    yield made
    made.close()
    vfs.unregister()


def test_deletions_wait_for_the_thread(slow: SQLiteStore) -> None:
    assert deletions_refused(slow) == []


def test_catches_a_thread_that_deletions_do_not_wait_for(slow: SQLiteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """PLANTED BUG: the log is folded without the lock. SQLite refuses two at once, without waiting."""

    def careless(self: LogKeeper, connection: apsw.Connection) -> int:
        there, folded = connection.wal_checkpoint(None, apsw.SQLITE_CHECKPOINT_PASSIVE)
        return there - folded

    monkeypatch.setattr(LogKeeper, "_left", careless)
    assert deletions_refused(slow)


def test_closing_waits_for_the_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever it comes: a store that was closed has no log, and no thread."""
    monkeypatch.setattr(sqlite_log, "LOG_PAGES", 4)
    for turn in range(30):
        store = SQLiteStore(tmp_path / f"{turn}.db")
        for version in range(1, 4 + turn % 5):
            store.put(version_of(0, version), Expect(version - 1, INCARNATION) if version > 1 else None)
        store.close()
        assert store._log._thread is None or not store._log._thread.is_alive()
        assert not Path(f"{store.path}-wal").exists()
