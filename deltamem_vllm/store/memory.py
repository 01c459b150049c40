"""A store in the process's memory, for tests and trials: **not durable**, everything is gone with the
process."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from deltamem_vllm.errors import StoreError, StoreUnavailable
from deltamem_vllm.store.codec import PLAIN, RecordCodec
from deltamem_vllm.store.ledger import View, check_keep, decide, encoded, roll_back
from deltamem_vllm.store.protocol import (
    Expect,
    Keys,
    Listing,
    Names,
    Outcomes,
    Put,
    Quota,
    Record,
    SessionInfo,
    SessionKey,
    Usage,
    WouldWait,
    id_range,
)
from deltamem_vllm.store.verify import Verifier, info_of


@dataclass
class _Session:
    """One session: what the rules see of it, and its versions (listing entry, request id, bytes)."""

    view: View = field(default_factory=View)
    versions: dict[int, tuple[SessionInfo, str, bytes]] = field(default_factory=dict)


class MemoryStore:
    """Keeps encoded records in a dict, so that it verifies and compares exactly as a durable store does.

    Args:
        keep: versions kept of each session.
        quota: per tenant.
        codec: how records are stored.
    """

    def __init__(self, *, keep: int = 4, quota: Quota | None = None, codec: RecordCodec = PLAIN) -> None:
        self.codec = codec
        self.keep = check_keep(keep)
        self.quota = quota or Quota()
        self._verify = Verifier(codec, "memory://")
        self._sessions: dict[SessionKey, _Session] = {}
        self._usage: dict[str, Usage] = {}
        self._lock = threading.Lock()
        self._closed = False

    def get(self, key: SessionKey) -> Record | None:
        with self._lock:
            session = self._open().get(key)
            head = session.view.head if session is not None else None
            blob = session.versions[head[0]][2] if session is not None and head is not None else None
        return None if head is None else self._verify.newest(key, head, blob, None)

    def get_version(self, key: SessionKey, version: int) -> Record | None:
        with self._lock:
            session = self._open().get(key)
            found = session.versions.get(version) if session is not None else None
        if found is None:
            return None
        return self._verify.version(key, (version, found[0].incarnation, found[1]), found[2])

    def head(self, key: SessionKey) -> Expect | None:
        with self._lock:
            return self._head(key)

    def glance(self, key: SessionKey) -> Expect | None:
        if self._closed or not self._lock.acquire(blocking=False):
            raise WouldWait
        try:
            return self._head(key)
        finally:
            self._lock.release()

    def _head(self, key: SessionKey) -> Expect | None:
        session = self._open().get(key)
        return None if session is None or session.view.head is None else Expect(*session.view.head[:2])

    def history(self, key: SessionKey, limit: int = 100) -> Listing:
        with self._lock:
            session = self._open().get(key)
            infos = [] if session is None else [info for info, _, _ in session.versions.values()]
        return sorted(infos, key=lambda info: -info.version)[: max(0, limit)]

    def put(self, record: Record, expect: Expect | None) -> None:
        self._put(record, expect, self.codec.encode(record))

    def _put(self, record: Record, expect: Expect | None, blob: bytes) -> None:
        key = record.key
        with self._lock:
            session = self._open().get(key) or _Session()
            usage = self._usage.get(key.tenant, Usage())
            change = decide(record, expect, len(blob), session.view, usage, self.quota, self.keep)
            if change is None:
                return
            session.view = session.view.after(record, len(blob), change)
            for version in change.trim:
                del session.versions[version]
            session.versions[record.version] = (info_of(record, len(blob)), record.request_id, blob)
            self._sessions[key] = session
            self._usage[key.tenant] = change.applied(usage)

    def put_many(self, puts: Sequence[Put]) -> Outcomes:
        group, outcomes = encoded(puts, self.codec)
        for index, put in group.items():
            try:
                self._put(*put)
            except StoreError as error:
                outcomes[index] = error
        return outcomes

    def rollback(self, key: SessionKey, version: int, expect: Expect, request_id: str) -> Record:
        return roll_back(self, key, version, expect, request_id)

    def delete(self, key: SessionKey) -> bool:
        with self._lock:
            self._open()
            return self._delete(key)

    def _delete(self, key: SessionKey) -> bool:
        session = self._sessions.pop(key, None)
        if session is None:
            return False
        used = self._usage.pop(key.tenant)
        if used.sessions > 1:
            size = sum(size for _, size in session.view.kept.values())
            self._usage[key.tenant] = Usage(used.sessions - 1, used.bytes - size)
        return True

    def expire(self, now: float, idle_seconds: float, limit: int = 1000) -> int:
        until = now - idle_seconds
        return len(self.delete_idle(self.idle(until, limit), until))

    def idle(self, until: float, limit: int = 1000) -> Keys:
        with self._lock:
            heads = [max(session.versions.items())[1][0] for session in self._open().values()]
        found = sorted((info.updated_at, info.key) for info in heads if info.updated_at <= until)
        return [key for _, key in found[: max(0, limit)]]

    def delete_idle(self, keys: Sequence[SessionKey], until: float) -> Keys:
        gone: Keys = []
        with self._lock:
            sessions = self._open()
            for key in keys:
                session = sessions.get(key)
                idle = session is not None and max(session.versions.items())[1][0].updated_at <= until
                if idle and self._delete(key):
                    gone.append(key)
        return gone

    def tenants(self, after: str | None = None, limit: int = 100) -> Names:
        with self._lock:
            self._open()
            return sorted(name for name in self._usage if after is None or name > after)[: max(0, limit)]

    def usage(self, tenant: str) -> Usage:
        with self._lock:
            self._open()
            return self._usage.get(tenant, Usage())

    def reencrypt(self, batch: int = 100) -> int:
        del batch
        done = 0
        with self._lock:
            for key, session in self._open().items():
                for version, (info, request_id, blob) in session.versions.items():
                    sealed = self._verify.sealed_again(key, (version, info.incarnation, request_id), blob)
                    if sealed is None:
                        continue
                    done += 1
                    session.versions[version] = (replace(info, bytes=len(sealed)), request_id, sealed)
                    session.view = View(session.view.head, {**session.view.kept, version: (request_id, len(sealed))})
                    used = self._usage[key.tenant]
                    self._usage[key.tenant] = Usage(used.sessions, used.bytes + len(sealed) - len(blob))
        return done

    def list(self, tenant: str, after: str | None = None, limit: int = 100, *, prefix: str | None = None) -> Listing:
        start, stop = id_range(after, prefix)
        with self._lock:
            keys = (key for key in self._open() if key.tenant == tenant and start <= key.session < stop)
            page = sorted(keys)[: max(0, limit)]
            return [max(self._sessions[key].versions.items())[1][0] for key in page]

    def close(self) -> None:
        with self._lock:
            self._closed = True

    def _open(self) -> dict[SessionKey, _Session]:
        if self._closed:
            raise StoreUnavailable("the store memory:// is closed")
        return self._sessions
