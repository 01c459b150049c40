"""The store is away, silent, slow or full for a while under a server whose clients go on.

Sessions that are in the server's memory must be answered all the same, and told `degraded` where their version is not
stored yet; every version that anybody was told of must be there afterwards, and soon.
"""

import asyncio
import contextlib
import statistics
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from deltamem_vllm.metrics import BACKLOG_VERSIONS, LOST_VERSIONS
from loadtests.chaos.clients import Client
from loadtests.chaos.cluster import KEEP, Cluster, serving, stored, talking
from loadtests.chaos.ledger import Problem, check
from loadtests.chaos.scripts import Script
from tests.pages import at, read
from tests.store import services

Fault = Literal["cut", "silent", "slow", "full"]
RECOVERY = 5.0
"""Seconds from a store's return until everything is in it: accepted."""
WARM, LATENCY = 2, 0.1
"""Turns of each session before anything breaks; seconds by which a slow store delays whatever is sent."""


class Store(Protocol):
    """A store that can be broken.

    Attributes:
        place: its URL, for who looks at it afterwards. way: its URL for the server.
    """

    place: str
    way: str

    def break_it(self) -> None: ...

    def mend(self) -> None: ...


class Behind:
    """A PostgreSQL behind a proxy: cut, silent (what is sent arrives when it is mended, even if nobody waits for an
    answer any more), or slow."""

    def __init__(self, port: int, fault: Fault) -> None:
        self.proxy, self.fault = services.Proxy(port), fault
        self.place = f"postgresql://test@127.0.0.1:{port}/postgres"
        self.way = f"postgresql://test@127.0.0.1:{self.proxy.port}/postgres?keep={KEEP}"
        self._passes = threading.Event()
        self._passes.set()

    def break_it(self) -> None:
        """See the class."""
        if self.fault == "cut":
            self.proxy.down = True
            self.proxy.cut()
        elif self.fault == "silent":
            self._passes.clear()
            self.proxy.forward = lambda data: self._passes.wait()
        else:
            self.proxy.forward = lambda data: not time.sleep(LATENCY)  # type: ignore[func-returns-value]

    def mend(self) -> None:
        """As it was before."""
        self.proxy.down = False
        self.proxy.forward = lambda data: True
        self._passes.set()


class SmallDisk:
    """A SQLite file on a small disk of its own (a tmpfs, which only root can mount), filled up by another file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.place = f"sqlite:///{folder}/sessions.db"
        self.way = f"{self.place}?keep={KEEP}"

    def break_it(self) -> None:
        """Fill it to the last byte."""
        with (self.folder / "ballast").open("ab", buffering=0) as ballast, contextlib.suppress(OSError):
            while True:
                ballast.write(bytes(4096))

    def mend(self) -> None:
        """Make room."""
        (self.folder / "ballast").unlink()


@contextlib.contextmanager
def store_with(fault: Fault) -> Iterator[Store]:
    """A store that is well, and can be given this fault."""
    if fault == "full":
        with tempfile.TemporaryDirectory(prefix="deltamem-disk-") as folder:
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder], check=True)
            try:
                yield SmallDisk(Path(folder))
            finally:
                subprocess.run(["umount", "--lazy", folder], check=True)
        return
    with services.postgres() as postgres:
        behind = Behind(postgres.port, fault)
        try:
            yield behind
        finally:
            behind.mend()
            behind.proxy.close()


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much of it.

    Attributes:
        seconds: how long the store is broken.
        rate: requests per second, over all sessions.
    """

    sessions: int = 40
    seconds: float = 60.0
    rate: float = 10.0
    scripts: int = 8

    @property
    def turns(self) -> int:
        """That each session can have."""
        return WARM + 4 + int(1.5 * self.rate * (self.seconds + 10) / self.sessions)


@dataclass
class Report:
    """What came of it.

    Attributes:
        told: outcomes while the store was broken, and refusals, by kind.
        took: seconds that each answer took meanwhile.
        committed: seconds from the mending until an answer said `committed` again.
        saved: seconds from the mending until every session was durable; None: not in time.
        lost: versions that the server itself reported as lost.
    """

    fault: Fault
    size: Size
    told: dict[str, int]
    took: list[float]
    committed: float | None
    saved: float | None
    lost: int
    acknowledged: int
    resumed: int
    problems: list[Problem] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def rows(self) -> dict[str, Any]:
        """The figures, by what they are of."""
        took = sorted(self.took) or [0.0]
        none = "not within the time"
        return {
            "the store": f"{self.fault} for {self.size.seconds:g} s, {self.size.sessions} sessions",
            "answers meanwhile": ", ".join(f"{count} {kind}" for kind, count in sorted(self.told.items())),
            "their time, p50 / max": f"{statistics.median(took):.2f} / {took[-1]:.2f} s",
            "from its return to the first `committed`": none if self.committed is None else f"{self.committed:.2f} s",
            "from its return until all was stored": none if self.saved is None else f"{self.saved:.2f} s",
            "versions that clients were told of": f"{self.acknowledged:,}",
            "of them lost, unreported": sum(problem.kind == "lost" for problem in self.problems),
            "reported as lost by the server": self.lost,
            "forks, turns applied twice, unknown memories": sum(problem.kind != "lost" for problem in self.problems),
            "sessions that went on afterwards": f"{self.resumed} of {self.size.sessions}",
            "sessions whose version by the API is another": len(self.faults),
        }


@contextlib.asynccontextmanager
async def _working(clients: list[Client], size: Size) -> AsyncIterator[list[tuple[float, float]]]:
    """Clients at work, each in its pace; yields begin and end of every turn, as they come."""
    turns: list[tuple[float, float]] = []
    over = asyncio.Event()

    async def work(client: Client, first: float) -> None:
        await asyncio.sleep(first)
        while not over.is_set() and client.turn < size.turns - 1:
            begun = time.monotonic()
            await client.next()
            turns.append((begun, time.monotonic()))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(over.wait(), max(0.001, begun + size.sessions / size.rate - time.monotonic()))

    async with asyncio.TaskGroup() as group:
        for number, client in enumerate(clients):
            group.create_task(work(client, number / size.rate))
        try:
            yield turns
        finally:
            over.set()


async def _until(done: Any, seconds: float) -> float | None:
    """Seconds until a condition holds; None: it did not in time."""
    begun = time.monotonic()
    while time.monotonic() < begun + seconds:
        if await done():
            return time.monotonic() - begun
        await asyncio.sleep(0.05)
    return None


async def campaign(cluster: Cluster, store: Store, fault: Fault, size: Size, recovery: float = 30.0) -> Report:
    """Sessions at work; the store breaks and is mended; then every version that was told is looked for."""
    scripts = [Script(number) for number in range(size.scripts)]
    await cluster.learn(scripts, size.turns, fault)
    door, ledger = cluster.door, cluster.door.ledger
    clients = [Client(door, f"{fault}-{n}", scripts[n % len(scripts)]) for n in range(size.sessions)]
    for _ in range(WARM):
        for client in clients:
            await client.next()

    async def metrics() -> Any:
        async with door.http.get(f"{door.urls[0]}/metrics") as response:
            return read(await response.text())

    async def committed() -> bool:
        return any(t.status == "committed" and t.at > mended for each in ledger.told.values() for t in each)

    async def all_saved() -> bool:
        return at(await metrics(), BACKLOG_VERSIONS) == 0

    async with _working(clients, size) as turns:
        await asyncio.sleep(1.0)
        before, broken = Counter(ledger.other), time.monotonic()
        await asyncio.to_thread(store.break_it)
        await asyncio.sleep(size.seconds)
        mended = time.monotonic()
        await asyncio.to_thread(store.mend)
        refusals = Counter(ledger.other) - before
        first, saved = await asyncio.gather(_until(committed, recovery), _until(all_saved, recovery))
    told = Counter(t.status for each in ledger.told.values() for t in each if broken < t.at < mended)
    for client in clients:
        await client.next()
    there = await asyncio.to_thread(stored, store.place, clients, cluster.memories)
    return Report(
        fault=fault,
        size=size,
        told=dict(told + refusals),
        took=[end - begun for begun, end in turns if broken < end and begun < mended],
        committed=first,
        saved=saved,
        lost=int(at(await metrics(), LOST_VERSIONS)),
        acknowledged=ledger.acknowledged,
        resumed=sum(client.last is not None and client.last.status == "committed" for client in clients),
        problems=check(ledger, there),
        faults=await cluster.faults(clients),
    )


def run(fault: Fault, size: Size) -> Report:
    """The campaign on a server and a store of its own."""

    async def inner() -> Report:
        async with talking(servers, store.place) as cluster:
            return await campaign(cluster, store, fault, size)

    with store_with(fault) as store, serving([store.way]) as servers:
        return asyncio.run(inner())
