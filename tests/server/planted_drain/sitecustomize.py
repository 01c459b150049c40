"""Bugs planted on purpose in a server's end: nobody waits for what is under way, and leases are kept."""

from typing import Any

from tests.engine.after_import import after_import


def _nobody_waits(drain: Any) -> None:
    drain.Drain.finish = lambda self, seconds, abort: 0.0


def _leases_stay(leases: Any) -> None:
    async def close(self: Any) -> None:
        self._held.clear()

    leases.EngineLeases.close = close


after_import("deltamem_vllm.server.drain", _nobody_waits)
after_import("deltamem_vllm.sessions.leases", _leases_stay)
