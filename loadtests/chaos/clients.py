"""Clients of a campaign: each has a session and sends its turns, to a server chosen at random, until it is told what
became of them."""

import asyncio
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import aiohttp

from loadtests.chaos.ledger import Ledger, Told
from loadtests.chaos.scripts import Script

TAKEN = ("committed", "degraded", "pending")
PAUSE = 0.05
"""Seconds before a request is sent again: a load balancer would not wait longer."""
TIMEOUT = aiohttp.ClientTimeout(total=60)


class GaveUp(Exception):
    """A turn was not taken in time, or an answer is not what a client may be told."""


@dataclass
class Door:
    """Where clients find the servers.

    Attributes:
        urls: of the servers.
        ledger: what clients are told goes there.
        patience: seconds after which a client gives up on a turn.
        asking: sessions whose request a server is carrying out now, by server.
        most: so many turns are acknowledged before clients wait with their next one; those under way go on.
    """

    http: aiohttp.ClientSession
    urls: Sequence[str]
    ledger: Ledger
    model: str = "m"
    seed: int = 0
    patience: float = 120.0
    most: float = math.inf
    asking: list[set[str]] = field(init=False)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.asking = [set() for _ in self.urls]

    async def enter(self) -> None:
        """Wait until a further turn may be begun."""
        while self.ledger.acknowledged >= self.most:
            await asyncio.sleep(0.01)

    def let_everybody_in(self) -> None:
        """No client waits any longer."""
        self.most = math.inf


@dataclass
class Client:
    """One session's client.

    Attributes:
        turn: the last one that it was told of.
        last: what it was told then.
    """

    door: Door
    session: str
    script: Script
    turn: int = 0
    last: Told | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def next(self, server: int | None = None) -> Told:
        """Send the next turn until its outcome is known.

        Args:
            server: where to send it first; None: to any. It is sent again to any.

        Raises:
            GaveUp: see there.
        """
        async with self.lock:
            turn, until = self.turn + 1, time.monotonic() + self.door.patience
            while True:
                at = self.door.rng.randrange(len(self.door.urls)) if server is None else server
                server = None
                told = await self._send(turn, at)
                if told is not None:
                    self.turn, self.last = turn, told
                    self.door.ledger.told[self.session].append(told)
                    return told
                if time.monotonic() > until:
                    raise GaveUp(f"{self.session}: turn {turn} was not taken within {self.door.patience:g} s")
                await asyncio.sleep(PAUSE)

    async def _send(self, turn: int, server: int) -> Told | None:
        """Send a turn once; None: it is to be sent again."""
        door, ledger, sent = self.door, self.door.ledger, time.monotonic()
        door.asking[server].add(self.session)
        try:
            async with door.http.post(
                f"{door.urls[server]}/v1/completions",
                json=self.script.body(turn, door.model),
                headers={"X-Session-ID": self.session},
                timeout=TIMEOUT,
            ) as response:
                text = await response.text()
        except aiohttp.ClientConnectorError:
            ledger.other["refused connection"] += 1
            return None
        except (aiohttp.ClientError, TimeoutError) as error:
            ledger.unknown[self.session][turn] += 1
            ledger.other[type(error).__name__] += 1
            return None
        finally:
            door.asking[server].discard(self.session)
        status, version = response.headers.get("X-DeltaMem-Commit"), response.headers.get("X-Session-Version")
        if response.status == 200 and status in TAKEN and version is not None:
            return Told(self.session, turn, int(version), status, server, sent, time.monotonic())
        if response.status == 200 and status in ("conflict", "failed", "aborted"):
            ledger.other[status] += 1
        elif response.status in (409, 429, 503):
            ledger.other[str(response.status)] += 1
        elif response.status >= 500 or status == "unknown":
            ledger.unknown[self.session][turn] += 1
            ledger.other[status or str(response.status)] += 1
        else:
            raise GaveUp(f"{self.session}: turn {turn} was answered {response.status}, {status}: {text[:300]}")
        return None


async def take_turns(clients: Sequence[Client], turns: int, workers: int, pace: float = 0.0) -> None:
    """Every client's turns up to ``turns``, ``workers`` requests at a time, in rounds: sessions are idle in between.

    Args:
        pace: seconds that a worker rests after each turn.
    """
    left = asyncio.Queue[Client]()
    for client in clients:
        left.put_nowait(client)

    async def work() -> None:
        while not left.empty():
            client = left.get_nowait()
            await client.door.enter()
            if client.lock.locked():  # somebody else sends its turn
                await asyncio.sleep(PAUSE)
            elif client.turn < turns:
                await client.next()
            if client.turn < turns:
                left.put_nowait(client)
            if pace:
                await asyncio.sleep(pace)

    async with asyncio.TaskGroup() as group:
        for _ in range(workers):
            group.create_task(work())
