"""Servers on one store, what their sessions must remember, and what the store has."""

import contextlib
import tempfile
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from numpy.typing import NDArray

from deltamem_vllm.demo.server import ONE_WORKER, SMALL, VllmServer
from deltamem_vllm.recall import ADAPTER_DIR, MODEL_DIR
from deltamem_vllm.store.protocol import SessionKey
from deltamem_vllm.store.url import open_store
from loadtests.chaos.clients import Client, Door, take_turns
from loadtests.chaos.ledger import Ledger, Problem, Version
from loadtests.chaos.scripts import Script
from tests.tolerances import SAME_MEMORY

KEEP = 200
"""Versions that the store keeps of each session: all that a campaign writes."""
TENANT = "default"
FLAGS = ("--max-model-len", "1024", "--max-num-seqs", "64", "--served-model-name", "m")
APART = 100
"""By how many tolerances the memories of two turns must differ, so that one is not taken for the other."""
Memories = Mapping[Script, Sequence[NDArray[np.float32]]]


def replica(
    store_url: str, log: Path, *flags: str, env: Mapping[str, str] | None = None, alone: bool = False
) -> VllmServer:
    """A server of the bundled recall model, not started yet; ``alone``: without a memory."""
    adapter = None if alone else ADAPTER_DIR
    return VllmServer(MODEL_DIR, adapter, store_url, *SMALL, *FLAGS, *ONE_WORKER, *flags, env=env, log=log)


@dataclass
class Cluster:
    """Servers that run, and a door to them.

    Attributes:
        place: URL of the store as it is, without what lies between it and the servers.
        memories: what a session of each script must remember after each turn, once `learn` has been there.
    """

    servers: list[VllmServer]
    door: Door
    place: str
    memories: dict[Script, list[NDArray[np.float32]]] = field(default_factory=dict)

    @property
    def up(self) -> list[VllmServer]:
        """Servers that were not killed for good."""
        return [server for server in self.servers if server.pid is not None]

    async def learn(self, scripts: Sequence[Script], turns: int, label: str) -> None:
        """Take every script's turns in a session that nothing disturbs, and note its memory after each.

        Args:
            label: begins those sessions' ids.

        Raises:
            RuntimeError: something did disturb it, or two turns leave memories too alike to be told apart.
        """
        quiet = Door(self.door.http, self.door.urls[:1], Ledger(), self.door.model)
        undisturbed = [Client(quiet, f"{label}-undisturbed-{script.number}", script) for script in scripts]
        await take_turns(undisturbed, turns, workers=4)
        if quiet.ledger.other or quiet.ledger.of("committed") != turns * len(scripts):
            raise RuntimeError(f"the undisturbed sessions were disturbed: {dict(quiet.ledger.other)}")
        store = open_store(f"{self.place}?keep={KEEP}")
        with contextlib.closing(store):
            for client in undisturbed:
                found = [store.get_version(SessionKey(TENANT, client.session), n + 1) for n in range(turns)]
                self.memories[client.script] = [record.end for record in found if record is not None]
        for script, states in self.memories.items():
            if len(states) != turns:
                raise RuntimeError(f"the store kept {len(states)} of {turns} versions of {script}")
            apart = min((difference(a, b) for i, a in enumerate(states) for b in states[:i]), default=np.inf)
            if apart < APART * SAME_MEMORY:
                raise RuntimeError(f"two turns of {script} leave memories that differ by {apart:.1e} only")

    async def faults(self, clients: Iterable[Client]) -> list[str]:
        """Sessions whose version by the API, from any server, is not the one their client was told last."""

        async def ask(client: Client) -> str | None:
            url = f"{self.door.rng.choice(self.up).base_url}/v1/sessions/{client.session}"
            async with self.door.http.get(url) as response:
                seen = (await response.json()).get("version") if response.status == 200 else response.status
            told = client.last.version if client.last else None
            return None if seen == told else f"{client.session}: told {told}, GET says {seen}"

        found = []
        for client in clients:
            found.append(await ask(client))
        return [each for each in found if each]


@contextlib.contextmanager
def serving(ways: Sequence[str], *flags: str, **more: Any) -> Iterator[list[VllmServer]]:
    """Start servers, one for each of ``ways``: the store's URL as it sees it. All are killed at the end."""
    with tempfile.TemporaryDirectory(prefix="deltamem-chaos-") as folder:
        servers = [replica(url, Path(folder) / f"server{n}.log", *flags, **more) for n, url in enumerate(ways)]
        try:
            for server in servers:
                server.start()
            for server in servers:
                server.wait_ready()
            yield servers
        finally:
            for server in servers:
                server.kill()


@contextlib.asynccontextmanager
async def talking(servers: list[VllmServer], place: str) -> AsyncIterator[Cluster]:
    """A door to servers that run, with an empty ledger."""
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector) as http:
        yield Cluster(servers, Door(http, [server.base_url for server in servers], Ledger()), place)


def difference(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """The largest one between two memories."""
    return float(np.abs(a - b).max())


def turn_of(state: NDArray[np.float32], memories: Sequence[NDArray[np.float32]]) -> int | None:
    """The turn after which a session has this memory; None: after none."""
    apart = [difference(state, each) for each in memories]
    best = int(np.argmin(apart))
    return best + 1 if apart[best] <= SAME_MEMORY else None


def stored(place: str, clients: Iterable[Client], memories: Memories) -> dict[str, list[Version]]:
    """Every version of the clients' sessions that the store has, by session."""
    found: dict[str, list[Version]] = {}
    with contextlib.closing(open_store(f"{place}?keep={KEEP}")) as store:
        for client in clients:
            key, there = SessionKey(TENANT, client.session), []
            for info in store.history(key, KEEP):
                record = store.get_version(key, info.version)
                if record is not None:
                    turn = turn_of(record.end, memories[client.script])
                    there.append(Version(record.version, record.incarnation, record.request_id, turn))
            found[client.session] = there
    return found


def shown(problems: Sequence[Problem], most: int = 10) -> list[str]:
    """Problems as lines."""
    lines = [f"{problem.kind}: session {problem.session}: {problem.text}" for problem in problems[:most]]
    return [*lines, f"and {len(problems) - most} more"] if len(problems) > most else lines
