"""This engine's leases: taken before a request that writes is granted, given back when its outcome is known.

Between servers that share a store a lease is what a turn is between requests of one server (see
``deltamem_vllm.store.leases`` for what it promises). Where the store has no leases, or is away, a request goes on
without one and compare-and-set decides.

A request whose session another server is writing asks again and again until its time in the queue is over. While
requests of a session follow each other here its lease stays here, but after ``MAX_TURNS`` of them a server that asked
for it in the meantime gets its chance.
"""

import asyncio
import contextlib
import logging
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from deltamem_vllm.errors import CapacityError
from deltamem_vllm.sessions.directory import Session
from deltamem_vllm.store.leases import Lease, Leases
from deltamem_vllm.store.protocol import SessionKey

logger = logging.getLogger("vllm.deltamem")
_T = TypeVar("_T")

FIRST_POLL, MAX_POLL = 0.02, 0.25
"""Seconds between two questions for another server's lease, growing from the first to the second."""
MAX_TURNS = 4
"""Turns in a row while another server waits."""
ASK_SECONDS = 2.0
"""How long a request waits to hear from the store before it goes on without a lease."""
AWAY_SECONDS = 1.0
"""How often a store that is away is asked again; requests do not ask it meanwhile."""
YIELD_SECONDS = 0.3
"""How long a lease is left to whoever waits for it: longer than they pause between two questions."""


@dataclass(slots=True, eq=False)
class _Held:
    session: Session
    turns: int = 0


class EngineLeases:
    """The leases of one engine; for the session service's event loop only.

    Args:
        leases: the store's; None without any, then nothing here does anything.
    """

    def __init__(self, leases: Leases | None) -> None:
        self._leases = leases
        self._askers = ThreadPoolExecutor(max_workers=2, thread_name_prefix="deltamem-lease")
        # One thread, so that a renewal cannot overtake the release that was asked for after it.
        self._keeper = ThreadPoolExecutor(max_workers=1, thread_name_prefix="deltamem-leases")
        self._held: dict[SessionKey, _Held] = {}
        self._leaving: set[SessionKey] = set()  # to be released with the next batch
        self._going: set[SessionKey] = set()  # being released
        self._batch: asyncio.Future[None] | None = None
        self._releasing: asyncio.Task[None] | None = None
        self._away = False

    @property
    def held(self) -> int:
        """Sessions whose lease this engine has, as far as it knows."""
        return len(self._held)

    async def take(self, session: Session, until: float) -> None:
        """Hold a session's lease from here on, until `done`; where this fails, too.

        Args:
            session: owned by the caller's request.
            until: the event loop's time at which to give up.

        Raises:
            CapacityError: 409; another server still has it.
        """
        if self._leases is not None:
            await self._take(self._leases, session, until)

    def done(self, session: Session) -> None:
        """A request's outcome is known: release the lease soon, unless the session's next request is here. Never
        waits."""
        if self._leases is not None:
            asyncio.get_running_loop().call_soon(self._leave_if_unused, session)

    async def keep(self) -> None:
        """Renew what is held, until cancelled."""
        if self._leases is None:
            return
        while True:
            seconds = self._leases.seconds / 3
            await asyncio.sleep(min(seconds, AWAY_SECONDS) if self._away else seconds)
            for held in list(self._held.values()):
                self._leave_if_unused(held.session)
            try:
                await self._renew(self._leases)
            except Exception as e:  # whatever it is: a server that stops renewing loses every turn
                self._unavailable(e)

    async def close(self) -> None:
        """Release everything."""
        keys = [*self._held]
        self._held.clear()
        self._leaving.clear()
        if self._leases is not None and keys:
            with contextlib.suppress(Exception):  # they end by themselves
                await _off_loop(self._keeper, self._leases.release, keys)
        self._askers.shutdown(wait=False)
        self._keeper.shutdown(wait=False)

    # ------------------------------------------------------------------ inside

    async def _renew(self, leases: Leases) -> None:
        before = {key: (held, held.turns) for key, held in self._held.items() if key not in self._leaving}
        if not before:
            return
        taken = await _off_loop(self._keeper, leases.renew, list(before))
        self._away = False
        now = {key: (held, held.turns) for key, held in self._held.items()}
        lost = [key for key in taken if now.get(key) == before[key]]  # else it came back meanwhile, with another turn
        for key in lost:
            del self._held[key]
        if lost:
            logger.warning(
                "%d session(s) were taken over by another server while a request ran here, which will end in a "
                "conflict: this server stood still, or could not reach the store, for longer than a lease",
                len(lost),
            )

    async def _take(self, leases: Leases, session: Session, until: float) -> None:
        loop, pause, key = asyncio.get_running_loop(), FIRST_POLL, session.key
        while True:
            if key in self._going and self._batch is not None:  # else the release could overtake what follows
                await asyncio.wait({self._batch}, timeout=ASK_SECONDS)
            self._leaving.discard(key)
            lease = await self._ask(leases, session)
            left = until - loop.time()
            if lease is None or lease.ours:
                held = self._held.setdefault(key, _Held(session))
                held.turns += 1
                if lease is None or not lease.wanted or held.turns <= MAX_TURNS or left < YIELD_SECONDS:
                    return
                self._leave(key)
                await asyncio.sleep(YIELD_SECONDS)
                continue
            self._held.pop(key, None)
            if left <= 0:
                raise CapacityError(
                    f"session {key.session!r} is being written by another server on the same store: retry later, send "
                    "the requests of a session to one server, or raise --deltamem-queue-seconds",
                    status=409,
                    retry_after=max(1.0, math.ceil(lease.seconds)),
                )
            await asyncio.sleep(min(pause, left))
            pause = min(1.6 * pause, MAX_POLL)

    async def _ask(self, leases: Leases, session: Session) -> Lease | None:
        """What the store says; None: it is away, and the request goes on without a lease."""
        if self._away:
            return None
        asking = asyncio.ensure_future(_off_loop(self._askers, leases.acquire, session.key))
        try:
            come, _ = await asyncio.wait({asking}, timeout=ASK_SECONDS)
        except asyncio.CancelledError:
            asking.add_done_callback(lambda done: self._came_too_late(session, done))
            raise
        if not come:
            asking.add_done_callback(lambda done: self._came_too_late(session, done))
            self._unavailable(TimeoutError(f"it did not answer within {ASK_SECONDS:g} s"))
            return None
        try:
            return asking.result()
        except Exception as e:  # never a reason to refuse a request
            self._unavailable(e)
            return None

    def _came_too_late(self, session: Session, asked: "asyncio.Future[Lease]") -> None:
        """A lease for a request that was withdrawn, or went on without, while it was asked for."""
        if not asked.cancelled() and asked.exception() is None and asked.result().ours:
            self._held.setdefault(session.key, _Held(session))
            self.done(session)

    def _leave_if_unused(self, session: Session) -> None:
        if session.key in self._held and session.owner is None and not session.unsaved:
            self._leave(session.key)

    def _leave(self, key: SessionKey) -> None:
        self._leaving.add(key)
        if self._releasing is None or self._releasing.done():
            self._releasing = asyncio.ensure_future(self._release())

    async def _release(self) -> None:
        """Release what leaves, together what came together."""
        assert self._leases is not None
        while self._leaving:
            self._going, self._leaving = self._leaving, set()
            self._batch = asyncio.get_running_loop().create_future()
            for key in self._going:
                self._held.pop(key, None)
            try:
                await _off_loop(self._keeper, self._leases.release, list(self._going))
                self._away = False
            except Exception as e:  # they end by themselves
                self._unavailable(e)
            finally:
                self._going = set()
                self._batch.set_result(None)

    def _unavailable(self, error: Exception) -> None:
        if not self._away:
            logger.warning("no leases while the store is away; versions decide between servers: %r", error)
        self._away = True


async def _off_loop(threads: ThreadPoolExecutor, work: Callable[..., _T], *args: object) -> _T:
    return await asyncio.get_running_loop().run_in_executor(threads, work, *args)
