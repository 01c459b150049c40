"""A real server with write-behind and a quota: what clients are told, and what an orderly end leaves."""

import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from deltamem_vllm.demo.server import VllmServer
from deltamem_vllm.store.protocol import SessionKey
from deltamem_vllm.store.sqlite import SQLiteStore
from tests.server.conftest import FLAGS, HERE, MODEL
from tests.server.talk import TENANT, Talk, ok, outcome, refused
from tests.server.talk import closing as closing_words

OURS = ["--deltamem-durability", "write-behind", "--deltamem-host-bytes", "8MiB", "--deltamem-ttl", "3600"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("write-behind")


@pytest.fixture(scope="module")
def behind(adapter: Path, folder: Path) -> Iterator[VllmServer]:
    sockets = folder / "tmp"
    sockets.mkdir()
    url = f"sqlite:///{folder}/sessions.db?max_sessions=3"
    env = {**HERE, "TMPDIR": str(sockets)}
    made = VllmServer(MODEL, adapter, url, *FLAGS, *OURS, env=env, log=folder / "log")
    with made:
        made.wait_ready()
        yield made


def test_it_tells_ahead_of_the_store_and_saves_at_the_end(behind: VllmServer, folder: Path) -> None:
    with Talk(behind.base_url) as talk:
        assert outcome(talk.complete([1, 2, 3], "a")) == ("a", "1", "committed"), "the quota may refuse a new session"
        assert outcome(talk.complete([4, 5, 6], "a")) == ("a", "2", "pending")
        with talk.streamed([7, 8, 9], "a") as stream:
            said = closing_words(stream.read().decode())
        assert (said["x-session-version"], said["x-deltamem-commit"]) == ("3", "pending")
        deadline = time.monotonic() + 30
        while not (found := ok(talk.get("/v1/sessions/a")))["durable"]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert (found["version"], found["lost"]) == (3, 0)

        for name in ("b", "c"):
            ok(talk.complete([1], name))
        response = talk.complete([1], "d")
        refused(response, 429, "3 of 3 sessions are used", "max_sessions")
        assert response.headers["retry-after"]
        ok(talk.complete([1], "d", "read"))
        ok(talk.delete("/v1/sessions/b"))
        assert outcome(talk.complete([1], "d")) == ("d", "1", "committed")

        last = {name: outcome(talk.complete([n], name))[1] for n in range(5) for name in ("a", "c", "d")}
        with closing(sqlite3.connect(folder / "sessions.db", isolation_level=None)) as lock:
            lock.execute("BEGIN IMMEDIATE")  # the store takes nothing, so that a version is sure to wait at the end
            session, version, status = outcome(talk.complete([77], "a"))
            assert (session, status) == ("a", "pending")
            last["a"] = version
            assert not ok(talk.get("/v1/sessions/a"))["durable"]
            stopping = threading.Thread(target=behind.stop)
            stopping.start()
            deadline = time.monotonic() + 60
            while "[shutdown] API server: stopping engine client" not in behind.log.read_text(errors="replace"):
                assert time.monotonic() < deadline, behind.last_lines(40)
                time.sleep(0.01)
            lock.execute("ROLLBACK")
        stopping.join(90)
        assert not stopping.is_alive()
    with closing(SQLiteStore(folder / "sessions.db")) as store:
        for name, version in last.items():
            kept = store.get(SessionKey(TENANT, name))
            assert kept is not None
            assert str(kept.version) == version, behind.last_lines(40)
    assert list((folder / "tmp").glob("deltamem-*")) == [], "the sockets' folder goes with its server"
