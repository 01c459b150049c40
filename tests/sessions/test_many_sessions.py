"""A service that opens a store with very many sessions is ready at once: nothing is read before it is asked for."""

import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from deltamem_vllm.sessions.service import SessionService
from deltamem_vllm.store.protocol import Put, SessionKey, new_incarnation
from deltamem_vllm.store.url import open_store
from tests.conftest import NIGHTLY
from tests.sessions.harness import ADAPTER, LAYOUT, MODEL, TENANT, admit, drive, make_service
from tests.store import services
from tests.store.records import record

SESSIONS = 100_000 if NIGHTLY else 5_000
GROUP = 1000
READY_SECONDS = 2.0


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/s.db"
        return
    with services.postgres() as server:
        yield f"postgresql://test@127.0.0.1:{server.port}/postgres?statement_timeout=60"


def fill(url: str) -> None:
    """Store ``SESSIONS`` sessions, by groups."""
    fields = {"layout": LAYOUT, "adapter": ADAPTER, "model": MODEL, "window": b"", "updated_at": time.time()}
    with closing(open_store(url)) as store:
        for start in range(0, SESSIONS, GROUP):
            keys = [SessionKey(TENANT, f"s{number}") for number in range(start, start + GROUP)]
            puts: list[Put] = [(record(1, key, incarnation=new_incarnation(), **fields), None) for key in keys]
            assert store.put_many(puts) == [None] * GROUP


def test_it_is_ready_at_once(url: str) -> None:
    fill(url)
    start = time.monotonic()

    async def scenario(service: SessionService) -> float:
        known = await admit(service, f"s{SESSIONS // 2}", [1])
        assert known["version"] == 1
        assert (await admit(service, "new", [1]))["version"] == 0
        return time.monotonic() - start

    seconds = drive(make_service(url, ttl=86400.0), scenario)
    print(f"{SESSIONS} sessions in {url.partition(':')[0]}: ready and two admitted after {seconds:.2f} s")
    assert seconds <= READY_SECONDS
