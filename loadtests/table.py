"""Rows of results as tables. Columns are those of any row, but for what a row keeps of each round: lists, which are in
results.json only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

WIDE = 200
"""Columns of what is no terminal, such as a file: tables have many, and are cut where they do not fit."""
Rows = Sequence[dict[str, Any]]


def console(*, stderr: bool = False) -> Console:
    """Where tables go."""
    found = Console(stderr=stderr)
    return found if found.is_terminal else Console(stderr=stderr, width=WIDE)


def shown(rows: Rows) -> Table:
    """For a terminal."""
    names = _columns(rows)
    table = Table(*names)
    for row in rows:
        table.add_row(*(_text(row.get(name)) for name in names))
    return table


def markdown(rows: Rows) -> list[str]:
    """Lines of Markdown."""
    names = _columns(rows)
    head = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return head + ["| " + " | ".join(_text(row.get(name)) for name in names) + " |" for row in rows]


def _columns(rows: Rows) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name, value in row.items() if not isinstance(value, list)))


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.{0 if abs(value) >= 1000 else 2}f}"
    return "" if value is None else str(value)
