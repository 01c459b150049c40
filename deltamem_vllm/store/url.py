"""Which store a URL names, in SQLAlchemy's style.

sqlite:////abs/path.db     four slashes: an absolute path
sqlite:///path.db          three slashes: relative to the working directory
memory://                  in this process, not durable
postgresql://…, redis://…  not served yet
"""

import os
from pathlib import Path
from urllib.parse import urlsplit

from deltamem_vllm.errors import ConfigError
from deltamem_vllm.store.memory import MemoryStore
from deltamem_vllm.store.protocol import StateStore
from deltamem_vllm.store.sqlite import SQLiteStore

_FORMS = "sqlite:////absolute/path.db, sqlite:///relative/path.db, memory://"


def default_url() -> str:
    """SQLite in the user's data directory: ``$XDG_DATA_HOME`` or ``~/.local/share``, then
    ``deltamem/sessions.db``."""
    configured = os.environ.get("XDG_DATA_HOME", "")
    data = Path(configured) if Path(configured).is_absolute() else Path.home() / ".local" / "share"
    return f"sqlite:///{data / 'deltamem' / 'sessions.db'}"


def open_store(url: str) -> StateStore:
    """Open the store that a URL names.

    Raises:
        ConfigError: the URL is not understood, or its scheme is not served.
        StoreUnavailable: the store cannot be opened; the message names the path and the remedy.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        raise ConfigError(f"store {_shown(url)!r} is not a URL; use one of {_FORMS}")
    match scheme.lower():
        case "sqlite":
            if "?" in rest:
                raise ConfigError(f"store {url!r} has options after '?'; SQLite's URL takes only a path")
            if not rest.startswith("/") or not rest[1:] or rest.endswith("/"):
                raise ConfigError(f"store {url!r} names no file; use sqlite:////absolute/path.db")
            return SQLiteStore(rest[1:])
        case "memory":
            if rest.strip("/"):
                raise ConfigError(f"store {url!r}: memory:// takes no path")
            return MemoryStore()
        case "postgresql" | "postgres" | "redis" | "rediss" | "valkey":
            raise ConfigError(f"store {scheme}:// is not served yet; use one of {_FORMS}")
        case _:
            raise ConfigError(f"store {_shown(url)!r} has an unknown scheme; use one of {_FORMS}")


def _shown(url: str) -> str:
    """A URL without what may be a password."""
    try:
        parts = urlsplit(url)
        return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    except ValueError:
        return url.partition("://")[0] + "://…"
