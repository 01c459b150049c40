"""Redis alone: what its settings may lose, partitions, crashes, clear errors."""

import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from deltamem_vllm.errors import ConfigError, QuotaExceeded, StaleVersion, StoreUnavailable
from deltamem_vllm.store import redis_scripts
from deltamem_vllm.store.protocol import Expect, Quota, SessionKey
from deltamem_vllm.store.redis import RedisStore
from tests.conftest import NIGHTLY
from tests.store import conformance, services
from tests.store.records import INCARNATION, KEY, record
from tests.store.services import Proxy, Server
from tests.store.test_crypto import check_rotation

CUTS = 2000 if NIGHTLY else 80

Place = tuple[str, str]


@pytest.fixture
def proxy(redis_server: Server) -> Iterator[Proxy]:
    made = Proxy(redis_server.port)
    yield made
    made.close()


def through(place: Place, proxy: Proxy, **options: Any) -> RedisStore:
    return RedisStore(f"redis://127.0.0.1:{proxy.port}/0", namespace=place[1], **options)


# --- partitions ---------------------------------------------------------------------------------------------


def check_cuts(place: Place, proxy: Proxy, cuts: int) -> dict[str, int]:
    """Commit groups while connections are cut around the script; every outcome must be right. Returns how often
    each kind of cut was made."""
    store = through(place, proxy)
    rng = random.Random(cuts)
    armed: list[str] = []
    made = dict.fromkeys(("before", "after"), 0)

    def forward(data: bytes) -> bool:
        if armed and b"EVALSHA" in data:
            kind = armed.pop()
            made[kind] += 1
            if kind == "after":
                raise Proxy.CutAfter
            return False
        return True

    proxy.forward = forward
    versions = dict.fromkeys(range(4), 0)
    while sum(made.values()) < cuts:
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
    assert store.usage("tenant").bytes == sum(
        info.bytes for session in versions for info in store.history(SessionKey("tenant", f"{session}"))
    ), "a commit was counted twice"
    store.close()
    return made


def test_cut_commits_are_resolved(redis_place: Place, proxy: Proxy) -> None:
    made = check_cuts(redis_place, proxy, CUTS)
    print(f"cuts: {made}; 0 commits applied twice, 0 outcomes unresolved")
    assert min(made.values()) > 10


def test_cuts_catch_a_dropped_request_id(redis_place: Place, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """PLANTED BUG: a commit that is sent again is not recognised."""
    monkeypatch.setattr(redis_scripts, "PUT", redis_scripts.PUT.replace("local same =", "local same = false and"))
    with pytest.raises(AssertionError, match="is reported as"):
        check_cuts(redis_place, proxy, 20)


def test_applied_though_the_client_saw_an_error(redis_place: Place, proxy: Proxy) -> None:
    """The partition stays longer than the store tries: the error says what to do, and doing it resolves it."""
    store = through(redis_place, proxy, retry_seconds=0.2)
    direct = RedisStore(redis_place[0], namespace=redis_place[1])
    store.put(record(1), None)

    def forward(data: bytes) -> bool:
        if b"EVALSHA" in data:
            proxy.down = True
            raise Proxy.CutAfter
        return True

    proxy.forward = forward
    with pytest.raises(StoreUnavailable, match=r"cannot be reached.*send it again"):
        store.put(record(2), record(1).expect)
    assert conformance.same(direct.get(KEY), record(2)), "the value had been applied"
    proxy.down = False
    proxy.forward = lambda data: True
    store.put(record(2), record(1).expect)
    direct.put(record(3), record(2).expect)
    store.put(record(2), record(1).expect)  # still known, though another writer has moved on
    assert conformance.same(store.get(KEY), record(3))
    with pytest.raises(StaleVersion):
        store.put(record(3, request_id="mine"), record(2).expect)
    store.close()
    direct.close()


def test_a_cut_delete_says_what_it_did(redis_place: Place, proxy: Proxy) -> None:
    store = through(redis_place, proxy)
    store.put(record(1), None)
    once = [True]

    def forward(data: bytes) -> bool:
        if b"EVALSHA" in data and once:
            once.clear()
            raise Proxy.CutAfter
        return True

    proxy.forward = forward
    assert store.delete(KEY)
    assert not once
    assert not store.delete(KEY)
    store.close()


# --- what the settings may lose -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (("--appendonly", "no"), "everything since its last snapshot"),
        (("--appendonly", "yes", "--appendfsync", "everysec"), "2 seconds"),
        (("--appendonly", "yes", "--appendfsync", "no"), "30 seconds"),
        (("--appendonly", "yes", "--appendfsync", "always", "--rename-command", "CONFIG", ""), "does not tell"),
    ],
)
def test_a_loss_must_be_accepted(options: tuple[str, ...], what: str, caplog: pytest.LogCaptureFixture) -> None:
    with services.redis(*options) as server:
        url = f"redis://127.0.0.1:{server.port}/0"
        with pytest.raises(ConfigError, match=rf"{what}.*durability=bounded"):
            RedisStore(url)
        assert caplog.text == ""
        store = RedisStore(url, durability="bounded")
        assert what in caplog.text
        store.put(record(1), None)
        store.close()


def test_eviction_is_refused() -> None:
    with services.redis("--appendonly", "no", "--maxmemory-policy", "allkeys-lru") as server:
        url = f"redis://127.0.0.1:{server.port}/0"
        with pytest.raises(ConfigError, match="allkeys-lru: it erases sessions"):
            RedisStore(url, durability="bounded")


def test_killed_servers_lose_no_acknowledged_commit() -> None:
    """``appendfsync always``; kill -9 cannot show a missing sync, but it shows what is only in memory."""
    with services.redis() as server:
        url = f"redis://127.0.0.1:{server.port}/0"
        store = RedisStore(url, retry_seconds=5)
        for turn in range(5):
            group = [(record(1, SessionKey(f"t{turn}", f"{index}")), None) for index in range(20)]
            assert store.put_many(group) == [None] * 20
            server.stop(9)
            server.start()
            for each in range(turn + 1):
                assert store.usage(f"t{each}").sessions == 20
                key = SessionKey(f"t{each}", "7")
                assert conformance.same(store.get(key), record(1, key))
        store.close()


def test_full_memory_changes_nothing() -> None:
    with services.redis("--appendonly", "no", "--maxmemory", "8mb") as server:
        store = RedisStore(f"redis://127.0.0.1:{server.port}/0", durability="bounded")
        count = 0
        while True:
            outcome = store.put_many([(record(1, SessionKey("tenant", f"{count:05}"), layout="L8H1r16"), None)])[0]
            if outcome is not None:
                break
            count += 1
        assert isinstance(outcome, StoreUnavailable)
        assert "memory is full; nothing was changed" in str(outcome)
        assert count > 10
        assert store.usage("tenant").sessions == count == len(store.list("tenant", limit=100_000))
        assert store.get(SessionKey("tenant", f"{count:05}")) is None
        assert store.delete(SessionKey("tenant", "00000")), "there is a way out"
        store.close()


# --- the rest -----------------------------------------------------------------------------------------------


def test_namespaces_do_not_mix(redis_place: Place) -> None:
    url, name = redis_place
    one, two = RedisStore(url, namespace=name), RedisStore(url, namespace=name + "x")
    one.put(record(1), None)
    assert two.get(KEY) is None
    assert two.list("tenant") == []
    assert two.expire(1e10, 0.0) == 0
    assert two.reencrypt() == 0
    for store in (one, two):
        store.close()


def test_deleted_sessions_leave_no_key(redis_place: Place) -> None:
    url, name = redis_place
    store = RedisStore(url, namespace=name, quota=Quota(sessions=1))
    client = redis.Redis.from_url(url)
    store.put(record(1), None)
    with pytest.raises(QuotaExceeded):
        store.put(record(1, SessionKey("tenant", "2")), None)
    mine = [key for key in client.scan_iter() if key.startswith(name.encode())]
    assert len(mine) == 5
    assert store.delete(KEY)
    assert [key for key in client.scan_iter() if key.startswith(name.encode())] == []
    store.close()


def test_rotation(redis_place: Place) -> None:
    check_rotation(lambda codec: RedisStore(redis_place[0], namespace=redis_place[1], codec=codec))


def test_a_replica_is_named(redis_server: Server) -> None:
    options = ("--appendonly", "yes", "--appendfsync", "always", "--replicaof", f"127.0.0.1 {redis_server.port}")
    with services.redis(*options) as replica:
        store = RedisStore(f"redis://127.0.0.1:{replica.port}/0")
        with pytest.raises(StoreUnavailable, match="Connect to the primary"):
            store.put(record(1), None)
        store.close()


@pytest.mark.parametrize(
    "url",
    ["redis://me:hunter2@127.0.0.1:1/0", "redis://:hunter2@127.0.0.1:port/0", "nonsense://:hunter2@x"],
)
def test_no_password_in_errors(url: str) -> None:
    with pytest.raises((ConfigError, StoreUnavailable)) as caught:
        RedisStore(url, retry_seconds=0.1)
    assert "hunter2" not in str(caught.value)


def test_a_wrong_password_is_named() -> None:
    with services.redis("--appendonly", "no", "--requirepass", "right") as server:
        start = time.monotonic()
        for wrong in ("", ":hunter2@"):
            with pytest.raises(StoreUnavailable, match="refused") as caught:
                RedisStore(f"redis://{wrong}127.0.0.1:{server.port}/0")
            assert "hunter2" not in str(caught.value)
        assert time.monotonic() - start < 3, "there is no use in trying again"


def test_a_fork_is_refused(redis_place: Place) -> None:
    store = RedisStore(redis_place[0], namespace=redis_place[1])
    store._link._process -= 1
    with pytest.raises(StoreUnavailable, match="before a fork"):
        store.get(KEY)
    store.close()


def test_missing_servers_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"nowhere is not installed: run deploy/ci/install-services.sh as root"):
        services.binary("nowhere")
    root = Path(__file__).parents[2]
    assert (root / services.INSTALL).stat().st_mode & 0o111
    assert subprocess.run(["/bin/sh", "-n", root / services.INSTALL], check=False).returncode == 0
