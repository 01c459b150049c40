"""The latest record of a session: from host memory where it is still the latest, else from the store."""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from deltamem_vllm.errors import SessionError, StoreUnavailable
from deltamem_vllm.sessions.directory import Session
from deltamem_vllm.store.protocol import Expect, Record, SessionKey, StateStore

logger = logging.getLogger("vllm.deltamem")
_T = TypeVar("_T")


class Records:
    """Reads records for the event loop; the store's calls run on loader threads.

    Args:
        store: where records persist.
        deleted: told of sessions that another server on the store has deleted.
        layout, adapter, model: what a record must have been made with.
    """

    def __init__(
        self, store: StateStore, deleted: Callable[[SessionKey], None], *, layout: str, adapter: str, model: str
    ) -> None:
        self.store, self._deleted = store, deleted
        self.layout, self.adapter, self.model = layout, adapter, model
        self._loaders = ThreadPoolExecutor(max_workers=2, thread_name_prefix="deltamem-load")

    async def on_loader(self, work: Callable[..., _T], *args: object) -> _T:
        """Run a call that waits for the store where it holds nobody up."""
        return await asyncio.get_running_loop().run_in_executor(self._loaders, work, *args)

    def close(self) -> None:
        """Start no further reads."""
        self._loaders.shutdown(wait=False)

    async def latest(self, session: Session) -> Record | None:
        """The session's latest record, None where it has none.

        Raises:
            CorruptRecord, StoreUnavailable: it cannot be read.
            SessionError: 422; it was made with another adapter, model or shape.
        """
        async with session.loading:
            if session.loaded and not session.unsaved:
                await self._notice_other_writers(session)
            if not session.loaded:
                record = await self.on_loader(self.store.get, session.key)
                if session.loaded:  # a commit has come meanwhile, and knows better
                    return session.record
                if record is not None:
                    self.verify(record)
                session.set_record(record)
            return session.record

    async def _notice_other_writers(self, session: Session) -> None:
        """Another server on the same store may have moved the session on since this one last saw it."""
        seen = session.record
        try:
            kept = await self.on_loader(self.store.history, session.key, 1)
        except StoreUnavailable as e:
            logger.warning("the store cannot be asked for newer versions; going on from the one known here: %s", e)
            return
        if session.record is not seen or session.unsaved:
            return  # it has moved on here meanwhile: what the store said is older
        here = seen.expect if seen is not None else None
        if (Expect(kept[0].version, kept[0].incarnation) if kept else None) != here:
            session.forget()
            if not kept:
                self._deleted(session.key)

    def verify(self, record: Record) -> None:
        """Refuse a memory made with another adapter, model or shape; zeroing it silently would lose it.

        Raises:
            SessionError: 422.
        """
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
