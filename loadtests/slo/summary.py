"""Answers as figures: percentiles by pattern, goodput against objectives, errors by kind."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loadtests.slo.replay import Answer
from loadtests.slo.trace import PATTERNS

PERCENTILES = (50, 95, 99)
ALL = "all"
Rows = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Objectives:
    """What an answer must keep to count as good, in seconds; the commit's holds where there is one."""

    ttft: float = 0.3
    tpot: float = 0.05
    commit: float = 0.25

    def met(self, answer: Answer) -> bool:
        """Whether an answer does."""
        if answer.outcome != "ok" or answer.ttft is None:
            return False
        tpot, commit = answer.tpot or 0.0, answer.commit or 0.0
        return answer.ttft <= self.ttft and tpot <= self.tpot and commit <= self.commit


def row(answers: Sequence[Answer], objectives: Objectives) -> dict[str, Any]:
    """Figures of some answers. Requests that were told 409 are no failures; they are not good either."""
    good = sum(map(objectives.met, answers))
    values: dict[str, Any] = {
        "requests": len(answers),
        "409": sum(answer.outcome == "409" for answer in answers),
        "errors": sum(answer.outcome not in ("ok", "409") for answer in answers),
    }
    for name in ("ttft", "tpot", "commit"):
        taken = [1e3 * value for answer in answers if (value := getattr(answer, name)) is not None]
        for percentile in PERCENTILES:
            values[f"{name} p{percentile}"] = float(np.percentile(taken, percentile)) if taken else None
    values["good %"] = 100 * good / len(answers) if answers else None
    return values


def rows(rounds: Mapping[str, Sequence[Sequence[Answer]]], objectives: Objectives) -> Rows:
    """One row for each pattern and arm, and one of all patterns; milliseconds."""
    found = []
    for pattern in (*PATTERNS, ALL):
        for arm, taken in rounds.items():
            answers = [answer for each in taken for answer in each if pattern in (answer.pattern, ALL)]
            if answers:
                found.append({"pattern": pattern, "arm": arm, **row(answers, objectives)})
    return found


def by_round(rounds: Mapping[str, Sequence[Sequence[Answer]]], seconds: float, objectives: Objectives) -> Rows:
    """What each round says by itself: a difference between arms that is not larger than that between rounds is none."""
    found = []
    for arm, taken in rounds.items():
        for number, answers in enumerate(taken):
            of_all = row(answers, objectives)
            good = sum(map(objectives.met, answers)) / seconds
            prompt = sum(answer.prompt for answer in answers)
            shown = {name: of_all[name] for name in ("requests", "ttft p50", "ttft p99", "tpot p50")}
            found.append({"round": number + 1, "arm": arm, **shown, "prompt tokens": prompt, "good per s": good})
    return found


def errors(rounds: Mapping[str, Iterable[Iterable[Answer]]]) -> Rows:
    """Everything but good answers, by arm and kind."""
    return [
        {"arm": arm, "outcome": outcome, "requests": count}
        for arm, taken in rounds.items()
        for outcome, count in sorted(Counter(a.outcome for each in taken for a in each if a.outcome != "ok").items())
    ]


def markdown(title: str, rows: Rows) -> str:
    """Rows as a table in Markdown."""
    if not rows:
        return f"## {title}\n\nnone\n"
    names = list(rows[0])
    lines = [f"## {title}", "", "| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(_text(each[name]) for name in names) + " |" for each in rows]
    return "\n".join(lines) + "\n"


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.{0 if abs(value) >= 100 else 1}f}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value).replace("|", "\\|")
