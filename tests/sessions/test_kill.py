"""kill -9 while several clients commit: what a client was told is committed is in the store, byte for byte.

This cannot show a missing fsync, because the page cache survives the process; ``store/test_power_loss`` is for that.
"""

import asyncio
import contextlib
import os
import random
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
import pytest
import zmq
import zmq.asyncio

from deltamem_vllm.sessions.control import ControlClient
from deltamem_vllm.store.sqlite import SQLiteStore
from tests.conftest import NIGHTLY
from tests.sessions.harness import TENANT, ids, key, memory

KILLS = 500 if NIGHTLY else 15
SESSIONS = 8
ROOT = Path(__file__).parents[2]


@dataclass
class Client:
    """One session's client: what it sent, and how much of that it was told is committed."""

    name: str
    rng: random.Random
    committed: int = 0
    states: list[np.ndarray] = field(default_factory=lambda: [memory(None, [])])  # by version

    async def work(self, control: ControlClient, engine: zmq.asyncio.Socket) -> None:
        """Send one new turn after another."""
        while True:
            prompt = [self.rng.randrange(1 << 20) for _ in range(self.rng.randint(1, 20))]
            ticket = secrets.token_hex(16)
            question = {"ticket": ticket, "session": self.name, "mode": "readwrite", "salt": None, "held": False}
            granted = await control.ask("admit", tenant=TENANT, tokens=ids(prompt).tobytes(), **question)
            assert granted["version"] == self.committed, "it goes on from another version than it told"
            self.states[self.committed + 1 :] = [memory(self.states[self.committed], prompt)]
            await engine.send(msgspec.msgpack.encode([ticket, prompt]))
            outcome = await control.ask("outcome", ticket=ticket)
            assert (outcome["status"], outcome["version"]) == ("committed", self.committed + 1), outcome
            self.committed = outcome["version"]

    def check(self, store: SQLiteStore) -> None:
        """The store has what was acknowledged, or the one request more that was under way; go on from there."""
        record = store.get(key(self.name))
        version = record.version if record is not None else 0
        assert version >= self.committed, f"{self.name}: version {self.committed} was told, {version} is there"
        assert version < len(self.states), f"{self.name}: version {version} is there, which nobody has asked for"
        if record is not None:
            assert record.end.tobytes() == self.states[version].tobytes(), f"{self.name}: another state"
        self.committed = version


@contextlib.contextmanager
def child(store: Path, folder: str, bug: str, *behind: str) -> Iterator["subprocess.Popen[bytes]"]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.sessions.committing", f"sqlite:///{store}", folder, bug, *behind]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=env, cwd=ROOT)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield process
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


async def commit_for(clients: list[Client], folder: str, seconds: float, process: "subprocess.Popen[bytes]") -> None:
    """Let the clients commit for a while, then kill -9 the process under them."""
    context = zmq.asyncio.Context()
    control, engine = ControlClient(f"ipc://{folder}/control"), context.socket(zmq.PUSH)
    engine.linger = 0
    engine.connect(f"ipc://{folder}/engine")
    tasks = [asyncio.create_task(c.work(control, engine)) for c in clients]
    try:
        done, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
        process.kill()
        await asyncio.sleep(0.01)  # answers sent before the end still arrive and count
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        control.close()
        engine.close()
        context.term()


def check_kills(folder: Path, kills: int, bug: str = "none") -> int:
    """Kill a serving process ``kills`` times on one store; returns how many commits were acknowledged."""
    rng, acknowledged = random.Random(kills), 0
    clients = [Client(f"s{i}", random.Random(i)) for i in range(SESSIONS)]
    for _ in range(kills):
        before = sum(c.committed for c in clients)
        with tempfile.TemporaryDirectory() as sockets, child(folder / "s.db", sockets, bug) as process:
            asyncio.run(commit_for(clients, sockets, rng.uniform(0, 0.3), process))
        acknowledged += sum(c.committed for c in clients) - before
        store = SQLiteStore(folder / "s.db")
        for client in clients:
            client.check(store)
        store.close()
    return acknowledged


def test_every_commit_a_client_was_told_of_survives(tmp_path: Path) -> None:
    assert check_kills(tmp_path, KILLS) >= 2 * KILLS


def test_catches_an_outcome_told_before_it_is_durable(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"was told|than it told"):
        check_kills(tmp_path, 10, "early")
