"""The folder of a server's control sockets: private, removed at its end, or by the next server where it had no end.

A server that is killed leaves its folder behind. Each folder has a file that every process using it holds locked; the
lock goes with the last of them, whatever ends it. So a folder that can be locked is nobody's any more.
"""

import atexit
import contextlib
import fcntl
import logging
import os
import shutil
import stat
import tempfile
from pathlib import Path

logger = logging.getLogger("vllm.deltamem")

PREFIX = "deltamem-"
_OWNER = "owner"
_held: dict[str, int] = {}


def make() -> str:
    """A fresh folder in the system's temporary one, for the life of this process; removes those of the dead."""
    _remove_abandoned(Path(tempfile.gettempdir()))
    folder, maker = tempfile.mkdtemp(prefix=PREFIX), os.getpid()
    # Locked before it has its name: until then nobody takes the folder for one of ours.
    handle = os.open(f"{folder}/.{_OWNER}", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    fcntl.flock(handle, fcntl.LOCK_SH)
    Path(f"{folder}/.{_OWNER}").rename(f"{folder}/{_OWNER}")
    _held[folder] = handle

    def remove() -> None:
        if os.getpid() == maker:  # not in a forked child that inherits this exit handler
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder


def hold(folder: str) -> None:
    """Keep a folder that another process has made for as long as this one lives."""
    if folder in _held:
        return
    with contextlib.suppress(OSError):  # a folder of somebody's own choice has no such file
        handle = os.open(f"{folder}/{_OWNER}", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        _held[folder] = handle


def _remove_abandoned(place: Path) -> None:
    for folder in place.glob(f"{PREFIX}*"):
        try:
            if _abandoned(folder):
                logger.info("removed the sockets of a server that was killed: %s", folder)
        except OSError:  # another server's start was faster, or it is not ours to look into
            continue


def _abandoned(folder: Path) -> bool:
    """Remove a folder if it is one of ours that no process holds; whether it was."""
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) != 0o700:
        return False
    handle = os.open(folder / _OWNER, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder)
    finally:
        os.close(handle)
    return True
