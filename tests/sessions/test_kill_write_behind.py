"""kill -9 with write-behind: what was told ``committed`` is there, and of what was told ``pending`` no more is lost
than the bounds say."""

import asyncio
import random
import secrets
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
import pytest
import zmq.asyncio

from deltamem_vllm.errors import CapacityError
from deltamem_vllm.sessions.control import ControlClient
from deltamem_vllm.store.sqlite import SQLiteStore
from tests.conftest import NIGHTLY
from tests.sessions.harness import TENANT, ids, key, memory
from tests.sessions.test_kill import child, commit_for

KILLS = 200 if NIGHTLY else 12
SESSIONS = 8
VERSIONS, SECONDS = 6, 1.0


@dataclass
class Client:
    """One session's client: what it was told of each version, and when."""

    name: str
    rng: random.Random
    version: int = 0
    committed: int = 0
    told: dict[int, float] = field(default_factory=dict)  # of the pending ones
    states: list[np.ndarray] = field(default_factory=lambda: [memory(None, [])])  # by version

    async def work(self, control: ControlClient, engine: zmq.asyncio.Socket) -> None:
        """Send one new turn after another."""
        while True:
            prompt = [self.rng.randrange(1 << 20) for _ in range(self.rng.randint(1, 20))]
            ticket = secrets.token_hex(16)
            question = {"ticket": ticket, "session": self.name, "mode": "readwrite", "salt": None, "held": False}
            try:
                granted = await control.ask("admit", tenant=TENANT, tokens=ids(prompt).tobytes(), **question)
            except CapacityError:  # without bounds, so many wait that the session is told to
                await asyncio.sleep(0.01)
                continue
            assert granted["version"] == self.version, "it goes on from another version than it told"
            self.states[self.version + 1 :] = [memory(self.states[self.version], prompt)]
            await engine.send(msgspec.msgpack.encode([ticket, prompt]))
            outcome = await control.ask("outcome", ticket=ticket)
            assert outcome["version"] == self.version + 1, outcome
            self.version = outcome["version"]
            if outcome["status"] == "committed":
                self.committed = self.version  # and so are those before it
            else:
                assert outcome["status"] == "pending", outcome
                self.told[self.version] = time.monotonic()

    def lost(self, store: SQLiteStore) -> list[float]:
        """When the versions were told that the store does not have; go on from what it has."""
        record = store.get(key(self.name))
        version = record.version if record is not None else 0
        assert version >= self.committed, f"{self.name}: version {self.committed} was committed, {version} is there"
        assert version < len(self.states), f"{self.name}: version {version} is there, which nobody has asked for"
        if record is not None:
            assert record.end.tobytes() == self.states[version].tobytes(), f"{self.name}: another state"
        lost = [self.told[number] for number in range(version + 1, self.version + 1)]
        self.version = self.committed = version
        self.told.clear()
        return lost


def check_kills(folder: Path, kills: int, bug: str = "none") -> tuple[int, int]:
    """Kill a serving process again and again; returns how many pending versions were told and lost."""
    rng, told, all_lost = random.Random(kills), 0, 0
    clients = [Client(f"s{i}", random.Random(i)) for i in range(SESSIONS)]
    for _ in range(kills):
        with (
            tempfile.TemporaryDirectory() as sockets,
            child(folder / "s.db", sockets, bug, f"{SECONDS},{VERSIONS}") as process,
        ):
            asyncio.run(commit_for(clients, sockets, rng.uniform(0.1, 0.4), process))  # type: ignore[arg-type]
        told += sum(len(client.told) for client in clients)
        store = SQLiteStore(folder / "s.db")
        lost = sorted(at for client in clients for at in client.lost(store))
        store.close()
        all_lost += len(lost)
        assert len(lost) <= VERSIONS, f"{len(lost)} versions are lost, {VERSIONS} may be"
        if lost:  # heard by the clients up to a moment later than told
            assert lost[-1] - lost[0] <= SECONDS + 0.5, f"what is lost was told over {lost[-1] - lost[0]:.1f} s"
    return told, all_lost


def test_a_kill_loses_no_more_than_the_bounds_say(tmp_path: Path) -> None:
    told, lost = check_kills(tmp_path, KILLS)
    print(f"{KILLS} kills: {told} versions told pending, {lost} lost, at most {VERSIONS} at once")
    assert told >= KILLS, "too little was told ahead of the store for this to say anything"
    assert lost, "nothing waited when the process was killed: the bound was not put to the test"


def test_catches_bounds_that_are_not_kept(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"versions are lost, 6 may be"):
        check_kills(tmp_path, 5, "unbounded")
