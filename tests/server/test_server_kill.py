"""kill -9 of the whole server while sessions commit: what clients were told is there after the restart.

Each kill costs a start of vLLM, so there are few here; ``sessions/test_kill`` has many, on the same service and store.
"""

import contextlib
import random
import threading
import time
from pathlib import Path

import httpx
import pytest

from deltamem_vllm.demo.server import VllmServer
from deltamem_vllm.store.protocol import SessionKey
from deltamem_vllm.store.sqlite import SQLiteStore
from tests.conftest import NIGHTLY
from tests.server.talk import TENANT, Talk, distance, new_session, ok, outcome
from tests.tolerances import SAME_MEMORY

KILLS = 50 if NIGHTLY else 1
SESSIONS = 4


class Committer(threading.Thread):
    """A client that sends one new turn after another until its server is gone.

    Attributes:
        session: its own.
        told: the version it was last told is committed.
        turns: prompts by version, and the one under way.
        dying: its server is being killed; the API process may outlive the engine by a moment and answer 500.
        wrong: what it was told that it should not have been.
    """

    def __init__(self, base_url: str, session: str, seed: int) -> None:
        super().__init__(daemon=True)
        self.base_url, self.session, self.rng = base_url, session, random.Random(seed)
        self.told = 0
        self.turns: list[list[int]] = []
        self.dying = False
        self.wrong = ""

    def run(self) -> None:
        with Talk(self.base_url) as talk, contextlib.suppress(httpx.TransportError):
            while not self.wrong:
                prompt = [self.rng.randrange(250) for _ in range(self.rng.randint(3, 60))]
                self.turns[self.told :] = [prompt]
                response = talk.complete(prompt, self.session, n=2)
                if self.dying and response.status_code >= 500:
                    return
                if outcome(response) != (self.session, f"{self.told + 1}", "committed"):
                    self.wrong = f"{response.status_code} {outcome(response)} after {self.told}: {response.text[:200]}"
                    return
                self.told += 1


def stored(path: Path, session: str) -> tuple[int, bytes]:
    store = SQLiteStore(path)
    try:
        record = store.get(SessionKey(TENANT, session))
        return (0, b"") if record is None else (record.version, record.end.tobytes())
    finally:
        store.close()


@pytest.mark.timeout(200 * (KILLS + 1))  # the server may have to start first
def test_what_was_told_survives_kill_9(server: VllmServer, talk: Talk) -> None:
    path = server.log.with_name("sessions.db")
    rng = random.Random(KILLS)
    sessions = [new_session() for _ in range(SESSIONS)]
    told = dict.fromkeys(sessions, 0)
    turns: dict[str, list[list[int]]] = {s: [] for s in sessions}
    for kill in range(KILLS):
        clients = []
        for i, session in enumerate(sessions):
            client = Committer(server.base_url, session, 100 * kill + i)
            client.told, client.turns = told[session], turns[session]
            clients.append(client)
        for client in clients:
            client.start()
        begun = time.monotonic()
        while any(c.told < told[c.session] + 2 for c in clients) and time.monotonic() - begun < 60:
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 1))
        for client in clients:
            client.dying = True
        server.kill()
        started = server.start()  # at once, so that what follows may fail and leave a server to the other tests
        for client in clients:
            client.join(30)
            assert not client.wrong, client.wrong
        before = {s: stored(path, s) for s in sessions}
        for client in clients:
            version = before[client.session][0]
            assert client.told > told[client.session], "nothing was committed: the kill shows nothing"
            assert client.told <= version <= client.told + 1, f"told {client.told}, {version} is in the store"
            told[client.session] = version
            turns[client.session] = client.turns[:version]
        started.wait_ready()
        for s in sessions:
            assert ok(talk.get(f"/v1/sessions/{s}"))["version"] == told[s]
            talk.complete([1, 2, 3], s, "read")
        assert {s: stored(path, s) for s in sessions} == before, "a start or a reader changed what was committed"
    for s in sessions:  # and it is the memory of just these turns
        fresh = new_session()
        for prompt in turns[s]:
            ok(talk.complete(prompt, fresh, n=2))
        assert distance(talk.probe(s), talk.probe(fresh)) <= SAME_MEMORY
