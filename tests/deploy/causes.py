"""What each alert is about, done to live processes.

Each cause is a context: entered, it begins; it yields what is to be repeated until the alerts fire (a call takes
seconds at most); left, the cause is gone. `CAUSES` says which alerts each must make fire.
"""

import contextlib
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from tests.deploy.bad_adapter import FEW, MANY
from tests.deploy.live import Live, new_session
from tests.deploy.prometheus import intervals
from tests.server.test_engine_ends import engine_pid

Again = Callable[[], object]
ANSWER_SECONDS = 3.5
"""How long an answer takes in `races`: a request that waits for two waits for longer than the alert on waits wants."""
OF_THE_OTHER = "of-the-good-adapter"
"""A session that the server with the good adapter has written."""


def time_passes() -> None:
    """While a cause is there by itself."""
    time.sleep(0.2)


@contextlib.contextmanager
def without_a_store(live: Live) -> Iterator[None]:
    """Connections to PostgreSQL are cut and refused."""
    live.proxy.down = True
    live.proxy.cut()
    try:
        yield
    finally:
        live.proxy.down = False


def delete_in_the_database(live: Live, session: str) -> None:
    """As nobody should: past every server."""
    with live.database as database:
        for table in ("deltamem_versions", "deltamem_sessions"):
            database.execute(f"DELETE FROM {table} WHERE session = %s", (session,))  # type: ignore[arg-type]


@contextlib.contextmanager
def no_cause(live: Live) -> Iterator[Again]:
    """All is well."""
    yield time_passes


@contextlib.contextmanager
def store_cut(live: Live) -> Iterator[Again]:
    """Sessions in memory go on until what waits for the store fills it, others get 503."""
    known = [new_session() for _ in range(16)]
    live.turns(*known)
    with without_a_store(live):
        yield lambda: live.turns(new_session(), *known * 5)


@contextlib.contextmanager
def other_writer_during_a_cut(live: Live) -> Iterator[Again]:
    """A session is deleted in the database while a version of it waits for the store to come back."""
    session = new_session()
    live.turn(session)
    with without_a_store(live):
        assert live.turn(session) == "degraded"
        delete_in_the_database(live, session)
    yield time_passes


@contextlib.contextmanager
def slow_store(live: Live) -> Iterator[Again]:
    """Each packet to PostgreSQL takes 0.3 seconds, and a commit several of them."""

    def late(_: bytes) -> bool:
        time.sleep(0.3)
        return True

    forward, live.proxy.forward = live.proxy.forward, late
    sessions = [new_session() for _ in range(4)]
    try:
        yield lambda: live.turns(*sessions)
    finally:
        live.proxy.forward = forward


@contextlib.contextmanager
def damaged_record(live: Live) -> Iterator[Again]:
    """Another server seems to have written the session, and what it wrote does not verify."""
    session = new_session()
    live.turn(session)
    with live.database as database:
        database.execute("UPDATE deltamem_sessions SET version = 9 WHERE session = %s", (session,))
        database.execute(
            "UPDATE deltamem_versions SET version = 9, blob = overlay(blob placing '\\xbad1bad1'::bytea from 40) "
            "WHERE session = %s",
            (session,),
        )
    yield lambda: live.turn(session)
    delete_in_the_database(live, session)


@contextlib.contextmanager
def races(live: Live) -> Iterator[Again]:
    """Four clients write one session, whose answers take `ANSWER_SECONDS`: one at a time is served, two wait,
    the fourth is refused. Other sessions are deleted while their answers are generated."""
    ended, tokens, session = threading.Event(), 20, new_session()

    def writer() -> None:
        while not ended.is_set():
            if live.turn(session, n=tokens, pace=ANSWER_SECONDS / tokens) == "409":
                ended.wait(1)

    def deleter() -> None:
        with ThreadPoolExecutor(1) as pool:
            while not ended.is_set():
                deleted = new_session()
                live.turn(deleted)
                answer = pool.submit(live.turn, deleted, n=tokens)
                live.prometheus.until(lambda: answer.done() or live.busy(deleted), 20, "no answer, no request")  # noqa: B023
                live.delete(deleted)
                answer.result(60)

    clients = [live.pool.submit(client) for client in (*[writer] * 4, deleter)]
    try:
        yield lambda: ended.wait(0.5)
    finally:
        ended.set()
        for client in clients:
            client.result(120)


@contextlib.contextmanager
def many_sessions(live: Live) -> Iterator[Again]:
    """220 sessions in turn, for which 8 slots and 1 MiB of host memory are too small."""
    sessions = [new_session() for _ in range(220)]
    yield lambda: live.turns(*sessions)


@contextlib.contextmanager
def audit_cannot_grow(live: Live) -> Iterator[Again]:
    """The engine may write no file any further, as on a full disk; its sessions are elsewhere, in PostgreSQL."""
    engine = engine_pid(live.server)
    before = resource.prlimit(engine, resource.RLIMIT_FSIZE)
    resource.prlimit(engine, resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield lambda: live.turns(*(new_session() for _ in range(16)))
    finally:
        resource.prlimit(engine, resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def paused_engine(live: Live) -> Iterator[Again]:
    """The engine's process stands still. A scrape takes the 3 seconds that a page waits for it: meanwhile there is a
    scrape in 5 seconds, which as shipped is shorter than the 15 between scrapes."""
    live.prometheus.reload({**intervals(), "scrape_interval": "5s"})
    engine = engine_pid(live.server)
    os.kill(engine, signal.SIGSTOP)
    try:
        yield time_passes
    finally:
        os.kill(engine, signal.SIGCONT)
        live.prometheus.reload(intervals())


@contextlib.contextmanager
def killed_engine(live: Live) -> Iterator[Again]:
    """The engine's process is killed, upon which the server ends, and is started again."""
    os.kill(engine_pid(live.server), signal.SIGKILL)
    try:
        yield time_passes
    finally:
        live.server.kill()
        live.server.start()
        live.server.wait_ready()


def planted(cause: str) -> Callable[[Live], AbstractContextManager[Again]]:
    """A bug that is planted in the running server: see `tests.deploy.planted`."""

    @contextlib.contextmanager
    def begin(live: Live) -> Iterator[Again]:
        path: Path = live.folder / "causes"
        path.write_text(cause)
        sessions = [new_session() for _ in range(4)]
        try:
            yield lambda: live.turns(*sessions * 4)
        finally:
            path.unlink()

    return begin


def turns_of(size: int) -> Callable[[Live], AbstractContextManager[Again]]:
    """New sessions with so many tokens: with the bad adapter that decides what is wrong with their memory."""

    @contextlib.contextmanager
    def begin(live: Live) -> Iterator[Again]:
        yield lambda: live.turns(*(new_session() for _ in range(16)), size=size)

    return begin


@contextlib.contextmanager
def sessions_of_another_adapter(live: Live) -> Iterator[Again]:
    """Requests of a session that the other server wrote."""
    yield lambda: live.turn(OF_THE_OTHER)


@dataclass(frozen=True)
class Cause:
    """How alerts are caused.

    Attributes:
        begin: see the module.
        alerts: that must fire, and cease afterwards.
        seconds: at most, until the last of them fires.
    """

    begin: Callable[[Live], AbstractContextManager[Again]]
    alerts: tuple[str, ...]
    seconds: float = 60.0


CAUSES = {
    "other writer": Cause(other_writer_during_a_cut, ("DeltamemLostVersions",)),
    "damaged record": Cause(damaged_record, ("DeltamemStoreCorrupt",)),
    "audit log cannot grow": Cause(audit_cannot_grow, ("DeltamemAuditFailing", "DeltamemAuditLost")),
    "slow store": Cause(slow_store, ("DeltamemStoreSlow", "DeltamemCommitLatencyFast", "DeltamemCommitLatencySlow")),
    "store cut": Cause(
        store_cut,
        (
            "DeltamemDegraded",
            "DeltamemBacklogOld",
            "DeltamemBacklogLarge",
            "DeltamemStoreErrors",
            "DeltamemRequestsUnavailable",
            "DeltamemLoadErrors",
        ),
        120,
    ),
    "many sessions": Cause(many_sessions, ("DeltamemSlotThrash", "DeltamemHostMemoryThrash"), 120),
    "races": Cause(races, ("DeltamemQueueRefusals", "DeltamemQueueWaits", "DeltamemCommitConflicts")),
    "bug in a hook": Cause(planted("gates"), ("DeltamemHookErrors",)),
    "bug in orders": Cause(planted("orders"), ("DeltamemOrdersRefused",)),
    "paused engine": Cause(paused_engine, ("DeltamemEngineSilent",)),
    "killed engine": Cause(killed_engine, ("DeltamemServerDown",)),
}
"""Those whose alerts look back for an hour first: they cease while others fire."""
QUICK = {"store cut": Cause(store_cut, ("DeltamemDegraded", "DeltamemStoreErrors", "DeltamemRequestsUnavailable"))}
"""Of the reduced run."""

OF_A_BAD_ADAPTER = {
    "another adapter's session": Cause(sessions_of_another_adapter, ("DeltamemLoadsRefused",)),
    "no effect": Cause(turns_of(FEW), ("DeltamemMemoryInert",)),
    "growing states": Cause(turns_of(MANY), ("DeltamemMemoryRunaway", "DeltamemCommitFailures")),
}
"""On a second server, which has a bad adapter."""
