"""The campaigns at a reduced size, on two replicas and one PostgreSQL; with DELTAMEM_NIGHTLY=1 each at its full size.

The first replica sees the store through a proxy, which the outages need. The tests run in this order: the first one
kills both replicas, and starts only the first one again.
"""

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import psycopg
import pytest

from deltamem_vllm.demo.server import VllmServer
from loadtests.chaos import replicas, soak, stores
from loadtests.chaos.clients import Client
from loadtests.chaos.cluster import KEEP, Cluster, serving, stored, talking
from loadtests.chaos.ledger import Kind, check
from loadtests.chaos.scripts import Script
from loadtests.slo import summary, trace
from loadtests.slo.__main__ import main as slo
from loadtests.slo.arms import MEMORY, Arm
from tests.conftest import NIGHTLY
from tests.store import services

pytestmark = pytest.mark.timeout(3600 if NIGHTLY else 300)


@dataclass
class Pair:
    """Two replicas; ``behind`` is how the first one sees their store."""

    servers: list[VllmServer]
    behind: stores.Behind

    @property
    def place(self) -> str:
        return self.behind.place


@contextmanager
def two_replicas(**env: str) -> Iterator[Pair]:
    with services.postgres() as postgres:
        behind = stores.Behind(postgres.port, "cut")
        ways = [f"{behind.way}&lease=1&retry=1", f"{behind.place}?lease=1&keep={KEEP}"]
        try:
            with serving(ways, env=env) as servers:
                yield Pair(servers, behind)
        finally:
            behind.mend()
            behind.proxy.close()


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with two_replicas() as made:
        yield made


# --- replicas that are killed ---------------------------------------------------------------------------------------


def kill_replicas(pair: Pair, size: replicas.Size) -> replicas.Report:
    async def scenario() -> replicas.Report:
        async with talking(pair.servers, pair.place) as cluster:
            return await replicas.campaign(cluster, size)

    report = asyncio.run(scenario())
    print("\n".join(f"{what}: {value}" for what, value in report.rows().items()))
    return report


def test_replicas_are_killed(pair: Pair) -> None:
    size = replicas.Size(sessions=40, turns=3, kills=2, last_stays_down=True, scripts=4)
    report = kill_replicas(pair, size)
    check_replicas(report)


@pytest.mark.nightly  # ten minutes, on servers of their own
def test_replicas_are_killed_every_thirty_seconds() -> None:
    report = replicas.run(replicas.Size())
    print("\n".join(f"{what}: {value}" for what, value in report.rows().items()))
    check_replicas(report)


def check_replicas(report: replicas.Report) -> None:
    size = report.size
    assert report.problems == []
    assert report.faults == []
    assert report.acknowledged == size.sessions * size.turns
    assert report.resumed == size.sessions
    assert len(report.kills) >= 2
    assert report.waits, "no kill met anybody: it shows nothing"
    assert report.late(replicas.RESUME) == []


# --- faults planted into a store that serves ------------------------------------------------------------------------


async def planted(cluster: Cluster, client: Client, plant: str) -> None:
    """Three turns of a client, and a fault that the check must find."""
    for _ in range(3):
        await client.next()
    match plant:
        case "a version is deleted behind the servers' backs":
            with psycopg.connect(cluster.place) as connection:
                row = (client.session,)
                connection.execute("DELETE FROM deltamem_versions WHERE session = %s AND version = 3", row)
        case "the session is deleted, and begins again":
            await cluster.door.http.delete(f"{cluster.door.urls[0]}/v1/sessions/{client.session}")
            await client.next()
        case "a turn is sent again after a later one":
            client.turn = 0
            await client.next()
        case "an answer names a version that nobody wrote":
            told = cluster.door.ledger.told[client.session]
            last = told.pop()
            told.append(replace(last, version=last.version + 1))


PLANTS: dict[str, Kind] = {
    "a version is deleted behind the servers' backs": "lost",
    "the session is deleted, and begins again": "fork",
    "a turn is sent again after a later one": "unknown memory",
    "an answer names a version that nobody wrote": "lost",
}


def test_what_is_planted_is_found(pair: Pair) -> None:
    async def scenario() -> dict[str, set[Kind]]:
        async with talking(pair.servers[:1], pair.place) as cluster:
            script = Script(2)
            await cluster.learn([script], 4, "planted")
            clients = {plant: Client(cluster.door, f"planted-{n}", script) for n, plant in enumerate(["", *PLANTS])}
            for plant, client in clients.items():
                await planted(cluster, client, plant)
            found = check(cluster.door.ledger, stored(pair.place, clients.values(), cluster.memories))
            return {
                plant: {problem.kind for problem in found if problem.session == client.session}
                for plant, client in clients.items()
            }

    found = asyncio.run(scenario())
    assert found.pop("") == set(), "nothing was planted there"
    for plant, kind in PLANTS.items():
        assert kind in found[plant], (plant, found[plant])


@pytest.mark.nightly  # two more servers
def test_a_server_that_tells_before_it_saves_is_found() -> None:
    plants = Path(__file__).parent / "planted"
    with two_replicas(PYTHONPATH=f"{plants}{os.pathsep}{Path(__file__).parents[2]}") as pair:
        report = kill_replicas(pair, replicas.Size(sessions=40, turns=8, kills=2, scripts=4))
    assert "lost" in {problem.kind for problem in report.problems}


# --- a store that fails ---------------------------------------------------------------------------------------------


def check_outage(report: stores.Report) -> None:
    print("\n".join(f"{what}: {value}" for what, value in report.rows().items()))
    assert report.problems == []
    assert report.faults == []
    assert report.lost == 0
    assert report.resumed == report.size.sessions
    assert report.saved is not None
    assert report.saved <= stores.RECOVERY
    assert report.committed is not None
    assert report.committed <= stores.RECOVERY


def fail_store(pair: Pair, fault: stores.Fault, size: stores.Size) -> stores.Report:
    pair.behind.fault = fault

    async def scenario() -> stores.Report:
        async with talking(pair.servers[:1], pair.place) as cluster:
            return await stores.campaign(cluster, pair.behind, fault, size)

    return asyncio.run(scenario())


@pytest.mark.parametrize("fault", ["cut", "slow"])
def test_the_store_fails_for_a_while(pair: Pair, fault: stores.Fault) -> None:
    seconds = {"cut": 6.0, "slow": 3.0}[fault]
    report = fail_store(pair, fault, stores.Size(sessions=8, seconds=seconds, rate=8, scripts=2))
    check_outage(report)
    if fault == "slow":
        assert set(report.told) == {"committed"}
        assert min(report.took) > stores.LATENCY
    else:
        assert report.told.get("degraded", 0) > 0, "nobody was answered, or nobody was told"


@pytest.mark.nightly  # a minute each, on servers of their own
@pytest.mark.parametrize("fault", ["cut", "silent", "slow", "full"])
def test_the_store_fails_for_a_minute(fault: stores.Fault) -> None:
    report = stores.run(fault, stores.Size())
    check_outage(report)
    assert (report.told.get("degraded", 0) > 0) == (fault != "slow")


# --- a long time, and a load ----------------------------------------------------------------------------------------


@pytest.mark.nightly  # ten minutes
def test_memory_and_descriptors_stay(tmp_path: Path) -> None:
    report = soak.run(soak.Size(), tmp_path)
    print("\n".join(f"{what}: {value}" for what, value in report.rows().items()))
    assert report.flat


def test_a_trace_on_a_server(pair: Pair) -> None:
    """Every pattern is answered as it should be, and measured; the comparison with vLLM alone is a nightly one."""
    made = trace.make(seed=5, seconds=6.0, rate=8.0, regular=4)

    async def scenario() -> tuple[summary.Rows, summary.Rows]:
        async with talking(pair.servers[:1], pair.place) as cluster:
            arm = Arm(MEMORY, pair.servers[0], cluster.door.http)
            await arm.tell({**made.regular, **made.idle})
            answers = {MEMORY: [await arm.take(made)]}
            return summary.rows(answers, summary.Objectives(ttft=60, tpot=60, commit=60)), summary.errors(answers)

    rows, errors = asyncio.run(scenario())
    by_pattern = {row["pattern"]: row for row in rows}
    assert set(by_pattern) == {*(arrival.pattern for arrival in made.arrivals), summary.ALL}
    assert {row["outcome"] for row in errors} <= {"409"}
    for pattern, row in by_pattern.items():
        assert 0 < row["ttft p50"] <= row["ttft p99"], pattern
        assert row["tpot p50"] > 0
        assert (row["commit p50"] is None) == (pattern in ("read only", "no session"))
        assert row["good %"] == pytest.approx(100 * (1 - row["409"] / row["requests"]))


@pytest.mark.nightly  # three servers are started
def test_the_report_of_both_servers(tmp_path: Path) -> None:
    assert slo(["--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "results.md", "results.png"}
