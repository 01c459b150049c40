"""The file of a SQLite store: made private, its errors translated."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import apsw

from deltamem_vllm.errors import ConfigError, CorruptRecord, StoreUnavailable

BUSY_SECONDS = 10.0
"""How long a lock held by another process is waited for."""


@contextlib.contextmanager
def translated(path: Path, what: str) -> Iterator[None]:
    """SQLite's errors inside the block as `ours`."""
    try:
        yield
    except apsw.Error as error:
        raise ours(error, path, what) from error


def ours(error: apsw.Error, path: Path, what: str) -> Exception:
    """What we raise in place of an error of SQLite: with the path and the remedy."""
    match error:
        case apsw.FullError():
            return StoreUnavailable(
                f"cannot {what} {path}: the disk is full ({error}). Free space; nothing was changed"
            )
        case apsw.BusyError() | apsw.LockedError():
            return StoreUnavailable(
                f"cannot {what} {path}: another process held its lock for {BUSY_SECONDS:g} s ({error})"
            )
        case apsw.NotADBError() if what == "open":
            return ConfigError(f"{path} is not a SQLite database. Choose another path")
        case apsw.NotADBError() | apsw.CorruptError():
            return CorruptRecord(f"cannot {what} {path}: {error}. Restore it from a backup")
        case apsw.ReadOnlyError() | apsw.PermissionsError() | apsw.CantOpenError():
            return StoreUnavailable(f"cannot {what} {path}: {error}. Make the file and its directory writable")
        case apsw.IOError():
            return StoreUnavailable(
                f"cannot {what} {path}: I/O error ({error}). Check the disk; to learn whether a commit"
                " was applied, send it again"
            )
        case _:
            return StoreUnavailable(f"cannot {what} {path}: {type(error).__name__}: {error}")


def create_private(path: Path) -> None:
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


def retry_busy(action: Callable[[], object]) -> None:
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
