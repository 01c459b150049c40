"""Sessions that nobody has written for longer than ``--deltamem-ttl`` are deleted, in the background and by batches.

So are those that have outlived a ttl of their own, as far as their records are in host memory. Others are deleted when
they are asked for (`Records.latest`): nobody gets one.
"""

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Callable

from deltamem_vllm.errors import StoreError
from deltamem_vllm.sessions.directory import Directory
from deltamem_vllm.sessions.records import Records, has_outlived
from deltamem_vllm.store.protocol import SessionKey

logger = logging.getLogger("vllm.deltamem")

BATCH = 100
PAUSE = 60.0
MAX_PASSED_OVER = 10_000
"""Idle sessions in use here that one sweep looks behind."""


class Expiry:
    """The sweep of one engine.

    Args:
        ttl: seconds since its last commit after which a session is deleted; 0: never.
        directory: the sessions that this engine knows; those in use are left alone.
        records: calls the store off the event loop.
        forget: called with the key of a session of which is not known whether the store has it still.
        expired: called with the key of one that the store has deleted.
        allowed: raises where changes are refused at present.

    Attributes:
        expired: sessions deleted so far.
    """

    def __init__(
        self,
        ttl: float,
        directory: Directory,
        records: Records,
        forget: Callable[[SessionKey], None],
        expired: Callable[[SessionKey], None],
        allowed: Callable[[], None],
    ) -> None:
        self.ttl, self.expired = ttl, 0
        self._directory, self._records = directory, records
        self._forget, self._expired, self._allowed = forget, expired, allowed

    def pause(self) -> float:
        """Seconds to the next sweep: a tenth of the ttl, a minute at most; jittered, so that engines take turns."""
        return min(self.ttl / 10 or PAUSE, PAUSE) * random.uniform(0.5, 1.5)

    async def run(self) -> None:
        """Sweep again and again, until cancelled."""
        while True:
            await asyncio.sleep(self.pause())
            try:
                await self.sweep()
            except StoreError as e:
                logger.warning("idle sessions could not be deleted; trying again later: %s", e)
            except Exception:
                logger.exception("idle sessions could not be deleted; trying again later")

    async def sweep(self) -> int:
        """Delete every session that has been idle for too long; returns how many there were."""
        self._allowed()
        before, passed_over = self.expired, 0
        for session in self._directory.idle():
            if session.record is not None and has_outlived(session.record):
                await self._delete([session.key], session.record.updated_at)
        if not self.ttl:
            return self.expired - before
        until = time.time() - self.ttl
        while True:
            limit = BATCH + passed_over
            idle = await self._records.reads.run(self._records.store.idle, until, limit)
            free = [key for key in idle if (known := self._directory.find(key)) is None or known.idle]
            gone = await self._delete(free[:BATCH], until) if free else 0
            left = min(len(idle) - gone, MAX_PASSED_OVER)
            if (len(idle) < limit and len(free) <= BATCH) or (not gone and left <= passed_over):
                return self.expired - before
            passed_over = left

    async def _delete(self, keys: list[SessionKey], until: float) -> int:
        """Delete sessions while nobody here can read or write them. A request that comes meanwhile waits for this
        one batch, and starts a new session."""
        async with contextlib.AsyncExitStack() as held:
            sessions = []
            for key in keys:  # they are idle, so none of this waits, and nothing comes between
                session = self._directory.get(key)
                await held.enter_async_context(session.storing)
                await held.enter_async_context(session.loading)
                sessions.append(session)
            gone = set()
            try:
                gone.update(await self._records.reads.run(self._records.store.delete_idle, keys, until))
            except StoreError:
                for session in sessions:  # what has become of them is not known
                    self._forget(session.key)
                    session.forget()
                raise
            for session in sessions:
                if session.key in gone:
                    self._expired(session.key)
                    session.erase()
        for session in sessions:
            if session.key in gone:
                self._directory.drop(session)
        self.expired += len(gone)
        return len(gone)
