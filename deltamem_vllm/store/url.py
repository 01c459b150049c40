"""Which store a URL names, in SQLAlchemy's style, with options after ``?``.

    sqlite:////abs/path.db             four slashes: an absolute path
    sqlite:///path.db                  three slashes: relative to the working directory
    memory://                          in this process, not durable
    postgresql://user@host:5432/db     shared by replicas; needs deltamem-vllm[postgres]
    redis://host:6379/0                and rediss:// (TLS), valkey://; needs deltamem-vllm[redis]

Options follow ``?`` and are joined by ``&``; `OPTIONS` says which there are:

    postgresql://me@db/deltamem?sslmode=verify-full&keep=8&max_sessions=10000&key_file=/run/secrets/deltamem

Passwords and keys do not belong on a command line: PostgreSQL's comes by PGPASSWORD or a pgpass file, Redis' by the
``DELTAMEM_STORE`` variable that holds the whole URL, keys by ``key_file`` or ``key_env``.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

from deltamem_vllm.errors import ConfigError
from deltamem_vllm.store.codec import PLAIN, RecordCodec
from deltamem_vllm.store.memory import MemoryStore
from deltamem_vllm.store.protocol import Quota, StateStore
from deltamem_vllm.store.sqlite import SQLiteStore

_FORMS = "sqlite:////absolute/path.db, sqlite:///relative/path.db, memory://, postgresql://…, redis://…"
OPTIONS: dict[tuple[str, ...], dict[str, str]] = {
    ("every store",): {
        "keep": "Versions kept of each session, for rollback.",
        "max_sessions": "Quota of sessions per tenant.",
        "max_bytes": "Quota of bytes per tenant, over all kept versions.",
        "key_file": "Encrypt: a file with lines `id base64-of-32-bytes`; the first one writes, all of them read.",
        "key_env": "Encrypt: the same from the environment variable of that name.",
        "accept_plain": "1: with a key, read unencrypted records too, until `deltamem store reencrypt` has run.",
    },
    ("PostgreSQL", "Redis"): {
        "retry": "Seconds that a broken connection is tried again.",
        "lease": "Seconds that a server may write a session without saying again that it does; 0: no leases.",
    },
    ("PostgreSQL",): {"statement_timeout": "Seconds per statement, waiting for locks included."},
    ("Redis",): {
        "timeout": "Seconds per command.",
        "durability": "bounded: accept a server that may lose acknowledged commits.",
        "namespace": "Prefix of the keys.",
    },
}
"""Options by the stores that have them. Any other of PostgreSQL's goes to libpq (``sslmode=verify-full``), of Redis' to
redis-py (``ssl_ca_certs=PATH``)."""

_COMMON = tuple(OPTIONS["every store",])
_POSTGRES = {"statement_timeout": "statement_seconds", "retry": "retry_seconds", "lease": "lease_seconds"}
_REDIS = {"timeout": "timeout_seconds", "retry": "retry_seconds", "lease": "lease_seconds"}


def default_url() -> str:
    """SQLite in the user's data directory: ``$XDG_DATA_HOME`` or ``~/.local/share``, then
    ``deltamem/sessions.db``."""
    configured = os.environ.get("XDG_DATA_HOME", "")
    data = Path(configured) if Path(configured).is_absolute() else Path.home() / ".local" / "share"
    return f"sqlite:///{data / 'deltamem' / 'sessions.db'}"


def sqlite_path(url: str) -> Path | None:
    """The file that a URL of SQLite's names; None for other stores."""
    scheme, _, rest = url.partition("://")
    return Path(rest.partition("?")[0][1:]) if scheme.lower() == "sqlite" else None


def open_store(url: str) -> StateStore:
    """Open the store that a URL names.

    Raises:
        ConfigError: the URL is not understood, its client library is not installed, or the server's settings are
            refused.
        StoreUnavailable: the store cannot be opened; the message names it and the remedy.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        raise ConfigError(f"store {_shown(url)!r} is not a URL; use one of {_FORMS}")
    place, _, query = rest.partition("?")
    try:
        options = dict(parse_qsl(query.replace("+", "%2B"), keep_blank_values=True, strict_parsing=bool(query)))
    except ValueError:
        raise ConfigError(f"store {_shown(url)!r}: what follows '?' is not of the form name=value&name=value") from None
    common = _common({name: options.pop(name) for name in _COMMON if name in options})
    match scheme.lower():
        case "sqlite":
            if options:
                raise ConfigError(
                    f"store {url!r}: SQLite has no option {', '.join(options)}; it has {', '.join(_COMMON)}"
                )
            if not place.startswith("/") or not place[1:] or place.endswith("/"):
                raise ConfigError(f"store {url!r} names no file; use sqlite:////absolute/path.db")
            return SQLiteStore(place[1:], **common)
        case "memory":
            if place.strip("/") or options:
                raise ConfigError(f"store {url!r}: memory:// takes no path, and no option but {', '.join(_COMMON)}")
            return MemoryStore(**common)
        case "postgresql" | "postgres":
            return _open_postgres(place, options, common)
        case "redis" | "rediss" | "valkey" | "valkeys":
            return _open_redis(scheme.lower().replace("valkey", "redis"), place, options, common)
        case _:
            raise ConfigError(f"store {_shown(url)!r} has an unknown scheme; use one of {_FORMS}")


def _open_postgres(place: str, options: dict[str, str], common: dict[str, Any]) -> StateStore:
    try:
        from deltamem_vllm.store.postgres import PostgresStore
    except ImportError as error:
        raise _missing("postgresql", "postgres", error) from None
    seconds = {ours: _seconds(name, options.pop(name)) for name, ours in _POSTGRES.items() if name in options}
    given: Any = {**seconds, **common}
    return PostgresStore(f"postgresql://{place}{_query(options)}", **given)


def _open_redis(scheme: str, place: str, options: dict[str, str], common: dict[str, Any]) -> StateStore:
    try:
        from deltamem_vllm.store.redis import RedisStore
    except ImportError as error:
        raise _missing("redis", "redis", error) from None
    seconds = {ours: _seconds(name, options.pop(name)) for name, ours in _REDIS.items() if name in options}
    durability, namespace = options.pop("durability", "fsync"), options.pop("namespace", "deltamem")
    if durability not in ("fsync", "bounded") or not namespace:
        raise ConfigError(
            "redis:// has durability=fsync (the default) or durability=bounded, and a namespace that is not empty"
        )
    given: Any = {"durability": durability, "namespace": namespace, **seconds, **common}
    return RedisStore(f"{scheme}://{place}{_query(options)}", **given)


def _common(options: Mapping[str, str]) -> dict[str, Any]:
    """The constructor arguments that all stores share."""
    quota = [_number(name, options[name]) if name in options else None for name in ("max_sessions", "max_bytes")]
    made: dict[str, Any] = {"quota": Quota(*quota), "codec": _codec(options)}
    if "keep" in options:
        made["keep"] = _number("keep", options["keep"], 1000)
    return made


def _codec(options: Mapping[str, str]) -> RecordCodec:
    """Encryption, if a key is named."""
    accept = options.get("accept_plain", "0")
    if accept not in ("0", "1"):
        raise ConfigError(f"store option accept_plain={accept!r}: use 1 or 0")
    named = [name for name in ("key_file", "key_env") if name in options]
    if len(named) > 1:
        raise ConfigError("store options key_file and key_env: give one of them")
    if not named:
        if accept == "1":
            raise ConfigError("store option accept_plain=1 means nothing without key_file or key_env")
        return PLAIN
    try:
        from deltamem_vllm.store.crypto import KeyRing, SealedCodec
    except ImportError as error:
        raise ConfigError(
            f"encryption needs the cryptography package ({error}): pip install 'deltamem-vllm[encryption]'"
        ) from None
    ring = KeyRing.from_file(options["key_file"]) if named == ["key_file"] else KeyRing.from_env(options["key_env"])
    return SealedCodec(ring, accept_plain=accept == "1")


def _number(name: str, text: str, most: int = 2**62) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= most:
        raise ConfigError(f"store option {name}={text[:32]!r}: it must be a whole number from 1 to {most}")
    return int(text)


def _seconds(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if name == "lease":  # a shorter one would end whenever a server is slow
        if value != 0 and not 1 <= value <= 3600:
            raise ConfigError(f"store option lease={text[:32]!r}: it must be seconds from 1 to 3600, or 0 for none")
    elif not 0.01 <= value <= 3600:
        raise ConfigError(f"store option {name}={text[:32]!r}: it must be seconds from 0.01 to 3600")
    return value


def _query(options: Mapping[str, str]) -> str:
    return f"?{urlencode(options, quote_via=quote)}" if options else ""


def _missing(scheme: str, extra: str, error: ImportError) -> ConfigError:
    return ConfigError(f"{scheme}:// needs a client library ({error}): pip install 'deltamem-vllm[{extra}]'")


def _shown(url: str) -> str:
    """A URL without what may be a password."""
    try:
        parts = urlsplit(url)
        return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="").geturl()
    except ValueError:
        return url.partition("://")[0] + "://…"
