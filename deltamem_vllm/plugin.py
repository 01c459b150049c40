"""vLLM's entry into the package, and the command-line flags.

`register` runs in every vLLM process of an environment where the package is installed. It must change nothing until
somebody asks for ``--plugin deltamem``: it declares flags and hooks that look for the settings and find none.
"""

import os
from argparse import Namespace
from dataclasses import asdict, is_dataclass
from importlib.metadata import entry_points
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from deltamem_vllm import compat
from deltamem_vllm.config import CONNECTOR, CONNECTOR_MODULE, PLUGIN, Settings, resolve
from deltamem_vllm.errors import ConfigError
from deltamem_vllm.server.tenants import read_key_file
from deltamem_vllm.sessions.grants import EXTRA
from deltamem_vllm.sessions.masks import hash_blocks

_GROUPS = (
    "vllm.general_plugins",
    "vllm.io_processor_plugins",
    "vllm.platform_plugins",
    "vllm.stat_logger_plugins",
    "vllm.endpoint_plugins",
)

SHUTDOWN_SECONDS = 15
"""vLLM's --shutdown-timeout with write-behind. Its default of 0 kills the engine at SIGTERM, versions that wait for the
store and all."""

_FLAGS: dict[str, dict[str, Any]] = {
    "adapter": {"metavar": "DIR", "help": "Adapter folder: delta_mem_config.json and the weights. Required."},
    "store": {
        "metavar": "URL",
        "help": "Where sessions persist: sqlite:////absolute/path.db, sqlite:///relative/path.db, postgresql://…, "
        "redis://… or memory:// (lost with the process). Default: SQLite in the user's data directory.",
    },
    "session-slots": {
        "type": int,
        "metavar": "N",
        "help": "Session states kept in device memory; fewer only cost copies (default 1024).",
    },
    "session-header": {"metavar": "NAME", "help": "HTTP header that names the session (default X-Session-ID)."},
    "queue-depth": {
        "type": int,
        "metavar": "N",
        "help": "Requests that may wait for one session; further ones get 409 (default 8).",
    },
    "queue-seconds": {
        "type": float,
        "metavar": "S",
        "help": "How long a request may wait for its session before it gets 409 (default 30).",
    },
    "durability": {
        "choices": ["sync", "write-behind"],
        "help": "When an answer ends: after its commit is durable, or before (default sync).",
    },
    "write-behind-seconds": {
        "type": float,
        "metavar": "S",
        "help": "write-behind: how old a version may get before answers wait for the store again (default 1).",
    },
    "write-behind-versions": {
        "type": int,
        "metavar": "N",
        "help": "write-behind: versions that may wait for the store, per engine, before answers wait too "
        "(default 1024).",
    },
    "host-bytes": {
        "metavar": "SIZE",
        "help": "Host memory for sessions and their records, per engine: bytes, or as 256MiB (the default). What is "
        "beyond it is read from the store when used.",
    },
    "ttl": {
        "type": float,
        "metavar": "SECONDS",
        "help": "Delete sessions that were not written for so long; 0: never (default 0).",
    },
    "write": {
        "metavar": "ROLES",
        "help": "Roles whose messages are written to the memory: all, none, or some of system, user, assistant and "
        "tool, separated by commas (default system,user,assistant: what a tool says is read, not remembered).",
    },
    "history": {
        "choices": ["full", "elide"],
        "help": "elide leaves out of a resent history what the session's memory holds already (default full).",
    },
    "history-keep": {
        "type": int,
        "metavar": "N",
        "help": "elide: how many of those messages to send along as context (default 2).",
    },
    "facts-chars": {
        "type": int,
        "metavar": "N",
        "help": "Characters of a session's pinned facts that a prompt is offered; beyond it those that match the "
        "question best (default 8000).",
    },
    "facts-block": {
        "metavar": "TEXT",
        "help": "Text that offers pinned facts to the model, with {facts} where they go (default: a built-in one).",
    },
    "audit": {"metavar": "FILE", "help": "Log changes of sessions to this hash-chained file (default: none)."},
    "audit-required": {
        "action": "store_true",
        "help": "Refuse changes with 503 while the audit log cannot be written.",
    },
    "ui": {
        "action": "store_true",
        "help": "Serve a page to look at sessions with, at /v1/sessions/ui; no session can be called ui then.",
    },
    "key-file": {
        "metavar": "PATH",
        "help": "Tenants, the digests of their API keys and their quotas (see deltamem keys --help); read again when "
        "it changes. Every request then needs a key. Not together with --api-key.",
    },
    "open": {
        "action": "store_true",
        "help": "Serve sessions without any API key to whoever can reach the server. Without it a server without keys "
        "starts only on a loopback --host or a Unix socket.",
    },
    "secret-file": {
        "metavar": "PATH",
        "help": "At least 32 random bytes that key the names of sessions in the engine, KV events and logs "
        "(default: fresh ones with each start).",
    },
    "kernel": {
        "choices": ["auto", "native", "triton", "torch"],
        "help": "Delta-rule operators: auto takes the compiled ones, on a GPU else Triton's (default auto).",
    },
}


def register() -> None:
    """Entry point ``vllm.general_plugins``; safe to call any number of times."""
    compat.on_cli_args(_add_flags)
    compat.on_engine_config(_check_config)
    compat.on_model_built(_attach)
    compat.register_connector(CONNECTOR, CONNECTOR_MODULE)
    compat.split_graph_at("deltamem::scan")
    compat.hash_blocks_with(unwritten_of, hash_blocks)
    compat.skip_layer_transfers()


def unwritten_of(request: Any) -> Any:
    """The spans of a scheduler's request that are not written."""
    params = request.sampling_params
    ours = params.extra_args.get(EXTRA) if params is not None and params.extra_args else None
    return ours.get("unwritten") if isinstance(ours, dict) else None


def _check_config(vllm_config: Any) -> None:
    from deltamem_vllm.memory.preflight import check

    check(vllm_config)


def _attach(model: Any, vllm_config: Any) -> None:
    from deltamem_vllm.config import settings_of

    if settings_of(vllm_config) is not None:
        from deltamem_vllm.memory.attach import attach_memory

        attach_memory(model, vllm_config)


def _add_flags(parser: Any) -> None:
    known = parser._option_string_actions
    if "--plugin" not in known:  # should vLLM grow its own --plugin, that one is used
        group = parser.add_argument_group("Plugins", "Out-of-tree vLLM plugins")
        group.add_argument(
            "--plugin",
            action="append",
            default=None,
            metavar="NAME",
            help="Activate an installed vLLM plugin by name. May be repeated.",
        )
    if "--deltamem-adapter" in known:
        return
    group = parser.add_argument_group("DeltaMem", "Options of --plugin deltamem; each also as DELTAMEM_<NAME>")
    for name, options in _FLAGS.items():
        group.add_argument(f"--deltamem-{name}", default=None, **options)
    parse = parser.parse_known_args

    def parse_known_args(args: Any = None, namespace: Any = None, **kwargs: Any) -> Any:
        parsed, rest = parse(args, namespace, **kwargs)
        try:
            _finalize(parsed)
        except ConfigError as e:
            parser.error(str(e))
        return parsed, rest

    parser.parse_known_args = parse_known_args  # this parser only


def _finalize(parsed: Namespace) -> None:
    """Turn the parsed flags into vLLM's own configuration."""
    names = [n for value in (getattr(parsed, "plugin", None) or []) for n in str(value).split(",") if n]
    given = {flag.replace("-", "_"): getattr(parsed, f"deltamem_{flag.replace('-', '_')}", None) for flag in _FLAGS}
    if PLUGIN not in names:
        used = [f"--deltamem-{n.replace('_', '-')}" for n, v in given.items() if v is not None]
        if used:
            raise ConfigError(f"{', '.join(used)} without --plugin deltamem: add --plugin deltamem")
    if not names:
        return
    allow_plugins(names)
    if PLUGIN not in names:
        return
    if getattr(parsed, "grpc", False):
        raise ConfigError("--grpc bypasses the HTTP layer that sessions need: leave it out with --plugin deltamem")
    if os.environ.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0", "false", "False"):
        raise ConfigError(
            "VLLM_USE_RUST_FRONTEND bypasses the Python HTTP layer that sessions need: unset it with --plugin deltamem"
        )
    settings = resolve(given)
    check_exposure(parsed, settings)
    settings = settings.with_control()
    if settings.write_behind is not None and getattr(parsed, "shutdown_timeout", None) == 0:
        parsed.shutdown_timeout = SHUTDOWN_SECONDS
    parsed.kv_transfer_config = transfer_config(settings, getattr(parsed, "kv_transfer_config", None))


def check_exposure(parsed: Namespace, settings: Settings) -> None:
    """Refuse to serve sessions to a network without a key, unless that was asked for.

    Args:
        parsed: vLLM's arguments; those of an offline run have no ``host``.

    Raises:
        ConfigError: names every remedy.
    """
    keys = compat.api_keys(parsed)
    if settings.key_file:
        if keys:
            raise ConfigError(
                "--deltamem-key-file beside --api-key (or VLLM_API_KEY): vLLM would refuse the file's keys; put every "
                "key into the file (deltamem keys new TENANT FILE) and leave --api-key out"
            )
        read_key_file(Path(settings.key_file))
    serves = hasattr(parsed, "host") and hasattr(parsed, "uds") and not getattr(parsed, "headless", False)
    if not serves or keys or settings.key_file or settings.open or parsed.uds or _is_loopback(parsed.host):
        return
    where = f"--host {parsed.host}" if parsed.host else "all interfaces (no --host was given)"
    raise ConfigError(
        f"sessions without an API key on {where}: anyone who can reach the server could use, read and delete them. "
        "Pass --api-key KEY or --deltamem-key-file PATH, or --deltamem-open if that is meant, or listen on "
        "--host 127.0.0.1"
    )


def _is_loopback(host: str | None) -> bool:
    if host == "localhost":
        return True
    try:
        return host is not None and ip_address(host).is_loopback
    except ValueError:  # another name: what it resolves to can change
        return False


def allow_plugins(names: list[str]) -> None:
    """Put plugins on vLLM's allowlist (``VLLM_PLUGINS``), which child processes and endpoint plugins read.

    Raises:
        ConfigError: a name that no installed plugin has, or an allowlist of the user's that leaves us out.
    """
    installed = {group: {e.name for e in entry_points(group=group)} for group in _GROUPS}
    known = set().union(*installed.values())
    for name in names:
        if name not in known:
            raise ConfigError(
                f"--plugin {name}: no installed vLLM plugin has that name; installed: "
                f"{', '.join(sorted(known)) or 'none'}"
            )
    current = os.environ.get("VLLM_PLUGINS")
    if current is None:  # unset means: every plugin but the endpoint plugins
        endpoint = installed["vllm.endpoint_plugins"] - set(names)
        allowed = sorted(set().union(*(v for k, v in installed.items() if k != "vllm.endpoint_plugins")) - endpoint)
    else:
        allowed = [n for n in current.split(",") if n]
        if PLUGIN in names and PLUGIN not in allowed:
            raise ConfigError(
                f"VLLM_PLUGINS={current!r} leaves deltamem out: add deltamem to it, or unset it, with --plugin deltamem"
            )
    os.environ["VLLM_PLUGINS"] = ",".join(dict.fromkeys([*allowed, *names]))


def transfer_config(settings: Settings, users: Any = None) -> Any:
    """The KV-transfer configuration that selects our connector; a connector of the user's is kept beside it."""
    from vllm.config import KVTransferConfig

    ours: dict[str, Any] = {
        "kv_connector": CONNECTOR,
        "kv_connector_module_path": CONNECTOR_MODULE,
        "kv_role": "kv_both",
        "kv_connector_extra_config": {PLUGIN: settings.model_dump()},
    }
    if users is None:
        return KVTransferConfig(**ours)
    theirs = asdict(users) if is_dataclass(users) and not isinstance(users, type) else dict(users)
    if theirs.get("kv_connector") in (None, CONNECTOR):
        return KVTransferConfig(**ours)
    kept = ("kv_connector", "kv_connector_module_path", "kv_role", "kv_connector_extra_config")
    return KVTransferConfig(
        kv_connector="MultiConnector",
        kv_role="kv_both",
        kv_connector_extra_config={"connectors": [{k: theirs[k] for k in kept if theirs.get(k) is not None}, ours]},
    )
