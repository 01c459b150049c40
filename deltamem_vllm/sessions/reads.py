"""The store's calls that wait for it, on a few threads; and a store that keeps them waiting.

A read whose connection breaks is tried again for seconds before it fails. While a store is away every request would
wait for that, each behind those before it. So after a read that failed slowly the store counts as away: reads are
refused at once, but for one a second, which finds out whether it is back. A store that fails at once is asked every
time.

What a store can say without waiting is asked on the event loop's own thread: handing a question to a thread and its
answer back costs ten times the look-up. Such a question should take microseconds; one that took long came to a disk
that hangs, and for a while all of them go to the threads again.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from deltamem_vllm.errors import StoreUnavailable
from deltamem_vllm.store.protocol import WouldWait

logger = logging.getLogger("vllm.deltamem")
_T = TypeVar("_T")

SLOW_SECONDS = 1.0
"""A read that fails after so long costs more than it tells."""
AWAY_SECONDS = 1.0
"""How often a store that is away is asked again."""
LONG_GLANCE = 0.02
"""A question on the event loop's thread that took so long, in seconds, is the last one there for `AWAY_SECONDS`."""


class Reads:
    """Runs calls for the event loop.

    Args:
        readers: threads for `read`, which other calls do not keep waiting. A store that lies in this process or in a
            local file wants one: its reads compute rather than wait, and two threads that compute wait for each other
            at every call of the database (CPython's global lock).
    """

    def __init__(self, readers: int = 2) -> None:
        self._readers = ThreadPoolExecutor(max_workers=readers, thread_name_prefix="deltamem-load")
        self._others = ThreadPoolExecutor(max_workers=2, thread_name_prefix="deltamem-store")
        self._away = self._trying = False
        self._why, self._next = "", 0.0
        self._glances_from = 0.0

    async def run(self, work: Callable[..., _T], *args: object) -> _T:
        """Run a call, however long it takes."""
        return await asyncio.get_running_loop().run_in_executor(self._others, work, *args)

    def glance(self, work: Callable[..., _T], *args: object) -> _T:
        """Run, on the event loop's thread, a read that does not wait.

        Raises:
            WouldWait: it cannot be told here; and whatever else the read raises.
        """
        begun = time.monotonic()
        if begun < self._glances_from:
            raise WouldWait
        try:
            return work(*args)
        finally:
            if (ended := time.monotonic()) - begun >= LONG_GLANCE:
                self._glances_from = ended + AWAY_SECONDS

    async def read(self, work: Callable[..., _T], *args: object, patience: float | None = None) -> _T:
        """Run a read, unless the store is away.

        Args:
            patience: seconds to wait; None: as long as it takes.

        Raises:
            StoreUnavailable: it is away, or did not answer within ``patience``; and whatever the read raises.
        """
        trying = self._away
        if trying and (self._trying or time.monotonic() < self._next):
            raise StoreUnavailable(self._why)
        self._trying = self._trying or trying
        loop = asyncio.get_running_loop()
        asked: asyncio.Future[_T] = loop.run_in_executor(self._readers, self._timed, work, args, trying)
        try:
            # Not wait_for: before Python 3.12 it swallows a cancellation that comes together with the answer.
            come, _ = await asyncio.wait({asked}, timeout=patience)
            if not come:
                raise StoreUnavailable(f"the store did not answer within {patience:g} s: see whether it is up")
            return asked.result()
        finally:
            asked.cancel()
            if trying:
                self._trying, self._next = False, time.monotonic() + AWAY_SECONDS

    def close(self) -> None:
        """Start nothing any more."""
        for threads in (self._readers, self._others):
            threads.shutdown(wait=False)

    def _timed(self, work: Callable[..., _T], args: tuple[object, ...], trying: bool) -> _T:
        """On a thread."""
        if self._away and not trying:  # it went while this read waited for a thread
            raise StoreUnavailable(self._why)
        begun = time.monotonic()
        try:
            found = work(*args)
        except StoreUnavailable as e:
            if time.monotonic() - begun >= SLOW_SECONDS:
                if not self._away:
                    logger.warning("the store is away; it is asked once in %g s until it answers: %s", AWAY_SECONDS, e)
                self._why, self._next, self._away = str(e), time.monotonic() + AWAY_SECONDS, True
            raise
        self._away = False
        return found
