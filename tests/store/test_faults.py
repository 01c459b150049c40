"""I/O errors at every place where SQLite writes: EIO, short writes, a full disk, a failed sync.

A VFS passes the real store's writes through and lets one of them fail, once or from then on. Whatever the store
had acknowledged is there afterwards; what it had refused is there wholly or not at all, and sending it again
resolves which.
"""

import dataclasses
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import apsw
import pytest

from deltamem_vllm.errors import StaleVersion, StoreError, StoreUnavailable
from deltamem_vllm.store import sqlite_log
from deltamem_vllm.store.protocol import Expect, Outcomes, Put, SessionKey
from deltamem_vllm.store.sqlite import SQLiteStore
from tests.conftest import NIGHTLY
from tests.store import conformance
from tests.store.committer import version_of
from tests.store.records import INCARNATION

STRIDE = 1 if NIGHTLY else 7  # 8 would always fall on the same calls
SESSIONS = 4
FAULTS = ("eio", "short", "full")


@dataclasses.dataclass
class Plan:
    """Which write-like call fails, and how.

    Attributes:
        at: number of the failing call; -1 for none.
        kind: ``eio``, ``short`` (half of the bytes are written) or ``full``.
        sticky: whether every later call fails too.
        calls: how many there were.
        hit: name of the first call that failed.
    """

    at: int
    kind: str
    sticky: bool = False
    calls: int = 0
    hit: str = ""

    def fails(self, name: str) -> bool:
        """Count a call; whether it is to fail."""
        now, self.calls = self.calls, self.calls + 1
        if self.at < 0 or now < self.at or (now > self.at and not self.sticky):
            return False
        self.hit = self.hit or name
        return True

    def error(self) -> apsw.Error:
        if self.kind == "full":
            return apsw.FullError("planned")
        return apsw.IOError("planned")


class FaultyFile(apsw.VFSFile):
    def __init__(self, plan: Plan, filename: Any, flags: list[int]) -> None:
        name = filename.filename() if isinstance(filename, apsw.URIFilename) else filename
        self.suffix = "wal" if str(name).endswith("-wal") else "db"
        self.plan = plan
        super().__init__("", filename, flags)

    def xWrite(self, data: Any, offset: int) -> None:
        if self.plan.fails(f"write {self.suffix}"):
            if self.plan.kind == "short":
                super().xWrite(bytes(data)[: len(data) // 2], offset)
            raise self.plan.error()
        super().xWrite(data, offset)

    def xTruncate(self, newsize: int) -> None:
        if self.plan.fails(f"truncate {self.suffix}"):
            raise self.plan.error()
        super().xTruncate(newsize)

    def xSync(self, flags: int) -> None:
        if self.plan.fails(f"sync {self.suffix}"):
            raise self.plan.error()
        super().xSync(flags)


class FaultyVFS(apsw.VFS):
    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        super().__init__("faulty", "")

    def xOpen(self, name: Any, flags: list[int]) -> Any:
        return FaultyFile(self.plan, name, flags)


class Hopeful(SQLiteStore):
    """PLANTED BUG: takes an error for a success."""

    def put_many(self, puts: Sequence[Put]) -> Outcomes:
        return [None if isinstance(each, StoreUnavailable) else each for each in super().put_many(puts)]


def put_of(session: int, version: int) -> Put:
    return version_of(session, version), Expect(version - 1, INCARNATION) if version > 1 else None


def work(folder: Path, plan: Plan, kind: type[SQLiteStore] = SQLiteStore, beside: bool = False) -> list[str]:
    """Commit, delete and checkpoint while the plan's fault happens; returns what is wrong afterwards.

    Args:
        beside: checkpoints are made as they are served, by a thread; else by the commits.
    """
    vfs = FaultyVFS(plan)
    path = folder / "s.db"
    acknowledged = dict.fromkeys(range(SESSIONS), 0)
    maybe: list[list[Put]] = []  # groups that raised: old or new, as a whole
    deleted = False  # whether session 0 may be gone
    errors: list[str] = []
    try:
        store = kind(path, vfs="faulty")
    except StoreError as error:
        vfs.unregister()
        SQLiteStore(path).close()
        return [] if str(path) in str(error) else [str(error)]
    if not beside:
        store._writer.execute("PRAGMA wal_autocheckpoint = 12")
    rng = random.Random(3)
    for step in range(10):
        group = [put_of(session, acknowledged[session] + 1) for session in rng.sample(range(1, SESSIONS), 2)]
        if step == 2:
            group.append(put_of(0, 1))
        outcomes = store.put_many(group)
        if outcomes == [None] * len(group):
            for made, _ in group:
                acknowledged[int(made.key.session)] = made.version
        else:
            errors += [str(each) for each in outcomes if isinstance(each, StoreUnavailable)]
            maybe.append(group)
            if plan.sticky:
                break
            again = store.put_many(group)  # a passing fault: send it again, as the protocol says
            if again != [None] * len(group):
                errors += [f"not resolved by sending it again: {again}"] if plan.hit and not plan.sticky else []
            else:
                maybe.pop()
                for made, _ in group:
                    acknowledged[int(made.key.session)] = made.version
        if step == 6:
            deleted = True
            try:
                store.delete(SessionKey("tenant", "0"))
            except StoreError as error:
                errors.append(str(error))
    store.close()
    vfs.unregister()
    wrong = [error for error in errors if str(path) not in error]
    return wrong + after(path, acknowledged, maybe, deleted)


def after(path: Path, acknowledged: dict[int, int], maybe: list[list[Put]], deleted: bool) -> list[str]:
    """What is wrong in the file: neither old nor new, torn, or inconsistent."""
    store = SQLiteStore(path)
    wrong = []
    if store._writer.pragma("integrity_check") != "ok":
        wrong.append("the file is damaged")
    if maybe:  # nothing was committed behind a group that raised
        newer = [made for made, _ in maybe[0]]
        there = [conformance.same(store.get(made.key), made) for made in newer]
        if len(set(there)) != 1:
            wrong.append(f"a group is there in part: {there}")
        if store.put_many(maybe[0]) != [None] * len(newer):
            wrong.append("sending it again does not resolve it")
        acknowledged |= {int(made.key.session): made.version for made in newer}
    for session, version in acknowledged.items():
        if session == 0 and deleted:
            continue
        found = store.get(SessionKey("tenant", f"{session}"))
        if version and not conformance.same(found, version_of(session, version)):
            wrong.append(f"session {session}: version {version} was acknowledged, {found and found.version} is there")
        kept = [info.version for info in store.history(SessionKey("tenant", f"{session}"))]
        if kept != list(range(version, max(0, version - 4), -1)):
            wrong.append(f"session {session}: versions {kept} are kept")
    sizes = [info.bytes for each in store.list("tenant") for info in store.history(each.key)]
    if store.usage("tenant").bytes != sum(sizes):
        wrong.append("what the tenant uses is miscounted")
    store.close()
    return wrong


def check_faults(tmp_path: Path, kind: type[SQLiteStore], stride: int, beside: bool = False) -> Counter[str]:
    """Fail each ``stride``-th write-like call in every way; returns how often each place was hit."""
    counting = Plan(-1, "eio")
    (tmp_path / "count").mkdir()
    assert work(tmp_path / "count", counting, beside=beside) == []
    places: Counter[str] = Counter()
    turn = 0
    for sticky in (False, True):
        for fault in FAULTS:
            for at in range(turn % stride, counting.calls, stride):
                turn += 1
                folder = tmp_path / f"{turn}"
                folder.mkdir()
                plan = Plan(at, fault, sticky)
                assert work(folder, plan, kind, beside) == [], (plan, "is not survived")
                places[plan.hit] += 1
                for each in folder.iterdir():
                    each.unlink()
    return places


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_every_write_may_fail(memory_path: Path) -> None:
    places = check_faults(memory_path, SQLiteStore, STRIDE)
    print(f"{sum(places.values())} faults, old or new state after each: {dict(places)}")
    assert {"write wal", "write db", "sync wal", "sync db"} <= set(places)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_every_write_may_fail_while_a_thread_folds_the_log(memory_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_log, "LOG_PAGES", 12)
    places = check_faults(memory_path, SQLiteStore, STRIDE, beside=True)
    assert {"write wal", "write db", "sync wal", "sync db"} <= set(places)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_faults_catch_a_swallowed_error(memory_path: Path) -> None:
    with pytest.raises(AssertionError, match="is not survived"):
        check_faults(memory_path, Hopeful, 3)


def test_stale_is_not_an_io_error(tmp_path: Path) -> None:
    store = SQLiteStore(tmp_path / "s.db")
    assert isinstance(store.put_many([put_of(1, 5)])[0], StaleVersion)
    store.close()
