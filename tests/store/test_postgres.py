"""PostgreSQL alone: cut connections, restarts, timeouts, clear errors, settings."""

import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from deltamem_vllm.errors import ConfigError, StaleVersion, StoreUnavailable
from deltamem_vllm.store import ledger, postgres, postgres_leases, protocol
from deltamem_vllm.store import postgres_schema as sql
from deltamem_vllm.store.postgres import PostgresStore
from deltamem_vllm.store.protocol import Expect, SessionKey
from tests.conftest import NIGHTLY
from tests.store import conformance, services
from tests.store.records import INCARNATION, KEY, record
from tests.store.services import Proxy, Server
from tests.store.test_crypto import check_rotation

CUTS = 2000 if NIGHTLY else 80


@pytest.fixture
def proxy(postgres_server: Server) -> Iterator[Proxy]:
    made = Proxy(postgres_server.port)
    yield made
    made.close()


def through(url: str, proxy: Proxy, **options: Any) -> PostgresStore:
    host = url.split("@")[1].split("/")[0]
    return PostgresStore(url.replace(host, f"127.0.0.1:{proxy.port}"), **options)


# --- ambiguous commits --------------------------------------------------------------------------------------

AUDIT = """
    CREATE TABLE audit (tenant TEXT, session TEXT, version BIGINT, request_id TEXT);
    CREATE FUNCTION audit() RETURNS trigger LANGUAGE plpgsql AS
        'BEGIN INSERT INTO audit VALUES (NEW.tenant, NEW.session, NEW.version, NEW.request_id); RETURN NEW; END';
    CREATE TRIGGER audit AFTER INSERT OR UPDATE ON deltamem_versions FOR EACH ROW EXECUTE FUNCTION audit();
"""


def check_cuts(url: str, proxy: Proxy, cuts: int) -> dict[str, int]:
    """Commit groups while connections are cut around COMMIT; every outcome must be right and no commit be made
    twice. Returns how often each kind of cut was made."""
    store = through(url, proxy)
    with psycopg.connect(url, autocommit=True) as admin:
        admin.execute(AUDIT)
    rng = random.Random(cuts)
    armed: list[str] = []
    made = dict.fromkeys(("before", "after", "answer"), 0)

    def forward(data: bytes) -> bool:
        if armed and b"COMMIT" in data and armed[0] in ("before", "after"):
            kind = armed.pop()
            made[kind] += 1
            if kind == "after":
                raise Proxy.CutAfter
            return False
        return True

    def backward(data: bytes) -> bool:
        if armed and b"COMMIT\0" in data and armed[0] == "answer":
            made[armed.pop()] += 1
            return False
        return True

    proxy.forward, proxy.backward = forward, backward
    versions = dict.fromkeys(range(4), 0)
    turn = 0
    while sum(made.values()) < cuts:
        turn += 1
        if rng.random() < 0.8 and not armed:
            armed.append(rng.choice(list(made)))
        group = []
        for session in rng.sample(range(4), rng.randint(1, 3)):
            for _ in range(rng.randint(1, 2)):
                versions[session] += 1
                at = versions[session]
                key = SessionKey("tenant", f"{session}")
                group.append((record(at, key, layout="L1H1r2"), Expect(at - 1, INCARNATION) if at > 1 else None))
        stale = (record(9, SessionKey("tenant", "none")), record(8).expect)
        outcomes = store.put_many([*group, stale])
        assert outcomes[:-1] == [None] * len(group), f"a commit that was made is reported as {outcomes}"
        assert isinstance(outcomes[-1], StaleVersion)
    for session, version in versions.items():
        key = SessionKey("tenant", f"{session}")
        assert conformance.same(store.get(key), record(version, key, layout="L1H1r2"))
    with psycopg.connect(url) as admin:
        rows = admin.execute("SELECT count(*), count(DISTINCT (session, version)) FROM audit").fetchone()
    assert rows == (sum(versions.values()),) * 2, f"commits made and distinct ones: {rows}"
    store.close()
    return made


def test_cut_commits_are_resolved(postgres_url: str, proxy: Proxy) -> None:
    made = check_cuts(postgres_url, proxy, CUTS)
    print(f"cuts: {made}; 0 commits applied twice, 0 outcomes unresolved")
    assert min(made.values()) > 10


def test_cuts_catch_a_dropped_request_id(postgres_url: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """PLANTED BUG: a commit that is sent again is not recognised."""

    def forgetful(record: Any, expect: Any, stored: Any, kept: Any) -> bool:
        return protocol.admit(record, expect, stored and (*stored[:2], stored[2] + "?"), None)

    monkeypatch.setattr(ledger, "admit", forgetful)
    with pytest.raises(AssertionError, match="is reported as"):
        check_cuts(postgres_url, proxy, 20)


def test_a_cut_delete_says_what_it_did(postgres_url: str, proxy: Proxy) -> None:
    store = through(postgres_url, proxy)
    store.put(record(1), None)
    once = [True]

    def forward(data: bytes) -> bool:
        if b"COMMIT" in data and once:
            once.clear()
            raise Proxy.CutAfter
        return True

    proxy.forward = forward
    assert store.delete(KEY), "it existed, and this call deleted it"
    assert not once
    assert store.get(KEY) is None
    assert not store.delete(KEY)
    store.close()


def test_rotation(postgres_url: str) -> None:
    check_rotation(lambda codec: PostgresStore(postgres_url, codec=codec))


def move_between(url: str, monkeypatch: pytest.MonkeyPatch) -> PostgresStore:
    """A store, and a writer who ignores the lock on the tenant and moves the session after the store has read it."""
    store = PostgresStore(url, retry_seconds=1.0)
    store.put(record(1), None)
    moves = [2]

    def plan(*args: Any) -> Any:
        if moves:
            with psycopg.connect(url, autocommit=True) as other:
                other.execute("UPDATE deltamem_sessions SET version = %s, request_id = 'theirs'", (moves.pop(),))
        return ledger.plan(*args)

    monkeypatch.setattr(postgres, "plan", plan)
    return store


def test_the_update_itself_compares(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = move_between(postgres_url, monkeypatch)
    with pytest.raises(StaleVersion, match="is at version 2"):
        store.put(record(2), record(1).expect)
    store.close()


def test_catches_an_update_that_does_not_compare(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PLANTED BUG: the UPDATE has no WHERE version = … AND incarnation = …."""
    monkeypatch.setattr(
        sql, "MOVE", sql.MOVE.replace("version = %s AND incarnation = %s", "%s::bigint + length(%s) > 0")
    )
    with pytest.raises((pytest.fail.Exception, StoreUnavailable)):
        test_the_update_itself_compares(postgres_url, monkeypatch)


# --- outages ------------------------------------------------------------------------------------------------


def test_an_outage_is_reported_and_ends(postgres_url: str, proxy: Proxy) -> None:
    store = through(postgres_url, proxy, retry_seconds=0.2)
    store.put(record(1), None)
    proxy.down = True
    proxy.cut()
    start = time.monotonic()
    with pytest.raises(StoreUnavailable, match=r"cannot be reached.*send it again"):
        store.put(record(2), record(1).expect)
    with pytest.raises(StoreUnavailable, match="cannot read"):
        store.get(KEY)
    assert time.monotonic() - start < 2
    proxy.down = False
    store.put(record(2), record(1).expect)
    assert conformance.same(store.get(KEY), record(2))
    store.close()


def test_an_outage_that_is_short_is_not_noticed(postgres_url: str, proxy: Proxy) -> None:
    store = through(postgres_url, proxy)
    store.put(record(1), None)
    proxy.down = True
    proxy.cut()
    threading.Timer(0.4, lambda: setattr(proxy, "down", False)).start()
    store.put(record(2), record(1).expect)
    store.close()


def test_crashed_servers_lose_no_acknowledged_commit() -> None:
    """An immediate shutdown, which recovers from the log as after a crash; the server's own default is not to wait
    for the log."""
    with services.postgres() as server:
        store = PostgresStore(f"postgresql://test@127.0.0.1:{server.port}/postgres", retry_seconds=10)
        with psycopg.connect(f"postgresql://test@127.0.0.1:{server.port}/postgres", autocommit=True) as admin:
            admin.execute("CHECKPOINT")  # the tables are on the disk: only commits are at stake
        for turn in range(4):
            keys = [SessionKey(f"t{turn}", f"{index}") for index in range(20)]
            assert store.put_many([(record(1, key), None) for key in keys]) == [None] * 20
            server.stop(3)
            server.start()
            for each in range(turn + 1):
                assert store.usage(f"t{each}").sessions == 20
                key = SessionKey(f"t{each}", "7")
                assert conformance.same(store.get(key), record(1, key))
        store.close()


def test_catches_commits_that_do_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """PLANTED BUG: COMMIT does not wait for the log, as the server's default says."""
    real = psycopg.Connection.execute

    def careless(self: Any, query: Any, *args: Any, **kwargs: Any) -> Any:
        return real(self, "SELECT 1" if query == "SET LOCAL synchronous_commit = on" else query, *args, **kwargs)

    monkeypatch.setattr(psycopg.Connection, "execute", careless)
    with pytest.raises(AssertionError):
        test_crashed_servers_lose_no_acknowledged_commit()


def test_a_lock_that_is_held_is_reported(postgres_url: str) -> None:
    store = PostgresStore(postgres_url, statement_seconds=0.3)
    store.put(record(1), None)
    with psycopg.connect(postgres_url) as other:
        other.execute("SELECT * FROM deltamem_tenants FOR UPDATE")
        with pytest.raises(StoreUnavailable, match="longer than statement_seconds"):
            store.put(record(2), record(1).expect)
        assert store.get(KEY) is not None, "reads do not wait for writers"
    store.put(record(2), record(1).expect)
    store.close()


# --- settings and errors ------------------------------------------------------------------------------------


def test_commits_wait_for_the_disk(postgres_url: str) -> None:
    with psycopg.connect(postgres_url) as admin:
        row = admin.execute("SHOW synchronous_commit").fetchone()
        assert row == ("off",), "the test server's default"
    store = PostgresStore(postgres_url)
    assert store._link.write("x", lambda c: c.execute("SHOW synchronous_commit").fetchone()) == ("on",)
    store.close()


def test_a_server_that_does_not_sync_is_refused(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = PostgresStore(postgres_url)
    read = type(real._link).read

    def lies(link: Any, what: str, statement: str, bindings: Any) -> Any:
        return [("off",)] if statement == "SHOW fsync" else read(link, what, statement, bindings)

    monkeypatch.setattr(type(real._link), "read", lies)
    with pytest.raises(ConfigError, match="runs with fsync off"):
        PostgresStore(postgres_url)
    real.close()


def test_a_newer_schema_is_refused(postgres_url: str) -> None:
    PostgresStore(postgres_url).close()
    with psycopg.connect(postgres_url) as admin:
        admin.execute("UPDATE deltamem_meta SET schema = 99")
    with pytest.raises(ConfigError, match=r"has schema 99; .* Upgrade"):
        PostgresStore(postgres_url)


def test_a_read_only_server_is_named(postgres_url: str) -> None:
    store = PostgresStore(postgres_url)
    with psycopg.connect(postgres_url, autocommit=True) as admin:
        admin.execute(f"ALTER DATABASE {admin.info.dbname} SET default_transaction_read_only = on")
    store._link._drop_idle()
    with pytest.raises(StoreUnavailable, match="Connect to the primary"):
        store.put(record(1), None)
    assert store.get(KEY) is None
    store.close()


def test_a_role_without_rights_is_named(postgres_url: str) -> None:
    PostgresStore(postgres_url).close()
    with psycopg.connect(postgres_url, autocommit=True) as admin:
        admin.execute("DROP ROLE IF EXISTS guest")
        admin.execute("CREATE ROLE guest LOGIN")
        admin.execute("GRANT SELECT ON deltamem_meta TO guest")
    store = PostgresStore(postgres_url.replace("test@", "guest@"))
    with pytest.raises(StoreUnavailable, match="has no right to it"):
        store.put(record(1), None)
    store.close()


def test_a_refused_login_is_named_at_once(postgres_url: str) -> None:
    start = time.monotonic()
    for url in (postgres_url.replace("test@", "stranger:hunter2@"), postgres_url + "_not_there"):
        with pytest.raises(StoreUnavailable, match=r"refused the login.*does not exist"):
            PostgresStore(url)
    assert time.monotonic() - start < 2, "there is no use in trying again"


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:hunter2@127.0.0.1:1/db",
        "postgresql://me:hunter2@127.0.0.1:1/db?nonsense=1",
        "postgresql://me:hunter2@[::1/db",
        "host=127.0.0.1 port=1 password=hunter2 nonsense",
    ],
)
def test_no_password_in_errors(url: str) -> None:
    with pytest.raises((ConfigError, StoreUnavailable)) as caught:
        PostgresStore(url, retry_seconds=0.1)
    error: BaseException | None = caught.value
    while error is not None:
        assert "hunter2" not in str(error)
        error = error.__cause__


def test_a_fork_is_refused(postgres_url: str) -> None:
    store = PostgresStore(postgres_url)
    store._link._process -= 1
    with pytest.raises(StoreUnavailable, match="before a fork"):
        store.get(KEY)
    store._link._process += 1
    store.close()


def test_processes_make_the_tables_at_once(postgres_url: str) -> None:
    stores: list[PostgresStore] = []
    threads = [threading.Thread(target=lambda: stores.append(PostgresStore(postgres_url))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(stores) == 6
    for store in stores:
        store.close()


def test_tenants_that_come_and_go_do_not_deadlock(postgres_url: str) -> None:
    """Groups over several tenants in any order, and deletions that remove tenants' rows meanwhile."""
    stores = [PostgresStore(postgres_url) for _ in range(4)]
    errors: list[BaseException] = []

    def work(index: int) -> None:
        rng = random.Random(index)
        try:
            for turn in range(40):
                keys = [SessionKey(f"t{each}", f"{index}-{turn}") for each in rng.sample(range(5), 3)]
                assert stores[index].put_many([(record(1, key, layout="L1H1r2"), None) for key in keys]) == [None] * 3
                for key in keys:
                    assert stores[index].delete(key)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    with psycopg.connect(postgres_url) as admin:
        for table in ("tenants", "sessions", "versions"):
            assert admin.execute(f"SELECT count(*) FROM deltamem_{table}").fetchone() == (0,)  # type: ignore[arg-type]
    for store in stores:
        store.close()


def test_every_statement_is_used() -> None:
    names = [name for name in vars(sql) if name.isupper()]
    source = "".join(Path(each.__file__).read_text() for each in (postgres, postgres_leases))
    assert [name for name in names if f"sql.{name}" not in source] == []
