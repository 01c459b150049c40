"""`deltamem store …`: look at a store, repair it, move it, without a server or beside one.

Beside a running server all of them are safe: every change is a compare-and-set or a deletion, a server asks for newer
versions before each request, and a request that runs on what was changed meanwhile ends in a conflict.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from deltamem_vllm.errors import DeltaMemError, VersionNotKept
from deltamem_vllm.store.inspection import check_session, check_usage, sessions_of, tenants_of
from deltamem_vllm.store.protocol import Expect, Listing, SessionInfo, SessionKey, StateStore
from deltamem_vllm.store.url import default_url, open_store, sqlite_path

app = typer.Typer(
    no_args_is_help=True, help="Look at a store of sessions, and change it. Safe beside a running server."
)

_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*([smhd]?)", re.ASCII)
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}

Url = Annotated[
    str,
    typer.Option(
        "--store",
        metavar="URL",
        envvar="DELTAMEM_STORE",
        help="The store, as for the server. Default: SQLite in the user's data directory.",
        show_envvar=True,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output, one object per line.")]
Tenant = Annotated[str, typer.Argument(metavar="TENANT", help="Whose session; 'default' where there is but one.")]
Session = Annotated[str, typer.Argument(metavar="SESSION", help="The session's id.")]


@contextlib.contextmanager
def _opened(url: str) -> Iterator[StateStore]:
    """The store; what goes wrong becomes one line and exit code 2, so that 1 can mean: damage found."""
    store: StateStore | None = None
    try:
        url = url or default_url()
        path = sqlite_path(url)
        if path is not None and str(path) and not path.is_file():  # opening it would make an empty one
            raise VersionNotKept(f"there is no store at {path}: check --store or DELTAMEM_STORE")
        store = open_store(url)
        yield store
    except (DeltaMemError, ValueError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    finally:
        if store is not None:
            store.close()


def _say(as_json: bool, words: str, **fields: Any) -> None:
    typer.echo(json.dumps(fields) if as_json else words)


@app.command()
def check(store: Url = "", as_json: Json = False) -> None:
    """Read and verify every kept version of every session. Exit code 1 if anything is damaged.

    A count that a running server changes meanwhile is counted again before it is called wrong.
    """
    with _opened(store) as opened:
        sessions = versions = 0
        damages: list[str] = []
        for tenant in tenants_of(opened):
            for info in sessions_of(opened, tenant):
                found, damaged = check_session(opened, info.key)
                sessions, versions, damages = sessions + 1, versions + found, damages + damaged
            damages += check_usage(opened, tenant)
        for damage in damages:
            _say(as_json, f"damaged: {damage}", damaged=damage)
        words = f"{sessions} sessions, {versions} versions: {len(damages) or 'nothing'} damaged"
        _say(as_json, words, sessions=sessions, versions=versions, damages=len(damages))
        if damages:
            raise typer.Exit(1)


@app.command("list")
def list_sessions(
    store: Url = "",
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's.")] = None,
    after: Annotated[str | None, typer.Option(metavar="SESSION", help="Begin behind this id; needs --tenant.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many at most.")] = 100,
    as_json: Json = False,
) -> None:
    """List sessions in the order of tenants and ids."""
    with _opened(store) as opened:
        if after is not None and tenant is None:
            raise ValueError("--after needs --tenant: it names the last session of the page before")
        for name in [tenant] if tenant is not None else tenants_of(opened):
            for info in sessions_of(opened, name, after):
                if limit == 0:
                    return
                limit -= 1
                _show(info, as_json)


@app.command()
def usage(store: Url = "", as_json: Json = False) -> None:
    """Say what each tenant has stored."""
    with _opened(store) as opened:
        for tenant in tenants_of(opened):
            used = opened.usage(tenant)
            words = f"{tenant:<32} {used.sessions:>10,} sessions {used.bytes:>16,} bytes"
            _say(as_json, words, tenant=tenant, sessions=used.sessions, bytes=used.bytes)


@app.command()
def expire(
    older_than: Annotated[
        str, typer.Option("--older-than", metavar="TIME", help="Seconds, or as 90m, 12h, 30d: since the last commit.")
    ],
    store: Url = "",
    as_json: Json = False,
) -> None:
    """Delete the sessions that nobody has written for some time. Also those a running server is about to write:
    such a request ends in a conflict. The server's own --deltamem-ttl spares what it uses."""
    with _opened(store) as opened:
        seconds, now, done = _seconds(older_than), time.time(), 0
        while found := opened.expire(now, seconds):
            done += found
        _say(as_json, f"{done} sessions deleted", deleted=done)


@app.command()
def reencrypt(store: Url = "", as_json: Json = False) -> None:
    """Store everything again that is not encrypted with the newest key (the first in the key file). Restart every
    server with that key file before."""
    with _opened(store) as opened:
        done = opened.reencrypt()
        _say(as_json, f"{done} versions encrypted with the newest key", reencrypted=done)


@app.command()
def rollback(
    tenant: Tenant,
    session: Session,
    version: Annotated[int, typer.Argument(metavar="VERSION", help="One of the kept ones.")],
    store: Url = "",
    as_json: Json = False,
) -> None:
    """Commit a kept version again, as the newest one."""
    with _opened(store) as opened:
        key = SessionKey(tenant, session)
        newest: Listing = opened.history(key, 1)
        if not newest:
            raise VersionNotKept(f"tenant {tenant!r} has no session {session!r}; see: deltamem store list")
        made = opened.rollback(
            key, version, Expect(newest[0].version, newest[0].incarnation), f"cli-{secrets.token_hex(8)}"
        )
        words = f"session {session!r} is at version {made.version}, with the memory of version {version}"
        _say(as_json, words, tenant=tenant, session=session, version=made.version, content_of=version)


@app.command()
def delete(tenant: Tenant, session: Session, store: Url = "", as_json: Json = False) -> None:
    """Erase a session with all its versions."""
    with _opened(store) as opened:
        if not opened.delete(SessionKey(tenant, session)):
            raise VersionNotKept(f"tenant {tenant!r} has no session {session!r}; see: deltamem store list")
        _say(as_json, f"session {session!r} is deleted", tenant=tenant, session=session, deleted=True)


@app.command()
def backup(
    target: Annotated[Path, typer.Argument(metavar="FILE", help="A new file.")], store: Url = "", as_json: Json = False
) -> None:
    """Copy a SQLite store as of one moment into a new file, beside running commits. For PostgreSQL use pg_dump."""
    from deltamem_vllm.store.sqlite import SQLiteStore

    with _opened(store) as opened:
        if not isinstance(opened, SQLiteStore):
            raise ValueError("backup copies SQLite stores: use pg_dump for PostgreSQL, BGSAVE for Redis")
        opened.backup(target)
        size = target.stat().st_size
        _say(as_json, f"{target}: {size:,} bytes", file=str(target), bytes=size)


def _show(info: SessionInfo, as_json: bool) -> None:
    fields = {name: getattr(info, name) for name in SessionInfo.__slots__ if name != "key"}
    updated = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(info.updated_at))
    words = f"{info.key.tenant:<16} {info.key.session:<40} v{info.version:<7} {updated} {info.bytes:>10,} bytes"
    _say(as_json, words, tenant=info.key.tenant, session=info.key.session, **fields)


def _seconds(text: str) -> float:
    found = _DURATION.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"--older-than {text!r}: give seconds, or a number with s, m, h or d, such as 30d")
    return float(found[1]) * _UNITS[found[2]]
