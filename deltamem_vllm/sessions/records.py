"""The latest record of a session: from host memory where it is still the latest, else from the store."""

import asyncio
import logging
import time
from collections.abc import Callable

from deltamem_vllm import metrics
from deltamem_vllm.errors import SessionError, StoreUnavailable
from deltamem_vllm.sessions import attributes
from deltamem_vllm.sessions.directory import Session
from deltamem_vllm.sessions.meters import Meters
from deltamem_vllm.sessions.reads import Reads
from deltamem_vllm.store.protocol import Expect, Record, SessionKey, StateStore, WouldWait

logger = logging.getLogger("vllm.deltamem")
_TTL = b"ttl"
NOTICE_SECONDS = 3.0
"""How long a request waits to hear of versions of other servers before it goes on from the one that is known here."""


class Records:
    """Reads records for the event loop; the store's calls run on loader threads.

    Args:
        store: where records persist.
        deleted: told of sessions that another server on the store has deleted.
        expired: told of sessions that were deleted here because they had outlived their own ttl.
        meters: counts the looks.
        layout, adapter, model: what a record must have been made with.

    Attributes:
        reads: runs calls of the store.
    """

    def __init__(
        self,
        store: StateStore,
        deleted: Callable[[SessionKey], None],
        expired: Callable[[SessionKey], None],
        meters: Meters,
        *,
        layout: str,
        adapter: str,
        model: str,
    ) -> None:
        self.store, self._deleted, self._expired, self._meters = store, deleted, expired, meters
        self.layout, self.adapter, self.model = layout, adapter, model
        self._glance: Callable[[SessionKey], Expect | None] | None = getattr(store, "glance", None)
        self.reads = Reads(readers=2 if self._glance is None else 1)

    def close(self) -> None:
        """Start no further reads."""
        self.reads.close()

    async def latest(self, session: Session, ticket: str | None = None) -> Record | None:
        """The session's latest record, None where it has none. One that has outlived its own ttl is deleted here,
        unless a request other than ``ticket`` is writing the session.

        Raises:
            CorruptRecord, StoreUnavailable: it cannot be read.
            SessionError: 422; it was made with another adapter, model or shape.
        """
        start = time.perf_counter()
        async with session.loading:
            if session.loaded and not session.unsaved:
                await self._notice_other_writers(session)
            source, outcome = "host" if session.loaded else "store", "error"
            try:
                found = await self._load(session)
                outcome = "absent" if found is None else "found"
            except SessionError:
                outcome = "refused"
                raise
            except asyncio.CancelledError:
                outcome = ""  # whoever asked has left
                raise
            finally:
                if outcome:
                    self._meters.add(metrics.LOADS, source, outcome)
                    self._meters.observe(metrics.LOAD_SECONDS, time.perf_counter() - start, source)
            if session.owner in (None, ticket):
                await self._expire(session)
            return session.record

    async def _load(self, session: Session) -> Record | None:
        if not session.loaded:
            record = await self.reads.read(self.store.get, session.key)
            if session.loaded:  # a commit has come meanwhile, and knows better
                return session.record
            if record is not None:
                self.verify(record)
            session.set_record(record)
        return session.record

    async def kept(self, latest: Record, version: int) -> Record:
        """A version of a session that the store still has.

        Args:
            latest: the session's latest record.

        Raises:
            CorruptRecord, StoreUnavailable: it cannot be read.
            SessionError: 404; the version is not kept. 422; as for `latest`.
        """
        if version == latest.version:
            return latest
        record = await self.reads.run(self.store.get_version, latest.key, version)
        if record is None or record.incarnation != latest.incarnation:
            raise SessionError(
                f"session {latest.key.session!r} does not keep version {version}", status=404, parameter="version"
            )
        self.verify(record)
        return record

    async def _expire(self, session: Session) -> None:
        record = session.record
        if record is None or session.unsaved or not has_outlived(record):
            return
        gone = await self.reads.run(self.store.delete_idle, [session.key], record.updated_at)
        if session.record is not record:
            return
        if gone:
            session.erase()
            self._expired(session.key)
        else:  # another server has written it meanwhile, or deleted it
            session.set_record(await self.reads.run(self.store.get, session.key))

    async def _notice_other_writers(self, session: Session) -> None:
        """Another server on the same store may have moved the session on since this one last saw it."""
        seen = session.record
        try:
            there = await self._head(session.key)
        except StoreUnavailable as e:
            logger.warning("the store cannot be asked for newer versions; going on from the one known here: %s", e)
            return
        if session.record is not seen or session.unsaved:
            return  # it has moved on here meanwhile: what the store said is older
        here = seen.expect if seen is not None else None
        if there != here:
            session.forget()
            if there is None:
                self._deleted(session.key)

    async def _head(self, key: SessionKey) -> Expect | None:
        """Where the store has a session: said at once by a store that can, else by a thread that waits for it."""
        if self._glance is not None:
            try:
                return self.reads.glance(self._glance, key)
            except WouldWait:
                pass
        return await self.reads.read(self.store.head, key, patience=NOTICE_SECONDS)

    def verify(self, record: Record) -> None:
        """Refuse a memory made with another adapter, model or shape; zeroing it silently would lose it.

        Raises:
            SessionError: 422.
        """
        if (record.adapter, record.model, record.layout) == (self.adapter, self.model, self.layout):
            return
        for what, have, want in (
            ("adapter", record.adapter, self.adapter),
            ("model", record.model, self.model),
            ("layout", record.layout, self.layout),
        ):
            if have != want:
                raise SessionError(
                    f"session {record.key.session!r} was written with {what} {have}, this server runs {want}: serve it "
                    "with what it was written with, or delete the session",
                    status=422,
                    parameter="session_id",
                )


def has_outlived(record: Record) -> bool:
    """Whether a session has a ttl of its own, and its last version is older."""
    if _TTL not in record.attributes:  # as the encoding names it: nothing is decoded for a session that has none
        return False
    return attributes.unpack(record.attributes).outlived(record.updated_at, time.time())
