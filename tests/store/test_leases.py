"""Leases: one suite for the stores that have them, proof that it catches planted bugs, and PostgreSQL's own cases."""

import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest

from deltamem_vllm.errors import LeaseLost
from deltamem_vllm.store import ledger, postgres, redis_scripts
from deltamem_vllm.store import postgres_schema as sql
from deltamem_vllm.store.leases import Lease, check_lease_seconds
from deltamem_vllm.store.memory import MemoryStore
from deltamem_vllm.store.postgres import PostgresStore
from deltamem_vllm.store.postgres_leases import PostgresLeases
from deltamem_vllm.store.protocol import SessionKey
from deltamem_vllm.store.redis import RedisStore
from deltamem_vllm.store.redis_leases import RedisLeases
from deltamem_vllm.store.sqlite import SQLiteStore
from tests.store import conformance, services
from tests.store import conformance_leases as checks
from tests.store.records import KEY, record
from tests.store.test_conformance import Reopened


@pytest.fixture(params=["postgres", "redis"])
def open_(request: pytest.FixtureRequest) -> Iterator[Reopened]:
    if request.param == "postgres":
        reopened = Reopened(partial(PostgresStore, request.getfixturevalue("postgres_url"), retry_seconds=1.0))
    else:
        url, namespace = request.getfixturevalue("redis_place")
        reopened = Reopened(partial(RedisStore, url, namespace=namespace))
    yield reopened
    for opened in reopened.opened:
        opened.close()


@pytest.mark.parametrize("check", checks.CHECKS, ids=lambda check: check.__name__)
def test_leases(check: checks.Check, open_: Reopened) -> None:
    check(open_)


def test_stores_of_one_machine_have_none(tmp_path: Path) -> None:
    for store in (MemoryStore(), SQLiteStore(tmp_path / "s.db")):
        assert getattr(store, "leases", None) is None
        store.close()


def test_seconds_are_checked() -> None:
    for seconds in (-1.0, 3601.0, float("nan")):
        with pytest.raises(ValueError, match="a lease lasts up to 3600 seconds"):
            check_lease_seconds(seconds)


# --- planted bugs -------------------------------------------------------------------------------------------

EDITS: dict[str, tuple[tuple[str, str, str], tuple[str, str, str]]] = {  # PostgreSQL, Redis: what, old, new
    "no_fence": (("FENCE", "WHERE", "WHERE false AND"), ("PUT", "holder and holder ~= ARGV[4]", "false")),
    "anyone_releases": (
        ("RELEASE", "holder = %s", "length(%s) > 0"),
        ("RELEASE", "redis.call('GET', lease) == ARGV[1]", "true"),
    ),
    "anyone_takes": (
        ("ACQUIRE", "l.holder = excluded.holder OR", "true OR"),
        ("ACQUIRE", "holder and holder ~= ARGV[1]", "false"),
    ),
    "for_ever": (("ACQUIRE", "l.expires_at <= statement_timestamp()", "false"), ("ACQUIRE", ", 'PX', ARGV[2])", ")")),
    "kept_after_deletion": (("DROP_LEASES", "WHERE", "WHERE false AND"), ("DELETE", ", KEYS[6])", ")")),
    "fence_first": (("", "", ""), ("PUT", "if answer == 'stored' and holder", "if holder")),
}


def by_the_clients_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """PLANTED BUG: each server writes down and compares its own time."""
    acquire = sql.ACQUIRE

    def postgres_take(self: PostgresLeases, keys: Sequence[SessionKey]) -> Any:
        monkeypatch.setattr(sql, "ACQUIRE", acquire.replace("statement_timestamp()", f"to_timestamp({time.time()!r})"))
        return take(self, keys)

    def redis_take(self: RedisLeases, keys: Sequence[SessionKey]) -> list[Lease]:
        taken = []
        for name in (self._names(key)[0] for key in keys):
            holder, until = (self._link.client.get(name) or b"nobody 0").decode().split()
            free = holder == self.holder or float(until) <= time.time()
            if free:
                self._link.client.set(name, f"{self.holder} {time.time() + self.seconds}")
            taken.append(Lease(free, self.seconds if free else float(until) - time.time()))
        return taken

    take = PostgresLeases._take
    monkeypatch.setattr(PostgresLeases, "_take", postgres_take)
    monkeypatch.setattr(RedisLeases, "_take", redis_take)


@pytest.mark.parametrize(
    ("bug", "check"),
    [
        ("no_fence", checks.keeps_other_writers_out),
        ("no_fence", checks.keeps_a_paused_holder_out),
        ("anyone_releases", checks.leaves_others_alone),
        ("anyone_takes", checks.has_one_holder),
        ("anyone_takes", checks.excludes_eight_threads),
        ("for_ever", checks.ends_by_itself),
        ("kept_after_deletion", checks.does_not_hinder_a_deletion),
        ("fence_first", checks.recognises_what_is_stored),
        ("clients_clock", checks.knows_one_clock),
    ],
)
def test_suite_catches(bug: str, check: checks.Check, open_: Reopened, monkeypatch: pytest.MonkeyPatch) -> None:
    if bug == "clients_clock":
        by_the_clients_clock(monkeypatch)
    else:
        for module, (name, old, new) in zip((sql, redis_scripts), EDITS[bug], strict=True):
            if name:
                assert old in getattr(module, name)
                monkeypatch.setattr(module, name, getattr(module, name).replace(old, new))
    if bug == "fence_first":
        monkeypatch.setattr(postgres, "plan", fence_first)
    if bug == "for_ever":
        real = checks.until
        monkeypatch.setattr(checks, "until", lambda what: real(what, 2.0))
    with pytest.raises((AssertionError, pytest.fail.Exception, LeaseLost)):
        check(open_)


def fence_first(encoded: Any, views: Any, usages: Any, quota: Any, keep: int, fences: Any) -> Any:
    """PLANTED BUG: another's lease is looked at before it is asked whether the commit is there already."""
    allowed = {index: put for index, put in encoded.items() if put[0].key not in fences}
    outcomes, writes = ledger.plan(allowed, views, usages, quota, keep, {})
    refused = {i: LeaseLost("refused") for i in encoded if i not in allowed}
    return {**outcomes, **refused}, writes


# --- PostgreSQL ---------------------------------------------------------------------------------------------


def check_a_commit_under_way_is_waited_for(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lease runs out just when its holder commits: whoever takes it over must see that commit."""
    a, b = PostgresStore(url, lease_seconds=0.3), PostgresStore(url, lease_seconds=60)
    assert a.leases is not None
    a.put(record(1), None)
    a.leases.acquire(KEY)
    seen: list[int] = []

    def take_over() -> None:
        assert b.leases is not None
        while not b.leases.acquire(KEY).ours:
            time.sleep(0.01)
        found = b.get(KEY)
        seen.append(found.version if found else 0)

    thread = threading.Thread(target=take_over)

    def plan(*args: Any) -> Any:
        thread.start()
        thread.join(1.5)
        return ledger.plan(*args)

    monkeypatch.setattr(postgres, "plan", plan)
    a.put(record(2), record(1).expect)
    thread.join(30)
    a.close()
    b.close()
    assert seen == [2], "the lease changed hands between the look at it and the commit"


def test_a_commit_under_way_is_waited_for(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_a_commit_under_way_is_waited_for(postgres_url, monkeypatch)


def test_catches_a_fence_that_does_not_lock(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PLANTED BUG: the fence only looks."""
    monkeypatch.setattr(sql, "FENCE", sql.FENCE.replace("FOR SHARE", ""))
    with pytest.raises(AssertionError, match="changed hands"):
        check_a_commit_under_way_is_waited_for(postgres_url, monkeypatch)


def test_a_crash_of_the_server_loses_leases_and_nothing_else() -> None:
    with services.postgres() as server:
        url = f"postgresql://test@127.0.0.1:{server.port}/postgres"
        a, b = (PostgresStore(url, lease_seconds=600, retry_seconds=10) for _ in range(2))
        assert a.leases is not None
        assert b.leases is not None
        with psycopg.connect(url, autocommit=True) as admin:
            admin.execute("CHECKPOINT")
        a.put(record(1), None)
        a.leases.acquire(KEY)
        server.stop(3)
        server.start()
        assert conformance.same(b.get(KEY), record(1))
        assert b.leases.acquire(KEY).ours
        with pytest.raises(LeaseLost):
            a.put(record(2), record(1).expect)
        b.put(record(2), record(1).expect)
        a.close()
        b.close()


def test_a_lease_costs_no_log(postgres_url: str) -> None:
    store = PostgresStore(postgres_url)
    assert store.leases is not None
    with psycopg.connect(postgres_url, autocommit=True) as admin:
        kind = admin.execute("SELECT relpersistence::text FROM pg_class WHERE relname = 'deltamem_leases'").fetchone()
        assert kind == ("u",)

        def written() -> int:
            row = admin.execute("SELECT pg_current_wal_insert_lsn() - '0/0'").fetchone()
            assert row is not None
            return int(row[0])

        store.leases.acquire(KEY)
        before = written()
        for index in range(100):
            assert store.leases.acquire(SessionKey("tenant", f"{index}")).ours
        assert written() - before < 100 * 50, "a logged row takes some 150 bytes"
    store.close()


def test_what_killed_servers_left_is_swept(postgres_url: str) -> None:
    store = PostgresStore(postgres_url)
    assert store.leases is not None
    for name in ("old", "mine", "live"):
        store.leases.acquire(SessionKey("tenant", name))
    with psycopg.connect(postgres_url, autocommit=True) as admin:
        admin.execute("UPDATE deltamem_leases SET expires_at = now() - interval '2 hours' WHERE session = 'old'")
        store.leases.release([SessionKey("tenant", "mine")])
        assert admin.execute("SELECT session FROM deltamem_leases").fetchall() == [("live",)]
    store.close()


def test_schema_1_is_migrated(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, psycopg.connect(postgres_url, autocommit=True) as admin:
        patch.setattr(sql, "MIGRATIONS", sql.MIGRATIONS[:1])
        patch.setattr(sql, "FENCE", "SELECT WHERE %s::text[] IS NULL AND %s::text[] IS NULL")
        old = PostgresStore(postgres_url)
        old.put(record(1), None)
        assert admin.execute("SELECT schema FROM deltamem_meta").fetchall() == [(1,)]
        assert admin.execute("SELECT to_regclass('deltamem_leases')::text").fetchone() == (None,)
    new = PostgresStore(postgres_url)
    assert conformance.same(new.get(KEY), record(1))
    assert new.leases is not None
    assert new.leases.acquire(KEY).ours
    new.put(record(2), record(1).expect)
    for store in (old, new):
        store.close()
