"""What a real session service counts, as its scrapes show it: exactly, and true at rest."""

import asyncio
import re
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from deltamem_vllm import metrics
from deltamem_vllm.errors import CapacityError, PreconditionFailed, StoreUnavailable
from deltamem_vllm.metrics import TABLE
from deltamem_vllm.server import metrics_page
from deltamem_vllm.sessions import commits
from deltamem_vllm.sessions.control import ControlClient, serve
from deltamem_vllm.sessions.histories import recall
from deltamem_vllm.sessions.management import erase
from deltamem_vllm.sessions.service import SessionService
from deltamem_vllm.store.memory import MemoryStore
from tests.pages import Page, at, read
from tests.sessions.harness import admit, drive, ids, key, make_service, run, serving, turn

PROMPT, REPLY = list(range(30)), [40, 41, 42, 43]


async def scrape(*services_or_addresses: Any) -> Page:
    """A page of engines at addresses, as {(name, labels): value}."""
    clients = [ControlClient(address) for address in services_or_addresses]
    try:
        return read((await metrics_page.page(clients)).decode())
    finally:
        for client in clients:
            client.close()


def with_page(
    folder: Path, scenario: Callable[[SessionService, Callable[[], Awaitable[Page]]], Awaitable[None]], **options: Any
) -> None:
    """Run a scenario on a service that also answers scrapes at its real socket."""
    service = make_service(**options)
    address = f"ipc://{folder}/control"

    async def both(started: SessionService) -> None:
        server = asyncio.ensure_future(serve(started, address))
        try:
            await scenario(started, lambda: scrape(address))
        finally:
            server.cancel()

    drive(service, both)


def test_requests_commits_and_tokens_are_counted_exactly(tmp_path: Path) -> None:
    async def scenario(service: SessionService, page: Callable[[], Awaitable[Page]]) -> None:
        before = await page()
        assert at(before, metrics.COMMITS, outcome="committed") == 0, "there before anything happened"
        for session in ("a", "b", "c"):
            assert (await turn(service, session, PROMPT, REPLY))["status"] == "committed"
        longer = [*PROMPT, *REPLY, *range(50, 60)]  # extends the window by 1 unfed reply token and 10 new ones
        assert (await turn(service, "a", longer, REPLY))["status"] == "committed"
        assert (await turn(service, "a", longer, REPLY, mode="read"))["status"] == "unchanged"
        after = await page()
        assert at(after, metrics.ADMISSIONS, outcome="granted") == 5
        assert at(after, metrics.ADMISSION_SECONDS, "_count") == 5
        assert at(after, metrics.QUEUE_WAIT, "_count") == 4, "a request that reads does not wait"
        assert at(after, metrics.COMMITS, outcome="committed") == 4
        assert at(after, metrics.COMMIT_SECONDS, "_count") == 4
        assert at(after, metrics.EVENTS, event="create") == 3
        assert at(after, metrics.EVENTS, event="commit") == 1
        assert at(after, metrics.LOADS, source="store", outcome="absent") == 3
        assert at(after, metrics.LOADS, source="host", outcome="found") == 2
        fed = len(PROMPT) + len(REPLY) - 1
        assert at(after, metrics.TOKENS, kind="written") == 3 * fed + len(longer) + len(REPLY) - 1 - fed
        assert at(after, metrics.STORE_RECORDS) == 4
        assert at(after, metrics.STORE_SECONDS, "_count", operation="put") == at(after, metrics.STORE_BATCHES)
        assert at(after, metrics.STATE_NORM, "_count") == 4
        assert at(after, metrics.SESSIONS, tier="host") == 3
        assert at(after, metrics.SESSIONS_BUSY) == at(after, metrics.REQUESTS_WAITING) == 0

    with_page(tmp_path, scenario)


def test_gauges_are_true_while_nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deltamem_vllm.sessions.gauges.TOTALS_SECONDS", 0.0)
    monkeypatch.setattr("deltamem_vllm.sessions.gauges.TOTALS_SHARE", 0)
    monkeypatch.setattr("deltamem_vllm.sessions.gauges.TOTALS_PATIENCE", 20.0)  # however busy the machine is
    monkeypatch.setattr(metrics_page, "ANSWER_SECONDS", 25.0)

    async def scenario(service: SessionService, page: Callable[[], Awaitable[Page]]) -> None:
        for session in ("a", "b"):
            await turn(service, session, PROMPT, REPLY)
        before = await page()
        assert at(before, metrics.STORE_SESSIONS) == at(before, metrics.SESSIONS, tier="host") == 2
        await erase(service, key("a"))
        after = await page()
        assert at(after, metrics.STORE_SESSIONS) == at(after, metrics.SESSIONS, tier="host") == 1
        assert 0 < at(after, metrics.STORE_BYTES) < at(before, metrics.STORE_BYTES)
        assert at(after, metrics.EVENTS, event="delete") == 1
        usage = service.store.usage("default")
        assert (usage.sessions, usage.bytes) == (1, at(after, metrics.STORE_BYTES))

    with_page(tmp_path, scenario)


def test_who_waits_and_who_is_refused(tmp_path: Path) -> None:
    async def scenario(service: SessionService, page: Callable[[], Awaitable[Page]]) -> None:
        first = await admit(service, "a", PROMPT)
        second = asyncio.ensure_future(admit(service, "a", PROMPT))
        await asyncio.sleep(0.02)
        waiting = await page()
        assert at(waiting, metrics.REQUESTS_WAITING) == at(waiting, metrics.SESSIONS_BUSY) == 1
        with pytest.raises(CapacityError):  # one may wait
            await admit(service, "a", PROMPT)
        second.cancel()
        await asyncio.wait({second})
        await run(service, first["ticket"], PROMPT, REPLY)
        with pytest.raises(PreconditionFailed):
            await service.admit("t", key("a"), "read", ids([1, 2, 3]), None, False, if_match=[7])
        after = await page()
        for outcome, count in {"granted": 1, "busy": 1, "cancelled": 1, "precondition": 1, "error": 0}.items():
            assert at(after, metrics.ADMISSIONS, outcome=outcome) == count
        assert at(after, metrics.CONFLICTS, reason="busy") == at(after, metrics.CONFLICTS, reason="precondition") == 1
        assert at(after, metrics.REQUESTS_WAITING) == at(after, metrics.SESSIONS_BUSY) == 0

    with_page(tmp_path, scenario, queue_depth=1)


class Away(MemoryStore):
    """A store that can be away, for writes or for reads."""

    away = unreadable = False

    def put_many(self, puts: Any) -> Any:
        if self.away:
            return [StoreUnavailable("away")] * len(puts)
        return super().put_many(puts)

    def get(self, key: Any) -> Any:
        if self.unreadable:
            raise StoreUnavailable("away")
        return super().get(key)


def test_a_request_turned_away_is_counted_once_however_far_it_came(tmp_path: Path) -> None:
    """A chat asks what its prompt depends on before it asks for its turn; a raw prompt asks for its turn."""
    store = Away()

    async def scenario(service: SessionService, page: Callable[[], Awaitable[Page]]) -> None:
        assert (await recall(service, key("a")))["version"] == 0
        assert at(await page(), metrics.ADMISSIONS, outcome="granted") == 0, "a question is no admission"
        store.unreadable = True
        for ask in (lambda: recall(service, key("chat")), lambda: admit(service, "raw", PROMPT)):
            with pytest.raises((StoreUnavailable, CapacityError)):
                await ask()
        assert at(await page(), metrics.ADMISSIONS, outcome="unavailable") == 2

    with_page(tmp_path, scenario, store=store)


def test_a_store_that_is_away_shows_until_it_is_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commits, "RETRY_SECONDS", 0.05)
    store = Away()

    async def scenario(service: SessionService, page: Callable[[], Awaitable[Page]]) -> None:
        store.away = True
        assert (await turn(service, "a", PROMPT, REPLY))["status"] == "degraded"
        during = await page()
        assert at(during, metrics.DEGRADED) == at(during, metrics.BACKLOG_VERSIONS) == 1
        assert at(during, metrics.BACKLOG_BYTES) > 0
        assert 0 < at(during, metrics.BACKLOG_AGE) < 5
        assert at(during, metrics.STORE_ERRORS, operation="put", kind="unavailable") >= 1
        assert at(during, metrics.COMMITS, outcome="degraded") == 1
        store.away = False
        while service.commits.unsaved:
            await asyncio.sleep(0.01)
        after = await page()
        assert at(after, metrics.DEGRADED) == at(after, metrics.BACKLOG_VERSIONS) == at(after, metrics.BACKLOG_AGE) == 0
        assert at(after, metrics.BACKLOG_BYTES) == at(after, metrics.LOST_VERSIONS) == 0

    with_page(tmp_path, scenario, store=store)


def test_each_engine_is_counted_once_and_one_that_is_silent_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_page, "ANSWER_SECONDS", 0.3)
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    services = [make_service() for _ in folders]

    async def ask(*addresses: str) -> Page:
        return await scrape(*addresses)

    with serving(services[0], folders[0]) as first, serving(services[1], folders[1]) as second:
        for service, turns in zip(services, (1, 2), strict=True):
            for _ in range(turns):
                service.meters.add(metrics.COMMITS, "committed")
        page = asyncio.run(ask(first, second))
        assert [at(page, metrics.COMMITS, engine=rank, outcome="committed") for rank in "01"] == [1, 2]
        assert [at(page, metrics.UP, engine=rank) for rank in "01"] == [1, 1]
        stores = [labels for name, labels in page if name == metrics.STORE_SESSIONS.name]
        assert stores == ['engine="0"'], "the store is everybody's: one engine tells of it"
        silent = asyncio.run(ask(first, f"ipc://{tmp_path}/nobody"))
        assert [at(silent, metrics.UP, engine=rank) for rank in "01"] == [1, 0]
        assert not [1 for name, labels in silent if 'engine="1"' in labels and name != metrics.UP.name]


def test_the_page_is_what_prometheus_wants(tmp_path: Path) -> None:
    """Every metric of the table, as if all had been counted, by Prometheus' own check."""
    service = make_service()
    for metric in TABLE:
        pairs = zip(metric.labels, metric.values, strict=True)
        labels = [values[0] if values else f'odd "{name}"\\\n' for name, values in pairs]
        if metric.kind == "histogram":
            service.meters.observe(metric, 0.5, *labels)
        elif metric is not metrics.UP:
            service.watched.append(lambda m=metric, had=tuple(labels): [(m.name, had, 1.0)])  # type: ignore[misc]

    async def text(address: str) -> bytes:
        client = ControlClient(address)
        try:
            return await metrics_page.page([client])
        finally:
            client.close()

    with serving(service, tmp_path) as address:
        page = asyncio.run(text(address))
    assert {m.name for m in TABLE} == set(re.findall(r"^# TYPE (\w+) ", page.decode(), re.MULTILINE))
    checked = subprocess.run(["promtool", "check", "metrics"], input=page, capture_output=True, timeout=60)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")


def test_counting_harms_no_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that cannot be made is vLLM's own, whole."""
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": b"vllm 1\n"})

    async def send(message: Any) -> None:
        sent.append(message)

    class State:
        clients = None

    class App:
        class state:  # noqa: N801
            deltamem = State

    scope = {"type": "http", "method": "GET", "path": "/metrics", "app": App}
    asyncio.run(metrics_page.MetricsPage(app)(scope, None, send))
    assert [each.get("body") for each in sent] == [None, b"vllm 1\n"]
