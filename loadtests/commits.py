"""Durable commits: how many per second one writer thread makes on this disk, and how long one takes.

python -m loadtests.commits [--commits 2000] [--layers 36]
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from deltamem_vllm.store.protocol import Expect, Record, SessionKey, new_incarnation
from deltamem_vllm.store.sqlite import SQLiteStore
from deltamem_vllm.store.writer import CommitWriter


def record(session: int, version: int, incarnation: str, state: np.ndarray) -> Record:
    """A record as a request's commit makes it."""
    return Record(
        key=SessionKey("bench", f"s{session}"), version=version, incarnation=incarnation, request_id=f"r{version}",
        adapter="a", model="m", layout=f"L{state.shape[0]}H1r8", base=state, end=state, window=b"",
        created_at=0.0, updated_at=float(version), tokens=version, windows=1,
    )  # fmt: skip


def main() -> None:
    """Commit one by one, then in groups; then read everything back and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--commits", type=int, default=2000)
    parser.add_argument("--layers", type=int, default=36)
    args = parser.parse_args()
    state = np.random.default_rng(0).normal(size=(args.layers, 1, 8, 8)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        store = SQLiteStore(str(Path(folder) / "bench.db"))
        writer = CommitWriter(store)
        incarnation = new_incarnation()
        alone = []
        for version in range(1, args.commits // 10 + 1):
            start = time.perf_counter()
            expect = Expect(version - 1, incarnation) if version > 1 else None
            writer.submit(record(0, version, incarnation, state), expect).result()
            alone.append((time.perf_counter() - start) * 1e3)
        start = time.perf_counter()
        for future in [writer.submit(record(1 + i, 1, incarnation, state), None) for i in range(args.commits)]:
            future.result()
        rate = args.commits / (time.perf_counter() - start)
        start = time.perf_counter()
        for i in range(args.commits):
            found = store.get(SessionKey("bench", f"s{1 + i}"))
            if found is None or not np.array_equal(found.end, state):
                raise SystemExit(f"session s{1 + i} came back different: nothing is reported")
        reads = args.commits / (time.perf_counter() - start)
        writer.close()
        store.close()
    table = Table("state bytes", "one commit p50 ms", "p99 ms", "grouped commits/s", "verified reads/s")
    p99 = statistics.quantiles(alone, n=100)[98]
    table.add_row(str(state.nbytes), f"{statistics.median(alone):.2f}", f"{p99:.2f}", f"{rate:.0f}", f"{reads:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
