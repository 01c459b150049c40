"""Leases in Redis: one key each that the server lets expire, taken by a script.

They reach the append-only file like everything else: with ``appendfsync always`` a lease costs a sync.
"""

from collections.abc import Callable, Sequence

from deltamem_vllm.store.leases import WANTED_SECONDS, Lease
from deltamem_vllm.store.protocol import SessionKey
from deltamem_vllm.store.redis_link import RedisLink

_RETRY_SECONDS = 0.5
"""Enough for a connection that the server closed; while the server is away, requests go on without leases."""


class RedisLeases:
    """``Leases`` over a store's connections.

    Args:
        link: the store's.
        names: a session's two keys: its lease, and the mark that somebody waits for it.
        holder: who we are.
        seconds: how long a lease lasts.
    """

    def __init__(
        self, link: RedisLink, names: Callable[[SessionKey], list[bytes]], holder: str, seconds: float
    ) -> None:
        self._link, self._names, self.holder, self.seconds = link, names, holder, seconds

    def acquire(self, key: SessionKey) -> Lease:
        return self._take([key])[0]

    def renew(self, keys: Sequence[SessionKey]) -> list[SessionKey]:
        return [key for key, lease in zip(keys, self._take(keys), strict=True) if not lease.ours] if keys else []

    def release(self, keys: Sequence[SessionKey]) -> None:
        if keys:
            names = [self._names(key)[0] for key in keys]
            self._link.script("release leases in", "RELEASE", names, self.holder, retry_seconds=_RETRY_SECONDS)

    def _take(self, keys: Sequence[SessionKey]) -> list[Lease]:
        names = [name for key in keys for name in self._names(key)]
        values = (self.holder, max(1, round(1000 * self.seconds)), round(1000 * WANTED_SECONDS))
        found = self._link.script("take leases in", "ACQUIRE", names, *values, retry_seconds=_RETRY_SECONDS)
        return [Lease(bool(ours), left / 1000, bool(wanted)) for ours, left, wanted in found]
