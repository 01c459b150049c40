"""Sessions in PostgreSQL 13 or newer, shared by replicas: ``pip install 'deltamem-vllm[postgres]'``.

Durability: ``synchronous_commit`` is forced on in every writing transaction, so that COMMIT returns after
the server's log is synced (and a synchronous standby's, if there is one). A server with ``fsync`` off is
refused. An asynchronous standby that is promoted may lack the last commits.

Compare-and-set: a group locks its tenants' rows, reads where its sessions are, decides by the common rules,
and moves each session by ``UPDATE … WHERE version = … AND incarnation = …``. Should a row have moved all the
same, the whole group is rolled back and decided again.

A connection that is cut, even after COMMIT was sent, is resolved inside ``put_many``: see ``postgres_link``.

Erasure: ``delete`` removes the rows; their bytes stay in the files until VACUUM, and in the log and backups
as long as the server keeps those. Encrypt (``crypto``) where that matters.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from deltamem_vllm.errors import ConfigError, StoreError
from deltamem_vllm.store import postgres_schema as sql
from deltamem_vllm.store.codec import MAX_RECORD_BYTES, PLAIN, RecordCodec
from deltamem_vllm.store.leases import LEASE_SECONDS, Leases, check_lease_seconds, new_holder
from deltamem_vllm.store.ledger import Encoded, View, Write, check_keep, encoded, plan, roll_back
from deltamem_vllm.store.postgres_leases import PostgresLeases, columns
from deltamem_vllm.store.postgres_link import Connection, Link, Moved
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
    id_range,
)
from deltamem_vllm.store.verify import Verifier

list_of = list  # here, because ``list`` is a method of the store


class PostgresStore:
    """A ``StateStore`` in a PostgreSQL database. Its tables are called ``deltamem_*`` and are made if they
    are missing.

    Args:
        url: ``postgresql://user@host:5432/database?sslmode=verify-full``, or any connection string of libpq.
            Give the password by PGPASSWORD, a pgpass file or a service file.
        keep: versions kept of each session.
        quota: per tenant.
        codec: how records are stored; ``crypto.SealedCodec`` encrypts them.
        statement_seconds: what a statement may take, waiting for locks included.
        retry_seconds: how long a broken connection is tried again before ``StoreUnavailable``.
        lease_seconds: how long a lease lasts; 0: this process takes none, but respects others'.

    Raises:
        ConfigError: the URL is not valid, the tables are of a newer version, or the server does not sync.
        StoreUnavailable: the database cannot be reached or the tables cannot be made.
    """

    def __init__(
        self,
        url: str,
        *,
        keep: int = 4,
        quota: Quota | None = None,
        codec: RecordCodec = PLAIN,
        statement_seconds: float = 10.0,
        retry_seconds: float = 5.0,
        lease_seconds: float = LEASE_SECONDS,
    ) -> None:
        self.codec = codec
        self.keep = check_keep(keep)
        self.quota = quota or Quota()
        self._link = Link(url, statement_seconds=statement_seconds, retry_seconds=retry_seconds)
        self.where = self._link.where
        self._verify = Verifier(codec, self.where)
        self._holder = new_holder()
        self.leases: Leases | None = None
        if check_lease_seconds(lease_seconds):
            self.leases = PostgresLeases(self._link, self._holder, lease_seconds)
        try:
            self._prepare()
        except BaseException:
            self._link.close()
            raise

    # --- reading --------------------------------------------------------------------------------------------

    def get(self, key: SessionKey) -> Record | None:
        floor = self._verify.floor(key)
        rows = self._link.read("read", sql.GET, (MAX_RECORD_BYTES, key.tenant, key.session))
        return self._verify.newest(key, rows[0][:3], rows[0][3], floor) if rows else None

    def get_version(self, key: SessionKey, version: int) -> Record | None:
        rows = self._link.read("read", sql.GET_VERSION, (MAX_RECORD_BYTES, key.tenant, key.session, version))
        return self._verify.version(key, rows[0][:3], rows[0][3]) if rows else None

    def head(self, key: SessionKey) -> Expect | None:
        rows = self._link.read("read", sql.HEAD, (key.tenant, key.session))
        return Expect(*rows[0]) if rows else None

    def history(self, key: SessionKey, limit: int = 100) -> Listing:
        rows = self._link.read("read", sql.HISTORY, (key.tenant, key.session, max(0, limit)))
        return [SessionInfo(key, *row) for row in rows]

    def list(self, tenant: str, after: str | None = None, limit: int = 100, *, prefix: str | None = None) -> Listing:
        rows = self._link.read("list", sql.LIST, (tenant, *id_range(after, prefix), max(0, limit)))
        return [SessionInfo(SessionKey(tenant, session), *rest) for session, *rest in rows]

    def idle(self, until: float, limit: int = 1000) -> Keys:
        return [SessionKey(*row) for row in self._link.read("list", sql.IDLE, (until, max(0, limit)))]

    def tenants(self, after: str | None = None, limit: int = 100) -> Names:
        return [str(name) for (name,) in self._link.read("list", sql.TENANTS, (after or "", max(0, limit)))]

    def usage(self, tenant: str) -> Usage:
        rows = self._link.read("read", sql.USAGE, (tenant,))
        return Usage(*rows[0]) if rows else Usage()

    # --- writing --------------------------------------------------------------------------------------------

    def put(self, record: Record, expect: Expect | None) -> None:
        outcome = self.put_many([(record, expect)])[0]
        if outcome is not None:
            raise outcome

    def put_many(self, puts: Sequence[Put]) -> Outcomes:
        group, outcomes = encoded(puts, self.codec)
        if not group:
            return outcomes
        found: dict[int, Outcome]
        try:
            found = self._link.write("write", lambda connection: self._put_group(connection, group))
        except StoreError as error:
            found = dict.fromkeys(group, error)
        for index, outcome in found.items():
            outcomes[index] = outcome
            if outcome is None:
                record = puts[index][0]
                self._verify.seen(record.key, record.incarnation, int(record.version))
        return outcomes

    def rollback(self, key: SessionKey, version: int, expect: Expect, request_id: str) -> Record:
        return roll_back(self, key, version, expect, request_id)

    def delete(self, key: SessionKey) -> bool:
        existed = False

        def work(connection: Connection) -> None:
            nonlocal existed  # true in any attempt: the one before may have been applied
            existed = bool(_delete(connection, [key], float("inf"))) or existed

        self._link.write("delete from", work)
        self._verify.forget(key)
        return existed

    def expire(self, now: float, idle_seconds: float, limit: int = 1000) -> int:
        until = now - idle_seconds
        return len(self.delete_idle(self.idle(until, limit), until))

    def delete_idle(self, keys: Sequence[SessionKey], until: float) -> Keys:
        if not keys:
            return []
        gone: set[SessionKey] = set()

        def work(connection: Connection) -> None:  # as in ``delete``: what any attempt has deleted
            gone.update(_delete(connection, list_of(keys), until))

        self._link.write("expire sessions in", work)
        for key in gone:
            self._verify.forget(key)
        return list_of(gone)

    def reencrypt(self, batch: int = 100) -> int:
        done = 0
        last: tuple[Any, ...] = ("", "", 0)
        while rows := self._link.read("read", sql.SWEEP, (*last, batch)):
            sealed = [(row, self._verify.sealed_again(SessionKey(*row[:2]), row[2:5], row[5])) for row in rows]
            changes = [(row, blob) for row, blob in sealed if blob is not None]
            if changes:
                done += self._link.write("reencrypt", partial(_reseal, changes))
            last = rows[-1][:3]
        return done

    def close(self) -> None:
        self._link.close()

    def _put_group(self, connection: Connection, encoded: Encoded) -> dict[int, Outcome]:
        """Compare and set a group inside the open transaction."""
        keys = {record.key for record, _, _ in encoded.values()}
        tenants = sorted({key.tenant for key in keys})
        names = columns(list(keys))
        with connection.pipeline():
            connection.execute(sql.NEW_TENANTS, (tenants,))
            locked = connection.execute(sql.LOCK_TENANTS, (tenants,))
            heads = connection.execute(sql.HEADS, names)
            kept = connection.execute(sql.KEPT, names)
            leases = connection.execute(sql.FENCE, names)
        usages = {tenant: Usage(*used) for tenant, *used in locked.fetchall()}
        if len(usages) != len(tenants):
            raise Moved("a tenant's row was removed while it was waited for")
        versions: dict[tuple[str, str], dict[int, tuple[str, int]]] = {}
        for tenant, session, version, request_id, size in kept.fetchall():
            versions.setdefault((tenant, session), {})[version] = (request_id, size)
        views = {SessionKey(t, s): View(tuple(head), versions.get((t, s), {})) for t, s, *head in heads.fetchall()}
        fences = {
            SessionKey(tenant, session): left
            for tenant, session, holder, left in leases.fetchall()
            if holder != self._holder and left > 0
        }
        outcomes, writes = plan(encoded, views, usages, self.quota, self.keep, fences)
        with connection.pipeline():
            moved = [_write(connection, write) for write in writes]
            for tenant in {write.record.key.tenant for write in writes}:
                used = usages[tenant]
                connection.execute(sql.SET_USAGE, (used.sessions, used.bytes, tenant))
            connection.execute(sql.DROP_TENANTS, (tenants,))
        if any(cursor.rowcount != 1 for cursor in moved):
            raise Moved("a session moved although its tenant's row was locked")
        return outcomes

    # --- schema ---------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """Refuse a server that does not sync; bring the tables up to date."""
        for name in ("fsync", "full_page_writes"):
            if self._link.read("open", f"SHOW {name}", ())[0][0] != "on":
                raise ConfigError(f"{self.where} runs with {name} off: a crash would damage it. Switch it on")
        if self._link.read("open", "SHOW server_encoding", ())[0][0] != "UTF8":
            raise ConfigError(f"{self.where} is not encoded in UTF8. Create the database with ENCODING 'UTF8'")
        if self._schema() < len(sql.MIGRATIONS):
            self._link.write("make the tables of", self._migrate)

    def _schema(self) -> int:
        """The schema number of the tables, 0 without any.

        Raises:
            ConfigError: newer than this package.
        """
        if self._link.read("open", "SELECT to_regclass('deltamem_meta')::text", ())[0][0] is None:
            return 0
        version = int(self._link.read("open", "SELECT coalesce(max(schema), 0) FROM deltamem_meta", ())[0][0])
        if version > len(sql.MIGRATIONS):
            raise ConfigError(
                f"{self.where} has schema {version}; this deltamem-vllm knows up to {len(sql.MIGRATIONS)}."
                " Upgrade deltamem-vllm"
            )
        return version

    def _migrate(self, connection: Connection) -> None:
        connection.execute("SELECT pg_advisory_xact_lock(%s)", (sql.LOCK,))
        connection.execute(sql.META)
        version = connection.execute("SELECT coalesce(max(schema), 0) FROM deltamem_meta").fetchone()[0]
        for migration in sql.MIGRATIONS[version:]:
            for statement in migration.split(";"):
                if statement.strip():
                    connection.execute(statement)
        connection.execute("DELETE FROM deltamem_meta")
        connection.execute("INSERT INTO deltamem_meta (schema) VALUES (%s)", (len(sql.MIGRATIONS),))


def _write(connection: Connection, write: Write) -> Any:
    """Queue the statements of one record; returns the cursor whose ``rowcount`` must be 1."""
    record, change = write.record, write.change
    name = (record.key.tenant, record.key.session)
    version, updated_at = int(record.version), float(record.updated_at)
    head = (version, record.incarnation, record.request_id, updated_at, *name)
    if write.expect is None:
        moved = connection.execute(sql.CREATE, head)
    else:
        moved = connection.execute(sql.MOVE, (*head, write.expect.version, write.expect.incarnation))
    row = (*name, version, record.incarnation, record.request_id, float(record.created_at), updated_at)
    blob = (int(record.tokens), int(record.windows), len(write.blob), write.blob)
    connection.execute(sql.INSERT_VERSION, (*row, *blob))
    if change.trim:
        connection.execute(sql.TRIM, (*name, list(change.trim)))
    return moved


def _delete(connection: Connection, keys: list[SessionKey], until: float) -> list[SessionKey]:
    """Delete those of the sessions that were not updated after ``until``; returns them."""
    tenants = sorted({key.tenant for key in keys})
    with connection.pipeline():
        connection.execute(sql.LOCK_TENANTS, (tenants,))
        cursor = connection.execute(sql.DELETE, ([k.tenant for k in keys], [k.session for k in keys], until))
        connection.execute(sql.DROP_TENANTS, (tenants,))
    gone = [SessionKey(*row) for row in cursor.fetchall()]
    connection.execute(sql.DROP_LEASES, columns(gone))
    return gone


def _reseal(changes: list[tuple[Any, bytes]], connection: Connection) -> int:
    """Replace the bytes of some versions, if they are still there; returns how many were."""
    with connection.pipeline():
        connection.execute(sql.LOCK_TENANTS, (sorted({row[0] for row, _ in changes}),))
        cursors = [connection.execute(sql.RESEAL, (len(new), new, *row[:5])) for row, new in changes]
    done = [cursor.rowcount for cursor in cursors]  # 0 where the version is gone meanwhile
    for (row, new), count in zip(changes, done, strict=True):
        connection.execute(sql.ADD_BYTES, (count * (len(new) - len(row[5])), row[0]))
    return sum(done)
