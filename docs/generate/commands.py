"""The `deltamem` command's reference, from its own parser."""

from typing import Any

import typer

from deltamem_vllm.cli import app


def commands() -> str:
    """One section per group, one table row per command, with its options below."""
    lines: list[str] = []
    root: Any = typer.main.get_command(app)
    alone = [(name, each) for name, each in root.commands.items() if not hasattr(each, "commands")]
    for name, group in root.commands.items():
        if hasattr(group, "commands"):
            lines += [f"### `deltamem {name}`", "", group.help, ""]
            for inner, command in group.commands.items():
                lines += _one(f"deltamem {name} {inner}", command)
    for name, command in alone:
        lines += [f"### `deltamem {name}`", "", *_one(f"deltamem {name}", command)]
    return "\n".join(lines)


def _one(name: str, command: Any) -> list[str]:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and not p.hidden]
    shown = " ".join([name, *(p.metavar or p.name.upper() for p in arguments), *(["[OPTIONS]"] if options else [])])
    lines = [f"**`{shown}`**", "", " ".join(command.help.split()), ""]
    for each in arguments:
        lines.append(f"* `{each.metavar or each.name.upper()}`: {_help(each)}")
    for each in options:
        operand = "" if each.is_flag else f" {each.metavar or ('N' if isinstance(each.default, int) else 'TEXT')}"
        known = each.default not in (None, "", False) and not callable(each.default)
        default = f" Default: `{each.default}`." if known and not each.is_flag else ""
        must = " Required." if each.required else ""
        lines.append(f"* `{each.opts[0]}{operand}`: {_help(each)}{default}{must}")
    return [*lines, ""]


def _help(parameter: Any) -> str:
    text = " ".join((parameter.help or "").split())
    return text if text.endswith(".") else f"{text}."
