"""The goals and the results of all parts as Markdown."""

from __future__ import annotations

from typing import Any

from loadtests.gpu.goals import goals


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_cell(v)}" for name, v in value.items())
    if isinstance(value, list):
        return "; ".join(map(_cell, value)) or "none"
    return str(value).replace("\n", " ").replace("|", "\\|")


def markdown(parts: dict[str, dict[str, Any]], problems: dict[str, str]) -> str:
    """The goals, then one section per part; rows whose values are dictionaries of the same keys share a table.

    Args:
        parts: results by part.
        problems: parts that failed or ran out of time, and how.
    """
    lines = ["# One GPU, measured", "", *goals(parts)]
    for part, results in parts.items():
        lines += [f"## {part}", ""]
        if part in problems:
            lines += [f"**Incomplete: {problems[part]}**", ""]
        plain = {key: value for key, value in results.items() if not isinstance(value, dict)}
        groups: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
        for key, value in results.items():
            if isinstance(value, dict):
                groups.setdefault(tuple(value), {})[key] = value
        if plain:
            lines += ["| what | value |", "|---|---|", *(f"| {k} | {_cell(v)} |" for k, v in plain.items()), ""]
        for columns, rows in groups.items():
            lines += [f"| what | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
            lines += [f"| {key} | {' | '.join(_cell(row[c]) for c in columns)} |" for key, row in rows.items()]
            lines += [""]
    lines += [f"**{part}: {problem}**" for part, problem in problems.items() if part not in parts]
    return "\n".join(lines).rstrip() + "\n"
