"""A store in the process's memory, for tests and trials: **not durable**, everything is gone with the
process."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from deltamem_vllm.errors import StoreError, StoreUnavailable
from deltamem_vllm.store.codec import decode, encode
from deltamem_vllm.store.protocol import (
    Expect,
    Listing,
    Outcomes,
    Put,
    Record,
    SessionInfo,
    SessionKey,
    admit,
)


@dataclass(frozen=True, slots=True)
class _Row:
    info: SessionInfo
    request_id: str
    blob: bytes


class MemoryStore:
    """Keeps encoded records in a dict, so that it verifies and compares exactly as a durable store does."""

    def __init__(self) -> None:
        self._rows: dict[SessionKey, _Row] = {}
        self._lock = threading.Lock()
        self._closed = False

    def get(self, key: SessionKey) -> Record | None:
        with self._lock:
            self._check_open()
            row = self._rows.get(key)
        return None if row is None else decode(row.blob, key=key)

    def put(self, record: Record, expect: Expect | None) -> None:
        blob = encode(record)
        with self._lock:
            self._check_open()
            row = self._rows.get(record.key)
            stored = None if row is None else (row.info.version, row.info.incarnation, row.request_id)
            if admit(record, expect, stored):
                info = SessionInfo(
                    key=record.key,
                    version=record.version,
                    incarnation=record.incarnation,
                    created_at=record.created_at,
                    updated_at=record.updated_at,
                    tokens=record.tokens,
                    windows=record.windows,
                    bytes=len(blob),
                )
                self._rows[record.key] = _Row(info, record.request_id, blob)

    def put_many(self, puts: Sequence[Put]) -> Outcomes:
        outcomes: Outcomes = []
        for record, expect in puts:
            try:
                self.put(record, expect)
            except StoreError as error:
                outcomes.append(error)
            else:
                outcomes.append(None)
        return outcomes

    def delete(self, key: SessionKey) -> bool:
        with self._lock:
            self._check_open()
            return self._rows.pop(key, None) is not None

    def list(self, tenant: str, after: str | None = None, limit: int = 100) -> Listing:
        with self._lock:
            self._check_open()
            infos = [row.info for row in self._rows.values() if row.info.key.tenant == tenant]
        infos = sorted((info for info in infos if after is None or info.key.session > after), key=_by_key)
        return infos[: max(0, limit)]

    def close(self) -> None:
        with self._lock:
            self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise StoreUnavailable("the store memory:// is closed")


def _by_key(info: SessionInfo) -> SessionKey:
    return info.key
