"""Replicas on one PostgreSQL, every request to one chosen at random; one of them is killed again and again.

Half of the clients resend their history, the others send only what is new. What is measured at each kill: the time
until the sessions that the killed server was writing, or may have held a lease of, were answered by another. How
much of that any answer may take on this machine, the slowest one that no kill met shows.
"""

import asyncio
import contextlib
import itertools
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from loadtests.chaos.clients import Client, GaveUp, take_turns
from loadtests.chaos.cluster import KEEP, Cluster, serving, stored, talking
from loadtests.chaos.ledger import Problem, Told, check
from loadtests.chaos.scripts import Script
from tests.store import services

RECENT = 0.5
"""Seconds: a session that a server answered so recently may still be leased to it."""
PROBES = 8
"""How many of those are asked for at a kill, at once, of another server."""
RESUME = 2.0
"""Seconds from a kill until another server answers, beyond what an answer takes: accepted."""
AFTERMATH = 10.0
"""Seconds after a kill whose answers say nothing of how long one takes without: far more than what is accepted."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much of it.

    Attributes:
        every: seconds from one kill to the next; longer where the killed server does not serve again by then.
        kills: exactly so many, spread over the turns, of which each leaves enough for the next; None: one after the
            other, ``every`` seconds apart, as long as there are turns.
        last_stays_down: the server that is killed last is not started again.
        workers: requests under way at a time.
        lease: seconds, as in the store's URL.
    """

    sessions: int = 1000
    turns: int = 10
    every: float = 30.0
    kills: int | None = None
    last_stays_down: bool = False
    workers: int = 8
    pace: float = 0.0
    scripts: int = 8
    lease: float = 1.0
    servers: int = 2


@dataclass
class Kill:
    """One kill.

    Attributes:
        waits: seconds until each session that the killed server was writing was answered by another.
        probes: the same of sessions that it had answered just before, whose lease it may have had.
        ready: seconds until it served again.
    """

    server: int
    at: float
    waits: list[float] = field(default_factory=list)
    probes: list[float] = field(default_factory=list)
    ready: float | None = None


@dataclass
class Report:
    """What came of it.

    Attributes:
        undisturbed: seconds of the slowest answer that no kill can have held up.
    """

    size: Size
    kills: list[Kill]
    seconds: float
    acknowledged: int
    unknown: int
    answers: dict[str, int]
    problems: list[Problem]
    faults: list[str]
    resumed: int
    undisturbed: float

    def late(self, limit: float) -> list[float]:
        """Waits that took more than ``limit`` seconds longer than an answer may take without a kill."""
        return [wait for wait in self.waits if wait > limit + self.undisturbed]

    @property
    def waits(self) -> list[float]:
        """Of all kills."""
        return [wait for kill in self.kills for wait in (*kill.waits, *kill.probes)]

    def rows(self) -> dict[str, Any]:
        """The figures, by what they are of."""
        count = {kind: sum(p.kind == kind for p in self.problems) for kind in ("lost", "fork", "applied twice")}
        waits = self.waits or [0.0]
        return {
            "sessions × turns": f"{self.size.sessions:,} × {self.size.turns}",
            "replicas killed": f"{len(self.kills)}, over {self.seconds:.0f} s",
            "acknowledged versions": f"{self.acknowledged:,}",
            "requests whose outcome nobody was told, sent again": self.unknown,
            "acknowledged versions lost": count["lost"],
            "forks": count["fork"],
            "turns applied twice": count["applied twice"],
            "versions with a memory that no turn leaves": sum(p.kind == "unknown memory" for p in self.problems),
            "sessions that went on afterwards": f"{self.resumed:,} of {self.size.sessions:,}",
            "sessions whose version by the API is another": len(self.faults),
            "sessions in flight or leased at a kill": sum(len(k.waits) + len(k.probes) for k in self.kills),
            "kill to their answer by another, p50 / max": f"{statistics.median(waits):.2f} / {max(waits):.2f} s",
            "slowest answer that no kill met": f"{self.undisturbed:.2f} s",
        }


def undisturbed(told: Iterable[Told], kills: Sequence[float]) -> float:
    """Seconds of the slowest answer that was not under way within `AFTERMATH` of any kill; 0: there is none."""
    apart = (each for each in told if all(each.at < kill or each.sent > kill + AFTERMATH for kill in kills))
    return max((each.at - each.sent for each in apart), default=0.0)


async def _kill(cluster: Cluster, clients: dict[str, Client], number: int, last: int, again: bool) -> Kill:
    """Kill a server, start it ``again`` or not, and see who takes its sessions over."""
    door, server = cluster.door, cluster.servers[number]
    others = [n for n in range(len(cluster.servers)) if n != number]
    under_way = [clients[session] for session in door.asking[number]]
    recent = time.monotonic() - RECENT
    idle = [
        client
        for client in clients.values()
        if client.last and client.last.server == number and client.last.at > recent and client.turn < last
    ]
    idle = [client for client in idle if not client.lock.locked()][:PROBES]
    kill = Kill(number, time.monotonic())
    await asyncio.to_thread(server.kill)
    if again:
        server.start()

    async def elsewhere(client: Client) -> float | None:
        while client.last is None or client.last.at < kill.at:
            if time.monotonic() > kill.at + door.patience:
                raise GaveUp(f"{client.session} was not served after the kill of server {number}")
            await asyncio.sleep(0.005)
        return None if client.last.server == number else client.last.at - kill.at

    async def probe(client: Client) -> float | None:
        if client.lock.locked() or client.turn >= last:  # it went on meanwhile
            return None
        return (await client.next(others[0])).at - kill.at

    async with asyncio.TaskGroup() as group:
        waits = [group.create_task(elsewhere(client)) for client in under_way]
        probes = [group.create_task(probe(client)) for client in idle]
    kill.waits = [wait for task in waits if (wait := task.result()) is not None]
    kill.probes = [wait for task in probes if (wait := task.result()) is not None]
    return kill


async def _keep_killing(
    cluster: Cluster, clients: dict[str, Client], size: Size, kills: list[Kill], over: asyncio.Event
) -> None:
    """Kill one server after the other, each when all of them serve."""
    door, everything = cluster.door, size.sessions * size.turns
    while size.kills is None or len(kills) < size.kills:
        number = len(kills) % len(cluster.servers)
        if size.kills is None:
            since = time.monotonic() - kills[-1].at if kills else 0.0
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(over.wait(), max(0.01, size.every - since))
        else:  # half of the turns up to the next kill are for the time until this one's server serves again
            part = everything / (size.kills + 1)
            door.most = (len(kills) + 1.5) * part
            while door.ledger.acknowledged < (len(kills) + 1) * part and not over.is_set():
                await asyncio.sleep(0.01)
        if over.is_set():
            return
        again = not size.last_stays_down or len(kills) + 1 != size.kills
        kill = await _kill(cluster, clients, number, size.turns, again)
        kills.append(kill)
        if not again:
            return
        await asyncio.to_thread(cluster.servers[number].wait_ready)
        kill.ready = time.monotonic() - kill.at


async def campaign(cluster: Cluster, size: Size, label: str = "replicas") -> Report:
    """Take all turns while servers are killed, then let every session go on once more, and look at what is stored."""
    scripts = [Script(number) for number in range(size.scripts)]
    await cluster.learn(scripts, size.turns + 1, label)
    names = [f"{label}-{n}" for n in range(size.sessions)]
    clients = {name: Client(cluster.door, name, scripts[n % len(scripts)]) for n, name in enumerate(names)}
    kills: list[Kill] = []
    over, begun = asyncio.Event(), time.monotonic()
    killing = asyncio.create_task(_keep_killing(cluster, clients, size, kills, over))
    killing.add_done_callback(lambda _: cluster.door.let_everybody_in())  # if it failed, too
    try:
        await take_turns(list(clients.values()), size.turns, size.workers, size.pace)
    finally:
        seconds = time.monotonic() - begun
        over.set()
        await killing
    for server in cluster.up:
        await asyncio.to_thread(server.wait_ready)
    acknowledged = cluster.door.ledger.acknowledged
    await take_turns(list(clients.values()), size.turns + 1, size.workers)
    resumed = sum(client.turn == size.turns + 1 for client in clients.values())
    faults = await cluster.faults(clients.values())
    ledger = cluster.door.ledger
    there = await asyncio.to_thread(stored, cluster.place, clients.values(), cluster.memories)
    return Report(
        size=size,
        kills=kills,
        seconds=seconds,
        acknowledged=acknowledged,
        unknown=sum(sum(each.values()) for each in ledger.unknown.values()),
        answers=dict(ledger.other),
        problems=check(ledger, there),
        faults=faults,
        resumed=resumed,
        undisturbed=undisturbed(itertools.chain(*ledger.told.values()), [kill.at for kill in kills]),
    )


def run(size: Size) -> Report:
    """The campaign on servers and a PostgreSQL of its own."""

    async def inner() -> Report:
        async with talking(servers, place) as cluster:
            return await campaign(cluster, size)

    with services.postgres() as postgres:
        place = f"postgresql://test@127.0.0.1:{postgres.port}/postgres"
        with serving([f"{place}?lease={size.lease:g}&keep={KEEP}"] * size.servers) as servers:
            return asyncio.run(inner())
