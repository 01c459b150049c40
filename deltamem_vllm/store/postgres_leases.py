"""Leases in PostgreSQL: one row each in an unlogged table, taken by one statement in one round trip.

The table is not logged and its transactions do not wait for the log: a lease costs no write to the disk. A crash
of the server empties it, and a standby has none; compare-and-set then decides alone.
"""

from collections.abc import Sequence
from typing import Any

from deltamem_vllm.store import postgres_schema as sql
from deltamem_vllm.store.leases import WANTED_SECONDS, Lease
from deltamem_vllm.store.postgres_link import Connection, Link
from deltamem_vllm.store.protocol import SessionKey

_RETRY_SECONDS = 0.5
"""Enough for a connection that the server closed; while the server is away, requests go on without leases."""


class PostgresLeases:
    """``Leases`` over a store's connections.

    Args:
        link: the store's.
        holder: who we are.
        seconds: how long a lease lasts.
    """

    def __init__(self, link: Link, holder: str, seconds: float) -> None:
        self._link, self.holder, self.seconds = link, holder, seconds

    def acquire(self, key: SessionKey) -> Lease:
        return self._take([key])[key]

    def renew(self, keys: Sequence[SessionKey]) -> list[SessionKey]:
        return [key for key, lease in self._take(keys).items() if not lease.ours] if keys else []

    def release(self, keys: Sequence[SessionKey]) -> None:
        if not keys:
            return
        names = columns(keys)

        def work(connection: Connection) -> None:
            connection.autocommit = True
            with connection.pipeline():
                connection.execute(sql.RELEASE, (*names, self.holder, self.holder))
                connection.execute(sql.SWEEP_LEASES)

        self._link.run("release leases in", work, _RETRY_SECONDS)

    def _take(self, keys: Sequence[SessionKey]) -> dict[SessionKey, Lease]:
        bindings = (self.holder, self.seconds, *columns(keys), WANTED_SECONDS)

        def work(connection: Connection) -> list[Any]:
            connection.autocommit = True
            rows: list[Any] = connection.execute(sql.ACQUIRE, bindings).fetchall()
            return rows

        rows = self._link.run("take leases in", work, _RETRY_SECONDS)
        found = {
            SessionKey(tenant, session): (holder == self.holder, left, w) for tenant, session, holder, left, w in rows
        }
        return {key: Lease(ours, max(0.0, left), ours and wanted) for key, (ours, left, wanted) in found.items()}


def columns(keys: Sequence[SessionKey]) -> tuple[list[str], list[str]]:
    """Distinct keys as the two arrays that ``unnest`` joins again."""
    ordered = sorted(set(keys))
    return [key.tenant for key in ordered], [key.session for key in ordered]
