"""One store's speed: a commit alone, commits in groups, verified reads, leases.

python -m loadtests.stores URL [--commits 300] [--layers 36]

URL as for ``--deltamem-store``. The sessions it makes belong to the tenant ``loadtest`` and are deleted at the end.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
from rich.table import Table

from deltamem_vllm.store.protocol import Record, SessionKey, StateStore, new_incarnation
from deltamem_vllm.store.url import open_store
from loadtests.table import console

GROUP = 32


def record(session: int, version: int, incarnation: str, state: np.ndarray) -> Record:
    """A record as a request's commit makes it."""
    return Record(
        key=SessionKey("loadtest", f"s{session}"), version=version, incarnation=incarnation, request_id=f"r{version}",
        adapter="a", model="m", layout=f"L{state.shape[0]}H1r8", base=state, end=state, window=b"",
        created_at=0.0, updated_at=float(version), tokens=version, windows=1,
    )  # fmt: skip


def timed(times: int, action: Callable[[int], None]) -> tuple[float, float]:
    """p50 and p99 of ``action(0 … times - 1)`` in milliseconds."""
    took = []
    for turn in range(times):
        start = time.perf_counter()
        action(turn)
        took.append((time.perf_counter() - start) * 1e3)
    return statistics.median(took), statistics.quantiles(took, n=100)[98]


def measure(store: StateStore, commits: int, state: np.ndarray) -> dict[str, tuple[float, float]]:
    """p50 and p99 in milliseconds by what was done; every answer is checked."""
    life = new_incarnation()

    def commit(turn: int) -> None:
        store.put(record(0, turn + 1, life, state), record(0, turn, life, state).expect if turn else None)

    def group(turn: int) -> None:
        puts = [
            (record(1 + each, turn + 1, life, state), record(1 + each, turn, life, state).expect if turn else None)
            for each in range(GROUP)
        ]
        if store.put_many(puts) != [None] * GROUP:
            raise SystemExit("a commit was refused: nothing is reported")

    def read(turn: int) -> None:
        found = store.get(SessionKey("loadtest", f"s{1 + turn % GROUP}"))
        if found is None or not np.array_equal(found.end, state):
            raise SystemExit("a session came back different: nothing is reported")

    def lease(turn: int) -> None:
        key = SessionKey("loadtest", f"s{turn}")
        assert leases is not None
        if not leases.acquire(key).ours:
            raise SystemExit("a lease was refused: nothing is reported")
        leases.release([key])

    made = {"one commit": timed(commits, commit), f"{GROUP} in a group": timed(max(2, commits // 4), group)}
    made["verified read"] = timed(commits, read)
    leases = getattr(store, "leases", None)
    return made | ({"a lease, taken and given back": timed(commits, lease)} if leases is not None else {})


def main() -> None:
    """Measure one store and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--commits", type=int, default=300)
    parser.add_argument("--layers", type=int, default=36)
    args = parser.parse_args()
    state = np.random.default_rng(0).normal(size=(args.layers, 1, 8, 8)).astype(np.float32)
    store = open_store(args.url)
    table = Table("what", "p50 ms", "p99 ms", title=f"{args.url.partition(':')[0]}, states of {state.nbytes} bytes")
    try:
        for what, (p50, p99) in measure(store, args.commits, state).items():
            table.add_row(what, f"{p50:.2f}", f"{p99:.2f}")
    finally:
        for session in range(GROUP + 1):
            store.delete(SessionKey("loadtest", f"s{session}"))
        store.close()
    console().print(table)


if __name__ == "__main__":
    main()
