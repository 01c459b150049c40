"""A report as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

COLUMNS = (
    ("requests", "requests", "{:d}"),
    ("prompt_tokens", "prompt tokens", "{:d}"),
    ("ttft_ms_without", "TTFT ms", "{:.1f}"),
    ("ttft_ms_with", "with memory", "{:.1f}"),
    ("ttft_percent", "%", "{:+.2f}"),
    ("tpot_ms_without", "TPOT ms", "{:.2f}"),
    ("tpot_ms_with", "with memory", "{:.2f}"),
    ("tpot_percent", "%", "{:+.2f}"),
    ("tokens_per_second_without", "tokens/s", "{:.1f}"),
    ("tokens_per_second_with", "with memory", "{:.1f}"),
    ("commit_ms", "commit ms", "{:.1f}"),
)


def markdown(found: Mapping[str, Any]) -> str:
    """Settings in a line, a table of sizes, a table of times."""
    settings = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in found["settings"].items())
    lines = [settings, "", "| | bytes, unless said |", "|---|---|"]
    lines += [f"| {name} | {'-' if value is None else format(value, ',')} |" for name, value in found["sizes"].items()]
    lines += ["", "| " + " | ".join(title for _, title, _ in COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for row in found["times"]:
        lines.append("| " + " | ".join(form.format(row[key]) for key, _, form in COLUMNS) + " |")
    return "\n".join(lines) + "\n"
