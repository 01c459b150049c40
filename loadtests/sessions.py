"""Sessions: durable commits, verified cold restores and warm loads, beside what the disk and SQLite do by themselves.

python -m loadtests.sessions [--commits 2048] [--layers 36]
"""

import argparse
import asyncio
import gc
import os
import secrets
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any

import apsw
import numpy as np
from rich.table import Table

from deltamem_vllm.sessions.meters import Meters
from deltamem_vllm.sessions.records import Records
from deltamem_vllm.sessions.service import SessionService
from deltamem_vllm.store import codec
from deltamem_vllm.store.protocol import Expect, Record, SessionKey, new_incarnation
from deltamem_vllm.store.sqlite import SQLiteStore
from deltamem_vllm.store.writer import CommitWriter
from loadtests.pages import seed_seconds
from loadtests.table import console

Row = dict[str, Any]
GROUP = 256
"""Records in a transaction of the bare measurements: as many as the writer puts into one."""
LOADERS = (1, 2)
"""Threads that read; a service reads a local store on the first number of them, see `sessions.reads`."""
PROMPT = 1024
WARM = 500
CODED = 2000


def record(session: int, version: int, life: str, states: np.ndarray) -> Record:
    """A record as a request's commit makes it; ``states`` [2, layers, 1, 8, 8]: base and end, which differ."""
    return Record(
        key=SessionKey("bench", f"s{session}"), version=version, incarnation=life, request_id=f"r{version}",
        adapter="a", model="m", layout=f"L{states.shape[1]}H1r8", base=states[0], end=states[1], window=b"",
        created_at=0.0, updated_at=float(version), tokens=version, windows=1,
    )  # fmt: skip


def row(name: str, value: float, unit: str, goal: str = "") -> Row:
    """One figure."""
    return {"name": name, "value": value, "unit": unit, "goal": goal}


def rate(times: int, work: Callable[[], object]) -> float:
    """How often per second something happens that ``work`` does ``times`` times."""
    start = time.perf_counter()
    work()
    return times / (time.perf_counter() - start)


def bare(folder: Path, size: int, count: int) -> list[Row]:
    """The ceilings, at records' size and in groups: the disk without a database, SQLite without us."""
    blobs = [secrets.token_bytes(size) for _ in range(GROUP)]
    groups = max(1, count // GROUP)
    log = os.open(folder / "log", os.O_RDWR | os.O_CREAT)

    def write(data: bytes, times: int) -> None:
        for turn in range(times):
            os.pwrite(log, data, turn * len(data))
            os.fdatasync(log)

    file = apsw.Connection(str(folder / "bare.db"))
    for statement in (
        "PRAGMA journal_mode = WAL",
        "PRAGMA synchronous = FULL",
        "CREATE TABLE t (id INTEGER PRIMARY KEY, b BLOB)",
    ):
        file.execute(statement).fetchall()

    def insert() -> None:
        for turn in range(groups):
            with file:
                file.executemany("INSERT INTO t VALUES (?, ?)", [(turn * GROUP + i, b) for i, b in enumerate(blobs)])

    try:
        return [
            row("disk: writes of 4 KiB, each synced", rate(200, lambda: write(bytes(4096), 200)), "/s"),
            row("disk: records, synced in groups", rate(groups * GROUP, lambda: write(b"".join(blobs), groups)), "/s"),
            row("SQLite alone: records, synced in groups", rate(groups * GROUP, insert), "/s"),
        ]
    finally:
        os.close(log)
        file.close()


def commits(path: Path, count: int, states: np.ndarray) -> list[Row]:
    """One by one, then ``count`` sessions whose commits wait at the writer at once: made, and moved on until each
    commit takes the place of a version that is kept no more, of each of those once."""
    store, life = SQLiteStore(path), new_incarnation()
    writer = CommitWriter(store)

    def put(session: int, version: int) -> tuple[Record, Expect | None]:
        return record(session, version, life, states), Expect(version - 1, life) if version > 1 else None

    alone = []
    for version in range(1, max(3, count // 10)):
        start = time.perf_counter()
        writer.submit(*put(count, version)).result()
        alone.append((time.perf_counter() - start) * 1e3)
    took = []
    for version in range(1, 2 * store.keep + 1):
        puts = [put(session, version) for session in range(count)]
        start = time.perf_counter()
        answered, _ = wait([writer.submit(*each) for each in puts])
        took.append(time.perf_counter() - start)
        for future in answered:
            future.result()  # raises what the store has refused
    writer.close()
    store.close()
    return [
        row("one durable commit, p50", statistics.median(alone), "ms"),
        row("one durable commit, p99", statistics.quantiles(alone, n=100)[98], "ms"),
        row("durable commits of new sessions, grouped", count / took[0], "/s", ">= 10000"),
        row(
            "durable commits of known sessions, grouped",
            count / statistics.fmean(took[store.keep :]),
            "/s",
            ">= 10000",
        ),
    ]


def restores(path: Path, count: int, states: np.ndarray) -> list[Row]:
    """By a store that is opened anew: read, checksum, adapter, model and shape verified, states ready as arrays."""

    keys, wanted, made = [SessionKey("bench", f"s{session}") for session in range(count)], states.tobytes(), []

    def one(records: Records, keys: list[SessionKey]) -> None:
        for key in keys:
            found = records.store.get(key)
            if found is None:
                raise SystemExit(f"session {key.session} is not there: nothing is reported")
            records.verify(found)

    for threads in LOADERS:
        store = SQLiteStore(path)
        records = Records(
            store,
            lambda key: None,
            lambda key: None,
            Meters(),
            layout=f"L{states.shape[1]}H1r8",
            adapter="a",
            model="m",
        )
        shares = [keys[first::threads] for first in range(threads)]
        with ThreadPoolExecutor(threads) as pool:
            start = time.perf_counter()
            list(pool.map(one, [records] * threads, shares))
            per_second = count / (time.perf_counter() - start)
        for key in keys:
            found = store.get(key)
            if found is None or found.base.tobytes() + found.end.tobytes() != wanted:
                raise SystemExit(f"session {key.session} came back different: nothing is reported")
        name = f"verified cold restores, {threads} thread{'s' * (threads > 1)}"
        made.append(row(name, per_second, "/s", ">= 20000" if threads == LOADERS[0] else ""))
        records.close()
        store.close()
    return made


def codec_rows(states: np.ndarray) -> list[Row]:
    """What of it is the record's own bytes."""
    made = record(0, 1, new_incarnation(), states)
    data = codec.encode(made)
    steps: dict[str, Callable[[], object]] = {
        "a record encoded": lambda: codec.encode(made),
        "a record decoded and verified": lambda: codec.decode(data, key=made.key),
        "of both: its checksum": lambda: codec.checksum(data),
    }
    return [row(name, 1e6 / rate(CODED, partial(repeat, work, CODED)), "µs") for name, work in steps.items()]


def repeat(work: Callable[[], object], times: int) -> None:
    """Keeps nothing of what is made: memory that nothing has used yet would have to be fetched from the system."""
    for _ in range(times):
        work()


def warm(path: Path, states: np.ndarray) -> list[Row]:
    """A session that is in memory: its admission, on the service's own loop, and the seed of its first page."""
    shape = states.shape[1:]
    service = SessionService(
        store_url=f"sqlite:///{path}", layout=f"L{shape[0]}H1r8", adapter="a", model="m", state_shape=shape,
        queue_depth=8, queue_seconds=30.0, secret=bytes(32),
    )  # fmt: skip
    key, tokens, took = SessionKey("bench", "s0"), np.arange(PROMPT, dtype=np.int32), []

    async def ask(running: SessionService) -> None:
        for turn in range(WARM + 1):
            start = time.perf_counter()
            answer = await running.admit(f"t{turn}", key, "readwrite", tokens, None, False)
            running.claim(f"t{turn}")
            if turn:
                took.append((time.perf_counter() - start) * 1e6)
            if not answer["version"]:
                raise SystemExit("the session is not there: nothing is reported")
            running.tickets.settle(f"t{turn}", {"status": "unchanged", "error": ""})

    loops = []

    async def serve(_: SessionService) -> None:
        loops.append(asyncio.get_running_loop())
        await asyncio.Event().wait()

    service.start(serve)
    try:
        asyncio.run_coroutine_threadsafe(ask(service), loops[0]).result()
    finally:
        service.close()
    admitted, seeded = statistics.median(took), statistics.median(seed_seconds(shape, WARM)) * 1e6
    return [
        row("warm load: admission p50", admitted, "µs"),
        row("warm load: slot to first page p50", seeded, "µs"),
        row("warm load: both", admitted + seeded, "µs", "<= 100"),
    ]


def once(count: int, states: np.ndarray, ours_first: bool) -> list[Row]:
    """Every figure of one round, on stores of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bench.db"
        size = len(codec.encode(record(0, 1, new_incarnation(), states)))
        ours = commits(path, count, states) if ours_first else []
        made = bare(Path(folder), size, count)
        made += ours or commits(path, count, states)
        alone = next(each["value"] for each in made if each["name"].startswith("SQLite alone"))
        for each in [each for each in made if each["name"].startswith("durable commits")]:
            made.append(row(f"{each['name']}, of SQLite alone", each["value"] / alone, "ratio"))
        return made + codec_rows(states) + restores(path, count, states) + warm(path, states)


def rows(count: int = 2048, layers: int = 36, rounds: int = 7) -> list[Row]:
    """Every figure: name, median of all rounds, unit, the goal where there is one, and the rounds' least and most.

    Args:
        count: sessions.
        layers: of a state, [layers, 1, 8, 8] fp32.
        rounds: SQLite alone and we take turns at being the first.
    """
    gc.collect()
    gc.freeze()  # as vLLM's engine does: what was imported is not searched for garbage while commits are made
    states = np.random.default_rng(0).normal(size=(2, layers, 1, 8, 8)).astype(np.float32)
    return summed_up([once(count, states, ours_first=bool(turn % 2)) for turn in range(rounds)])


def summed_up(rounds: list[list[Row]]) -> list[Row]:
    """Each figure's median over rounds, its least and its most."""
    values: dict[str, list[float]] = {each["name"]: [] for each in rounds[0]}
    for made in rounds:
        for each in made:
            values[each["name"]].append(each["value"])
    return [
        {**each, "value": statistics.median(found), "least": min(found), "most": max(found)}
        for each in rounds[0]
        for found in [values[each["name"]]]
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--commits", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    table = Table(
        "what", "median", "least", "most", "unit", "goal", title=f"states of {args.layers * 256} bytes, two to a record"
    )
    for each in rows(args.commits, args.layers, args.rounds):
        figures = (f"{each[name]:.{0 if each[name] >= 100 else 2}f}" for name in ("value", "least", "most"))
        table.add_row(each["name"], *figures, each["unit"], each["goal"])
    console().print(table)


if __name__ == "__main__":
    main()
