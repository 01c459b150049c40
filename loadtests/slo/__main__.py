"""vLLM alone and with a memory under the same load: ``python -m loadtests.slo [--rounds 4] [--seconds 30] [--rate 6]``.

Starts both servers with the bundled recall model, replays one trace a round on each, in alternating order, and writes
results.json, results.md and results.png. Objectives are given in seconds: ``--ttft 0.3 --tpot 0.05 --commit 0.25``.
"""

import argparse
import asyncio
import dataclasses
import json
import sys
from pathlib import Path

from loadtests.__main__ import ROOT, machine
from loadtests.slo import picture, summary, trace
from loadtests.slo.arms import rounds, serving
from loadtests.slo.replay import Answer
from loadtests.table import console


async def measure(traces: list[trace.Trace]) -> tuple[dict[str, list[list[Answer]]], summary.Rows]:
    """Answers by arm and round, and cold starts."""
    async with serving(traces) as arms:
        answers = await rounds(arms, traces)
        cold = [{"arm": arm.name, "first request": what, "s": s} for arm in arms for what, s in arm.cold.items()]
    return answers, cold


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write; returns the exit code: 1 if a request failed."""
    known = summary.Objectives()
    parser = argparse.ArgumentParser(prog="python -m loadtests.slo", description=__doc__)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=30.0, help="of each round on each server")
    parser.add_argument("--rate", type=float, default=6.0, help="arrivals per second")
    parser.add_argument("--seed", type=int, default=1)
    for name, value in dataclasses.asdict(known).items():
        parser.add_argument(f"--{name}", type=float, default=value, help=f"objective in seconds, {value:g} by default")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "slo")
    given = parser.parse_args(arguments)
    objectives = summary.Objectives(ttft=given.ttft, tpot=given.tpot, commit=given.commit)
    traces = [trace.make(given.seed + number, given.seconds, given.rate) for number in range(given.rounds)]
    answers, cold = asyncio.run(measure(traces))
    tables = {
        f"all rounds, ms; good: {1e3 * given.ttft:g}, {1e3 * given.tpot:g} and {1e3 * given.commit:g} ms at most":
            summary.rows(answers, objectives),
        "round by round": summary.by_round(answers, given.seconds, objectives),
        "start of the process to a first token": cold,
        "answers that are no success": summary.errors(answers),
    }  # fmt: skip
    load = f"{given.rounds} rounds of {given.seconds:g} s, {given.rate:g} arrivals per second, seed {given.seed}"
    text = "\n".join([machine(), "", load, "", *(summary.markdown(title, rows) for title, rows in tables.items())])
    given.out.mkdir(parents=True, exist_ok=True)
    raw = {arm: [[dataclasses.asdict(a) for a in each] for each in taken] for arm, taken in answers.items()}
    whole = {"machine": machine(), "load": load, "tables": tables, "answers": raw}
    (given.out / "results.json").write_text(json.dumps(whole, indent=1), encoding="utf-8")
    (given.out / "results.md").write_text(text, encoding="utf-8")
    picture.draw(answers, next(iter(tables.values())), given.out / "results.png", f"{machine()}; {load}")
    console().print(text, f"all of it: {given.out}", markup=False)
    return int(any(row["outcome"] != "409" for row in tables["answers that are no success"]))


if __name__ == "__main__":
    sys.exit(main())
