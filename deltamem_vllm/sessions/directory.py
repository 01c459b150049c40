"""Which sessions this engine knows, who owns each, and who waits. Used by the service's event loop only."""

import asyncio
import contextlib
from collections import OrderedDict, deque
from collections.abc import AsyncIterator

from deltamem_vllm.errors import CapacityError
from deltamem_vllm.store.protocol import Expect, Record, SessionKey, new_incarnation

MAX_SESSIONS = 100_000
"""Sessions known at once, record or not."""


class Session:
    """One session as this engine sees it.

    Attributes:
        record: the latest durable record; None if it has none.
        loaded: whether ``record`` is known (else it must be read from the store).
        incarnation: the record's, or a fresh random one for a session without a record.
        deletions: how often it was deleted here; a commit granted before a deletion is refused.
        loading: held while the record is read from the store.
        unsaved: versions that the store could not take yet, oldest first, with what they expect there.
        storing: held while a commit or a deletion is on its way to the store.
    """

    def __init__(self, key: SessionKey) -> None:
        self.key = key
        self.record: Record | None = None
        self.loaded = False
        self.incarnation = new_incarnation()
        self.deletions = 0
        self.loading = asyncio.Lock()
        self.storing = asyncio.Lock()
        self.unsaved: deque[tuple[Record, Expect | None]] = deque()
        self._owner: str | None = None
        self._waiting: deque[tuple[str, asyncio.Future[None]]] = deque()

    @property
    def idle(self) -> bool:
        """Nobody owns it or waits for it."""
        return not (self._owner or self._waiting or self.unsaved or self.loading.locked() or self.storing.locked())

    @property
    def owner(self) -> str | None:
        """The ticket that may commit, if any."""
        return self._owner

    @property
    def record_bytes(self) -> int:
        """Host memory that the record's states take."""
        return 0 if self.record is None else self.record.base.nbytes + self.record.end.nbytes

    async def acquire(self, ticket: str, depth: int, seconds: float) -> None:
        """Become the owner, first come, first served.

        Raises:
            CapacityError: 409; ``depth`` requests wait already, or the turn did not come in ``seconds``.
        """
        if self._owner is None and not self._waiting:
            self._owner = ticket
            return
        if len(self._waiting) >= depth:
            raise CapacityError(
                f"session {self.key.session!r} is busy and {len(self._waiting)} requests wait for it already: retry "
                "later, send one request of a session at a time, or raise --deltamem-queue-depth",
                status=409,
                retry_after=1.0,
            )
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((ticket, turn))
        try:
            # Not wait_for: before Python 3.12 it swallows a cancellation that comes together with the turn.
            come, _ = await asyncio.wait({turn}, timeout=seconds)
        except asyncio.CancelledError:
            self._give_up(ticket, turn)
            raise
        if not come:
            self._give_up(ticket, turn)
            raise CapacityError(
                f"session {self.key.session!r} stayed busy for {seconds:g} s: retry later, or raise "
                "--deltamem-queue-seconds",
                status=409,
                retry_after=1.0,
            )

    def _give_up(self, ticket: str, turn: "asyncio.Future[None]") -> None:
        """Step out of the line, or hand on the session that came in this moment."""
        if self._owner == ticket:
            self.release(ticket)
        else:
            self._waiting.remove((ticket, turn))

    def release(self, ticket: str) -> None:
        """Give the session to the next in line; does nothing unless ``ticket`` owns it."""
        if self._owner != ticket:
            return
        self._owner = None
        if self._waiting:
            self._owner, turn = self._waiting.popleft()
            turn.set_result(None)

    def set_record(self, record: Record | None) -> None:
        """The session's durable truth as just read or written."""
        self.record, self.loaded = record, True
        if record is not None:
            self.incarnation = record.incarnation

    def forget(self) -> None:
        """The record is no longer known to be the latest: read it again before the next use."""
        self.record, self.loaded = None, False
        self.incarnation = new_incarnation()  # the record's takes its place when there still is one

    def erase(self) -> None:
        """The session was deleted: no record, another incarnation."""
        self.record, self.loaded = None, True
        self.unsaved.clear()
        self.incarnation = new_incarnation()
        self.deletions += 1


class Directory:
    """Sessions by key, least recently used first.

    Args:
        budget: bytes of records kept in host memory; idle sessions beyond it are dropped (the store has them).
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._uses = 0
        self._sessions: OrderedDict[SessionKey, Session] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sessions)

    def get(self, key: SessionKey) -> Session:
        """The session, made known if it was not; becomes the most recently used."""
        session = self._sessions.get(key)
        if session is None:
            session = self._sessions[key] = Session(key)
        self._sessions.move_to_end(key)
        return session

    def trim(self) -> None:
        """Now and then, drop idle sessions, oldest first, until the records fit the budget."""
        self._uses += 1
        if self._uses % 256:
            return
        used = sum(s.record_bytes for s in self._sessions.values())
        for key, session in list(self._sessions.items()):
            if used <= self.budget and len(self._sessions) <= MAX_SESSIONS:
                break
            if session.idle:
                used -= session.record_bytes
                del self._sessions[key]

    @contextlib.asynccontextmanager
    async def owned(self, session: Session, ticket: str, depth: int, seconds: float) -> AsyncIterator[None]:
        """Own a session while the block runs; keeps it on success, releases it on error."""
        await session.acquire(ticket, depth, seconds)
        try:
            yield
        except BaseException:
            session.release(ticket)
            raise
