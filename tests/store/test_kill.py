"""kill -9 while committing: whatever was acknowledged is there, byte for byte, and nothing is torn.

This cannot show a missing fsync, because the page cache survives the process; ``test_power_loss`` is for
that.
"""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deltamem_vllm.store.protocol import SessionKey
from deltamem_vllm.store.sqlite import SQLiteStore
from tests.conftest import NIGHTLY
from tests.store.committer import SESSIONS, digest, version_of

KILLS = 500 if NIGHTLY else 10
ROOT = Path(__file__).parents[2]


def commit_and_kill(path: Path, seed: int, bug: str, seconds: float) -> list[tuple[int, int, str]]:
    """Let a process commit for a while after its first acknowledgement, kill it, and return what it had
    said."""
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.store.committer", str(path), str(seed), bug],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        cwd=ROOT,
    )
    assert child.stdout is not None
    said = child.stdout.readline()
    time.sleep(seconds)
    child.kill()
    said += child.stdout.read()
    child.wait()
    child.stdout.close()
    assert child.returncode == -9, "the child ended by itself"
    lines = [line.split() for line in said.decode().splitlines() if line.count(" ") == 2 and len(line) > 34]
    return [(int(session), int(version), what) for session, version, what in lines]


def check_kills(path: Path, kills: int, bug: str = "none") -> int:
    """Kill a committing process ``kills`` times on one file; returns how many commits were acknowledged."""
    rng = random.Random(kills)
    last = dict.fromkeys(range(SESSIONS), 0)
    acknowledged = 0
    for turn in range(kills):
        for session, version, what in commit_and_kill(path, turn, bug, rng.uniform(0, 0.25)):
            assert version > last[session], "versions go backwards"
            assert what == digest(version_of(session, version))
            last[session] = version
            acknowledged += 1
        store = SQLiteStore(path)
        assert store._writer.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        for session, version in last.items():
            found = store.get(SessionKey("tenant", f"{session}"))
            there = found.version if found else 0
            assert there >= version, f"session {session}: version {version} was acknowledged, {there} is there"
            if found:
                assert digest(found) == digest(version_of(session, there)), f"session {session} is torn"
                last[session] = there
        store.close()
    return acknowledged


def test_no_acknowledged_commit_is_lost(tmp_path: Path) -> None:
    assert check_kills(tmp_path / "s.db", KILLS) >= 10 * KILLS


def test_catches_an_acknowledgement_before_the_commit(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="was acknowledged"):
        check_kills(tmp_path / "s.db", 5, "early")
