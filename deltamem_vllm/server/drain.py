"""An orderly end of an API process: who is served is served to the end, who comes now is told to go elsewhere.

vLLM's own draining (``--shutdown-timeout``) asks the engine to end when its last request has, which is before the
outcomes of those requests were asked for, and with several API processes closes these first. So here the engine is
asked only when no response is under way any more, and with it no commit and no lease: it has nothing to lose then.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from deltamem_vllm.errors import CapacityError

logger = logging.getLogger("vllm.deltamem")

ENGINE_SECONDS = 5.0
"""What of the time is left to the engines, to save what still waits for the store; a third where the whole is short."""
ABORT_SECONDS = 2.0
"""How long requests that were cut short may take to be told."""
RETRY_SECONDS = 5.0
STILL_SERVED = ("/metrics", "/version")


class Drain:
    """Counts the responses that are under way in an API process; ends when they have.

    `serving` is for the event loop, `finish` for another thread.
    """

    def __init__(self) -> None:
        self._running = 0
        self._change = threading.Condition()
        self.draining = False

    def refusal(self, path: str) -> CapacityError | None:
        """What a request to a path is told that comes now; None: it is served."""
        if not self.draining or path in STILL_SERVED:
            return None
        return CapacityError(
            "this server is shutting down and takes no new requests: ask another one, or retry when it runs again",
            status=503,
            retry_after=RETRY_SECONDS,
        )

    @contextmanager
    def serving(self) -> Iterator[None]:
        """A response is under way."""
        with self._change:
            self._running += 1
        try:
            yield
        finally:
            with self._change:
                self._running -= 1
                self._change.notify_all()

    def finish(self, seconds: float, abort: Callable[[], None]) -> float:
        """Refuse what comes, and wait for what is under way.

        Args:
            seconds: what the whole end may take, the engines' included.
            abort: ends the requests that are still running, when their time is over. Must not wait.

        Returns:
            seconds that are left to the engines.
        """
        started = time.monotonic()
        for_engines = min(ENGINE_SECONDS, seconds / 3)
        for_aborts = min(ABORT_SECONDS, seconds / 6)
        self.draining = True
        logger.info("shutting down: %d response(s) under way, new requests get 503", self._running)
        if not self._wait(seconds - for_engines - for_aborts):
            logger.warning(
                "%d request(s) are not finished in time for --shutdown-timeout %g: aborted, without a commit",
                self._running,
                seconds,
            )
            abort()
            self._wait(for_aborts)
        return max(for_engines, seconds - (time.monotonic() - started))

    def _wait(self, seconds: float) -> bool:
        with self._change:
            return self._change.wait_for(lambda: self._running == 0, seconds)
