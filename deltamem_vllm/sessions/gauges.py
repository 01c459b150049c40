"""What one engine tells a scrape: all that was counted, and how things stand now."""

import asyncio
import functools
import importlib.metadata
import logging
import time
from typing import TYPE_CHECKING, Any

from deltamem_vllm import metrics
from deltamem_vllm.sessions.meters import Sample, gauge
from deltamem_vllm.store.protocol import StateStore, Usage

if TYPE_CHECKING:
    from deltamem_vllm.sessions.service import SessionService

logger = logging.getLogger("vllm.deltamem")

TOTALS_SECONDS = 15.0
"""How old a count of all that is in the store may be before it is made again."""
TOTALS_SHARE = 20
"""A count that takes long is made more rarely: this times its duration apart."""
TOTALS_PATIENCE = 0.5
"""How long a scrape waits for a count."""
PAGE = 1000


class StoreTotals:
    """How much is in a store, counted tenant by tenant off the event loop, and not more often than it is worth.

    Args:
        store: whose.
    """

    def __init__(self, store: StateStore) -> None:
        self._store = store
        self._known: Usage | None = None
        self._due = 0.0
        self._counting: asyncio.Task[None] | None = None

    async def latest(self) -> Usage | None:
        """The newest count; None where there is none yet, or the store could not be asked when one was due."""
        if self._counting is None and time.monotonic() >= self._due:
            self._counting = asyncio.ensure_future(self._count())
        if self._counting is not None:
            await asyncio.wait({self._counting}, timeout=TOTALS_PATIENCE)
        return self._known

    async def _count(self) -> None:
        start = time.monotonic()
        try:
            self._known = await asyncio.to_thread(self._sum)
        except Exception as error:
            self._known = None
            logger.debug("what is in the store could not be counted: %s", error)
        finally:
            took = time.monotonic() - start
            self._due, self._counting = time.monotonic() + max(TOTALS_SECONDS, TOTALS_SHARE * took), None

    def _sum(self) -> Usage:
        sessions = size = 0
        after: str | None = None
        while True:
            tenants = self._store.tenants(after, PAGE)
            for tenant in tenants:
                usage = self._store.usage(tenant)
                sessions, size = sessions + usage.sessions, size + usage.bytes
            if len(tenants) < PAGE:
                return Usage(sessions, size)
            after = tenants[-1]


async def report(service: "SessionService", store: bool = False) -> dict[str, Any]:
    """All samples of an engine.

    Args:
        store: also what is in the store.
    """
    samples = [*service.meters.samples(), *_now(service)]
    for watched in service.watched:
        samples += watched()
    samples += service.quality.samples()
    if store and (totals := await service.totals.latest()) is not None:
        samples += [gauge(metrics.STORE_SESSIONS, totals.sessions), gauge(metrics.STORE_BYTES, totals.bytes)]
    return {"samples": samples}


@functools.cache
def _version() -> str:
    try:
        return importlib.metadata.version("deltamem-vllm")
    except importlib.metadata.PackageNotFoundError:  # run from a tree that is not installed
        return "unknown"


def _now(service: "SessionService") -> list[Sample]:
    directory, commits, stats = service.directory, service.commits, service.writer.stats
    held = busy = waiting = 0
    for session in directory:
        held += session.record is not None
        busy += session.owner is not None
        waiting += session.waiting
    version, adapter, model = _version(), commits.versions.adapter[:12], commits.versions.model[:12]
    durability = "sync" if commits.ahead is None else "write-behind"
    audit = service.audit
    return [
        gauge(metrics.BUILD_INFO, 1, version, adapter, model, commits.versions.layout, service.store_kind, durability),
        gauge(metrics.START_TIME, service.started_at),
        gauge(metrics.SESSIONS, held, "host"),
        gauge(metrics.SESSIONS_BUSY, busy),
        gauge(metrics.REQUESTS_WAITING, waiting),
        gauge(metrics.EVICTIONS, directory.dropped, "host"),
        gauge(metrics.HOST_BYTES, directory.used),
        gauge(metrics.HOST_LIMIT, directory.budget),
        gauge(metrics.LEASES, service.leases.held),
        gauge(metrics.LOST_VERSIONS, commits.lost),
        gauge(metrics.AUDIT_FAILURES, audit.failures if audit is not None else 0),
        gauge(metrics.AUDIT_LOST, audit.lost if audit is not None else 0),
        gauge(metrics.DEGRADED, commits.degraded),
        gauge(metrics.STORE_BATCHES, stats.batches),
        gauge(metrics.STORE_RECORDS, stats.commits),
        gauge(metrics.STORE_QUEUE, stats.pending),
        gauge(metrics.BACKLOG_VERSIONS, commits.unsaved),
        gauge(metrics.BACKLOG_BYTES, commits.backlog_bytes),
        gauge(metrics.BACKLOG_AGE, commits.oldest),
    ]
