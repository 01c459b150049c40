"""The one thread that commits: what arrives while a transaction is being synced becomes the next group."""

import logging
import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, replace

from deltamem_vllm.errors import StoreError, StoreUnavailable
from deltamem_vllm.store.protocol import Expect, Outcomes, Put, Record, StateStore


@dataclass(frozen=True, slots=True)
class WriterStats:
    """Counters since the start.

    Attributes:
        commits: records stored durably.
        failures: records that were not (stale, not valid, store unavailable).
        batches: transactions.
        seconds: wall time spent in transactions.
        pending: records submitted and not yet answered.
    """

    commits: int = 0
    failures: int = 0
    batches: int = 0
    seconds: float = 0.0
    pending: int = 0


logger = logging.getLogger("vllm.deltamem")

MAX_BATCH_BYTES = 16 << 20
"""States in one transaction."""

_Item = tuple[Record, Expect | None, "Future[None]"]


class CommitWriter:
    """Commits records by groups. Several versions of one session may be submitted in order without waiting.

    Args:
        store: where to commit; not closed by the writer.
        max_batch: records per transaction, of which only the first may take it beyond ``MAX_BATCH_BYTES``.
        max_pending: records that may wait; more are refused, so that a store that hangs does not fill the
        memory.
    """

    def __init__(self, store: StateStore, *, max_batch: int = 256, max_pending: int = 4096) -> None:
        if max_batch < 1 or max_pending < 1:
            raise ValueError(f"max_batch {max_batch} and max_pending {max_pending} must be at least 1")
        self._store = store
        self._max_batch = max_batch
        self._max_pending = max_pending
        self._queue: deque[_Item] = deque()
        self._batch: list[_Item] = []
        self._changed = threading.Condition()
        self._closing = False
        self._bugs = 0
        self._why = ""
        self._stats = WriterStats()
        self._thread = threading.Thread(target=self._run, name="deltamem-commit", daemon=True)
        self._thread.start()

    @property
    def stats(self) -> WriterStats:
        """The counters, as of one moment."""
        with self._changed:
            return replace(self._stats, pending=len(self._queue) + len(self._batch))

    def submit(self, record: Record, expect: Expect | None) -> "Future[None]":
        """Queue one commit; safe from any thread, never waits for the store.

        Returns:
            resolves to None once the record is durable, or raises the ``StoreError`` that ``put`` would
            have raised. A future that is cancelled before its group starts is not committed.

        Raises:
            StoreUnavailable: the writer is closed, or ``max_pending`` records wait.
        """
        future: Future[None] = Future()
        with self._changed:
            if self._closing:
                raise StoreUnavailable("the commit writer is closed")
            if len(self._queue) >= self._max_pending:
                raise StoreUnavailable(f"{len(self._queue)} commits wait for the store already. Try again later")
            self._queue.append((record, expect, future))
            self._changed.notify()
        return future

    def close(self, timeout: float | None = None) -> bool:
        """Commit what is queued and stop.

        Args:
            timeout: seconds to wait; None without end.

        Returns:
            whether everything was answered in time. If not, what still waits is refused; a group being
            committed is answered when the store answers.
        """
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout)
        if not self._thread.is_alive():
            return True
        with self._changed:
            left = list(self._queue)
            self._queue.clear()
        self._fail(left, StoreUnavailable(f"the commit writer was closed; the store did not answer in {timeout} s"))
        return False

    def _run(self) -> None:
        while self._take():
            self._answer(self._commit([(record, expect) for record, expect, _ in self._batch]))

    def _take(self) -> bool:
        """Wait for work and move what makes up a group from the queue to the batch; False: closed and empty."""
        size = 0
        with self._changed:
            while True:
                while self._queue and len(self._batch) < self._max_batch:
                    size += self._queue[0][0].base.nbytes + self._queue[0][0].end.nbytes
                    if self._batch and size > MAX_BATCH_BYTES:
                        break
                    item = self._queue.popleft()
                    if item[2].set_running_or_notify_cancel():
                        self._batch.append(item)
                if self._batch:
                    return True
                if self._closing:
                    return False
                self._changed.wait()

    def _commit(self, puts: list[Put]) -> Outcomes:
        start = time.monotonic()
        outcomes = self._put(puts)
        if outcomes is None and len(puts) > 1:  # one of them may be what the store stumbles over: spare the others
            outcomes = [outcome for put in puts for outcome in self._put([put]) or [self._unknown()]]
        elif outcomes is None:
            outcomes = [self._unknown()]
        failures = sum(outcome is not None for outcome in outcomes)
        with self._changed:
            self._stats = replace(
                self._stats,
                commits=self._stats.commits + len(puts) - failures,
                failures=self._stats.failures + failures,
                batches=self._stats.batches + 1,
                seconds=self._stats.seconds + time.monotonic() - start,
            )
        return outcomes

    def _put(self, puts: list[Put]) -> Outcomes | None:
        """What the store answers; None where a bug of its own kept it from answering. The thread must survive that:
        with it would end every commit of the process."""
        try:
            outcomes = self._store.put_many(puts)
            if len(outcomes) != len(puts):
                raise RuntimeError(f"the store answered {len(outcomes)} of {len(puts)} commits")
        except StoreError as error:  # against the protocol, but its meaning is clear
            return [error] * len(puts)
        except BaseException as error:
            self._bugs += 1
            if self._bugs & (self._bugs - 1) == 0:  # the 1st, 2nd, 4th, …: it may come again every second
                logger.exception("a bug in the store: %d group(s) of commits have failed by it so far", self._bugs)
            self._why = f"{type(error).__name__}: {error}"
            return None
        return outcomes

    def _unknown(self) -> StoreError:
        return StoreUnavailable(
            f"a bug in the store ({self._why}): whether the commit was applied is not known; it is sent again. The log "
            "has the traceback: report it"
        )

    def _answer(self, outcomes: Outcomes) -> None:
        for outcome in outcomes:
            _, _, future = self._batch.pop(0)
            if outcome is None:
                future.set_result(None)
            else:
                future.set_exception(outcome)

    def _fail(self, items: list[_Item], error: StoreError) -> None:
        with self._changed:
            self._stats = replace(self._stats, failures=self._stats.failures + len(items))
        for _, _, future in items:
            if future.running() or future.set_running_or_notify_cancel():
                future.set_exception(error)
