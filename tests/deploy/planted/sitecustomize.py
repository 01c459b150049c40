"""Causes of alerts that a sound server does not give, planted in every process of one.

The file that ``DELTAMEM_TEST_CAUSES`` names is read at each chance, so a test switches them on and off while the
server runs: ``gates`` raises where a worker looks at the gates of a commit; ``orders`` lets the session pool refuse
every order to seed a request, as if slots had been reused. In any case the audit log keeps 64 entries that it cannot
write, not 10,000.
"""

import os
from pathlib import Path
from typing import Any

from tests.engine.after_import import after_import


def _wanted(cause: str) -> bool:
    path = Path(os.environ["DELTAMEM_TEST_CAUSES"])
    return path.exists() and cause in path.read_text(encoding="utf-8").split()


def _plant_worker(worker: Any) -> None:
    look = worker.gate_means

    def planted(*arguments: Any) -> Any:
        if _wanted("gates"):
            raise RuntimeError("a planted bug")
        return look(*arguments)

    worker.gate_means = planted


def _plant_pool(pool: Any) -> None:
    seed = pool.SessionPool.seed

    def planted(self: Any, seeds: Any) -> Any:
        if seeds and _wanted("orders"):
            return [pool.StaleOrder("a planted order") for _ in seeds]
        return seed(self, seeds)

    pool.SessionPool.seed = planted


def _plant_audit(log: Any) -> None:
    log.MAX_WAITING = 64


after_import("deltamem_vllm.sessions.worker", _plant_worker)
after_import("deltamem_vllm.sessions.pool", _plant_pool)
after_import("deltamem_vllm.audit.log", _plant_audit)
