"""From a request's final state to a durable record, in order, and what happens while the store cannot take it.

A commit that the store refuses for good (another writer was first, the session was deleted) is a conflict: nothing
is kept. One that it cannot take now (disk full, unreachable) is kept in this process and tried again every second:
the session goes on from it, the client is told ``degraded`` instead of ``committed``, and the versions reach the
store in their order once it recovers. What is still unsaved when the process ends is lost, and said.
"""

import asyncio
import logging
import time
from typing import Any

import numpy as np

from deltamem_vllm.errors import CapacityError, CorruptRecord, StaleVersion, StoreError, StoreUnavailable
from deltamem_vllm.sessions import windows
from deltamem_vllm.sessions.directory import Session
from deltamem_vllm.sessions.grants import Grant
from deltamem_vllm.sessions.masks import sign
from deltamem_vllm.store.protocol import Record
from deltamem_vllm.store.writer import CommitWriter

logger = logging.getLogger("vllm.deltamem")

RETRY_SECONDS = 1.0
MAX_UNSAVED = 64
"""Versions of one session that may wait for the store; then its requests get 503."""


class Commits:
    """Makes the commits of one engine.

    Args:
        writer: the store's one writer.
        layout, adapter, model: what every record says it was made with.
        state_shape: [layers, H, r, r].
    """

    def __init__(
        self, writer: CommitWriter, *, layout: str, adapter: str, model: str, state_shape: tuple[int, ...]
    ) -> None:
        self._writer = writer
        self.layout, self.adapter, self.model, self.state_shape = layout, adapter, model, state_shape
        self._troubled: set[Session] = set()

    @property
    def unsaved(self) -> int:
        """Versions that exist in this process only."""
        return sum(len(session.unsaved) for session in self._troubled)

    def check_room(self, session: Session) -> None:
        """Refuse a further turn of a session whose versions have waited for too long.

        Raises:
            CapacityError: 503.
        """
        if len(session.unsaved) >= MAX_UNSAVED:
            raise CapacityError(
                f"{len(session.unsaved)} versions of session {session.key.session!r} wait for the store, which does "
                "not take them: repair the store, then retry",
                status=503,
                retry_after=5.0,
            )

    async def commit(
        self, session: Session, grant: Grant, deletions: int, tokens_fed: list[int], state: np.ndarray
    ) -> dict[str, Any]:
        """Make one request's memory durable.

        Args:
            deletions: how often the session had been deleted when the request was granted.
            tokens_fed: every token that went through the model.
            state: [layers, H, r, r] fp32 after them.

        Returns:
            the outcome: status, version, error.
        """
        try:
            async with session.storing:  # a deletion waits, so that what is on its way cannot arrive after it
                if session.deletions != deletions:
                    raise StaleVersion(f"session {session.key.session!r} was deleted while the request ran")
                record = self._next(grant, session.record, tokens_fed, state)
                session.unsaved.append((record, grant.expect))
                try:
                    await self._save(session)
                except StoreUnavailable as e:
                    self._troubled.add(session)
                    logger.error("the store does not take commits; %d version(s) wait: %s", self.unsaved, e)
                    session.set_record(record)
                    return {"status": "degraded", "version": record.version, "error": str(e)}
                session.set_record(record)
                return {"status": "committed", "version": record.version, "error": ""}
        except StaleVersion as e:
            self._drop(session)
            return {"status": "conflict", "error": str(e)}
        except Exception as e:
            self._drop(session)
            logger.exception("session memory was not saved")
            why = str(e) if isinstance(e, StoreError) else f"{type(e).__name__}: {e}"
            return {"status": "failed", "error": why}

    async def keep_trying(self) -> None:
        """Bring waiting versions to the store, until cancelled."""
        while True:
            await asyncio.sleep(RETRY_SECONDS)
            await self.save_waiting()

    async def save_waiting(self) -> None:
        """Try once to save every version that waits."""
        for session in list(self._troubled):
            async with session.storing:
                waiting = len(session.unsaved)
                try:
                    await self._save(session)
                except StoreUnavailable:
                    continue
                except Exception:
                    logger.exception("%d version(s) of a session are lost: the store refused them", waiting)
                    self._drop(session)
                else:
                    logger.warning("%d version(s) of a session reached the store late", waiting)
                self._troubled.discard(session)

    async def _save(self, session: Session) -> None:
        while session.unsaved:
            record, expect = session.unsaved[0]
            await asyncio.wrap_future(self._writer.submit(record, expect))
            session.unsaved.popleft()

    def _drop(self, session: Session) -> None:
        session.unsaved.clear()
        session.forget()
        self._troubled.discard(session)

    def _next(self, grant: Grant, last: Record | None, tokens_fed: list[int], state: np.ndarray) -> Record:
        if not np.isfinite(state).all():
            raise CorruptRecord("the state after this request is not finite; it was not saved")
        now = time.time()
        base = grant.base if grant.base is not None else np.zeros(self.state_shape, np.float32)
        before = last.tokens if last else 0
        if last and grant.plan.kind != "new":  # the window is written again from its base
            window = windows.unpack(last.window)
            before -= window.end.count if window is not None else 0
        return Record(
            key=grant.key,
            version=(grant.expect.version if grant.expect else 0) + 1,
            incarnation=grant.incarnation,
            request_id=grant.ticket,
            adapter=self.adapter,
            model=self.model,
            layout=self.layout,
            base=base,
            end=state,
            window=windows.pack(windows.advance(grant.plan, sign(tokens_fed, grant.spans), grant.prompt_tokens)),
            created_at=last.created_at if last else now,
            updated_at=now,
            tokens=before + len(tokens_fed),
            windows=(last.windows if last else 0) + (grant.plan.kind == "new"),
            attributes=last.attributes if last else b"",
        )
