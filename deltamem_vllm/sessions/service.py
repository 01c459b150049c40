"""The session service of one engine: admission, ownership, commits. One thread with one event loop.

It lives in the engine-core process, beside the scheduler, and is talked to from two sides:

* API processes ask over a socket (`deltamem_vllm.sessions.control`): admit this prompt to that session; what became
  of this ticket; what is known of that session; delete it.
* The scheduler's thread claims a ticket's grant when the request arrives, and reports how it ended. Those calls never
  block: whatever touches the store or hashes a prompt happens on this thread, on a loader thread or on the writer's.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from deltamem_vllm import metrics
from deltamem_vllm.audit.log import AuditLog
from deltamem_vllm.errors import SessionError
from deltamem_vllm.names import Names
from deltamem_vllm.sessions import management, pinning, windows
from deltamem_vllm.sessions.changes import Match, check_match, in_turn
from deltamem_vllm.sessions.commits import Commits
from deltamem_vllm.sessions.directory import Directory, Session
from deltamem_vllm.sessions.expiry import Expiry
from deltamem_vllm.sessions.facts import Pin
from deltamem_vllm.sessions.gauges import StoreTotals
from deltamem_vllm.sessions.grants import WRITTEN, Grant, History, cache_salt, state_digest
from deltamem_vllm.sessions.histories import check_rendered_from
from deltamem_vllm.sessions.leases import EngineLeases
from deltamem_vllm.sessions.masks import Spans, conversation, place
from deltamem_vllm.sessions.metered import metered
from deltamem_vllm.sessions.meters import Meters, Sample, count_admission, count_refusal
from deltamem_vllm.sessions.quality import Corrections, Quality, SampleOfMemory
from deltamem_vllm.sessions.quotas import Quotas
from deltamem_vllm.sessions.rates import Rates
from deltamem_vllm.sessions.records import Records
from deltamem_vllm.sessions.tickets import Ticket, Tickets, count_tokens
from deltamem_vllm.sessions.versions import Versions
from deltamem_vllm.sessions.write_behind import WriteBehind
from deltamem_vllm.store.protocol import Expect, SessionKey, StateStore
from deltamem_vllm.store.url import open_store
from deltamem_vllm.store.writer import CommitWriter

logger = logging.getLogger("vllm.deltamem")

VERDICT_SECONDS = 10.0
"""How long the blocks of a request with stop strings wait to hear where its answer ended."""
FINISH_SECONDS = 4.0
"""How long closing may try to save what waits for the store."""


class SessionService:
    """Sessions of one engine.

    Args:
        store_url: where records persist.
        layout: name of the states' shape, part of every record.
        adapter: adapter fingerprint.
        model: backbone fingerprint.
        state_shape: [layers, H, r, r].
        queue_depth, queue_seconds, host_bytes, ttl: see `deltamem_vllm.config.Settings`.
        secret: the server's, at least 32 bytes.
        write_behind: (seconds, versions) that clients may be told ahead of the store; None: not at all.
        audit: where changes are logged; closed with the service.
        layers: the model's numbers of the state's layers; none: from 0.
        corrections: tells how large corrections are; None: not known.
    """

    def __init__(
        self,
        *,
        store_url: str,
        layout: str,
        adapter: str,
        model: str,
        state_shape: tuple[int, ...],
        queue_depth: int,
        queue_seconds: float,
        secret: bytes,
        host_bytes: int = 256 << 20,
        write_behind: tuple[float, int] | None = None,
        ttl: float = 0.0,
        audit: AuditLog | None = None,
        layers: Sequence[int] = (),
        corrections: Corrections | None = None,
    ) -> None:
        self.meters = Meters()
        self.quality = Quality(self.meters, layers or range(state_shape[0]), corrections)
        self.started_at, self.store_kind = time.time(), store_url.partition("://")[0]
        self.watched: list[Callable[[], list[Sample]]] = []  # what else has gauges
        self.adapter, self.state_shape = adapter, state_shape
        self.queue_depth, self.queue_seconds = queue_depth, queue_seconds
        self.store: StateStore = metered(open_store(store_url), self.meters)
        self.totals = StoreTotals(self.store)
        self.records = Records(
            self.store, self.forget_on_device, self._expired, self.meters, layout=layout, adapter=adapter, model=model
        )
        self.writer = CommitWriter(self.store)
        self.quotas = Quotas(self.records, state_shape)
        self.rates = Rates()
        self._names = Names(secret)
        self.leases = EngineLeases(getattr(self.store, "leases", None))
        self.commits = Commits(
            self.writer,
            versions=Versions(layout, adapter, model, state_shape),
            ahead=WriteBehind(*write_behind, growth=self.quotas.growth) if write_behind is not None else None,
            unsaved_bytes=host_bytes,
            audit=audit,
            meters=self.meters,
        )
        self.audit = audit
        self.directory = Directory(host_bytes)
        self.erased: deque[SessionKey] = deque()  # sessions whose states the pool must forget
        self.expiry = Expiry(
            ttl, self.directory, self.records, self.forget_on_device, self._expired, self.commits.check_audit
        )
        self.tickets = Tickets(self._settled)
        self._admitting: dict[str, asyncio.Task[Any] | None] = {}
        self._epoch = 0
        self._serve: Callable[[SessionService], Any] | None = None
        self._started = threading.Event()
        self._start_error: BaseException | None = None
        self._stop: asyncio.Event | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._thread = threading.Thread(target=self._run, name="deltamem-sessions", daemon=True)

    # ------------------------------------------------------------------ life

    def start(self, serve: Callable[["SessionService"], Any]) -> None:
        """Start the thread; ``serve(service)`` is a coroutine function that answers the API processes."""
        self._serve = serve
        self._thread.start()
        self._started.wait()
        if self._start_error is not None:
            raise self._start_error

    def close(self, timeout: float = 10.0) -> None:
        """Let running commits become durable, then stop."""
        if self._thread.is_alive() and self._stop is not None:
            self._call(self._stop.set)
            self._thread.join(timeout)
        self.writer.close(timeout)
        self.records.close()
        self.store.close()
        if self.audit is not None:
            self.audit.close()

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except BaseException as e:
            self._start_error = e
            logger.exception("the session service stopped")
        finally:
            self._started.set()

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        assert self._serve is not None
        server = asyncio.ensure_future(self._serve(self))
        await asyncio.sleep(0)
        if server.done():  # its socket could not be bound: `start` must not say that all is well
            server.result()
        self._started.set()
        background = [asyncio.ensure_future(each) for each in (self.commits.keep_trying(), self.leases.keep())]
        background.append(asyncio.ensure_future(self.expiry.run()))
        stopped = asyncio.ensure_future(self._stop.wait())
        await asyncio.wait({server, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if server.done():
            server.result()
        if self._tasks:  # commits under way; within what `close` waits for, so that what is lost gets said
            await asyncio.wait(self._tasks, timeout=5.0)
        for task in background:
            task.cancel()
        await self.commits.finish(FINISH_SECONDS)
        await self.leases.close()
        server.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await server

    def _call(self, function: Callable[..., Any], *args: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # the loop is closed: the engine is going down
            logger.warning("the session service is stopped; %s was not done", getattr(function, "__name__", function))

    def _spawn(self, coroutine: Any) -> None:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ------------------------------------------------------------------ asked by API processes

    async def admit(
        self,
        ticket: str,
        key: SessionKey,
        mode: windows.Mode,
        tokens: np.ndarray,
        clients_salt: str | None,
        held: bool,
        spans: Spans = (),
        *,
        offered: Spans = (),
        pins: tuple[Pin, ...] = (),
        history: History | None = None,
        if_match: Match = None,
        elided: int = 0,
    ) -> dict[str, Any]:
        """Give a prompt its place in a session: waits for its turn, here and among servers, reads the record, plans
        the window.

        Args:
            ticket: a fresh random name; whoever asks can withdraw by it, even while waiting.
            spans: tokens, of the prompt or of the reply, that are not written.
            offered: those among them that are no part of the conversation.
            pins: facts to pin with the commit.
            history: how the prompt stands to the conversation that it was rendered from.
            if_match: versions of which the session must have one.
            elided: tokens of its conversation that it does not have; only counted.

        Returns:
            prefix-cache salt for the engine request; the version it starts from; tokens already written.

        Raises:
            PreconditionFailed: 412; ``if_match`` does not have its version.
            CapacityError: the session is busy (409). CorruptRecord, StoreUnavailable: its memory cannot be read.
        """
        session = self.directory.get(key)
        if ticket in self._admitting or ticket in self.tickets:
            raise SessionError(f"ticket {ticket!r} is in use: make a fresh one for each request", status=400)
        self._admitting[ticket] = asyncio.current_task()
        start = time.perf_counter()
        asked = (session, ticket, mode, tokens, clients_salt, held, spans, offered, pins, history, if_match)
        try:
            async with in_turn(self, session, ticket) if mode == "readwrite" else contextlib.nullcontext():
                granted = await self._grant(*asked)
        except BaseException as error:
            count_refusal(self.meters, error)
            raise
        finally:
            self._admitting.pop(ticket, None)
        count_admission(self.meters, elided, time.perf_counter() - start)
        return granted

    async def _grant(
        self,
        session: Session,
        ticket: str,
        mode: windows.Mode,
        tokens: np.ndarray,
        salt: str | None,
        held: bool,
        spans: Spans,
        offered: Spans,
        pins: tuple[Pin, ...],
        history: History | None,
        if_match: Match,
    ) -> dict[str, Any]:
        self.commits.check_room(session)
        record = await self.records.latest(session, ticket)
        check_match(session.key, record, if_match, needed=False)
        if mode == "readwrite":
            self.commits.check_audit()
            await self.quotas.check(session.key, record)
        if pins:
            pinning.check(record, pins)
        window = windows.unpack(record.window) if record is not None else None
        own = conversation(tokens, spans, offered)
        if history is not None and history.cut is not None:
            check_rendered_from(history, record)
            plan = windows.NEW if history.cut.state == "end" else windows.plan_from_base(window, own)
        else:
            plan = windows.plan(window, own)
        base = None
        if record is not None:
            base = record.end if plan.kind == "new" else record.base
            base = base if base.item(0) or base.any() else None  # the empty memory has one name only
        grant = Grant(
            ticket=ticket,
            key=session.key,
            mode=mode,
            plan=plan,
            prompt_tokens=len(tokens),
            base=base,
            base_digest=state_digest(base),
            write_limit=place(offered, windows.write_limit(plan, mode, len(own))),
            expect=Expect(record.version, record.incarnation) if record is not None else None,
            incarnation=session.incarnation,
            held_for_verdict=held,
            spans=spans,
            offered=offered,
            pins=pins,
            history=history,
        )
        version = record.version if record is not None else 0
        self.tickets.issue(grant, session.deletions, version)
        limit = grant.write_limit
        made_from = f"{self.adapter}/{self._epoch}"
        return {
            "salt": cache_salt(session.key, grant.incarnation, grant.base_digest, limit, made_from, salt, self._names),
            "version": version,
            "window": plan.kind,
            "matched": plan.matched,
        }

    def give_verdict(self, ticket: str, tokens: int | None) -> None:
        """The API process says of a request: commit it after ``tokens`` tokens (a held one), or (None) drop it."""
        waiting = self._admitting.get(ticket)
        if waiting is not None and tokens is None:
            waiting.cancel()
        self.tickets.give_verdict(ticket, tokens)

    async def outcome(self, ticket: str) -> dict[str, Any]:
        """See `Tickets.outcome`."""
        return await self.tickets.outcome(ticket)

    def note_reply(self, key: SessionKey, version: int, digests: list[bytes]) -> None:
        """What the client may call the answer that came with a version, see `chain.reply_digests`."""
        self.directory.get(key).reply = (version, digests)

    async def info(self, key: SessionKey) -> dict[str, Any] | None:
        """What is known of a session, or None where it has no record."""
        return await management.info(self, key)

    async def delete(self, key: SessionKey) -> bool:
        """Erase a session everywhere. A request that runs meanwhile finishes and commits nothing."""
        return bool((await management.erase(self, key))["existed"])

    def forget_on_device(self, key: SessionKey) -> None:
        """A session was deleted: its states leave the pool with the engine's next step."""
        self.tickets.note_deletion(key)  # before the scheduler hears of it: see SchedulerSide._plan_seed
        self.erased.append(key)

    def _expired(self, key: SessionKey) -> None:
        self.forget_on_device(key)
        self.meters.add(metrics.EVENTS, "expire")
        if self.audit is not None:
            self.audit.append("expire", key)

    # ------------------------------------------------------------------ called by the scheduler's thread

    def claim(self, ticket: str) -> Grant | None:
        """See `Tickets.claim`. Never blocks."""
        return self.tickets.claim(ticket)

    def verdict(self, ticket: str) -> tuple[bool, int | None]:
        """See `Tickets.verdict`. Never blocks."""
        return self.tickets.verdict(ticket)

    def was_deleted(self, ticket: str) -> bool:
        """See `Tickets.was_deleted`. Never blocks."""
        return self.tickets.was_deleted(ticket)

    def distrust_cached_blocks(self) -> None:
        """A request ran on a wrong memory: from now on no grant shares a cached block with anything before."""
        self._epoch += 1

    def end(self, ticket: str, status: str, error: str = "") -> None:
        """The request ended without a commit (``unchanged``, ``aborted`` or ``failed``). Never blocks."""
        self._call(self.tickets.settle, ticket, {"status": status, "error": error})

    def commit(self, ticket: str, tokens_fed: list[int], state: np.ndarray) -> None:
        """The request ended; make ``state [layers, H, r, r]`` after ``tokens_fed`` durable. Never blocks."""
        arrived = time.perf_counter()
        self._call(lambda: self._spawn(self._commit(ticket, tokens_fed, state, arrived)))

    def note_sample(self, sample: SampleOfMemory) -> None:
        """Workers have looked at what the memory does. Never blocks."""
        self._call(self.quality.note_sample, sample)

    # ------------------------------------------------------------------ inside

    async def _commit(self, ticket: str, tokens_fed: list[int], state: np.ndarray, arrived: float) -> None:
        entry = self.tickets.get(ticket)
        if entry is None:
            return
        session = self.directory.get(entry.grant.key)
        outcome = await self.commits.commit(session, entry.grant, entry.deletions, tokens_fed, state)
        self.meters.observe(metrics.COMMIT_SECONDS, time.perf_counter() - arrived)
        if outcome["status"] in WRITTEN:
            count_tokens(self.meters, entry.grant, len(tokens_fed))
            self.quality.note_commit(state)
        self.tickets.settle(ticket, outcome)

    def _settled(self, entry: Ticket) -> None:
        session = self.directory.get(entry.grant.key)
        session.release(entry.grant.ticket)
        if entry.grant.commits:
            self.meters.add(metrics.COMMITS, status := entry.outcome.result()["status"])
            if status == "conflict":
                self.meters.add(metrics.CONFLICTS, "commit")
            self.leases.done(session)
