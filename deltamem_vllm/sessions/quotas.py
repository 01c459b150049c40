"""A tenant over its quota is refused before its answer is generated. The store's check at commit stays the truth."""

import logging
import time

from deltamem_vllm.errors import StoreUnavailable
from deltamem_vllm.sessions.records import Records
from deltamem_vllm.store.ledger import Change, check_quota
from deltamem_vllm.store.protocol import Record, SessionKey, Usage

logger = logging.getLogger("vllm.deltamem")

FRESH_SECONDS = 1.0
"""How long a tenant's usage is believed to leave room. It is asked for again before anybody is refused."""
MAX_TENANTS = 10_000


class Quotas:
    """Checks at admission what a commit would add.

    Args:
        records: reads the store off the event loop.
        state_bytes: size of one state.
    """

    def __init__(self, records: Records, state_bytes: int) -> None:
        self._records, self._state_bytes = records, state_bytes
        self.quota, self.keep = records.store.quota, records.store.keep
        self._seen: dict[str, tuple[float, Usage]] = {}

    @property
    def growth(self) -> int:
        """Versions up to this number may be refused by a quota, because they add to what is stored; 0 without one."""
        if self.quota.bytes is not None:
            return self.keep
        return 0 if self.quota.sessions is None else 1

    async def check(self, key: SessionKey, record: Record | None) -> None:
        """Refuse a request that would create a session or a version that the tenant has no room for.

        Costs nothing for a session that has all its kept versions: its commits replace as much as they add.

        Args:
            record: the session's latest; None if it is new.

        Raises:
            QuotaExceeded: 429.
        """
        if (record.version if record is not None else 0) >= self.growth:
            return
        adds = Change(created=record is None, trim=(), grown=2 * self._state_bytes)  # base and end, at the least
        at, usage = self._seen.get(key.tenant, (0.0, Usage()))
        try:
            if at and time.monotonic() - at < FRESH_SECONDS and self._fits(adds, usage):
                self._seen[key.tenant] = (at, adds.applied(usage))  # others must not count on the same room
                return
            usage = await self._records.on_loader(self._records.store.usage, key.tenant)
        except StoreUnavailable as e:
            logger.warning("the store cannot be asked for a tenant's usage; its quota is checked at commit: %s", e)
            return
        if len(self._seen) >= MAX_TENANTS:
            self._seen.clear()
        self._seen[key.tenant] = (time.monotonic(), adds.applied(usage))
        check_quota(adds, usage, self.quota, key)

    def _fits(self, adds: Change, usage: Usage) -> bool:
        after = adds.applied(usage)
        return (self.quota.sessions is None or after.sessions <= self.quota.sessions) and (
            self.quota.bytes is None or after.bytes <= self.quota.bytes
        )
