"""The configuration reference: flags, from the parser's own table and the frozen settings; options of store URLs."""

import inspect
import re
from typing import Any, Literal, get_args, get_origin

from deltamem_vllm.config import Settings
from deltamem_vllm.plugin import _FLAGS
from deltamem_vllm.store.postgres import PostgresStore
from deltamem_vllm.store.redis import RedisStore
from deltamem_vllm.store.url import _POSTGRES, _REDIS, OPTIONS

SEE = {
    "adapter": "[adapters](adapters.md)",
    "store": "[stores](stores.md)",
    "durability": "[write-behind](sessions.md#write-behind)",
    "ttl": "[expiry](sessions.md#versions-and-deletion)",
    "write": "[write policies](sessions.md#what-is-written)",
    "history": "[history elision](sessions.md#history-elision)",
    "facts-chars": "[pinned facts](facts.md)",
    "facts-block": "[pinned facts](facts.md#what-the-model-sees)",
    "audit": "[the audit log](audit.md)",
    "key-file": "[security](security.md#the-key-file)",
    "open": "[security](security.md#who-may-reach-which-session)",
    "secret-file": "[security](security.md#ids-in-the-engine-in-logs-kv-events-and-metrics)",
    "kernel": "[performance](performance.md)",
}
"""Where a page says more about a flag."""

_BOUNDS = {"ge": "from {}", "gt": "above {}", "le": "up to {}", "lt": "below {}"}


def flags() -> str:
    """One row per flag."""
    rows = ["| flag | default | values | what it sets |", "|---|---|---|---|"]
    for flag, options in _FLAGS.items():
        field = Settings.model_fields[flag.replace("-", "_")]
        operand = options.get("metavar", "")
        see = f" See {SEE[flag]}." if flag in SEE else ""
        name = f"`--deltamem-{flag}{' ' if operand else ''}{operand}`"
        rows.append(f"| {name} | {default_of(flag)} | {_values(field)} | {_cell(_meaning(options['help']))}{see} |")
    return "\n".join(rows)


def default_of(flag: str) -> str:
    """The setting's default, as the table shows it."""
    field = Settings.model_fields[flag.replace("-", "_")]
    if field.is_required():  # the default store depends on the user
        return "SQLite in the user's data directory" if flag == "store" else "required"
    if isinstance(field.default, bool):
        return "on" if field.default else "off"
    if field.default == "":
        return "none"
    return f"`{field.default:g}`" if isinstance(field.default, float) else f"`{field.default}`"


def store_options() -> str:
    """One row per option of a store's URL."""
    rows = ["| option | stores | default | meaning |", "|---|---|---|---|"]
    for stores, options in OPTIONS.items():
        for name, meaning in options.items():
            rows.append(f"| `{name}=` | {', '.join(stores)} | {_option_default(name, stores)} | {_cell(meaning)} |")
    return "\n".join(rows)


def _option_default(name: str, stores: tuple[str, ...]) -> str:
    """From the constructors that take it; a store that disagrees with another is shown by itself."""
    makers: dict[str, tuple[Any, dict[str, str]]] = {
        "PostgreSQL": (PostgresStore, _POSTGRES),
        "Redis": (RedisStore, _REDIS),
    }
    found = {}
    for store, (maker, names) in makers.items():
        given = inspect.signature(maker).parameters.get(names.get(name, name))
        if given is not None and (store in stores or stores == ("every store",)):
            found[store] = f"`{given.default:g}`" if isinstance(given.default, int | float) else f"`{given.default}`"
    if len(set(found.values())) > 1:
        return ", ".join(f"{value} ({store})" for store, value in found.items())
    return next(iter(found.values()), "none")


def _values(field: Any) -> str:
    if get_origin(field.annotation) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(field.annotation))
    bounds = {name: getattr(m, name) for m in field.metadata for name in _BOUNDS if getattr(m, name, None) is not None}
    return ", ".join(_BOUNDS[name].format(f"{value:,.15g}") for name, value in bounds.items())


def _meaning(help_text: str) -> str:
    """The help text without the default, which has a column of its own."""
    text = re.sub(r" \(default:? [^ ):]+\)", "", help_text)
    return re.sub(r" (Default: [^.]*\.|Required\.)$", "", text)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
