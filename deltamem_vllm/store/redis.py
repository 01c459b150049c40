"""Sessions in one Redis (or Valkey) server: ``pip install 'deltamem-vllm[redis]'``.

What may be lost depends on the server's settings, which are read when the store is opened:

* ``appendonly yes`` and ``appendfsync always``: an acknowledged commit is on the server's disk.
* ``appendfsync everysec``: a power loss of the server takes up to about 2 seconds of acknowledged commits.
* ``appendfsync no``: whatever the kernel had not written, some 30 seconds on Linux.
* ``appendonly no``: everything since the last snapshot, or everything.

All but the first, and a server that does not tell (CONFIG forbidden), are refused unless the store is opened with
``durability="bounded"``, by which the operator says that this loss is acceptable; it is logged. Replication is
asynchronous: a failover may lose the last commits whatever the settings. An eviction policy other than
``noeviction`` is always refused, because it erases sessions.

Behind a partition a client may see an error although the server has applied the write. ``put_many`` sends the
group again until ``retry_seconds`` have passed; what was applied is recognised by its request id.

Erasure: ``delete`` removes the keys; their bytes stay in the append-only file until it is rewritten (BGREWRITEAOF).
Redis Cluster is not served: a group's keys would lie on several nodes.
"""

import json
from collections.abc import Sequence
from functools import partial
from typing import Any

from deltamem_vllm.errors import StoreError
from deltamem_vllm.store.codec import PLAIN, RecordCodec
from deltamem_vllm.store.leases import LEASE_SECONDS, Leases, check_lease_seconds, fenced, new_holder
from deltamem_vllm.store.ledger import Change, check_keep, check_quota, encoded, roll_back
from deltamem_vllm.store.protocol import (
    Expect,
    Keys,
    Listing,
    Names,
    Outcome,
    Outcomes,
    Put,
    Quota,
    Record,
    SessionInfo,
    SessionKey,
    Usage,
    admit,
    id_range,
)
from deltamem_vllm.store.redis_leases import RedisLeases
from deltamem_vllm.store.redis_link import Durability, RedisLink
from deltamem_vllm.store.verify import Verifier, info_of

_Answer = list[Any]  # here, because ``list`` is a method of the store
_Keys = list[bytes]


class RedisStore:
    """A ``StateStore`` in a Redis server.

    Args:
        url: ``redis://user@host:6379/0``, ``rediss://…`` with TLS, or ``unix://``; redis-py's options may follow.
        namespace: prefix of every key.
        durability: ``fsync`` refuses a server that may lose acknowledged commits; ``bounded`` accepts it.
        keep: versions kept of each session.
        quota: per tenant.
        codec: how records are stored; ``crypto.SealedCodec`` encrypts them.
        timeout_seconds: what a command may take.
        retry_seconds: how long a broken connection is tried again before ``StoreUnavailable``.
        lease_seconds: how long a lease lasts; 0: this process takes none, but respects others'.

    Raises:
        ConfigError: the URL is not valid, or the server's settings may lose what is acknowledged.
        StoreUnavailable: the server cannot be reached.
    """

    def __init__(
        self,
        url: str,
        *,
        namespace: str = "deltamem",
        durability: Durability = "fsync",
        keep: int = 4,
        quota: Quota | None = None,
        codec: RecordCodec = PLAIN,
        timeout_seconds: float = 5.0,
        retry_seconds: float = 5.0,
        lease_seconds: float = LEASE_SECONDS,
    ) -> None:
        self.codec = codec
        self.keep = check_keep(keep)
        self.quota = quota or Quota()
        self._namespace = namespace.encode()
        self._link = RedisLink(url, namespace=namespace, timeout_seconds=timeout_seconds, retry_seconds=retry_seconds)
        self.where = self._link.where
        self._verify = Verifier(codec, self.where)
        self._holder = new_holder()
        self.leases: Leases | None = None
        if check_lease_seconds(lease_seconds):
            self.leases = RedisLeases(self._link, self._lease_names, self._holder, lease_seconds)
        try:
            self._link.check_server(durability)
        except BaseException:
            self._link.close()
            raise

    # --- reading --------------------------------------------------------------------------------------------

    def get(self, key: SessionKey) -> Record | None:
        floor = self._verify.floor(key)
        found = self._link.script("read", "GET", self._keys(key)[:2])
        return self._verify.newest(key, _row(found), found[3], floor) if found else None

    def get_version(self, key: SessionKey, version: int) -> Record | None:
        found = self._link.script("read", "GET_VERSION", self._keys(key)[:2], version)
        return self._verify.version(key, _row(found), found[3]) if found else None

    def head(self, key: SessionKey) -> Expect | None:
        place = self._keys(key)[0]
        version, incarnation = self._link.run("read", lambda: self._link.client.hmget(place, "v", "i"))
        return Expect(int(version), incarnation.decode()) if version else None

    def history(self, key: SessionKey, limit: int = 100) -> Listing:
        found = self._link.script("read", "HISTORY", self._keys(key)[1:2])
        infos = sorted((_info(key, meta) for meta in found), key=lambda info: -info.version)
        return infos[: max(0, limit)]

    def list(self, tenant: str, after: str | None = None, limit: int = 100, *, prefix: str | None = None) -> Listing:
        start, stop = (each.encode() for each in id_range(after, prefix))
        if limit <= 0:
            return []
        place, bounds = self._key(b"names", tenant), (b"[" + start, b"(" + stop)
        names = self._link.run("list", lambda: self._link.client.zrangebylex(place, *bounds, start=0, num=limit))
        keys = [SessionKey(tenant, name.decode()) for name in names]
        if not keys:
            return []

        def heads() -> Any:
            pipeline = self._link.client.pipeline(transaction=False)
            for key in keys:
                pipeline.hget(self._keys(key)[0], "m")
            return pipeline.execute()

        infos = [_info(key, meta) for key, meta in zip(keys, self._link.run("list", heads), strict=True) if meta]
        # Sessions that went between the two steps: an empty page would look like the end.
        return infos or self.list(tenant, keys[-1].session, limit, prefix=prefix)

    def idle(self, until: float, limit: int = 1000) -> Keys:
        if limit <= 0:
            return []
        score = repr(float(until))
        found = self._link.run(
            "list", lambda: self._link.client.zrangebyscore(self._idle, "-inf", score, start=0, num=limit)
        )
        return [SessionKey(*member.decode().split("\0")) for member in found]

    def tenants(self, after: str | None = None, limit: int = 100) -> Names:
        prefix = self._key(b"used", "")
        found = self._link.run("list", lambda: {*self._link.client.scan_iter(match=_glob(prefix) + b"*", count=1000)})
        names = (name[len(prefix) :] for name in found)
        start = (after or "").encode()
        return [name.decode() for name in sorted(name for name in names if name > start)[: max(0, limit)]]

    def usage(self, tenant: str) -> Usage:
        key = self._key(b"used", tenant)
        sessions, size = self._link.run("read", lambda: self._link.client.hmget(key, "sessions", "bytes"))
        return Usage(int(sessions or 0), int(size or 0))

    # --- writing --------------------------------------------------------------------------------------------

    def put(self, record: Record, expect: Expect | None) -> None:
        outcome = self.put_many([(record, expect)])[0]
        if outcome is not None:
            raise outcome

    def put_many(self, puts: Sequence[Put]) -> Outcomes:
        group, outcomes = encoded(puts, self.codec)
        if not group:
            return outcomes
        keys: list[bytes] = []
        limits = (-1 if limit is None else limit for limit in (self.quota.sessions, self.quota.bytes))
        values: list[Any] = [self.keep, *limits, self._holder]
        for record, expect, blob in group.values():
            keys += self._keys(record.key)
            seen = (expect.version, expect.incarnation) if expect is not None else ("", "")
            values += [_member(record.key), record.key.session, int(record.version), record.incarnation]
            values += [record.request_id, *seen, repr(float(record.updated_at)), _meta(record, len(blob)), blob]
        try:
            answers = self._link.script("write", "PUT", keys, *values)
            found = [self._outcome(*put[:2], answer) for put, answer in zip(group.values(), answers, strict=True)]
        except StoreError as error:
            found = [error] * len(group)
        for index, outcome in zip(group, found, strict=True):
            outcomes[index] = outcome
            if outcome is None:
                record = group[index][0]
                self._verify.seen(record.key, record.incarnation, int(record.version))
        return outcomes

    def rollback(self, key: SessionKey, version: int, expect: Expect, request_id: str) -> Record:
        return roll_back(self, key, version, expect, request_id)

    def delete(self, key: SessionKey) -> bool:
        keys = self._keys(key)
        existed = bool(self._link.run("read", lambda: self._link.client.exists(keys[0])))
        gone = self._link.script("delete from", "DELETE", keys, _member(key), key.session, "")
        self._verify.forget(key)
        return existed or bool(gone)  # a cut may have come after the server had done it

    def expire(self, now: float, idle_seconds: float, limit: int = 1000) -> int:
        until = now - idle_seconds
        return len(self.delete_idle(self.idle(until, limit), until))

    def delete_idle(self, keys: Sequence[SessionKey], until: float) -> Keys:
        gone: Keys = []
        for key in keys:
            values = (_member(key), key.session, repr(float(until)))
            if self._link.script("expire sessions in", "DELETE", self._keys(key), *values):
                self._verify.forget(key)
                gone.append(key)
        return gone

    def reencrypt(self, batch: int = 100) -> int:
        done = 0
        prefix = self._namespace + b":vers:"
        cursor: Any = 0
        while True:
            scan = partial(self._link.client.scan, cursor, match=_glob(prefix) + b"*", count=batch)
            cursor, found = self._link.run("read", scan)
            for name in found:
                key = SessionKey(*name[len(prefix) :].decode().split("\0"))
                done += sum(self._reseal(key, info.version) for info in self.history(key, 1000))
            if not cursor:
                return done

    def close(self) -> None:
        self._link.close()

    # --- inside ---------------------------------------------------------------------------------------------

    def _reseal(self, key: SessionKey, version: int) -> bool:
        found = self._link.script("read", "GET_VERSION", self._keys(key)[:2], version)
        sealed = self._verify.sealed_again(key, _row(found), found[3]) if found else None
        if sealed is None:
            return False
        meta = _meta(self._verify.version(key, _row(found), sealed), len(sealed))
        head, vers, _, used, *_ = self._keys(key)
        values = (version, found[3], sealed, meta)
        return bool(self._link.script("write", "RESEAL", [head, vers, used], *values))

    def _outcome(self, record: Record, expect: Expect | None, answer: _Answer) -> Outcome:
        """The error that the common rules give for what the script found; None if it is stored."""
        kind, version, incarnation, request_id, created, grown, sessions, size, left = answer
        if kind in (b"stored", b"there"):
            return None
        if kind == b"leased":
            return fenced(record.key, left / 1000)
        stored = (int(version), incarnation.decode(), request_id.decode()) if version else None
        try:
            if kind == b"quota":
                check_quota(Change(bool(created), (), grown), Usage(sessions, size), self.quota, record.key)
            else:
                admit(record, expect, stored)
        except StoreError as error:
            return error
        return StoreError(f"session {record.key.session!r} in {self.where}: refused by the script, not by the rules")

    @property
    def _idle(self) -> bytes:
        return self._namespace + b":idle"

    def _key(self, kind: bytes, name: str) -> bytes:
        return b":".join((self._namespace, kind, name.encode()))

    def _keys(self, key: SessionKey) -> _Keys:
        """head, vers, names, used, idle, lease of a session."""
        member = f"{key.tenant}\0{key.session}"
        tenants = [self._key(kind, key.tenant) for kind in (b"names", b"used")]
        lease = self._lease_names(key)[0]
        return [self._key(b"head", member), self._key(b"vers", member), *tenants, self._idle, lease]

    def _lease_names(self, key: SessionKey) -> _Keys:
        return [self._key(kind, f"{key.tenant}\0{key.session}") for kind in (b"lease", b"want")]


def _member(key: SessionKey) -> bytes:
    return f"{key.tenant}\0{key.session}".encode()


def _meta(record: Record, size: int) -> str:
    info = info_of(record, size)
    return json.dumps([getattr(info, name) for name in SessionInfo.__slots__[1:]])


def _info(key: SessionKey, meta: bytes) -> SessionInfo:
    return SessionInfo(key, *json.loads(meta))


def _row(found: list[Any]) -> tuple[int, str, str]:
    return int(found[0]), found[1].decode(), found[2].decode()


def _glob(prefix: bytes) -> bytes:
    """A prefix as a pattern that matches only itself."""
    return b"".join(b"\\" + bytes([byte]) if byte in b"*?[]\\^-" else bytes([byte]) for byte in prefix)
