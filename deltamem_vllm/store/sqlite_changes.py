"""What a write does inside an open transaction of the SQLite store. A statement runs once for a whole group, and a
group's rules are those of ``ledger``."""

import math
from collections.abc import Sequence
from typing import Any

import apsw

from deltamem_vllm.store import sqlite_schema
from deltamem_vllm.store.ledger import Encoded, View, Write, plan
from deltamem_vllm.store.protocol import Outcome, Quota, SessionKey, Usage


def put_group(writer: apsw.Connection, puts: Encoded, quota: Quota, keep: int) -> dict[int, Outcome]:
    """Compare and set a group; the outcome of each index."""
    spans: dict[SessionKey, tuple[int, int]] = {}  # the group's least and greatest version of each session
    for record, _, _ in puts.values():
        least, greatest = spans.get(record.key, (record.version, record.version))
        spans[record.key] = min(least, record.version), max(greatest, record.version)
    keys = {(key.tenant, key.session): key for key in spans}
    names = sorted(keys)
    tenants = sorted({(tenant,) for tenant, _ in names})
    kept: dict[tuple[str, str], dict[int, tuple[str, int]]] = {}
    # Of the kept versions those that the group may write again, and those that are kept no more with it.
    concerned = ((*name, spans[keys[name]][0], spans[keys[name]][1] - keep) for name in names)
    rows: Any = writer.executemany(sqlite_schema.CONCERNED, concerned)
    for tenant, session, version, request_id, size in rows:
        kept.setdefault((tenant, session), {})[version] = (request_id, size)
    views = {
        keys[tenant, session]: View((version, incarnation, request_id), kept.get((tenant, session), {}))
        for tenant, session, version, incarnation, request_id in writer.executemany(sqlite_schema.HEAD, names)
    }
    rows = writer.executemany(sqlite_schema.USAGE, tenants)
    usages = {tenant: Usage(sessions, size) for tenant, sessions, size in rows}
    outcomes, writes = plan(puts, views, usages, quota, keep, {})
    _write(writer, writes)
    return outcomes


def delete(writer: apsw.Connection, key: SessionKey, until: float = math.inf) -> bool:
    """Delete a session inside the open transaction, unless it was updated after ``until``; whether it did."""
    name = (key.tenant, key.session)
    if not writer.execute(sqlite_schema.IDLE_SINCE, (*name, until)).fetchone():
        return False
    kept: Any = writer.execute(sqlite_schema.KEPT, name).fetchall()
    writer.execute("DELETE FROM versions WHERE tenant = ? AND session = ?", name)
    writer.execute("DELETE FROM sessions WHERE tenant = ? AND session = ?", name)
    writer.execute(sqlite_schema.ADD_USAGE, (key.tenant, -1, -sum(size for *_, size in kept)))
    writer.execute(sqlite_schema.DROP_USAGE, (key.tenant,))
    return True


def _write(writer: apsw.Connection, writes: Sequence[Write]) -> None:
    """Carry out what a group changes. By kind, each in the group's order: a row that is taken over may be one that the
    same group has inserted, while those that are deleted were there before it."""
    heads: dict[tuple[str, str], tuple[Any, ...]] = {}  # where each session is in the end
    grown: dict[str, list[int]] = {}
    created = sorted({(write.record.key.tenant,) for write in writes if write.change.created})
    inserted, replaced, trimmed = [], [], []
    for write in writes:
        record, change = write.record, write.change
        name = (record.key.tenant, record.key.session)
        row = (
            *name,
            int(record.version),
            record.incarnation,
            record.request_id,
            float(record.created_at),
            float(record.updated_at),
            int(record.tokens),
            int(record.windows),
            len(write.blob),
            write.blob,
        )
        heads[name] = (*row[:5], row[6])
        used = grown.setdefault(record.key.tenant, [0, 0])
        used[0] += change.created
        used[1] += change.grown
        trimmed += [(*name, version) for version in change.trim[1:]]
        if change.trim:
            replaced.append((*row, change.trim[0]))
        else:
            inserted.append(row)
    for statement, rows in (
        (sqlite_schema.NEW_USAGE, created),
        (sqlite_schema.PUT_HEAD, heads.values()),
        (sqlite_schema.INSERT_VERSION, inserted),
        (sqlite_schema.TRIM, trimmed),
        (sqlite_schema.REPLACE_VERSION, replaced),
        (sqlite_schema.ADD_USAGE, [(tenant, *used) for tenant, used in grown.items()]),
    ):
        if rows:
            writer.executemany(statement, rows)
