"""Which sessions this engine knows, who owns each, and who waits. Used by the service's event loop only."""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from deltamem_vllm.audit.chain import Event
from deltamem_vllm.errors import CapacityError
from deltamem_vllm.store.protocol import Expect, Record, SessionKey, new_incarnation

SESSION_BYTES = 4 << 10
"""What a session counts for beside its record's content: its locks, queues, names and places in tables."""
PATIENCE = 32
"""Sessions in use that one look for room passes over before it leaves the rest to the next."""


@dataclass(eq=False, slots=True)
class Unsaved:
    """A version on its way to the store.

    Attributes:
        expect: what it expects there.
        told: when its client was told of it, on the monotonic clock; None while the client waits for the store.
        gone: whether it has reached the store, or never will.
        event: what the audit log calls it; empty: what its number says.
    """

    record: Record
    expect: Expect | None
    told: float | None = None
    gone: bool = False
    event: Event | Literal[""] = ""


class Session:
    """One session as this engine sees it.

    Attributes:
        record: the latest record, the last of ``unsaved`` if there are any; None if it has none.
        loaded: whether ``record`` is known (else it must be read from the store).
        incarnation: the record's, or a fresh random one for a session without a record.
        deletions: how often it was deleted here; a commit granted before a deletion is refused.
        loading: held while the record is read from the store.
        unsaved: versions that the store does not have yet, oldest first.
        reply: what the client may call the answer that came with a version, and which version.
        storing: held while versions or a deletion are on their way to the store.

    Args:
        resized: called with the bytes by which its record has grown or shrunk.
    """

    def __init__(self, key: SessionKey, resized: Callable[[int], None] | None = None) -> None:
        self.key = key
        self.resized = resized
        self.record: Record | None = None
        self.loaded = False
        self.incarnation = new_incarnation()
        self.deletions = 0
        self.loading = asyncio.Lock()
        self.storing = asyncio.Lock()
        self.unsaved: deque[Unsaved] = deque()
        self.reply: tuple[int, list[bytes]] | None = None
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
    def waiting(self) -> int:
        """How many requests wait for their turn."""
        return len(self._waiting)

    @property
    def record_bytes(self) -> int:
        """Host memory that the record takes."""
        return 0 if self.record is None else size_of(self.record)

    def is_at(self, expect: Expect | None, deletions: int) -> bool:
        """Whether it is, as far as is known here, what a request started from."""
        known = self.record.expect if self.record is not None else None
        return self.loaded and known == expect and self.deletions == deletions

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
        """The session's latest record, as just read or made."""
        self._keep(record, True)
        if record is not None:
            self.incarnation = record.incarnation

    def forget(self) -> None:
        """The record is no longer known to be the latest: read it again before the next use."""
        self._keep(None, False)
        self.incarnation = new_incarnation()  # the record's takes its place when there still is one

    def erase(self) -> None:
        """The session was deleted: no record, another incarnation."""
        self._keep(None, True)
        self.incarnation = new_incarnation()
        self.deletions += 1

    def _keep(self, record: Record | None, loaded: bool) -> None:
        before = self.record_bytes
        self.record, self.loaded = record, loaded
        if self.resized is not None:
            self.resized(self.record_bytes - before)


def size_of(record: Record) -> int:
    """Host memory that a record's content takes, in bytes."""
    return record.base.nbytes + record.end.nbytes + len(record.window) + len(record.attributes)


class Directory:
    """Sessions by key, least recently used first.

    Args:
        budget: bytes of host memory for sessions and their records; idle sessions beyond it are dropped (the store
            has them).

    Attributes:
        used: bytes taken now.
        dropped: sessions that were dropped to make room.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.used = self.dropped = 0
        self._sessions: OrderedDict[SessionKey, Session] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sessions)

    def find(self, key: SessionKey) -> Session | None:
        """The session if it is known here; counts as no use."""
        return self._sessions.get(key)

    def __iter__(self) -> Iterator[Session]:
        return iter(self._sessions.values())

    def idle(self) -> list[Session]:
        """The sessions that are known here and idle."""
        return [session for session in self._sessions.values() if session.idle]

    def drop(self, session: Session) -> None:
        """Forget a session that is idle; one in use stays."""
        if session.idle and self._sessions.get(session.key) is session:
            del self._sessions[session.key]
            session.resized = None
            self.used -= SESSION_BYTES + session.record_bytes

    def get(self, key: SessionKey) -> Session:
        """The session, made known if it was not; becomes the most recently used. Makes room for it."""
        session = self._sessions.get(key)
        if session is None:
            session = self._sessions[key] = Session(key, self._resized)
            self.used += SESSION_BYTES
        self._sessions.move_to_end(key)
        self._make_room(session)
        return session

    def _resized(self, by: int) -> None:
        self.used += by
        if by >= 0:  # 0: it waits for nothing any more, so that it can be dropped
            self._make_room()

    def _make_room(self, asked_for: Session | None = None) -> None:
        """Drop idle sessions, oldest first, until the rest fits the budget. Each look costs O(1) on average.

        The one that was just asked for stays: were it dropped, the next to ask would get another one, and both own it.
        """
        passed = 0
        while self.used > self.budget and len(self._sessions) > 1 and passed < PATIENCE:
            key, session = next(iter(self._sessions.items()))
            if session is asked_for or not session.idle:  # in use, hence as good as just used
                passed += 1
                self._sessions.move_to_end(key)
                continue
            self.drop(session)
            self.dropped += 1
