"""An API process that is slow to tell its engine: a request that a stop string has ended runs on for many more tokens.

Short answers are then complete, by their end token or their length, before the engine hears of the stop string.
"""

import asyncio
from pathlib import Path
from typing import Any

from tests.engine.after_import import after_import

LATE_ABORTS = Path(__file__).parent / "late_aborts"
"""For a server's PYTHONPATH."""
LATE_SECONDS = 0.1
"""Longer than a short answer of the recall model takes."""
_under_way: set[asyncio.Task[None]] = set()


def aborts_come_late() -> None:
    """In this process, for ever."""
    after_import("vllm.v1.engine.core_client", _make_late)


def _make_late(core_client: Any) -> None:
    for client in (core_client.AsyncMPClient, core_client.DPLBAsyncMPClient):
        abort = client.abort_requests_async

        async def later(self: Any, request_ids: list[str], abort: Any = abort) -> None:
            await asyncio.sleep(LATE_SECONDS)
            await abort(self, request_ids)

        async def late(self: Any, request_ids: list[str], later: Any = later) -> None:
            # In a task of its own: that of a client which has left is cancelled at whatever it waits for.
            task = asyncio.create_task(later(self, request_ids))
            _under_way.add(task)
            task.add_done_callback(_under_way.discard)

        client.abort_requests_async = late
