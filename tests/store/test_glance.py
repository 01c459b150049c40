"""SQLite asked on a thread that must not wait: it says where a session is at once, or that it cannot, and is in
nobody's way."""

import multiprocessing
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import apsw
import pytest

from deltamem_vllm.errors import StoreUnavailable
from deltamem_vllm.store import sqlite_file, sqlite_glance
from deltamem_vllm.store.protocol import WouldWait
from deltamem_vllm.store.sqlite import SQLiteStore
from tests.store.records import KEY, record

RECOVERS = """
import fcntl, sys
with open(sys.argv[1], "r+b", buffering=0) as index:
    for lock in (120, 122):  # WAL_WRITE_LOCK, WAL_RECOVER_LOCK
        fcntl.lockf(index, fcntl.LOCK_EX, 1, lock)
    index.write(bytes(96))  # the two copies of the header: not made yet
    print("holds", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sqlite_file, "BUSY_SECONDS", 0.5)
    made = SQLiteStore(tmp_path / "s.db")
    made.put(record(1), None)
    assert made.glance(KEY) == record(1).expect
    yield made
    made.close()


def check_not_kept_waiting(store: SQLiteStore) -> None:
    held = [sys.executable, "-c", RECOVERS, f"{store.path}-shm"]
    with subprocess.Popen(held, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "holds\n"
        begun = time.monotonic()
        with pytest.raises(WouldWait):
            store.glance(KEY)
        took = time.monotonic() - begun
        with pytest.raises(StoreUnavailable, match="another process held its lock"):
            store.head(KEY)
        other.communicate("")
    assert store.head(KEY) == store.glance(KEY) == record(1).expect
    assert took < 0.2, f"waited {took:.2f} s for another process"


def test_another_process_that_recovers_the_log_is_not_waited_for(store: SQLiteStore) -> None:
    check_not_kept_waiting(store)


def test_catches_a_connection_that_waits(store: SQLiteStore) -> None:
    """PLANTED BUG: it waits for locks as every other connection does."""
    store._glancer.close()
    store._glancer = sqlite_glance.Glancer(lambda: Waits(str(store.path), flags=apsw.SQLITE_OPEN_READONLY))
    with pytest.raises(AssertionError, match=r"waited 0\.[5-9]"):
        check_not_kept_waiting(store)


class Waits(apsw.Connection):
    def set_busy_timeout(self, milliseconds: int) -> None:
        super().set_busy_timeout(500)


def check_erases(store: SQLiteStore) -> None:
    for version in (2, 3):
        store.put(record(version), record(version - 1).expect)
        store.glance(KEY)
    assert store.delete(KEY)
    assert Path(f"{store.path}-wal").stat().st_size == 0
    assert store.glance(KEY) is None


def test_it_does_not_keep_a_deletion_from_emptying_the_log(store: SQLiteStore) -> None:
    check_erases(store)


def test_catches_a_read_transaction_that_stays_open(store: SQLiteStore) -> None:
    """PLANTED BUG: the question is asked inside a transaction that nobody ends."""

    class Stays(apsw.Connection):
        def execute(self, *args: Any, **options: Any) -> Any:
            if not self.in_transaction:
                super().execute("BEGIN")
            return super().execute(*args, **options)

    store._glancer.close()
    store._glancer = sqlite_glance.Glancer(lambda: Stays(str(store.path), flags=apsw.SQLITE_OPEN_READONLY))
    store.glance(KEY)
    with pytest.raises(StoreUnavailable, match="readers keep old pages"):
        check_erases(store)


def test_errors_and_another_threads_use_are_left_to_head(store: SQLiteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fails:
        def execute(self, *_: Any) -> Any:
            raise apsw.IOError("disk I/O error")

        def close(self) -> None:
            pass

    with store._glancer._lock, pytest.raises(WouldWait):
        store.glance(KEY)
    monkeypatch.setattr(store._glancer, "_connection", Fails())
    with pytest.raises(WouldWait):
        store.glance(KEY)
    assert store.head(KEY) == record(1).expect


def test_closing_folds_the_log_in_and_ends_it(store: SQLiteStore) -> None:
    store.close()
    with pytest.raises(WouldWait):
        store.glance(KEY)
    assert not Path(f"{store.path}-wal").exists()


def _in_child(store: SQLiteStore, told: Any) -> None:
    try:
        store.glance(KEY)
    except WouldWait:
        told.send("would wait")


def test_after_a_fork_it_says_nothing(store: SQLiteStore) -> None:
    here, there = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=_in_child, args=(store, there))
    child.start()
    child.join(20)
    assert here.poll(0)
    assert here.recv() == "would wait"
