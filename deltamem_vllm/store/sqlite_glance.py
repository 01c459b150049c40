"""Where sessions of a SQLite file are, for a thread that must not wait: an event loop's.

In WAL a reader waits for no writer. What could keep it waiting is refused: with a busy timeout of 0 SQLite does not
wait for locks (another process recovers the log, or holds the file), and a connection of its own is in no other
thread's use. A question is one statement that is read to its end, so that no read transaction stays open to keep a
deletion from emptying the log. What is left are reads of pages that neither SQLite nor the system has in memory: see
`deltamem_vllm.sessions.reads` for a disk that hangs.
"""

import threading
from collections.abc import Callable
from typing import Any

import apsw

from deltamem_vllm.store.protocol import Expect, SessionKey, WouldWait
from deltamem_vllm.store.sqlite_schema import WHERE_IS


class Glancer:
    """Answers at once or not at all.

    Args:
        connect: opens a read-only connection; called when it is first needed.
    """

    def __init__(self, connect: Callable[[], apsw.Connection]) -> None:
        self._connect = connect
        self._connection: apsw.Connection | None = None
        self._lock = threading.Lock()
        self._closed = False

    def head(self, key: SessionKey) -> Expect | None:
        """Version and incarnation of a session's newest version; None without one.

        Raises:
            WouldWait: closed, in use by another thread, locked by another process, or SQLite has an error to tell.
        """
        if not self._lock.acquire(blocking=False):
            raise WouldWait
        try:
            if self._closed:
                raise WouldWait
            if self._connection is None:
                self._connection = self._connect()
                self._connection.set_busy_timeout(0)
            rows: Any = self._connection.execute(WHERE_IS, (key.tenant, key.session)).fetchall()
        except apsw.Error as error:
            raise WouldWait from error
        finally:
            self._lock.release()
        return Expect(*rows[0]) if rows else None

    def close(self) -> None:
        """Answer nothing any more. A second call does nothing."""
        with self._lock:
            self._closed = True
            if self._connection is not None:
                self._connection.close()
                self._connection = None
