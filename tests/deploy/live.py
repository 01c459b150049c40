"""A real server on a real PostgreSQL behind a proxy, watched by a real Prometheus with the shipped rules."""

import contextlib
import itertools
import os
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx
import psycopg

from deltamem_vllm.demo.server import ONE_WORKER, VllmServer
from tests.deploy.prometheus import Prometheus
from tests.server.conftest import HERE, MODEL
from tests.server.talk import API_KEY, Talk
from tests.store import services

FLAGS = (
    "--dtype float32 --block-size 32 --max-model-len 1024 --enforce-eager --served-model-name m --max-num-seqs 4 "
    f"--api-key {API_KEY} --deltamem-queue-depth 2 --deltamem-session-slots 8 --deltamem-host-bytes 1MiB"
).split()
FLAGS += [*ONE_WORKER, "--logits-processors", "tests.server.slow:Slow"]
PLANTED = Path(__file__).parent / "planted"
_names = itertools.count(1)


def serve(adapter: Path, store: str, folder: Path, *more: str) -> VllmServer:
    """A server in whose processes `PLANTED` can cause what a sound one does not give."""
    env = {**HERE, "PYTHONPATH": os.pathsep.join([str(PLANTED), HERE["PYTHONPATH"]])}
    env["DELTAMEM_TEST_CAUSES"] = str(folder / "causes")
    return VllmServer(MODEL, adapter, store, *FLAGS, *more, env=env, log=folder / "log")


@dataclass
class Live:
    """What a cause of alerts works with.

    Attributes:
        server, prometheus: the processes.
        postgres, proxy: the store, and what the server takes for it.
        folder: the server's; the audit log is in it.
        statuses: of all answers so far, how often each came.
    """

    server: VllmServer
    prometheus: Prometheus
    postgres: services.Server
    proxy: services.Proxy
    folder: Path
    statuses: dict[str, int] = field(default_factory=dict)
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(8))

    @property
    def database(self) -> psycopg.Connection[tuple[object, ...]]:
        """A connection past the proxy."""
        return psycopg.connect(f"postgresql://test@127.0.0.1:{self.postgres.port}/postgres", autocommit=True)

    def turn(self, session: str, size: int = 12, mode: str | None = None, n: int = 2, pace: float = 0.0) -> str:
        """A new turn of a session; what became of it: the commit, or the status where it is no success."""
        prompt = [random.randrange(250) for _ in range(size)]
        more = {"vllm_xargs": {"step_seconds": pace}} if pace else {}
        with Talk(self.server.base_url) as talk:
            try:
                response = talk.complete(prompt, session, mode, n, logprobs=None, **more)
            except httpx.TransportError as error:
                return self._count(type(error).__name__)
        good = response.status_code == 200
        return self._count(response.headers.get("X-DeltaMem-Commit", "none") if good else str(response.status_code))

    def turns(self, *sessions: str, size: int = 12) -> list[str]:
        """One turn of each, several at a time."""
        return list(self.pool.map(lambda session: self.turn(session, size), sessions))

    def recover(self) -> None:
        """Wait until a new session is served and saved as it should be: nothing of a cause is left."""
        self.prometheus.until(lambda: self.turn(new_session()) == "committed", 30, f"not well again: {self.statuses}")

    def busy(self, session: str) -> bool:
        """Whether a request writes it now."""
        with Talk(self.server.base_url) as talk:
            return bool(talk.get(f"/v1/sessions/{session}").json()["busy"])

    def delete(self, session: str) -> None:
        """By the API."""
        with Talk(self.server.base_url) as talk:
            talk.delete(f"/v1/sessions/{session}")

    def _count(self, what: str) -> str:
        self.statuses[what] = self.statuses.get(what, 0) + 1
        return what


@contextlib.contextmanager
def another_server(live: Live, adapter: Path, folder: Path) -> Iterator[Live]:
    """A second server on the same database, past the proxy, with another adapter. It starts, whatever is done to the
    first meanwhile, and Prometheus does not watch it yet."""
    with serve(adapter, f"postgresql://test@127.0.0.1:{live.postgres.port}/postgres", folder) as server:
        yield replace(live, server=server, folder=folder, statuses={})


def new_session() -> str:
    """An id that is not used elsewhere."""
    return f"observed-{next(_names)}"


@contextlib.contextmanager
def load(live: Live) -> Iterator[None]:
    """Ordinary requests meanwhile, two at a time: returning sessions and new ones, writing, reading, without memory."""
    ended = threading.Event()

    def client(number: int) -> None:
        own = new_session()
        for turn in itertools.count():
            if ended.wait(0.05):
                return
            match turn % 6:
                case 4:
                    live.turn(own, mode="read")
                case 5:
                    live.turn(new_session(), mode="off" if turn % 12 == 5 else None)
                case _:
                    live.turn(own, size=40)

    threads = [threading.Thread(target=client, args=(number,), daemon=True) for number in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join(120)


@contextlib.contextmanager
def live_server(adapter: Path, folder: Path, rules: str) -> Iterator[Live]:
    """Start everything, and end it. Prometheus has ``rules`` beside the shipped ones."""
    (folder / "prometheus").mkdir()
    with services.postgres() as postgres:
        proxy = services.Proxy(postgres.port)
        store = f"postgresql://test@127.0.0.1:{proxy.port}/postgres?retry=0.1"
        with serve(adapter, store, folder, "--deltamem-audit", str(folder / "audit.log")) as server:
            server.wait_ready()
            with Prometheus(folder / "prometheus", [f"127.0.0.1:{server.port}"], rules) as prometheus:
                made = Live(server, prometheus, postgres, proxy, folder)
                yield made
                made.pool.shutdown()
        proxy.close()
