"""The SQLite schema, its migrations, and the statements of the store.

Two tables and a counter: ``sessions`` has one small row per session (where it is), ``versions`` one row per
kept version with its record, ``tenants`` what each tenant uses. ``versions`` has a rowid: a record is some
tens of kilobytes, and rows that large make a WITHOUT ROWID tree slow to search. The blob is the last column,
so that listings never touch its overflow pages. A new version takes over the row of the one that is kept no
more, so that a commit writes one record and not two.
"""

MIGRATIONS = (
    """
    CREATE TABLE sessions (
        tenant TEXT NOT NULL,
        session TEXT NOT NULL,
        version INTEGER NOT NULL CHECK (version >= 1),
        incarnation TEXT NOT NULL,
        request_id TEXT NOT NULL,
        created_at REAL NOT NULL,
        updated_at REAL NOT NULL,
        tokens INTEGER NOT NULL,
        windows INTEGER NOT NULL,
        bytes INTEGER NOT NULL,
        blob BLOB NOT NULL CHECK (length(blob) = bytes),
        PRIMARY KEY (tenant, session)
    ) STRICT
    """,
    """
    CREATE TABLE versions (
        tenant TEXT NOT NULL,
        session TEXT NOT NULL,
        version INTEGER NOT NULL CHECK (version >= 1),
        incarnation TEXT NOT NULL,
        request_id TEXT NOT NULL,
        created_at REAL NOT NULL,
        updated_at REAL NOT NULL,
        tokens INTEGER NOT NULL,
        windows INTEGER NOT NULL,
        bytes INTEGER NOT NULL,
        blob BLOB NOT NULL CHECK (length(blob) = bytes),
        PRIMARY KEY (tenant, session, version)
    ) STRICT;
    INSERT INTO versions SELECT tenant, session, version, incarnation, request_id, created_at, updated_at, tokens,
                                windows, bytes, blob FROM sessions ORDER BY tenant, session;
    CREATE TABLE heads (
        tenant TEXT NOT NULL,
        session TEXT NOT NULL,
        version INTEGER NOT NULL CHECK (version >= 1),
        incarnation TEXT NOT NULL,
        request_id TEXT NOT NULL,
        updated_at REAL NOT NULL,
        PRIMARY KEY (tenant, session)
    ) STRICT;
    INSERT INTO heads SELECT tenant, session, version, incarnation, request_id, updated_at FROM sessions;
    CREATE TABLE tenants (
        tenant TEXT NOT NULL PRIMARY KEY,
        sessions INTEGER NOT NULL CHECK (sessions >= 0),
        bytes INTEGER NOT NULL CHECK (bytes >= 0)
    ) STRICT;
    INSERT INTO tenants SELECT tenant, count(*), sum(bytes) FROM sessions GROUP BY tenant;
    DROP TABLE sessions;
    ALTER TABLE heads RENAME TO sessions;
    CREATE INDEX sessions_idle ON sessions (updated_at);
    """,
)
"""``MIGRATIONS[n]`` brings a file from ``user_version`` n to n+1. Entries are never edited, only added."""

HEAD = "SELECT tenant, session, version, incarnation, request_id FROM sessions WHERE tenant = ? AND session = ?"
WHERE_IS = "SELECT version, incarnation FROM sessions WHERE tenant = ? AND session = ?"
KEPT = "SELECT tenant, session, version, request_id, bytes FROM versions WHERE tenant = ? AND session = ?"
CONCERNED = f"{KEPT} AND (version >= ? OR version <= ?)"
GET = """
    SELECT h.version, h.incarnation, h.request_id, CASE WHEN length(v.blob) <= ?1 THEN v.blob END
    FROM sessions h LEFT JOIN versions v ON (v.tenant, v.session, v.version) = (h.tenant, h.session, h.version)
    WHERE h.tenant = ?2 AND h.session = ?3
"""
GET_VERSION = """
    SELECT version, incarnation, request_id, CASE WHEN length(blob) <= ?1 THEN blob END
    FROM versions WHERE tenant = ?2 AND session = ?3 AND version = ?4
"""
PUT_HEAD = """
    INSERT INTO sessions (tenant, session, version, incarnation, request_id, updated_at)
    VALUES (?1, ?2, ?3, ?4, ?5, ?6)
    ON CONFLICT (tenant, session) DO UPDATE SET version = ?3, incarnation = ?4, request_id = ?5, updated_at = ?6
"""
INSERT_VERSION = """
    INSERT INTO versions (tenant, session, version, incarnation, request_id, created_at, updated_at, tokens,
                          windows, bytes, blob)
    VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11)
"""
REPLACE_VERSION = """
    UPDATE versions SET version = ?3, incarnation = ?4, request_id = ?5, created_at = ?6, updated_at = ?7,
                        tokens = ?8, windows = ?9, bytes = ?10, blob = ?11
    WHERE tenant = ?1 AND session = ?2 AND version = ?12
"""
TRIM = "DELETE FROM versions WHERE tenant = ? AND session = ? AND version = ?"
USAGE = "SELECT tenant, sessions, bytes FROM tenants WHERE tenant = ?"
NEW_USAGE = "INSERT INTO tenants (tenant, sessions, bytes) VALUES (?, 0, 0) ON CONFLICT DO NOTHING"
ADD_USAGE = "UPDATE tenants SET sessions = sessions + ?2, bytes = bytes + ?3 WHERE tenant = ?1"
DROP_USAGE = "DELETE FROM tenants WHERE tenant = ? AND sessions = 0"
IDLE = "SELECT tenant, session FROM sessions WHERE updated_at <= ? ORDER BY updated_at LIMIT ?"
IDLE_SINCE = "SELECT 1 FROM sessions WHERE tenant = ? AND session = ? AND updated_at <= ?"
TENANTS = "SELECT tenant FROM tenants WHERE tenant > ? ORDER BY tenant LIMIT ?"
_INFO = "v.version, v.incarnation, v.created_at, v.updated_at, v.tokens, v.windows, v.bytes"
LIST = f"""
    SELECT h.session, {_INFO}
    FROM sessions h JOIN versions v ON (v.tenant, v.session, v.version) = (h.tenant, h.session, h.version)
    WHERE h.tenant = ? AND h.session >= ? AND h.session < ? ORDER BY h.session LIMIT ?
"""
HISTORY = f"SELECT {_INFO} FROM versions v WHERE tenant = ? AND session = ? ORDER BY version DESC LIMIT ?"
SWEEP = """
    SELECT rowid, tenant, session, version, incarnation, request_id, blob
    FROM versions WHERE rowid > ? ORDER BY rowid LIMIT ?
"""
RESEAL = "UPDATE versions SET bytes = length(?1), blob = ?1 WHERE rowid = ?2"
