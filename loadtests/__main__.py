"""Every benchmark in turn, then the goals: ``python -m loadtests [--out DIR] [--parts …]`` (``make bench``).

Writes results.json, results.md and results.png. Each part runs alone; one whose correctness check fails has no figures.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loadtests import decode, elision, goals, hooks, kernels, long_history, overhead, plot, sessions, table

Rows = list[dict[str, Any]]
PARTS: dict[str, tuple[str, Callable[[], Rows]]] = {
    "operators": ("delta-rule operators, one layer", kernels.measure),
    "decode": ("a layer of a decode step, µs", decode.measure),
    "sessions": ("sessions: commits, restores, warm loads", sessions.rows),
    "hooks": ("engine hooks, µs", hooks.measure),
    "history": ("a resent history, left out, or not sent: ms to the first token", elision.by_length),
    "long history": ("a turn behind a long history: ms to the first token", long_history.measure),
    "overhead": ("what the memory adds to vLLM", overhead.run),
}
ROOT = Path(__file__).parents[1]


def markdown(results: dict[str, Rows], problems: dict[str, str]) -> str:
    """Goals, then every part."""
    lines = ["## goals", "", *goals.table(results)]
    for part, rows in results.items():
        lines += ["", f"## {PARTS[part][0]}", "", *table.markdown(rows)]
    lines += [f"\nNothing of *{PARTS[part][0]}*: {problem}" for part, problem in problems.items()]
    return "\n".join(lines) + "\n"


def machine() -> str:
    """Processor, cores, date."""
    names = [
        line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "name" in line
    ]
    return f"{names[0] if names else platform.processor()}, {len(names)} core(s), {time.strftime('%Y-%m-%d')}"


def main() -> int:
    """Run parts; returns the exit code: 0 if each of them ended well, whatever the goals."""
    parser = argparse.ArgumentParser(prog="python -m loadtests", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of them, separated by commas")
    given = parser.parse_args()
    parts = given.parts.split(",")
    if unknown := sorted(set(parts) - set(PARTS)):
        parser.error(f"unknown parts: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    screen, results, problems = table.console(), {}, {}
    for part in parts:
        title, measure = PARTS[part]
        screen.print(f"\n{title} …")
        try:
            results[part] = measure()
        except (Exception, SystemExit) as error:  # noqa: BLE001  the other parts have figures of their own
            problems[part] = f"{type(error).__name__}: {error}"
            screen.print(f"nothing measured: {problems[part]}")
        else:
            screen.print(table.shown(results[part]))
    given.out.mkdir(parents=True, exist_ok=True)
    whole = {"machine": machine(), "parts": results, "problems": problems}
    (given.out / "results.json").write_text(json.dumps(whole, indent=1), encoding="utf-8")
    text = f"{machine()}\n\n{markdown(results, problems)}"
    (given.out / "results.md").write_text(text, encoding="utf-8")
    plot.draw(results, given.out / "results.png", machine())
    screen.print("\n" + "\n".join(goals.table(results)) + f"\n\nall of it: {given.out}")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
