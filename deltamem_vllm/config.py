"""Frozen settings. The only module that reads ``DELTAMEM_*`` from the environment.

A setting comes from the command line (or vLLM's ``--config`` YAML), else from ``DELTAMEM_<NAME>``, else from its
default. Settings travel inside vLLM's own configuration, in the connector's extra config, so that every process of
the server (API, engine core, workers) sees the same values.
"""

import logging
import os
import re
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError, field_validator

from deltamem_vllm import folders
from deltamem_vllm.errors import ConfigError
from deltamem_vllm.names import MIN_SECRET_BYTES
from deltamem_vllm.policy import parse_policy
from deltamem_vllm.sessions.facts import PLACE
from deltamem_vllm.store.url import default_url

logger = logging.getLogger("vllm.deltamem")

PLUGIN = "deltamem"
CONNECTOR = "DeltaMemConnector"
CONNECTOR_MODULE = "deltamem_vllm.sessions.connector"

_SECRET = "secret"
_HEADER = re.compile(r"[A-Za-z][A-Za-z0-9-]{0,63}")


class Settings(BaseModel):
    """What the operator decided. Frozen; one instance per server.

    Attributes:
        adapter: folder with ``delta_mem_config.json`` and the weights.
        store: where sessions persist, as a URL (``sqlite:////abs/path.db``, ``memory://``).
        session_slots: states kept in the session pool on the device.
        session_header: HTTP header that names the session.
        queue_depth: requests that may wait for one session before further ones get 409.
        queue_seconds: how long one may wait for its session before it gets 409.
        durability: ``sync`` ends an answer after its commit is durable, ``write-behind`` before that.
        write_behind_seconds: while a version has waited for the store for this long, answers wait as with ``sync``.
        write_behind_versions: versions that may wait so, per engine; beyond it answers wait as with ``sync``.
        host_bytes: host memory for sessions and their records, per engine; a number or ``256MiB``.
        ttl: seconds since its last commit after which a session is deleted; 0: never.
        write: roles whose messages are written, separated by commas, or ``all``, or ``none``.
        history: what is done with a history that a client resends: ``full`` or ``elide``.
        history_keep: with ``elide``, how many of the messages that the memory holds are sent along as context.
        facts_chars: characters of pinned facts that a prompt is offered; beyond it those that match the question best.
        facts_block: text that offers them, with ``{facts}`` in it; empty: the built-in one.
        audit: file that changes of sessions are logged to; empty: none.
        audit_required: refuse changes while it cannot be written.
        kernel: ``auto`` takes the compiled operators where they load, on a GPU else Triton's; ``torch`` forces the slow
            fallback.
        key_file: tenants and the digests of their keys (`deltamem_vllm.server.tenants`); empty: none.
        ui: serve the page of `deltamem_vllm.server.page`.
        open: serve sessions without any key to whoever can reach the server.
        secret_file: file whose bytes key the names that sessions have in the engine, in KV events and in logs; empty:
            a fresh random secret with each start.
        control: private folder of the secret, and of the sockets over which API servers talk to the engines; made at
            start.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    adapter: str
    store: str
    session_slots: int = Field(default=1024, ge=1, le=1 << 20)
    session_header: str = "X-Session-ID"
    queue_depth: int = Field(default=8, ge=0, le=10_000)
    queue_seconds: float = Field(default=30.0, gt=0, le=3600)
    durability: Literal["sync", "write-behind"] = "sync"
    write_behind_seconds: float = Field(default=1.0, gt=0, le=3600)
    write_behind_versions: int = Field(default=1024, ge=1, le=1 << 20)
    host_bytes: ByteSize = Field(default=ByteSize(256 << 20), ge=1 << 20)
    ttl: float = Field(default=0.0, ge=0, le=1e10)
    write: str = "system,user,assistant"
    history: Literal["full", "elide"] = "full"
    history_keep: int = Field(default=2, ge=0, le=1000)
    facts_chars: int = Field(default=8000, ge=0, le=400_000)
    facts_block: str = ""
    audit: str = ""
    audit_required: bool = False
    kernel: Literal["auto", "native", "triton", "torch"] = "auto"
    ui: bool = False
    key_file: str = ""
    open: bool = False
    secret_file: str = ""
    control: str = ""

    @property
    def write_behind(self) -> tuple[float, int] | None:
        """(seconds, versions) that clients may be told ahead of the store; None: not at all."""
        return (self.write_behind_seconds, self.write_behind_versions) if self.durability == "write-behind" else None

    @field_validator("ttl")
    @classmethod
    def _ttl(cls, value: float) -> float:
        if 0 < value < 1:
            raise ValueError("a session must live for 1 second at least (0: no limit)")
        return value

    @field_validator("session_header")
    @classmethod
    def _header_name(cls, value: str) -> str:
        if not _HEADER.fullmatch(value):
            raise ValueError(f"{value!r} is no HTTP header name (letters, digits and '-', at most 64)")
        return value

    @field_validator("facts_block")
    @classmethod
    def _facts_block(cls, value: str) -> str:
        if value and value.count(PLACE) != 1:
            raise ValueError(f"the text must have {PLACE} in it once")
        return value

    @field_validator("write")
    @classmethod
    def _write_policy(cls, value: str) -> str:
        parse_policy(value)
        return value

    def with_control(self) -> "Settings":
        """The same settings with a fresh, private folder for the control sockets and the secret.

        Raises:
            ConfigError: the secret file cannot be read, or is too short.
        """
        secret = _read_secret(self.secret_file) if self.secret_file else secrets.token_bytes(MIN_SECRET_BYTES)
        folder = folders.make()
        # Settings travel in arguments, which vLLM logs, so the secret itself travels in a file.
        with os.fdopen(os.open(Path(folder) / _SECRET, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secret)
        return self.model_copy(update={"control": folder})

    def secret(self) -> bytes:
        """The server's secret, the same in all of its processes."""
        return (Path(self.control) / _SECRET).read_bytes()

    def control_address(self, data_parallel_rank: int) -> str:
        """ZeroMQ address of one engine's control socket."""
        return f"ipc://{self.control}/engine-{data_parallel_rank}"


def _read_secret(path: str) -> bytes:
    try:
        mode, secret = Path(path).stat().st_mode, Path(path).read_bytes()
    except OSError as e:
        raise ConfigError(f"--deltamem-secret-file {path} cannot be read: {e.strerror}") from None
    if mode & stat.S_IWOTH:
        raise ConfigError(f"--deltamem-secret-file {path} can be written by anyone: chmod 600 it, and make a new one")
    if mode & stat.S_IROTH:
        logger.warning("--deltamem-secret-file %s can be read by anyone on this machine: chmod 600 it", path)
    if len(secret) < MIN_SECRET_BYTES:
        raise ConfigError(
            f"--deltamem-secret-file {path} has {len(secret)} bytes; it needs {MIN_SECRET_BYTES} random ones or more: "
            f"head -c {MIN_SECRET_BYTES} /dev/urandom > {path}"
        )
    return secret


def resolve(given: Mapping[str, Any]) -> Settings:
    """Build settings from what the command line gave (``None`` means: not given) and the environment.

    Raises:
        ConfigError: a value is missing or wrong; names the flag, the value and the remedy.
    """
    values: dict[str, Any] = {}
    for name in Settings.model_fields:
        if name == "control":  # made at start, nobody's to choose
            continue
        value = given.get(name)
        if value is None:
            value = os.environ.get(f"DELTAMEM_{name.upper()}")
        if value is not None:
            values[name] = value
    if not values.get("adapter"):
        raise ConfigError(
            "no adapter: pass --deltamem-adapter DIR (or set DELTAMEM_ADAPTER), a folder with delta_mem_config.json "
            "and the weights"
        )
    values["adapter"] = str(Path(values["adapter"]).expanduser().absolute())
    for name in ("key_file", "secret_file"):
        if values.get(name):
            values[name] = str(Path(values[name]).expanduser().absolute())
    values.setdefault("store", default_url())
    if values.get("audit"):
        values["audit"] = str(Path(values["audit"]).expanduser().absolute())
    try:
        return Settings(**values)
    except ValidationError as e:
        first = e.errors()[0]
        flag = "--deltamem-" + str(first["loc"][0]).replace("_", "-")
        raise ConfigError(f"{flag}: {first['msg']} (given: {first['input']!r})") from None


def settings_of(carrier: Any) -> Settings | None:
    """The settings that travel in a ``VllmConfig`` (or parsed arguments), or None where δ-mem is not switched on."""
    transfer = getattr(carrier, "kv_transfer_config", None)
    if transfer is None:
        return None
    extra = transfer.kv_connector_extra_config or {}
    candidates = [(transfer.kv_connector, extra)]
    for part in extra.get("connectors", ()):  # MultiConnector: ours beside the user's own
        candidates.append((part.get("kv_connector"), part.get("kv_connector_extra_config") or {}))
    for name, options in candidates:
        if name == CONNECTOR:
            return Settings(**options[PLUGIN])
    return None
