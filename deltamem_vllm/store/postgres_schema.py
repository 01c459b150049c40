"""The PostgreSQL schema and the statements of the store.

The same three tables as in SQLite: where each session is, its kept versions, what each tenant uses. Text is
compared by bytes (collation "C"), so that listings have the order of the other stores. Records are stored
uncompressed (EXTERNAL): states do not compress.
"""

LOCK = 0x444D454D
"""Advisory lock under which the schema is made."""

META = "CREATE TABLE IF NOT EXISTS deltamem_meta (schema INTEGER NOT NULL)"
MIGRATIONS = (
    """
    CREATE TABLE deltamem_tenants (
        tenant TEXT COLLATE "C" NOT NULL PRIMARY KEY,
        sessions BIGINT NOT NULL CHECK (sessions >= 0),
        bytes BIGINT NOT NULL CHECK (bytes >= 0)
    );
    CREATE TABLE deltamem_sessions (
        tenant TEXT COLLATE "C" NOT NULL,
        session TEXT COLLATE "C" NOT NULL,
        version BIGINT NOT NULL CHECK (version >= 1),
        incarnation TEXT NOT NULL,
        request_id TEXT NOT NULL,
        updated_at DOUBLE PRECISION NOT NULL,
        PRIMARY KEY (tenant, session)
    );
    CREATE INDEX deltamem_sessions_idle ON deltamem_sessions (updated_at);
    CREATE TABLE deltamem_versions (
        tenant TEXT COLLATE "C" NOT NULL,
        session TEXT COLLATE "C" NOT NULL,
        version BIGINT NOT NULL CHECK (version >= 1),
        incarnation TEXT NOT NULL,
        request_id TEXT NOT NULL,
        created_at DOUBLE PRECISION NOT NULL,
        updated_at DOUBLE PRECISION NOT NULL,
        tokens BIGINT NOT NULL,
        windows BIGINT NOT NULL,
        bytes BIGINT NOT NULL,
        blob BYTEA NOT NULL CHECK (octet_length(blob) = bytes),
        PRIMARY KEY (tenant, session, version)
    );
    ALTER TABLE deltamem_versions ALTER COLUMN blob SET STORAGE EXTERNAL;
    """,
    """
    CREATE UNLOGGED TABLE deltamem_leases (
        tenant TEXT COLLATE "C" NOT NULL,
        session TEXT COLLATE "C" NOT NULL,
        holder TEXT NOT NULL,
        expires_at TIMESTAMPTZ NOT NULL,
        wanted_at TIMESTAMPTZ,
        PRIMARY KEY (tenant, session)
    );
    """,
)
"""``MIGRATIONS[n]`` brings a database from schema n to n+1. Entries are never edited, only added."""

# Writers lock the rows of their tenants first, in sorted order. Whoever writes sessions holds the row of their
# tenant, so two groups cannot wait for each other, and what a writer has read of them stays true.
NEW_TENANTS = """
    INSERT INTO deltamem_tenants (tenant, sessions, bytes)
    SELECT unnest(%s::text[]), 0, 0 ORDER BY 1 ON CONFLICT DO NOTHING
"""
LOCK_TENANTS = """
    SELECT tenant, sessions, bytes FROM deltamem_tenants WHERE tenant = ANY(%s) ORDER BY tenant FOR UPDATE
"""
HEAD = "SELECT version, incarnation FROM deltamem_sessions WHERE tenant = %s AND session = %s"
HEADS = """
    SELECT tenant, session, version, incarnation, request_id FROM deltamem_sessions
    WHERE (tenant, session) IN (SELECT * FROM unnest(%s::text[], %s::text[]))
"""
KEPT = """
    SELECT tenant, session, version, request_id, bytes FROM deltamem_versions
    WHERE (tenant, session) IN (SELECT * FROM unnest(%s::text[], %s::text[]))
"""
CREATE = """
    INSERT INTO deltamem_sessions (version, incarnation, request_id, updated_at, tenant, session)
    VALUES (%s, %s, %s, %s, %s, %s) ON CONFLICT DO NOTHING
"""
MOVE = """
    UPDATE deltamem_sessions SET version = %s, incarnation = %s, request_id = %s, updated_at = %s
    WHERE tenant = %s AND session = %s AND version = %s AND incarnation = %s
"""
INSERT_VERSION = """
    INSERT INTO deltamem_versions (tenant, session, version, incarnation, request_id, created_at, updated_at,
                                   tokens, windows, bytes, blob)
    VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)
"""
TRIM = "DELETE FROM deltamem_versions WHERE tenant = %s AND session = %s AND version = ANY(%s)"
SET_USAGE = "UPDATE deltamem_tenants SET sessions = %s, bytes = %s WHERE tenant = %s"
USAGE = "SELECT sessions, bytes FROM deltamem_tenants WHERE tenant = %s"
DELETE = """
    WITH gone AS (
        DELETE FROM deltamem_sessions s USING unnest(%s::text[], %s::text[]) AS k (tenant, session)
        WHERE s.tenant = k.tenant AND s.session = k.session AND s.updated_at <= %s
        RETURNING s.tenant, s.session
    ), dropped AS (
        DELETE FROM deltamem_versions v USING gone g WHERE v.tenant = g.tenant AND v.session = g.session
        RETURNING v.tenant, v.bytes
    ), counted AS (
        UPDATE deltamem_tenants t
        SET sessions = sessions - (SELECT count(*) FROM gone g WHERE g.tenant = t.tenant),
            bytes = bytes - (SELECT coalesce(sum(d.bytes), 0) FROM dropped d WHERE d.tenant = t.tenant)
        WHERE t.tenant IN (SELECT tenant FROM gone)
    )
    SELECT tenant, session FROM gone
"""
DROP_TENANTS = "DELETE FROM deltamem_tenants WHERE tenant = ANY(%s) AND sessions = 0"
IDLE = "SELECT tenant, session FROM deltamem_sessions WHERE updated_at <= %s ORDER BY updated_at LIMIT %s"
TENANTS = "SELECT tenant FROM deltamem_tenants WHERE tenant > %s ORDER BY tenant LIMIT %s"
GET = """
    SELECT h.version, h.incarnation, h.request_id, CASE WHEN octet_length(v.blob) <= %s THEN v.blob END
    FROM deltamem_sessions h LEFT JOIN deltamem_versions v USING (tenant, session, version)
    WHERE h.tenant = %s AND h.session = %s
"""
GET_VERSION = """
    SELECT version, incarnation, request_id, CASE WHEN octet_length(blob) <= %s THEN blob END
    FROM deltamem_versions WHERE tenant = %s AND session = %s AND version = %s
"""
# OFFSET 0 keeps the planner from joining by a merge, which reads the tenant's versions from the first one on.
LIST = """
    SELECT h.session, i.*
    FROM deltamem_sessions h JOIN LATERAL (
        SELECT v.version, v.incarnation, v.created_at, v.updated_at, v.tokens, v.windows, v.bytes
        FROM deltamem_versions v
        WHERE (v.tenant, v.session, v.version) = (h.tenant, h.session, h.version) OFFSET 0
    ) i ON true
    WHERE h.tenant = %s AND h.session >= %s AND h.session < %s ORDER BY h.session LIMIT %s
"""
HISTORY = """
    SELECT version, incarnation, created_at, updated_at, tokens, windows, bytes
    FROM deltamem_versions WHERE tenant = %s AND session = %s ORDER BY version DESC LIMIT %s
"""
SWEEP = """
    SELECT tenant, session, version, incarnation, request_id, blob FROM deltamem_versions
    WHERE (tenant, session, version) > (%s, %s, %s) ORDER BY tenant, session, version LIMIT %s
"""
RESEAL = """
    UPDATE deltamem_versions SET bytes = %s, blob = %s
    WHERE tenant = %s AND session = %s AND version = %s AND incarnation = %s AND request_id = %s
"""
ADD_BYTES = "UPDATE deltamem_tenants SET bytes = bytes + %s WHERE tenant = %s"

# Leases. Only the server's clock counts, and within a statement it stands still. Whoever locks several rows takes
# them in sorted order; who holds a tenant's row may wait for a lease's, never the other way round.
ACQUIRE = """
    INSERT INTO deltamem_leases AS l (tenant, session, holder, expires_at)
    SELECT k.tenant, k.session, %s, statement_timestamp() + make_interval(secs => %s)
    FROM unnest(%s::text[], %s::text[]) AS k (tenant, session), set_config('synchronous_commit', 'off', true)
    ORDER BY k.tenant COLLATE "C", k.session COLLATE "C"
    ON CONFLICT (tenant, session) DO UPDATE SET (holder, expires_at, wanted_at) = (
        SELECT CASE WHEN free THEN excluded.holder ELSE l.holder END,
               CASE WHEN free THEN excluded.expires_at ELSE l.expires_at END,
               CASE WHEN free THEN l.wanted_at ELSE statement_timestamp() END
        FROM (SELECT l.holder = excluded.holder OR l.expires_at <= statement_timestamp()) AS may (free))
    RETURNING tenant, session, holder,
              extract(epoch FROM expires_at - statement_timestamp())::double precision,
              coalesce(wanted_at > statement_timestamp() - make_interval(secs => %s), false)
"""
FENCE = """
    SELECT tenant, session, holder, extract(epoch FROM expires_at - statement_timestamp())::double precision
    FROM deltamem_leases
    WHERE (tenant, session) IN (SELECT * FROM unnest(%s::text[], %s::text[]))
    ORDER BY tenant, session FOR SHARE
"""
"""Locks the rows, so that no lease changes hands between this look and the COMMIT."""
RELEASE = """
    DELETE FROM deltamem_leases WHERE (tenant, session) IN (
        SELECT tenant, session FROM deltamem_leases
        WHERE (tenant, session) IN (SELECT * FROM unnest(%s::text[], %s::text[])) AND holder = %s
        ORDER BY tenant, session FOR UPDATE)
    AND holder = %s AND set_config('synchronous_commit', 'off', true) IS NOT NULL
"""
SWEEP_LEASES = """
    DELETE FROM deltamem_leases WHERE (tenant, session) IN (
        SELECT tenant, session FROM deltamem_leases WHERE expires_at < statement_timestamp() - interval '1 hour'
        FOR UPDATE SKIP LOCKED)
"""
"""What killed servers left behind."""
DROP_LEASES = """
    DELETE FROM deltamem_leases WHERE (tenant, session) IN (
        SELECT tenant, session FROM deltamem_leases
        WHERE (tenant, session) IN (SELECT * FROM unnest(%s::text[], %s::text[]))
        ORDER BY tenant, session FOR UPDATE)
"""
