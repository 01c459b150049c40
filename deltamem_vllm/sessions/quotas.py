"""A tenant over its quota is refused before its answer is generated.

There are two: the store's, for every tenant, which the store checks again at the commit; and a tenant's own, from the
key file, which only API processes know, and send along with whatever may write.
"""

import logging
import time
from collections.abc import Sequence

import numpy as np

from deltamem_vllm.errors import StoreUnavailable
from deltamem_vllm.sessions.records import Records
from deltamem_vllm.store.codec import PLAIN
from deltamem_vllm.store.ledger import Change, check_quota
from deltamem_vllm.store.protocol import Quota, Record, SessionKey, Usage, new_incarnation

logger = logging.getLogger("vllm.deltamem")

FRESH_SECONDS = 1.0
"""How long a tenant's usage is believed to leave room. It is asked for again before anybody is refused."""
MAX_TENANTS = 10_000
_NONE = Quota()


class Quotas:
    """Checks at admission what a commit would add.

    Args:
        records: reads the store off the event loop.
        state_shape: [layers, H, r, r] of a session.
    """

    def __init__(self, records: Records, state_shape: tuple[int, ...]) -> None:
        self._records = records
        state = np.zeros(state_shape, np.float32)
        self._least = len(
            PLAIN.encode(
                Record(
                    key=SessionKey("t", "s"),
                    version=1,
                    incarnation=new_incarnation(),
                    request_id=new_incarnation(),  # as long as a ticket
                    adapter=records.adapter,
                    model=records.model,
                    layout=records.layout,
                    base=state,
                    end=state,
                    window=b"",
                    created_at=time.time(),
                    updated_at=time.time(),
                    tokens=1,
                    windows=1,
                )
            )
        )
        self.quota, self.keep = records.store.quota, records.store.keep
        self._seen: dict[str, tuple[float, Usage]] = {}
        self._own: dict[str, Quota] = {}

    @property
    def growth(self) -> int:
        """Versions up to this number may be refused by the store's quota: see `_growth`."""
        return self._growth(self.quota)

    def note(self, tenant: str, own: Sequence[int | None] | None) -> None:
        """A tenant's own limits (sessions, bytes), as its request's API process knows them now; None: it has none."""
        if len(self._own) >= MAX_TENANTS:
            self._own.clear()  # whoever comes again brings them along
        self._own.pop(tenant, None)
        if own is not None:
            self._own[tenant] = Quota(*own)

    async def check(self, key: SessionKey, record: Record | None) -> None:
        """Refuse a request that would create a session or a version that the tenant has no room for.

        Costs nothing for a session that has all its kept versions: its commits replace as much as they add.

        Args:
            record: the session's latest; None if it is new.

        Raises:
            QuotaExceeded: 429.
        """
        version = record.version if record is not None else 0
        both = ((self.quota, "the store's"), (self._own.get(key.tenant, _NONE), "the tenant's"))
        quotas = [(quota, whose) for quota, whose in both if version < self._growth(quota)]
        if not quotas:
            return
        # What the next version takes at the least: the window that it will have is not known yet.
        grown = self._least + len(key.tenant) + len(key.session) + (len(record.attributes) if record else 0)
        adds = Change(created=record is None, trim=(), grown=grown)
        at, usage = self._seen.get(key.tenant, (0.0, Usage()))
        try:
            if at and time.monotonic() - at < FRESH_SECONDS and all(_fits(adds, usage, quota) for quota, _ in quotas):
                self._seen[key.tenant] = (at, adds.applied(usage))  # others must not count on the same room
                return
            usage = await self._records.reads.read(self._records.store.usage, key.tenant)
        except StoreUnavailable as e:
            logger.warning("the store cannot be asked for a tenant's usage; its quota is checked at commit: %s", e)
            return
        if len(self._seen) >= MAX_TENANTS:
            self._seen.clear()
        self._seen[key.tenant] = (time.monotonic(), adds.applied(usage))
        for quota, whose in quotas:
            check_quota(adds, usage, quota, key, whose)

    def _growth(self, quota: Quota) -> int:
        """Versions up to this number may be refused by a quota, because they add to what is stored; 0 without one."""
        if quota.bytes is not None:
            return self.keep
        return 0 if quota.sessions is None else 1


def _fits(adds: Change, usage: Usage, quota: Quota) -> bool:
    after = adds.applied(usage)
    return (quota.sessions is None or after.sessions <= quota.sessions) and (
        quota.bytes is None or after.bytes <= quota.bytes
    )
