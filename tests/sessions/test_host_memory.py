"""Host memory keeps to its budget, however many sessions are asked for.

In a process of its own, so that its size says something: ``python -m tests.sessions.test_host_memory IDS [leak]``.
"""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from deltamem_vllm.sessions.directory import PATIENCE, Directory
from deltamem_vllm.sessions.service import SessionService
from tests.conftest import NIGHTLY
from tests.sessions.harness import admit, drive, end_of, key, make_service, memory, turn

IDS = 1_000_000 if NIGHTLY else 30_000
BUDGET = 16 << 20
FLAT = 8 << 20
"""Bytes by which the process may grow after the first fifth. A leak of a session's worth per id makes it some 60 MB."""
ROOT = Path(__file__).parents[2]


def resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def ask_for_many(service: SessionService, ids: int) -> int:
    """Ask for distinct sessions, some of which are written; returns by how much the process grew after a fifth."""
    at_a_fifth = 0
    for number in range(ids):
        if number == ids // 5:
            at_a_fifth = resident()
        if number % 50 == 0:
            assert (await turn(service, f"written{number % 5000}", [number], [0]))["status"] == "committed"
        elif number % 3 == 0:
            granted = await admit(service, f"left{number}", [number])
            service.give_verdict(granted["ticket"], None)  # its client has left
        else:
            assert await service.info(key(f"asked{number}")) is None
        assert service.directory.used <= BUDGET
    return resident() - at_a_fifth


def main(ids: str, bug: str = "") -> None:
    if bug == "leak":  # PLANTED BUG
        Directory._make_room = lambda *_: None  # type: ignore[method-assign]
        globals()["BUDGET"] = 1 << 60
    service = make_service(host_bytes=16 << 20)
    service.start(lambda started: wait_for(started, int(ids)))
    service._thread.join()


async def wait_for(service: SessionService, ids: int) -> None:
    print(await ask_for_many(service, ids), len(service.directory), flush=True)


def grown(ids: int, *bug: str) -> tuple[int, int]:
    """Bytes grown and sessions known at the end, in a process of its own."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.sessions.test_host_memory", str(ids), *bug]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=True)
    size, known = done.stdout.split()[-2:]
    return int(size), int(known)


def test_memory_stays_flat_under_distinct_ids() -> None:
    size, known = grown(IDS)
    print(f"{IDS} ids: {size / 2**20:.1f} MiB grown after the first fifth, {known} sessions known at the end")
    assert size <= FLAT
    assert known <= BUDGET // 4096


def test_catches_a_directory_that_forgets_nothing() -> None:
    size, _ = grown(20_000, "leak")
    assert size > 2 * FLAT


@pytest.mark.parametrize("write_behind", [None, (600.0, 1000)])
def test_unloading_loses_nothing(tmp_path: Path, write_behind: tuple[float, int] | None) -> None:
    """200 sessions with room for about 10: each turn finds its session unloaded, its versions are all there."""

    async def scenario(service: SessionService) -> None:
        for step in range(4):
            for number in range(200):
                outcome = await turn(service, f"s{number}", [1000 * step + number], [0])
                assert outcome["status"] == ("committed" if write_behind is None else "pending")
                assert outcome["version"] == step + 1
                for _ in range(0, 200, PATIENCE):  # how many have just been saved is the writer's affair: look at all
                    service.directory.get(key(f"s{number}"))
                kept = sum(not session.idle for session in service.directory)
                assert len(service.directory) <= 12 + kept, "more is kept than the budget and what waits"
        async with asyncio.timeout(20):
            while service.commits.unsaved:
                await asyncio.sleep(0.001)
        assert service.commits.lost == 0
        await service.info(key("s0"))
        assert len(service.directory) <= 12
        for number in range(200):
            tokens = [1000 * step + number for step in range(4)]
            np.testing.assert_array_equal(end_of(service, f"s{number}"), memory(None, tokens))

    drive(make_service(f"sqlite:///{tmp_path}/s.db", host_bytes=10 * 4300, write_behind=write_behind), scenario)


if __name__ == "__main__":
    main(*sys.argv[1:])
