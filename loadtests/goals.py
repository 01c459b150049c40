"""The CPU's figures beside what is wanted of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Results = Mapping[str, list[dict[str, Any]]]
"""By benchmark, its rows."""


@dataclass(frozen=True)
class Goal:
    """One figure.

    Attributes:
        find: the figure in a run's results; None where it was not measured.
        at_least: larger is better.
        noise: what the same figure is of an arm against itself.
        error: the figure's standard error.
    """

    what: str
    unit: str
    accept: float
    find: Callable[[Results], float | None]
    at_least: bool = False
    noise: Callable[[Results], float | None] | None = None
    error: Callable[[Results], float | None] | None = None

    def verdict(self, figure: float, noise: float | None = None) -> str:
        """``pass``, ``FAIL``, or that nothing can be said: the noise is more than what is accepted."""
        if noise is not None and abs(noise) > self.accept:
            return f"unclear: vanilla against itself is {noise:+.2f} {self.unit}"
        return "pass" if (figure >= self.accept if self.at_least else figure <= self.accept) else "FAIL"


def value(benchmark: str, column: str, **key: Any) -> Callable[[Results], float | None]:
    """The value of the first row that has these other values."""

    def find(results: Results) -> float | None:
        for row in results.get(benchmark, ()):
            if all(row.get(name) == wanted for name, wanted in key.items()):
                return row.get(column)
        return None

    return find


def _scan(rank: int) -> Callable[[Results], float | None]:
    return value("operators", "scan_ns", implementation="native", threads=1, rank=rank, heads=1)


def _added(what: str, accept: float, row: str) -> Goal:
    memory, again, error = (value("overhead", name, what=row) for name in ("memory %", "vanilla again %", "memory % ±"))
    return Goal(what, "%", accept, memory, noise=again, error=error)


def _lora(what: str, accept: float, row: str) -> Goal:
    return Goal(what, "", accept, value("overhead", "lora / memory", what=f"{row}, beside LoRA"), True)


def _elided(tokens: int, accept: float) -> Goal:
    what = f"time to the first token, {tokens:,} tokens elided, to full replay"
    return Goal(what, "", accept, value("long history", "elide / full", history=tokens))


GOALS = (
    _added("time per token, 1 request", 1.3, "TPOT, B=1"),
    _added("time per token, 8 requests", 0.7, "TPOT, B=8"),
    _added("time to the first token, 128", 1.2, "TTFT, 128 tokens"),
    _added("time to the first token, 2,048", 1.2, "TTFT, 2048 tokens"),
    _lora("LoRA's time per token to ours, 1", 1.2, "TPOT, B=1"),
    _lora("LoRA's time per token to ours, 8", 1.1, "TPOT, B=8"),
    _elided(8192, 0.2),
    _elided(32768, 0.05),
    Goal("scan, rank 8", "ns per token and layer", 25, _scan(8)),
    Goal("scan, rank 16", "ns per token and layer", 40, _scan(16)),
    Goal("warm load", "µs", 100, value("sessions", "value", name="warm load: both")),
    Goal(
        "durable commits, grouped",
        "per second",
        10_000,
        value("sessions", "value", name="durable commits of known sessions, grouped"),
        True,
    ),
    Goal(
        "verified cold restores",
        "per second",
        20_000,
        value("sessions", "value", name="verified cold restores, 1 thread"),
        True,
    ),
)


def table(results: Results) -> list[str]:
    """Markdown lines."""
    lines = ["| goal | accepted | measured | |", "|---|---|---|---|"]
    for goal in GOALS:
        figure = goal.find(results)
        bound = f"{'at least' if goal.at_least else 'at most'} {goal.accept:,g} {goal.unit}".strip()
        said = "not measured" if figure is None else f"{figure:,.{2 if abs(figure) < 100 else 0}f}"
        noise, error = (None if find is None else find(results) for find in (goal.noise, goal.error))
        said += "" if error is None else f" ± {error:.2f}"
        lines.append(f"| {goal.what} | {bound} | {said} | {'' if figure is None else goal.verdict(figure, noise)} |")
    return lines
