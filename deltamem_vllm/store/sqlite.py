"""Sessions in one SQLite file, through APSW (its bundled SQLite has the fix of the WAL-reset corruption bug).

Durability: WAL with ``synchronous=FULL``, so that COMMIT returns after the log is synced. NORMAL loses
acknowledged commits at a power loss. A group of commits is one transaction, hence one sync.

Erasure: ``secure_delete`` overwrites freed bytes in the file, and ``delete`` then truncates the log, so
that no older image of a page stays behind.

Threads: one connection writes, under a lock; reads take their own connections, which in WAL never wait for
the writer.
Processes: SQLite's own locks; each process opens the store itself, and never after a fork with the store
open.

The table has a rowid: a record is some tens of kilobytes, and rows that large make a WITHOUT ROWID tree
slow to search. The blob is the last column, so that listings never touch its overflow pages.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import apsw

from deltamem_vllm.errors import ConfigError, CorruptRecord, StoreError, StoreUnavailable
from deltamem_vllm.store.codec import MAX_RECORD_BYTES, decode, encode
from deltamem_vllm.store.protocol import (
    Expect,
    Listing,
    Outcome,
    Outcomes,
    Put,
    Record,
    SessionInfo,
    SessionKey,
    admit,
)

BUSY_SECONDS = 10.0
"""How long a lock held by another process is waited for."""
_IDLE_READERS = 8
_APPLICATION_ID = 0x444D454D  # "DMEM", so that file(1) and we can tell whose database it is

MIGRATIONS = (
    """
    CREATE TABLE sessions (
        tenant TEXT NOT NULL,
        session TEXT NOT NULL,
        version INTEGER NOT NULL CHECK (version >= 1),
        incarnation TEXT NOT NULL,
        request_id TEXT NOT NULL,
        created_at REAL NOT NULL,
        updated_at REAL NOT NULL,
        tokens INTEGER NOT NULL,
        windows INTEGER NOT NULL,
        bytes INTEGER NOT NULL,
        blob BLOB NOT NULL CHECK (length(blob) = bytes),
        PRIMARY KEY (tenant, session)
    ) STRICT
    """,
)
"""``MIGRATIONS[n]`` brings a file from ``user_version`` n to n+1. Entries are never edited, only added."""

_ROW = "SELECT version, incarnation, request_id FROM sessions WHERE tenant = ? AND session = ?"
_GET = """
    SELECT version, incarnation, request_id, bytes, CASE WHEN length(blob) <= ? THEN blob END
    FROM sessions WHERE tenant = ? AND session = ?
"""
_PUT = """
    INSERT INTO sessions (tenant, session, version, incarnation, request_id, created_at, updated_at, tokens,
                          windows, bytes, blob)
    VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11)
    ON CONFLICT (tenant, session) DO UPDATE SET
        version = ?3, incarnation = ?4, request_id = ?5, created_at = ?6, updated_at = ?7, tokens = ?8,
        windows = ?9, bytes = ?10, blob = ?11
"""
_LIST = """
    SELECT session, version, incarnation, created_at, updated_at, tokens, windows, bytes
    FROM sessions WHERE tenant = ? AND session > ? ORDER BY session LIMIT ?
"""


class SQLiteStore:
    """A ``StateStore`` in one file.

    Args:
        path: the database file. It is created 0600 and missing directories 0700; what exists keeps its mode.
        vfs: name of a registered SQLite VFS, for fault tests; None for the system's.

    Raises:
        StoreUnavailable: the file cannot be opened or written.
        ConfigError: the file is something else, or of a newer version of this package.
    """

    def __init__(self, path: str | os.PathLike[str], *, vfs: str | None = None) -> None:
        self.path = Path(path).absolute()
        self._vfs = vfs
        self._process = os.getpid()
        self._write_lock = threading.Lock()
        self._readers: list[apsw.Connection] = []
        self._readers_lock = threading.Lock()
        self._closed = False
        with self._translated("open"):
            try:
                _create_private(self.path)
            except OSError as error:
                raise StoreUnavailable(
                    f"cannot create or write the store {self.path}: {error.strerror}. Choose a writable path"
                ) from error
            self._writer = self._connect(apsw.SQLITE_OPEN_READWRITE)
            try:
                self._prepare()
            except BaseException:
                self._writer.close()
                raise

    # --- the protocol ---------------------------------------------------------------------------------------

    def get(self, key: SessionKey) -> Record | None:
        with self._translated("read"), self._reader() as reader:
            rows: list[Any] = reader.execute(_GET, (MAX_RECORD_BYTES, key.tenant, key.session)).fetchall()
        if not rows:
            return None
        version, incarnation, request_id, size, blob = rows[0]
        try:
            if blob is None:
                raise CorruptRecord(f"{size} bytes are stored; the limit is {MAX_RECORD_BYTES}")
            record = decode(blob, key=key)
            if (record.version, record.incarnation, record.request_id) != (version, incarnation, request_id):
                raise CorruptRecord("row and record are of different versions")
        except CorruptRecord as error:
            raise CorruptRecord(f"session {key.session!r} in {self.path}: {error}") from error
        return record

    def put(self, record: Record, expect: Expect | None) -> None:
        outcome = self.put_many([(record, expect)])[0]
        if outcome is not None:
            raise outcome

    def put_many(self, puts: Sequence[Put]) -> Outcomes:
        outcomes: Outcomes = [None] * len(puts)
        blobs: dict[int, bytes] = {}
        for index, (record, _) in enumerate(puts):
            try:
                blobs[index] = encode(record)
            except CorruptRecord as error:
                outcomes[index] = error
        if not blobs:
            return outcomes
        found: dict[int, Outcome] = {}
        try:
            with self._transaction() as writer:
                for index, blob in blobs.items():
                    record, expect = puts[index]
                    found[index] = _put(writer, record, expect, blob)
        except StoreError as error:
            found = dict.fromkeys(blobs, error)  # rolled back as one: a stale item may be so no more
        for index, outcome in found.items():
            outcomes[index] = outcome
        return outcomes

    def delete(self, key: SessionKey) -> bool:
        with self._transaction() as writer:
            writer.execute("DELETE FROM sessions WHERE tenant = ? AND session = ?", (key.tenant, key.session))
            existed = writer.changes() > 0
        with self._translated("erase from the log of"), self._write_lock:
            busy = self._open_writer().execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if busy is None or busy[0]:
            raise StoreUnavailable(
                f"session {key.session!r} is deleted, but readers keep old pages in the log of {self.path}."
                " Delete it again to finish the erasure"
            )
        return existed

    def list(self, tenant: str, after: str | None = None, limit: int = 100) -> Listing:
        with self._translated("list"), self._reader() as reader:
            found: list[Any] = reader.execute(_LIST, (tenant, after or "", max(0, limit))).fetchall()
        return [SessionInfo(SessionKey(tenant, session), *rest) for session, *rest in found]

    def close(self) -> None:
        with self._write_lock, self._readers_lock:
            self._closed = True
            for reader in self._readers:
                reader.close()
            self._readers.clear()
            with contextlib.suppress(apsw.Error):  # the last one to close also folds the log into the file
                self._writer.close()

    # --- connections ----------------------------------------------------------------------------------------

    def _connect(self, flags: int) -> apsw.Connection:
        connection = apsw.Connection(str(self.path), flags=flags, vfs=self._vfs)
        connection.set_busy_timeout(int(BUSY_SECONDS * 1000))
        return connection

    def _prepare(self) -> None:
        """Switch to WAL, set what makes commits durable and deletes final, bring the schema up to date."""
        writer = self._writer
        self._schema()  # before anything is changed: the file may be another program's
        _retry_busy(lambda: writer.execute("PRAGMA journal_mode = WAL").fetchall())
        writer.execute("PRAGMA synchronous = FULL; PRAGMA fullfsync = ON; PRAGMA secure_delete = ON")
        writer.execute("PRAGMA journal_size_limit = 67108864; PRAGMA trusted_schema = OFF")
        writer.execute("BEGIN IMMEDIATE")
        with self._rollback_on_error():
            version = self._schema()
            if version < len(MIGRATIONS):
                for migration in MIGRATIONS[version:]:
                    writer.execute(migration)
                writer.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
                writer.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
            writer.execute("COMMIT")

    def _schema(self) -> int:
        """The file's schema number, 0 for an empty file; refuses what is not ours or newer than we are."""
        names = ("pragma_user_version", "pragma_application_id", "(SELECT count(*) FROM sqlite_schema)")
        row: Any = self._writer.execute(f"SELECT * FROM {', '.join(names)}").fetchall()[0]
        version, owner, tables = row
        if owner != _APPLICATION_ID and (owner or version or tables):
            raise ConfigError(f"{self.path} is a database of another program. Choose another path")
        if version > len(MIGRATIONS):
            raise ConfigError(
                f"{self.path} has schema {version}; this deltamem-vllm knows up to {len(MIGRATIONS)}."
                " Upgrade deltamem-vllm"
            )
        return int(version)

    def _open_writer(self) -> apsw.Connection:
        if self._closed:
            raise StoreUnavailable(f"the store {self.path} is closed")
        if os.getpid() != self._process:
            raise StoreUnavailable(f"the store {self.path} was opened before a fork. Open it in each process")
        return self._writer

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[apsw.Connection]:
        """The writer's connection inside one immediate transaction; any error rolls all of it back."""
        with self._translated("write"), self._write_lock:
            writer = self._open_writer()
            writer.execute("BEGIN IMMEDIATE")
            with self._rollback_on_error():
                yield writer
                writer.execute("COMMIT")

    @contextlib.contextmanager
    def _rollback_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            if self._writer.in_transaction:  # SQLite has rolled back by itself after some errors
                with contextlib.suppress(apsw.Error):
                    self._writer.execute("ROLLBACK")
            raise

    @contextlib.contextmanager
    def _reader(self) -> Iterator[apsw.Connection]:
        """A connection for reading that no other thread uses meanwhile."""
        with self._readers_lock:
            self._open_writer()
            reader = self._readers.pop() if self._readers else None
        if reader is None:
            reader = self._connect(apsw.SQLITE_OPEN_READONLY)
        try:
            yield reader
        finally:
            with self._readers_lock:
                keep = not self._closed and len(self._readers) < _IDLE_READERS
                if keep:
                    self._readers.append(reader)
            if not keep:
                reader.close()

    @contextlib.contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        """SQLite's errors as ours, with the path and the remedy."""
        try:
            yield
        except apsw.FullError as error:
            raise StoreUnavailable(
                f"cannot {what} {self.path}: the disk is full ({error}). Free space; nothing was changed"
            ) from error
        except (apsw.BusyError, apsw.LockedError) as error:
            raise StoreUnavailable(
                f"cannot {what} {self.path}: another process held its lock for {BUSY_SECONDS:g} s ({error})"
            ) from error
        except (apsw.NotADBError, apsw.CorruptError) as error:
            if what == "open" and isinstance(error, apsw.NotADBError):
                raise ConfigError(f"{self.path} is not a SQLite database. Choose another path") from error
            message = f"cannot {what} {self.path}: {error}. Restore it from a backup"
            raise CorruptRecord(message) from error
        except (apsw.ReadOnlyError, apsw.PermissionsError, apsw.CantOpenError) as error:
            raise StoreUnavailable(
                f"cannot {what} {self.path}: {error}. Make the file and its directory writable"
            ) from error
        except apsw.IOError as error:
            raise StoreUnavailable(
                f"cannot {what} {self.path}: I/O error ({error}). Check the disk; to learn whether a commit"
                " was applied, send it again"
            ) from error
        except apsw.Error as error:
            raise StoreUnavailable(f"cannot {what} {self.path}: {type(error).__name__}: {error}") from error


def _put(writer: apsw.Connection, record: Record, expect: Expect | None, blob: bytes) -> Outcome:
    """Compare and set one row inside the open transaction."""
    key = record.key
    row = writer.execute(_ROW, (key.tenant, key.session)).fetchone()
    try:
        if not admit(record, expect, row):
            return None
    except StoreError as error:
        return error
    writer.execute(
        _PUT,
        (
            key.tenant,
            key.session,
            int(record.version),
            record.incarnation,
            record.request_id,
            float(record.created_at),
            float(record.updated_at),
            int(record.tokens),
            int(record.windows),
            len(blob),
            blob,
        ),
    )
    return None


def _create_private(path: Path) -> None:
    """Create the file 0600 and its missing directories 0700, and make their names durable."""
    made = [directory for directory in reversed(path.parents) if not directory.is_dir()]
    for directory in made:
        directory.mkdir(mode=0o700, exist_ok=True)
    existed = path.exists()
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    if existed:
        return
    for directory in {path.parent, *(each.parent for each in made)}:
        handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _retry_busy(action: Callable[[], object]) -> None:
    """Run a statement for which SQLite does not call its busy handler (the switch to WAL)."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            action()
            return
        except (apsw.BusyError, apsw.LockedError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
