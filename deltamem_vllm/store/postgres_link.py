"""Connections to PostgreSQL: a small pool, what each session is set to, retries, and errors as ours.

A transaction whose connection breaks is run again on a new connection until ``retry_seconds`` have passed.
That is right even if the cut came after COMMIT was sent, because every transaction of the store can be
repeated: a write that was applied is recognised by its request id.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import psycopg
from psycopg import conninfo, errors

from deltamem_vllm.errors import ConfigError, StoreUnavailable

T = TypeVar("T")
Connection = Any  # psycopg.Connection; the library is optional, so its types are not relied upon

_IDLE_CONNECTIONS = 8
_PATIENCE = {"connect_timeout": "5", "keepalives_idle": "5", "keepalives_interval": "2", "keepalives_count": "3"}


class Moved(Exception):
    """What a transaction had read is no longer so; it is run again."""


class Link:
    """A pool of connections to one database.

    Args:
        url: ``postgresql://…`` or another connection string of libpq. Its options override ours.
        statement_seconds: what a statement may take, waiting for locks included.
        retry_seconds: how long a broken connection is tried again.

    Raises:
        ConfigError: the URL is not valid.
    """

    def __init__(self, url: str, *, statement_seconds: float, retry_seconds: float) -> None:
        try:
            given = conninfo.conninfo_to_dict(url)
        except psycopg.Error:  # its message quotes the URL, which may hold a password
            raise ConfigError(
                "the store's postgresql:// URL is not valid; use postgresql://user@host:5432/database"
            ) from None
        self._params = {"application_name": "deltamem", **_PATIENCE, "tcp_user_timeout": "10000", **given}
        self._secret = str(given.get("password") or "")
        host, port = given.get("host") or given.get("hostaddr") or "localhost", given.get("port") or 5432
        self.where = f"postgresql://{host}:{port}/{given.get('dbname') or given.get('user') or ''}"
        self._timeout = max(1, int(statement_seconds * 1000))
        self._retry_seconds = retry_seconds
        self._idle: list[Connection] = []
        self._lock = threading.Lock()
        self._closed = False
        self._process = os.getpid()

    def read(self, what: str, statement: str, bindings: tuple[Any, ...]) -> list[Any]:
        """The rows of one statement."""

        def work(connection: Connection) -> list[Any]:
            connection.autocommit = True
            rows: list[Any] = connection.cursor(binary=True).execute(statement, bindings).fetchall()
            return rows

        return self.run(what, work)

    def write(self, what: str, work: Callable[[Connection], T]) -> T:
        """Run ``work`` in a transaction whose COMMIT waits for the disk, whatever the server's default is.
        ``work`` may be run several times."""

        def transaction(connection: Connection) -> T:
            connection.autocommit = False
            with connection.pipeline():  # here too, not only at connect: a pooler may hand out another session
                connection.execute("SET LOCAL synchronous_commit = on")
                connection.execute(f"SET LOCAL statement_timeout = {self._timeout}")
                done = work(connection)
            connection.commit()
            return done

        return self.run(what, transaction)

    def run(self, what: str, work: Callable[[Connection], T], retry_seconds: float | None = None) -> T:
        """Run ``work`` on a connection, again on a new one while the connection breaks.

        Args:
            retry_seconds: at most so long, if that is less than the link's own.

        Raises:
            StoreUnavailable: it did not succeed; the message names the database and the remedy.
        """
        deadline = time.monotonic() + min(self._retry_seconds, retry_seconds or self._retry_seconds)
        pause = 0.02
        while True:
            try:
                with self._connection() as connection:
                    return work(connection)
            except (psycopg.Error, Moved) as error:
                if not _worth_another_try(error) or time.monotonic() + pause > deadline:
                    raise self._ours(what, error) from error
            time.sleep(pause)
            pause = min(2 * pause, 0.5)

    @contextlib.contextmanager
    def _connection(self) -> Iterator[Connection]:
        """A connection that no other thread uses meanwhile; closed after any error."""
        with self._lock:
            self._check_open()
            connection = self._idle.pop() if self._idle else None
        if connection is None:
            connection = self._connect()
        try:
            yield connection
        except BaseException as error:
            connection.close()
            if isinstance(error, psycopg.OperationalError):
                self._drop_idle()  # they go to the same server, and would each fail once
            raise
        with self._lock:
            if not self._closed and len(self._idle) < _IDLE_CONNECTIONS:
                self._idle.append(connection)
                return
        connection.close()

    def _connect(self) -> Connection:
        connection = psycopg.connect(**self._params, autocommit=True, prepare_threshold=None)
        try:
            connection.execute(
                f"SET statement_timeout = {self._timeout}; SET idle_in_transaction_session_timeout = 30000;"
                " SET client_encoding = 'UTF8'; SET TIME ZONE 'UTC'"
            )
        except BaseException:
            connection.close()
            raise
        return connection

    def _drop_idle(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _check_open(self) -> None:
        if self._closed:
            raise StoreUnavailable(f"the store {self.where} is closed")
        if os.getpid() != self._process:
            raise StoreUnavailable(f"the store {self.where} was opened before a fork. Open it in each process")

    def close(self) -> None:
        """Close idle connections; those in use close when their work ends."""
        with self._lock:
            self._closed = True
        self._drop_idle()

    def _ours(self, what: str, error: Exception) -> StoreUnavailable:
        """An error as ours, with the database, the remedy and no password."""
        text = " ".join(str(error).split())[:400]
        if self._secret:
            text = text.replace(self._secret, "***")
        remedy = next(remedy for kinds, remedy in _REMEDIES if isinstance(error, kinds))
        if _login_refused(error):
            remedy = (
                "the server refused the login. Check user, database, pg_hba.conf, and PGPASSWORD or the pgpass file"
            )
        return StoreUnavailable(f"cannot {what} {self.where}: {remedy} ({type(error).__name__}: {text})")


_REMEDIES: tuple[tuple[Any, str], ...] = (
    (Moved, "other writers kept changing the same sessions. Try again"),
    (errors.QueryCanceled, "it took longer than statement_seconds. Check the load and locks of the server"),
    (errors.ReadOnlySqlTransaction, "the server is read-only; it may be a standby. Connect to the primary"),
    (errors.DiskFull, "the server's disk is full; nothing was changed. Free space"),
    (errors.InsufficientPrivilege, "the role has no right to it. Grant it on the deltamem_ tables and the schema"),
    (
        errors.UndefinedTable,
        "the tables of the store are gone. Restore them from a backup; a restart of the server makes empty ones",
    ),
    (errors.TooManyConnections, "the server has no connection left. Raise max_connections"),
    (psycopg.OperationalError, "the server cannot be reached. To learn whether a commit was applied, send it again"),
    (Exception, "the server refused it"),
)


def _login_refused(error: Exception) -> bool:
    """Whether the server answered and said no. libpq gives no error code for that, only the server's words."""
    if getattr(error, "sqlstate", None) is not None:
        return False  # said by the server inside a session, not at its door
    said = str(error)
    return any(words in said for words in ("authentication failed", "no password supplied", "does not exist", "pg_hba"))


def _worth_another_try(error: Exception) -> bool:
    """Whether the same work may succeed on a new connection: the link broke, the server restarts, or writers
    collided."""
    if isinstance(error, Moved | errors.SerializationFailure | errors.DeadlockDetected):
        return True
    if not isinstance(error, psycopg.OperationalError) or _login_refused(error):
        return False
    state = error.sqlstate
    return state is None or state[:2] == "08" or state in ("57P01", "57P02", "57P03", "57P05", "25P03")
