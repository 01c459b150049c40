"""Appends to an audit chain: by groups, each written and synced on a thread of its own."""

import errno
import fcntl
import hashlib
import hmac
import logging
import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from deltamem_vllm.audit.chain import MAX_LINE, Event, Head, line, parse, segments
from deltamem_vllm.errors import ConfigError, StoreUnavailable
from deltamem_vllm.store.protocol import SessionKey

logger = logging.getLogger("vllm.deltamem")

RETRY_SECONDS = 1.0
MAX_WAITING = 10_000
"""Entries that wait for a disk that does not take them; further ones are lost, and the chain will say how many."""
SEGMENT_BYTES = 64 << 20
KEY_BYTES = 32


def audit_file(path: str, rank: int) -> Path:
    """The file of one engine."""
    return Path(path if rank == 0 else f"{path}.{rank}")


def read_key(path: Path) -> bytes:
    """The key that names sessions in the logs at ``path``; made, for the owner only, where there is none.

    Raises:
        ConfigError: it cannot be made or read.
    """
    file = path.with_name(path.name + ".key")
    try:
        try:
            made = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            pass
        else:
            with os.fdopen(made, "wb") as opened:
                opened.write(secrets.token_bytes(KEY_BYTES))
                opened.flush()
                os.fsync(opened.fileno())
        for _ in range(100):  # another engine may be about to write it
            key = file.read_bytes()
            if len(key) == KEY_BYTES:
                return key
            time.sleep(0.02)
    except OSError as error:
        raise ConfigError(f"--deltamem-audit {path}: {file} cannot be used: {error.strerror}") from None
    raise ConfigError(f"--deltamem-audit {path}: {file} does not have {KEY_BYTES} bytes: restore it, or move both away")


def label(key: bytes, name: str, *more: str) -> str:
    """What a tenant (its name) or a session (tenant, session) is called in a log: 32 hex digits, an HMAC."""
    content = b"".join(len(part.encode()).to_bytes(4, "little") + part.encode() for part in (name, *more))
    return hmac.new(key, content, hashlib.sha256).hexdigest()[:32]


class AuditLog:
    """One chain, in one file and those rotated away from it.

    Args:
        path: where entries are appended; `PATH.lock` beside it keeps a second writer out.
        key: names sessions; see `read_key`.
        required: refuse changes while entries cannot be written.
        segment_bytes: size from which a file is rotated away.
        sync: makes a file descriptor's content durable.

    Attributes:
        failures: tries to write that have failed.
        lost: entries that had to be dropped.

    Raises:
        ConfigError: the file cannot be opened, is in use, or does not end in an entry.
    """

    def __init__(
        self,
        path: Path,
        key: bytes,
        *,
        required: bool = False,
        segment_bytes: int = SEGMENT_BYTES,
        sync: Callable[[int], None] = os.fsync,
    ) -> None:
        self.path, self.required, self._key = path, required, key
        self._segment_bytes, self._sync = segment_bytes, sync
        self.failures = self.lost = 0
        self._unsaid = 0  # entries lost that the chain does not mention yet
        self._error: OSError | None = None
        self._queue: deque[tuple[dict[str, Any], Future[None]]] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._file = -1
        try:
            self._lock = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            torn = self._open()
        except OSError as error:
            why = "another server writes it" if error.errno == errno.EWOULDBLOCK else str(error.strerror)
            raise ConfigError(f"--deltamem-audit {path}: {why}") from None
        if torn:
            logger.warning("the audit log ended in %d bytes of an unfinished entry; they were removed", torn)
            self.append("repair", None, dropped_bytes=torn)
        self._thread = threading.Thread(target=self._run, name="deltamem-audit", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Refuse a change that could not be logged, where that is required.

        Raises:
            StoreUnavailable: 503.
        """
        if self.required and self._error is not None:
            raise StoreUnavailable(
                f"the audit log cannot be written ({self._error.strerror}), and --deltamem-audit-required is set: "
                "repair its disk, then retry"
            )

    def append(
        self, event: Event, key: SessionKey | None, version: int = 0, request_id: str = "", **more: Any
    ) -> "Future[None]":
        """Log that something happened; never waits. Safe from any thread.

        Returns:
            resolves once the entry is durable, or was given up.
        """
        fields: dict[str, Any] = {"time": round(time.time(), 6), "event": event, **more}
        if key is not None:
            fields["tenant"] = label(self._key, key.tenant)
            fields["session"] = label(self._key, key.tenant, key.session)
            fields["version"] = version
        if request_id:
            fields["request"] = request_id
        done: Future[None] = Future()
        with self._changed:
            if self._closing or len(self._queue) >= MAX_WAITING:
                self.lost += 1
                self._unsaid += 1
                done.set_result(None)
                return done
            self._queue.append((fields, done))
            self._changed.notify()
        return done

    def close(self, timeout: float = 5.0) -> None:
        """Write what waits, and stop."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout)
        if self._thread.is_alive() or self._queue:
            logger.error("%d audit entries were not written", len(self._queue))
        if not self._thread.is_alive():
            os.close(self._file)
            os.close(self._lock)

    # ------------------------------------------------------------------ inside

    def _open(self) -> int:
        """Open the file at its end, having removed an entry that a kill cut off; returns the bytes of that."""
        files = segments(self.path)
        self._segments = len([file for file in files if file != self.path])
        new = not self.path.exists()
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        if new:
            _sync_folder(self.path.parent)
        self._size, torn = os.fstat(self._file).st_size, 0
        if self._size:
            tail = os.pread(self._file, MAX_LINE, max(0, self._size - MAX_LINE))
            torn = len(tail) - (tail.rfind(b"\n") + 1)
            if torn == len(tail) and self._size > len(tail):
                raise ConfigError(f"--deltamem-audit {self.path}: its end is no entry: see `deltamem audit verify`")
            if torn:
                self._size -= torn
                os.ftruncate(self._file, self._size)
                self._sync(self._file)
        self._head = self._last(files)
        return torn

    def _last(self, files: list[Path]) -> Head:
        """Where the chain ends: the last whole entry of the newest file that has one."""
        for file in reversed(files):
            with file.open("rb") as opened:
                opened.seek(max(0, file.stat().st_size - MAX_LINE))
                lines = [raw for raw in opened.read().split(b"\n") if raw]
            if lines:
                try:
                    entry = parse(lines[-1])
                except ValueError as error:
                    raise ConfigError(
                        f"--deltamem-audit {file}: its last line {error}: see `deltamem audit verify`, then move it"
                    ) from None
                return Head(entry["seq"], entry["hash"])
        return Head()

    def _run(self) -> None:
        while (group := self._take()) is not None:
            while not self._write(group):
                with self._changed:
                    if self._closing:
                        return
                    self._changed.wait(RETRY_SECONDS)
            with self._changed:
                for _ in group:
                    self._queue.popleft()
            for _, done in group:
                done.set_result(None)

    def _take(self) -> list[tuple[dict[str, Any], "Future[None]"]] | None:
        """All that waits now, which stays in the queue until it is written; None: closed and empty."""
        with self._changed:
            while not self._queue and not self._closing:
                self._changed.wait()
            return list(self._queue) or None

    def _write(self, group: list[tuple[dict[str, Any], "Future[None]"]]) -> bool:
        """Append a group and sync it; on failure the file is as before, or the next try makes it so."""
        head, lines = self._head, []
        with self._changed:
            said = self._unsaid
        for index, (fields, _) in enumerate(group):
            lost = {"lost_before": said} if said and not index else {}
            raw, made = line({**fields, **lost}, head.seq + 1, head.hash)
            lines.append(raw)
            head = Head(head.seq + 1, made)
        data = b"".join(lines)
        try:
            if os.fstat(self._file).st_size != self._size:  # what a failed try has left
                os.ftruncate(self._file, self._size)
            written = 0
            while written < len(data):
                written += os.write(self._file, data[written:])
            self._sync(self._file)
        except OSError as error:
            self._failed(error)
            return False
        if self._error is not None:
            logger.warning("the audit log is written again")
            self._error = None
        with self._changed:
            self._unsaid -= said
        self._head, self._size = head, self._size + len(data)
        if self._size >= self._segment_bytes:
            self._rotate()
        return True

    def _failed(self, error: OSError) -> None:
        self._error = error
        self.failures += 1
        if self.failures & (self.failures - 1) == 0:  # the 1st, 2nd, 4th, …: it is tried every second
            logger.error(
                "the audit log %s cannot be written (%d tries failed): %s", self.path, self.failures, error.strerror
            )

    def _rotate(self) -> None:
        """Put the file aside and begin the next; the chain goes on. A failure leaves the file in use."""
        aside = self.path.with_name(f"{self.path.name}.{self._segments + 1:06d}")
        try:
            if aside.exists():
                raise FileExistsError(errno.EEXIST, f"{aside} exists")
            self.path.rename(aside)
            fresh = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            _sync_folder(self.path.parent)
        except OSError as error:
            self._failed(error)
            self._error = None  # entries still go where they went
            return
        os.close(self._file)
        self._file, self._size, self._segments = fresh, 0, self._segments + 1


def _sync_folder(folder: Path) -> None:
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
