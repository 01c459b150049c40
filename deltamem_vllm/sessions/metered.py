"""A store whose calls are timed and whose errors are counted."""

import time
from collections.abc import Callable
from typing import Any, cast

from deltamem_vllm import metrics
from deltamem_vllm.errors import CorruptRecord, QuotaExceeded, StaleVersion, StoreUnavailable, VersionNotKept
from deltamem_vllm.sessions.meters import Meters
from deltamem_vllm.store.protocol import StateStore, WouldWait

OPERATIONS = {
    "put": "put",
    "put_many": "put",
    "rollback": "put",
    "get": "get",
    "get_version": "get",
    "head": "head",
    "glance": "head",
    "history": "history",
    "delete": "delete",
    "delete_idle": "delete",
    "expire": "delete",
    "idle": "list",
    "tenants": "list",
    "list": "list",
    "usage": "usage",
}
"""What each of a store's methods counts as."""


def metered(store: StateStore, meters: Meters) -> StateStore:
    """The same store, metered; all else of it shows through."""
    return cast(StateStore, _Metered(store, meters))


class _Metered:
    def __init__(self, store: StateStore, meters: Meters) -> None:
        self._store, self._meters = store, meters
        for method, operation in OPERATIONS.items():
            if getattr(store, method, None) is None:  # not every store can be glanced at
                continue
            setattr(self, method, self._timed(method, operation))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def _timed(self, method: str, operation: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                answer = getattr(self._store, method)(*args, **kwargs)
            except WouldWait:  # no call: the question is asked again, by another method
                raise
            except Exception as error:
                self._meters.observe(metrics.STORE_SECONDS, time.perf_counter() - start, operation)
                self._failed(operation, error)
                raise
            self._meters.observe(metrics.STORE_SECONDS, time.perf_counter() - start, operation)
            if method == "put_many":
                for outcome in answer:
                    self._failed(operation, outcome)
            return answer

        return call

    def _failed(self, operation: str, error: BaseException | None) -> None:
        if error is None or isinstance(error, (StaleVersion, QuotaExceeded, VersionNotKept)):
            return
        kinds = ((StoreUnavailable, "unavailable"), (CorruptRecord, "corrupt"))
        kind = next((name for cls, name in kinds if isinstance(error, cls)), "other")
        self._meters.add(metrics.STORE_ERRORS, operation, kind)
