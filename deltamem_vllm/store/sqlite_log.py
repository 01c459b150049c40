"""The log of a SQLite file is folded into the file beside the commits, not within one of them.

By itself SQLite has the commit that finds the log long copy all of it and sync both files: it then waits for the disk
for all that many others wrote. A thread of its own does that while further commits go on. What they add meanwhile it
follows up until little is left; for that last bit it keeps the writer waiting, so that the log is begun anew and does
not grow without end.
"""

import contextlib
import threading
from collections.abc import Callable

import apsw

LOG_PAGES = 4000
"""After so many pages (32 MiB) the log is folded into the file. Each page that several commits have changed is then
written once, so that seldom is cheaper."""
TOO_MANY_PAGES = 8 * LOG_PAGES
"""With so many pages a commit does it by itself: the thread does not get on."""
FEW_PAGES = 400
"""So many may be left when the writer is kept waiting."""
ROUNDS = 4


class LogKeeper:
    """Keeps one file's log short.

    Args:
        connect: opens a connection that may write, with the settings that make its writes durable; called on the
            thread, once it is needed.
        writing: held by whoever writes.

    Attributes:
        folding: held while the log is being folded: SQLite refuses two at once.
    """

    def __init__(self, connect: Callable[[], apsw.Connection], writing: threading.Lock) -> None:
        self._connect, self._writing = connect, writing
        self.folding = threading.Lock()
        self._thread: threading.Thread | None = None
        self._wanted = threading.Event()
        self._closing = False

    def watch(self, writer: apsw.Connection) -> None:
        """Hear of each commit of ``writer``, in place of SQLite's own look at the log."""
        writer.set_wal_hook(self._committed)

    def close(self) -> None:
        """Stop; waits for what is under way. The connection that closes last folds the rest."""
        self._closing = True
        self._wanted.set()
        if self._thread is not None:
            self._thread.join()

    def _committed(self, writer: apsw.Connection, database: str, pages: int) -> int:
        """Called by SQLite at the end of a commit, which is durable by then; on the thread that commits."""
        if pages >= TOO_MANY_PAGES:
            with contextlib.suppress(apsw.Error):  # the commit has succeeded, whatever becomes of the log
                writer.wal_checkpoint(database, apsw.SQLITE_CHECKPOINT_PASSIVE)
        elif pages >= LOG_PAGES and self._started():
            self._wanted.set()
        return apsw.SQLITE_OK

    def _started(self) -> bool:
        """Whether there is a thread; starts it when it is first asked for."""
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="deltamem-log", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # the system has no room for another thread now
                return False
            self._thread = thread
        return True

    def _run(self) -> None:
        connection: apsw.Connection | None = None
        while True:
            self._wanted.wait()
            if self._closing:
                break
            try:
                if connection is None:
                    connection = self._connect()
                self._fold(connection)
            except apsw.Error:  # a full or failing disk: the log keeps everything, and the next commit asks again
                pass
            self._wanted.clear()
            if self._closing:  # what `close` has set may have been cleared
                break
        if connection is not None:
            connection.close()

    def _fold(self, connection: apsw.Connection) -> None:
        for _ in range(ROUNDS):
            if self._closing or self._left(connection) <= FEW_PAGES:
                break
        with self._writing:
            self._left(connection)

    def _left(self, connection: apsw.Connection) -> int:
        """Fold what is in the log now; pages that have come meanwhile."""
        with self.folding:
            there, folded = connection.wal_checkpoint(None, apsw.SQLITE_CHECKPOINT_PASSIVE)
        return there - folded
