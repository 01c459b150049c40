"""What was measured beside what was wanted, and whether it passes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Parts = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Goal:
    """One figure: where it is in a part's results (``{}`` stands for the kernels' name) and what it should be.

    Attributes:
        minus: a second value of the same row that is taken off.
        at_least: larger is better.
    """

    what: str
    part: str
    row: str
    value: str
    accept: float
    aim: float
    unit: str
    at_least: bool = False
    minus: str | None = None

    def figure(self, parts: Parts, kernel: str) -> float | None:
        """What was measured with some kernels; None: nothing was."""
        row = parts.get(self.part, {}).get(self.row.format(kernel), {})
        value, minus = row.get(self.value.format(kernel)), row.get(self.minus, None) if self.minus else 0
        return None if value is None or minus is None else round(value - minus, 3)

    def verdict(self, figure: float) -> str:
        """``aim``, ``pass`` or ``FAIL``."""
        for name, bound in (("aim", self.aim), ("pass", self.accept)):
            if figure >= bound if self.at_least else figure <= bound:
                return name
        return "FAIL"


def _stack(what: str, row: str, accept: float, aim: float) -> Goal:
    return Goal(what, "stack", "{}: " + row, "memory %", accept, aim, "%")


def _bandwidth(what: str, row: str) -> Goal:
    return Goal(what, "kernels", row + ", {}", "% of copy", 80, 90, "% of copy", at_least=True)


GOALS = (
    _stack("time per token, 1 request", "TPOT, B=1, context 2040", 2, 1),
    _stack("time per token, 32 requests", "TPOT, B=32, context 2040", 1, 0.5),
    _stack("time per token, 256 requests", "TPOT, B=256, context 1016", 0.5, 0.25),
    _stack("time to the first token, 512", "TTFT, 512 tokens", 5, 2),
    _stack("time to the first token, 8k", "TTFT, 8192 tokens", 1, 0.4),
    _stack("time to the first token, 32k", "TTFT, 32768 tokens", 0.5, 0.2),
    Goal("further launches per layer", "stack", "{}: launches per layer", "memory", 1, 0, "", minus="without"),
    Goal(
        "prefill in chunks against token after token, 8k, 1 request",
        "kernels",
        "prefill us, 1 x 8192 tokens",
        "{}: one launch / chunks",
        15,
        50,
        "times faster",
        at_least=True,
    ),
    _bandwidth("seeds of 16,384 sessions", "seed of 16384 sessions"),
    _bandwidth("takes of 16,384 sessions", "take of 16384 sessions"),
    _bandwidth("update of 262,144 states", "update of 262144 states"),
)


def goals(parts: Parts) -> list[str]:
    """A Markdown section. No figure appears unless the checks of this run have passed."""
    lines = ["## goals", ""]
    if parts.get("check", {}).get("ok") is not True:
        return [*lines, "No figure: the checks of this run have not passed.", ""]
    lines += ["| goal | accept | aim | cuda | triton |", "|---|---|---|---|---|"]
    for goal in GOALS:
        sign = "≥" if goal.at_least else "≤"
        cells = []
        for kernel in ("cuda", "triton"):
            figure = goal.figure(parts, kernel)
            cells.append(
                "not measured" if figure is None else f"{figure:g} {goal.unit}".strip() + f": {goal.verdict(figure)}"
            )
        lines.append(f"| {goal.what} | {sign} {goal.accept:g} | {sign} {goal.aim:g} | {' | '.join(cells)} |")
    return [*lines, ""]
