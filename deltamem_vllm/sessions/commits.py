"""From a request's final state to a durable record, in order, and what happens while the store cannot take it.

Every new version joins its session's ``unsaved`` ones and goes to the store behind those before it. What differs is
when the client is told:

* after the store has it (``committed``): the default;
* at once (``pending``): with write-behind, as long as what waits stays within `WriteBehind`'s bounds. A commit that
  would exceed them waits for the store as above;
* after the store could not take it, disk full or unreachable (``degraded``): it is tried again every second. A session
  that has waited long for such an answer does not wait for the next one.

A commit that the store refuses for good (another writer was first, the session was deleted) is a conflict: nothing is
kept. If versions that clients were told of are refused so, they are lost: counted, logged, shown with the session, and
the session goes on from what the store has. What is unsaved when the process ends is lost, and said.
"""

import asyncio
import logging
import time
from collections import OrderedDict, deque
from typing import Any, Literal

import numpy as np

from deltamem_vllm import metrics
from deltamem_vllm.audit.chain import Event
from deltamem_vllm.audit.log import AuditLog
from deltamem_vllm.errors import CapacityError, LeaseLost, StaleVersion, StoreError, StoreUnavailable
from deltamem_vllm.sessions.directory import Session, Unsaved, size_of
from deltamem_vllm.sessions.grants import Grant
from deltamem_vllm.sessions.meters import Meters
from deltamem_vllm.sessions.versions import Versions
from deltamem_vllm.sessions.write_behind import WriteBehind
from deltamem_vllm.store.protocol import Expect, Record, SessionKey
from deltamem_vllm.store.writer import CommitWriter

logger = logging.getLogger("vllm.deltamem")

RETRY_SECONDS = 1.0
MAX_UNSAVED = 64
"""Versions of one session that may wait for the store; then its requests get 503."""
MAX_LOSSES = 10_000
"""Sessions whose losses are remembered one by one."""
SLOW_SECONDS = 1.0
"""A store that refuses a session's version after so long is not waited for again, until it has taken what waits."""
AUDIT_SECONDS = 5.0
"""How long what has happened waits for a log that is required, before its client is told all the same."""


class Commits:
    """Makes the commits of one engine.

    Args:
        writer: the store's one writer.
        versions: makes the records.
        ahead: how far clients may be told ahead of the store; None: not at all.
        unsaved_bytes: host memory that records the store does not take may fill.
        audit: where what the store has taken is logged.
        meters: counts what happens to sessions.

    Attributes:
        lost: versions that clients were told of and that the store does not have, nor ever will.
        unsaved, backlog_bytes: those that it does not have yet, and the host memory that they take.
    """

    def __init__(
        self,
        writer: CommitWriter,
        *,
        versions: Versions,
        ahead: WriteBehind | None = None,
        unsaved_bytes: int = 256 << 20,
        audit: AuditLog | None = None,
        meters: Meters | None = None,
    ) -> None:
        self._meters, self._audit = meters if meters is not None else Meters(), audit
        self._writer = writer
        self.versions = versions
        self.ahead, self.room = ahead, unsaved_bytes
        self.lost = self.unsaved = self.backlog_bytes = 0
        self._told: deque[Unsaved] = deque()  # in the order of telling; those gone meanwhile included
        self._waiting: OrderedDict[Session, None] = OrderedDict()  # sessions of the versions that count as unsaved
        self._troubled: set[Session] = set()  # those among them that the store could not take
        self._kept_waiting: set[Session] = set()  # those of them that it kept waiting
        self._losses: OrderedDict[SessionKey, int] = OrderedDict()
        self._bringing: set[asyncio.Task[bool]] = set()

    @property
    def oldest(self) -> float:
        """For how many seconds the oldest unsaved version has waited; 0: there is none."""
        told = next((entry.told for entry in self._told if not entry.gone), None)
        return 0.0 if told is None else time.monotonic() - told

    @property
    def degraded(self) -> bool:
        """Whether versions wait that the store could not take."""
        return bool(self._troubled)

    def lost_of(self, key: SessionKey) -> int:
        """Versions of one session that were lost in this process's life."""
        return self._losses.get(key, 0)

    def check_room(self, session: Session) -> None:
        """Refuse a further turn while too much waits for the store.

        Raises:
            CapacityError: 503.
        """
        if len(session.unsaved) >= MAX_UNSAVED:
            waits = f"{len(session.unsaved)} versions of session {session.key.session!r} wait"
        elif self.backlog_bytes >= self.room:
            waits = f"{self.unsaved} versions ({self.backlog_bytes} bytes, all that --deltamem-host-bytes allows) wait"
        else:
            return
        raise CapacityError(
            f"{waits} for the store, which does not take them: repair the store, then retry",
            status=503,
            retry_after=5.0,
        )

    def check_audit(self) -> None:
        """Refuse a change that could not be logged.

        Raises:
            StoreUnavailable: 503.
        """
        if self._audit is not None:
            self._audit.check()

    async def note(self, event: Event, key: SessionKey, version: int = 0, request_id: str = "") -> None:
        """Count and log what has happened; waits for the log where it is required."""
        self._meters.add(metrics.EVENTS, event)
        if self._audit is None:
            return
        logged = self._audit.append(event, key, version, request_id)
        if self._audit.required:
            await asyncio.wait({asyncio.wrap_future(logged)}, timeout=AUDIT_SECONDS)

    async def commit(
        self, session: Session, grant: Grant, deletions: int, tokens_fed: list[int], state: np.ndarray
    ) -> dict[str, Any]:
        """Make one request's memory durable, or tell its client ahead of that.

        Args:
            deletions: how often the session had been deleted when the request was granted.
            tokens_fed: every token that went through the model.
            state: [layers, H, r, r] fp32 after them.

        Returns:
            the outcome: status, version, error.
        """
        try:
            self.check_audit()
            known_away = session in self._kept_waiting and session.is_at(grant.expect, deletions)
            if known_away or self._may_tell_ahead(session, grant, deletions):
                entry = Unsaved(self.versions.after(grant, session.record, tokens_fed, state), grant.expect)
                session.unsaved.append(entry)
                self._tell(session, entry)
                if known_away:
                    why = f"{len(session.unsaved)} versions of the session wait for the store"
                    return {"status": "degraded", "version": entry.record.version, "error": why}
                self._bring_soon(session)
                return {"status": "pending", "version": entry.record.version, "error": ""}
            async with session.storing:  # a deletion waits, so that what is on its way cannot arrive after it
                if session.deletions != deletions:
                    raise StaleVersion(f"session {session.key.session!r} was deleted while the request ran")
                entry = Unsaved(self.versions.after(grant, session.record, tokens_fed, state), grant.expect)
                return await self._store_now(session, entry)
        except StaleVersion as e:
            return {"status": "conflict", "error": str(e)}
        except Exception as e:
            logger.exception("session memory was not saved")
            why = str(e) if isinstance(e, StoreError) else f"{type(e).__name__}: {e}"
            return {"status": "failed", "error": why}

    async def _store_now(self, session: Session, entry: Unsaved) -> dict[str, Any]:
        session.unsaved.append(entry)
        begun = time.monotonic()
        try:
            await self._save(session)
        except StoreUnavailable as e:
            self._tell(session, entry)
            self._troubled.add(session)
            if time.monotonic() - begun >= SLOW_SECONDS:
                self._kept_waiting.add(session)
            logger.error("the store does not take commits; %d version(s) wait: %s", self.unsaved, e)
            return {"status": "degraded", "version": entry.record.version, "error": str(e)}
        except LeaseLost as e:
            session.unsaved.pop()  # versions before it may still find their place, should the other server give up
            if not session.unsaved:
                self._refused(session, e)
            raise
        except Exception as e:
            self._refused(session, e)
            raise
        session.set_record(entry.record)
        return {"status": "committed", "version": entry.record.version, "error": ""}

    async def store(
        self, session: Session, record: Record, expect: Expect | None, deletions: int, event: Event | Literal[""] = ""
    ) -> None:
        """Make a version durable that was made outside of a request; those before it first. Never told ahead.

        Args:
            expect: what it was made from.
            deletions: how often the session had been deleted then.
            event: what the audit log calls it.

        Raises:
            StaleVersion: the session was deleted, or another writer was first. StoreUnavailable, QuotaExceeded,
            CorruptRecord: the store did not take it. The session goes on from what the store has.
        """
        async with session.storing:
            if session.deletions != deletions:
                raise StaleVersion(f"session {session.key.session!r} was deleted meanwhile")
            entry = Unsaved(record, expect, event=event)
            session.unsaved.append(entry)
            try:
                await self._save(session)
            except BaseException as e:
                if session.unsaved and session.unsaved[-1] is entry:
                    session.unsaved.pop()  # nobody was told of it, so it is not tried again
                if not session.unsaved:  # it was tried, and may have been stored all the same
                    self._settled(session)
                    session.forget()
                elif not isinstance(e, (StoreUnavailable, LeaseLost)):
                    self._refused(session, e)
                raise
            session.set_record(record)

    def abandon(self, session: Session) -> bool:
        """The session is deleted: its unsaved versions go with it. Whether there were any."""
        there = bool(session.unsaved)
        for entry in session.unsaved:
            self._done(entry)
        session.unsaved.clear()
        self._settled(session)
        return there

    async def keep_trying(self) -> None:
        """Bring waiting versions to the store, until cancelled."""
        while True:
            await asyncio.sleep(RETRY_SECONDS)
            await self.save_waiting()

    async def save_waiting(self) -> None:
        """Try once to save what waits: one session first, so that a store that is away costs one try and no queue."""
        if not self._waiting:
            return
        first, *others = self._waiting
        if await self._bring(first):
            await asyncio.gather(*(self._bring(session) for session in others))
        elif first in self._waiting:
            # Should it be the only one that is refused, the next round helps the others.
            self._waiting.move_to_end(first)

    async def finish(self, seconds: float) -> None:
        """The end: save what can be saved in ``seconds``, and say what is lost."""
        deadline = time.monotonic() + seconds
        for _ in range(len(self._waiting)):
            left = deadline - time.monotonic()
            if not self._waiting or left <= 0:
                break
            trying = asyncio.ensure_future(self.save_waiting())
            await asyncio.wait({trying}, timeout=left)
            trying.cancel()
        if self.unsaved:
            self.lost += self.unsaved
            logger.error("%d version(s) never reached the store and are lost", self.unsaved)

    # ------------------------------------------------------------------ inside

    def _may_tell_ahead(self, session: Session, grant: Grant, deletions: int) -> bool:
        """Whether this commit keeps within the bounds of write-behind, and nothing is known that will refuse it."""
        if self.ahead is None or session in self._troubled or not session.is_at(grant.expect, deletions):
            return False
        version = grant.expect.version + 1 if grant.expect is not None else 1
        if version <= self.ahead.growth:
            return False
        if (
            len(session.unsaved) >= MAX_UNSAVED // 2
            or self.unsaved >= self.ahead.versions
            or self.backlog_bytes >= self.room
        ):
            return False
        while self._told and self._told[0].gone:
            self._told.popleft()
        oldest = self._told[0].told if self._told else None
        return oldest is None or time.monotonic() - oldest < self.ahead.seconds

    def _tell(self, session: Session, entry: Unsaved) -> None:
        """The client hears of a version that the store does not have; the session goes on from it."""
        entry.told = time.monotonic()
        self._told.append(entry)
        self._waiting[session] = None
        self.unsaved += 1
        self.backlog_bytes += size_of(entry.record)
        session.set_record(entry.record)

    def _done(self, entry: Unsaved) -> None:
        """A version waits no more."""
        entry.gone = True
        if entry.told is not None:
            self.unsaved -= 1
            self.backlog_bytes -= size_of(entry.record)
        while self._told and self._told[0].gone:
            self._told.popleft()

    def _settled(self, session: Session) -> None:
        """Nothing of the session waits any more."""
        self._waiting.pop(session, None)
        self._troubled.discard(session)
        self._kept_waiting.discard(session)

    def _bring_soon(self, session: Session) -> None:
        """Start bringing a session's versions to the store, unless that is under way."""
        if session.storing.locked():  # whoever saves them goes on to the last, this one included
            return
        task = asyncio.get_running_loop().create_task(self._bring(session))
        self._bringing.add(task)
        task.add_done_callback(self._bringing.discard)

    async def _bring(self, session: Session) -> bool:
        """Bring a session's versions to the store, if it takes them; False: it cannot now."""
        async with session.storing:
            late = session in self._troubled
            waiting = len(session.unsaved)
            try:
                await self._save(session)
            except (StoreUnavailable, LeaseLost) as e:
                if not late:
                    self._troubled.add(session)
                    logger.error("the store does not take commits; %d version(s) wait: %s", self.unsaved, e)
                return False
            except Exception as e:
                self._refused(session, e)
                return True  # the store is there
            if late and waiting:
                logger.warning("%d version(s) of a session reached the store late", waiting)
            return True

    async def _save(self, session: Session) -> None:
        """One after the other: a version must not be tried while the one before it may still fail."""
        while session.unsaved:
            entry = session.unsaved[0]
            await asyncio.wrap_future(self._writer.submit(entry.record, entry.expect))
            session.unsaved.popleft()
            self._done(entry)
            made = entry.record
            event = entry.event or ("create" if made.version == 1 else "commit")
            await self.note(event, made.key, made.version, made.request_id)
        self._settled(session)

    def _refused(self, session: Session, why: BaseException) -> None:
        """The store will never take what waits. What clients were told of is lost; go on from what the store has."""
        told = sum(entry.told is not None for entry in session.unsaved)
        self.abandon(session)
        session.forget()
        if not told:
            return
        self.lost += told
        self._losses[session.key] = self._losses.pop(session.key, 0) + told
        if len(self._losses) > MAX_LOSSES:
            self._losses.popitem(last=False)
        logger.error("%d version(s) of a session are lost: the store refused them: %s", told, why)
