"""Who a request is from: API key → tenant. A tenant's sessions are invisible to every other.

Keys come from one of three places:

* ``--deltamem-key-file``: tenants by name, each with the SHA-256 digests of its keys (several while one is being
  rotated) and its quotas. Read again when the file changes; every path but a few open ones needs a key.
* vLLM's own ``--api-key`` or ``VLLM_API_KEY``: each key is a tenant of its own, named after the key's digest.
* none: everybody is the tenant ``default``.
"""

import asyncio
import hashlib
import hmac
import json
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from deltamem_vllm.errors import ConfigError

logger = logging.getLogger("vllm.deltamem")

DEFAULT_TENANT = "default"
POLL_SECONDS = 1.0
OPEN_PATHS = ("/health", "/metrics", "/version", "/ping")
"""What vLLM leaves open to probes and scrapers, and so do we."""

TenantName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Digest = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]
Limit = Annotated[int, Field(ge=1, le=1 << 53)]


class TenantEntry(BaseModel):
    """A tenant in a key file.

    Attributes:
        keys: digests of its keys; none: the tenant is locked out, its sessions stay.
        max_sessions, max_bytes: what it may keep in the store; None: no limit of its own.
        commits_per_minute: requests that may write to its sessions; None: no limit.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    keys: list[Digest] = []
    max_sessions: Limit | None = None
    max_bytes: Limit | None = None
    commits_per_minute: Limit | None = None


class KeyFile(BaseModel):
    """A key file: ``{"tenants": {NAME: {"keys": ["sha256:…"], …}}}``."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    tenants: dict[TenantName, TenantEntry]

    @model_validator(mode="after")
    def _each_key_once(self) -> "KeyFile":
        seen: dict[str, str] = {}
        for name, entry in self.tenants.items():
            for key in entry.keys:
                if key in seen:
                    raise ValueError(f"key {key[:15]}… is listed twice, by {seen[key]!r} and by {name!r}")
                seen[key] = name
        return self


@dataclass(frozen=True)
class Tenant:
    """Whose request it is, and what its key file entry allows; see `TenantEntry`."""

    name: str
    max_sessions: int | None = None
    max_bytes: int | None = None
    commits_per_minute: int | None = None


EVERYBODY = Tenant(DEFAULT_TENANT)


class Tenants(Protocol):
    """Knows tenants by their keys.

    Attributes:
        guard_everything: a request without a key reaches nothing but the open paths. Where this is False, vLLM
            guards what it guards, and we the sessions.
    """

    guard_everything: bool

    def of(self, key: str | None) -> Tenant | None:
        """The tenant with this key (None: the request had none), or None for a stranger."""


def digest_of(key: str) -> str:
    """What a key file keeps of a key."""
    return "sha256:" + hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def bearer(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """The key of a request's one ``Authorization: Bearer KEY`` header."""
    given = [value for name, value in headers if name.lower() == b"authorization"]
    if len(given) != 1:
        return None
    scheme, _, key = given[0].decode("latin-1").partition(" ")
    return key if scheme.lower() == "bearer" and key else None


def is_open(path: str) -> bool:
    """Whether a path is served without a key whatever guards the rest."""
    return path in OPEN_PATHS or path.startswith("/metrics/")


class OneTenant:
    """No keys: everybody is ``default``."""

    guard_everything = False

    def of(self, key: str | None) -> Tenant | None:
        """See `Tenants`."""
        return EVERYBODY


class ServerKeys:
    """vLLM's own keys; each is a tenant, ``key-`` and 16 hex digits of the key's SHA-256.

    Another key is another tenant, so a key that is to be rotated belongs into a key file.

    Args:
        keys: as vLLM knows them.
    """

    guard_everything = False

    def __init__(self, keys: Sequence[str]) -> None:
        digests = [digest_of(key) for key in keys]
        self._tenants = [(d, Tenant(f"key-{d.removeprefix('sha256:')[:16]}")) for d in digests]

    def of(self, key: str | None) -> Tenant | None:
        """See `Tenants`."""
        return _find(self._tenants, key)


class FileKeys:
    """The keys of a file, read again when it has changed.

    A file that is broken or gone changes nothing: the keys known last stay, and the log says so.

    Args:
        path: the key file.
        clock: seconds.

    Raises:
        ConfigError: it cannot be read the first time.
    """

    guard_everything = True

    def __init__(self, path: str | Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.path, self._clock = Path(path), clock
        self._seen: Any = self._signature()
        self._tenants = _tenants_of(read_key_file(self.path))
        self._next = clock() + POLL_SECONDS
        self._trouble = ""

    def of(self, key: str | None) -> Tenant | None:
        """See `Tenants`."""
        if self._clock() >= self._next:
            self._poll()
        return _find(self._tenants, key)

    async def watch(self) -> None:
        """Look at the file until cancelled: a process that is asked nothing for a while must not miss a change."""
        while True:
            await asyncio.sleep(POLL_SECONDS)
            self._poll()

    def _poll(self) -> None:
        self._next = self._clock() + POLL_SECONDS
        found = self._signature()
        if found == self._seen:
            return
        self._seen = found
        try:
            tenants = _tenants_of(read_key_file(self.path))
        except ConfigError as e:
            if str(e) != self._trouble:
                logger.error("%s; the keys read before stay in force", e)
            self._trouble = str(e)
            return
        if tenants != self._tenants or self._trouble:
            logger.info("the key file was read again: %d key(s)", len(tenants))
        self._tenants, self._trouble = tenants, ""

    def _signature(self) -> Any:
        """Changes whenever the file does. One that is younger than its time stamps can tell is never the same twice."""
        try:
            stat = self.path.stat()
        except OSError as e:
            return e.errno
        young = time.time() - stat.st_mtime < POLL_SECONDS
        return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, time.time_ns() if young else 0


def read_key_file(path: Path) -> KeyFile:
    """A key file, strictly.

    Raises:
        ConfigError: it cannot be read, anybody may write to it, or it has another form; never shows its content.
    """
    try:
        mode, text = path.stat().st_mode, path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ConfigError(f"key file {path} cannot be read: {why}") from None
    if mode & 0o002:
        raise ConfigError(f"key file {path} can be written by anyone: chmod 600 it, and check its keys")
    try:
        return KeyFile.model_validate(json.loads(text, object_pairs_hook=_no_twins))
    except ValidationError as error:
        first = error.errors(include_input=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise ConfigError(f"key file {path}: {where}: {first['msg']}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"key file {path} is not the JSON of a key file: {error}") from None


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON lets a name come twice and the last one win: a tenant would silently lose its keys."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name comes twice in one object")
    return found


def _tenants_of(file: KeyFile) -> list[tuple[str, Tenant]]:
    return [
        (key, Tenant(name, entry.max_sessions, entry.max_bytes, entry.commits_per_minute))
        for name, entry in file.tenants.items()
        for key in entry.keys
    ]


def _find(tenants: Sequence[tuple[str, Tenant]], key: str | None) -> Tenant | None:
    """Compares with every digest in constant time, so that neither a hit nor its place shows in the time it takes."""
    given = digest_of(key or "")
    found: Tenant | None = None
    for digest, tenant in tenants:
        if hmac.compare_digest(digest, given):
            found = tenant
    return found if key else None
