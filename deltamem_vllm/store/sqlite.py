"""Sessions in one SQLite file, through APSW (its bundled SQLite has the fix of the WAL-reset corruption bug).

Durability: WAL with ``synchronous=FULL``, so that COMMIT returns after the log is synced. NORMAL loses
acknowledged commits at a power loss. A group of commits is one transaction, hence one sync.

Erasure: ``secure_delete`` overwrites freed bytes in the file, and ``delete`` and ``expire`` then truncate
the log, so that no older image of a page stays behind.

Threads: one connection writes, under a lock; reads take their own connections, which in WAL never wait for
the writer; so does what an event loop asks (``sqlite_glance``).
Processes: SQLite's own locks; each process opens the store itself, and never after a fork with the store
open.

Tables and statements: ``sqlite_schema``. What a write does inside its transaction: ``sqlite_changes``. Files and
errors: ``sqlite_file``.
"""

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import apsw

from deltamem_vllm.errors import ConfigError, StoreError, StoreUnavailable
from deltamem_vllm.store import sqlite_file, sqlite_schema
from deltamem_vllm.store.codec import MAX_RECORD_BYTES, PLAIN, RecordCodec
from deltamem_vllm.store.ledger import check_keep, encoded, roll_back
from deltamem_vllm.store.protocol import (
    Expect,
    Keys,
    Listing,
    Names,
    Outcome,
    Outcomes,
    Put,
    Quota,
    Record,
    SessionInfo,
    SessionKey,
    Usage,
    WouldWait,
    id_range,
)
from deltamem_vllm.store.sqlite_changes import delete, put_group
from deltamem_vllm.store.sqlite_file import create_private, ours, retry_busy, translated
from deltamem_vllm.store.sqlite_glance import Glancer
from deltamem_vllm.store.sqlite_log import LogKeeper
from deltamem_vllm.store.verify import Verifier

_Rows = list[Any]  # here, because ``list`` is a method of the store
_IDLE_READERS = 8
_PAGE_BYTES = 8192
"""Of a new file. A record of some 20 KB then takes three pages and not six; a lone commit, which changes a few small
rows, is no slower."""
_APPLICATION_ID = 0x444D454D  # "DMEM", so that file(1) and we can tell whose database it is


class SQLiteStore:
    """A ``StateStore`` in one file.

    Args:
        path: the database file. It is created 0600 and missing directories 0700; what exists keeps its mode.
        keep: versions kept of each session.
        quota: per tenant.
        codec: how records are stored; ``crypto.SealedCodec`` encrypts them.
        vfs: name of a registered SQLite VFS, for fault tests; None for the system's.

    Raises:
        StoreUnavailable: the file cannot be opened or written.
        ConfigError: the file is something else, or of a newer version of this package.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        keep: int = 4,
        quota: Quota | None = None,
        codec: RecordCodec = PLAIN,
        vfs: str | None = None,
    ) -> None:
        self.path = Path(path).absolute()
        self.codec = codec
        self.keep = check_keep(keep)
        self.quota = quota or Quota()
        self._verify = Verifier(codec, str(self.path))
        self._vfs = vfs
        self._process = os.getpid()
        self._write_lock = threading.Lock()
        self._readers: list[apsw.Connection] = []
        self._readers_lock = threading.Lock()
        self._glancer = Glancer(lambda: self._connect(apsw.SQLITE_OPEN_READONLY))
        self._log = LogKeeper(self._connect_durably, self._write_lock)
        self._closed = False
        with translated(self.path, "open"):
            try:
                create_private(self.path)
            except OSError as error:
                raise StoreUnavailable(
                    f"cannot create or write the store {self.path}: {error.strerror}. Choose a writable path"
                ) from error
            self._writer = self._connect_durably()
            try:
                self._prepare()
            except BaseException:
                self._writer.close()
                raise

    # --- reading --------------------------------------------------------------------------------------------

    def get(self, key: SessionKey) -> Record | None:
        floor = self._verify.floor(key)
        rows = self._read("read", sqlite_schema.GET, (MAX_RECORD_BYTES, key.tenant, key.session))
        if not rows:
            return None
        *row, blob = rows[0]
        return self._verify.newest(key, tuple(row), blob, floor)

    def get_version(self, key: SessionKey, version: int) -> Record | None:
        bindings = (MAX_RECORD_BYTES, key.tenant, key.session, version)
        rows = self._read("read", sqlite_schema.GET_VERSION, bindings)
        return self._verify.version(key, rows[0][:3], rows[0][3]) if rows else None

    def head(self, key: SessionKey) -> Expect | None:
        rows = self._read("read", sqlite_schema.WHERE_IS, (key.tenant, key.session))
        return Expect(*rows[0]) if rows else None

    def glance(self, key: SessionKey) -> Expect | None:
        if os.getpid() != self._process:  # ``head`` says what is wrong
            raise WouldWait
        return self._glancer.head(key)

    def history(self, key: SessionKey, limit: int = 100) -> Listing:
        rows = self._read("read", sqlite_schema.HISTORY, (key.tenant, key.session, max(0, limit)))
        return [SessionInfo(key, *row) for row in rows]

    def list(self, tenant: str, after: str | None = None, limit: int = 100, *, prefix: str | None = None) -> Listing:
        rows = self._read("list", sqlite_schema.LIST, (tenant, *id_range(after, prefix), max(0, limit)))
        return [SessionInfo(SessionKey(tenant, session), *rest) for session, *rest in rows]

    def idle(self, until: float, limit: int = 1000) -> Keys:
        return [SessionKey(*row) for row in self._read("list", sqlite_schema.IDLE, (until, max(0, limit)))]

    def tenants(self, after: str | None = None, limit: int = 100) -> Names:
        return [name for (name,) in self._read("list", sqlite_schema.TENANTS, (after or "", max(0, limit)))]

    def usage(self, tenant: str) -> Usage:
        rows = self._read("read", sqlite_schema.USAGE, (tenant,))
        return Usage(*rows[0][1:]) if rows else Usage()

    # --- writing --------------------------------------------------------------------------------------------

    def put(self, record: Record, expect: Expect | None) -> None:
        outcome = self.put_many([(record, expect)])[0]
        if outcome is not None:
            raise outcome

    def put_many(self, puts: Sequence[Put]) -> Outcomes:
        group, outcomes = encoded(puts, self.codec)
        if not group:
            return outcomes
        found: dict[int, Outcome]
        try:
            with self._transaction() as writer:
                found = put_group(writer, group, self.quota, self.keep)
        except StoreError as error:
            found = dict.fromkeys(group, error)  # rolled back as one: a stale item may be so no more
        for index, outcome in found.items():
            outcomes[index] = outcome
            if outcome is None:
                record = puts[index][0]
                self._verify.seen(record.key, record.incarnation, int(record.version))
        return outcomes

    def rollback(self, key: SessionKey, version: int, expect: Expect, request_id: str) -> Record:
        return roll_back(self, key, version, expect, request_id)

    def delete(self, key: SessionKey) -> bool:
        with self._transaction() as writer:
            existed = delete(writer, key)
        self._verify.forget(key)
        self._truncate_log(f"session {key.session!r} is deleted")
        return existed

    def expire(self, now: float, idle_seconds: float, limit: int = 1000) -> int:
        until = now - idle_seconds
        return len(self.delete_idle(self.idle(until, limit), until))

    def delete_idle(self, keys: Sequence[SessionKey], until: float) -> Keys:
        if not keys:
            return []
        with self._transaction() as writer:
            gone = [key for key in keys if delete(writer, key, until)]
        for key in gone:
            self._verify.forget(key)
        if gone:
            self._truncate_log(f"{len(gone)} idle sessions are deleted")
        return gone

    def reencrypt(self, batch: int = 100) -> int:
        done = last = 0
        while True:
            with self._transaction() as writer:
                rows: _Rows = writer.execute(sqlite_schema.SWEEP, (last, batch)).fetchall()
                if not rows:
                    break
                for rowid, tenant, session, version, incarnation, request_id, blob in rows:
                    key = SessionKey(tenant, session)
                    sealed = self._verify.sealed_again(key, (version, incarnation, request_id), blob)
                    if sealed is not None:
                        writer.execute(sqlite_schema.RESEAL, (sealed, rowid))
                        writer.execute(sqlite_schema.ADD_USAGE, (tenant, 0, len(sealed) - len(blob)))
                        done += 1
                last = rows[-1][0]
        if done:
            self._truncate_log("everything is encrypted with the new key")
        return done

    def backup(self, target: Path) -> None:
        """Copy the store as of one moment into a new file, 0600, beside running commits.

        Raises:
            StoreUnavailable: the file exists or cannot be written; what was written of it is removed.
        """
        try:
            os.close(os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        except OSError as error:
            raise StoreUnavailable(f"cannot create {target}: {error.strerror}. Name a new file") from error
        try:
            with translated(target, "write"), self._reader() as reader:
                reader.execute("VACUUM INTO ?", (str(target.absolute()),))
            with target.open("rb") as written:
                os.fsync(written.fileno())
        except BaseException:
            target.unlink(missing_ok=True)
            raise

    def close(self) -> None:
        self._log.close()
        with self._write_lock, self._readers_lock:
            self._closed = True
            for reader in self._readers:
                reader.close()
            self._readers.clear()
            self._glancer.close()
            with contextlib.suppress(apsw.Error):  # the last one to close also folds the log into the file
                self._writer.close()

    def _truncate_log(self, done: str) -> None:
        """Empty the log, so that no older image of a page is left.

        Raises:
            StoreUnavailable: readers keep it; says what is ``done`` already.
        """
        with translated(self.path, "erase from the log of"), self._write_lock, self._log.folding:
            busy = self._open_writer().execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if busy is None or busy[0]:
            raise StoreUnavailable(
                f"{done}, but readers keep old pages in the log of {self.path}. Delete it again to finish the erasure"
            )

    # --- connections ----------------------------------------------------------------------------------------

    def _read(self, what: str, statement: str, bindings: tuple[Any, ...]) -> _Rows:
        try:  # not `translated`: a read is short, and a generator costs as much as its look-up
            with self._readers_lock:
                self._open_writer()
                reader = self._readers.pop() if self._readers else None
            if reader is None:
                reader = self._connect(apsw.SQLITE_OPEN_READONLY)
            try:
                return reader.execute(statement, bindings).fetchall()
            finally:
                self._give_back(reader)
        except apsw.Error as error:
            raise ours(error, self.path, what) from error

    def _connect(self, flags: int) -> apsw.Connection:
        connection = apsw.Connection(str(self.path), flags=flags, vfs=self._vfs)
        connection.set_busy_timeout(int(sqlite_file.BUSY_SECONDS * 1000))
        # Plans do not depend on values: else SQLite, which is built with STAT4, compiles a statement anew for each.
        connection.config(apsw.SQLITE_DBCONFIG_ENABLE_QPSG, 1)
        return connection

    def _connect_durably(self) -> apsw.Connection:
        """A connection that writes, with what makes commits durable and deletes final."""
        connection = self._connect(apsw.SQLITE_OPEN_READWRITE)
        for setting in (
            "synchronous = FULL",
            "fullfsync = ON",
            "secure_delete = ON",
            "journal_size_limit = 67108864",
            "trusted_schema = OFF",
        ):  # one by one: some answer with a row, and what stands behind those would wait until it is fetched
            connection.execute(f"PRAGMA {setting}").fetchall()
        return connection

    def _prepare(self) -> None:
        """Switch to WAL, bring the schema up to date."""
        writer = self._writer
        self._schema()  # before anything is changed: the file may be another program's
        writer.execute(f"PRAGMA page_size = {_PAGE_BYTES}").fetchall()  # a file that has pages keeps theirs
        retry_busy(lambda: writer.execute("PRAGMA journal_mode = WAL").fetchall())
        self._log.watch(writer)
        writer.execute("BEGIN IMMEDIATE")
        with self._rollback_on_error():
            version = self._schema()
            if version < len(sqlite_schema.MIGRATIONS):
                for migration in sqlite_schema.MIGRATIONS[version:]:
                    writer.execute(migration)
                writer.execute(f"PRAGMA user_version = {len(sqlite_schema.MIGRATIONS)}")
                writer.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
            writer.execute("COMMIT")

    def _schema(self) -> int:
        """The file's schema number, 0 for an empty file; refuses what is not ours or newer than we are."""
        names = ("pragma_user_version", "pragma_application_id", "(SELECT count(*) FROM sqlite_schema)")
        row: Any = self._writer.execute(f"SELECT * FROM {', '.join(names)}").fetchall()[0]
        version, owner, tables = row
        if owner != _APPLICATION_ID and (owner or version or tables):
            raise ConfigError(f"{self.path} is a database of another program. Choose another path")
        if version > len(sqlite_schema.MIGRATIONS):
            raise ConfigError(
                f"{self.path} has schema {version}; this deltamem-vllm knows up to {len(sqlite_schema.MIGRATIONS)}."
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
        with translated(self.path, "write"), self._write_lock:
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
        reader = self._connect(apsw.SQLITE_OPEN_READONLY)
        try:
            yield reader
        finally:
            self._give_back(reader)

    def _give_back(self, reader: apsw.Connection) -> None:
        with self._readers_lock:
            if not self._closed and len(self._readers) < _IDLE_READERS:
                self._readers.append(reader)
                return
        reader.close()
