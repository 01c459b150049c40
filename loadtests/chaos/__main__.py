"""One campaign: ``python -m loadtests.chaos replicas|cut|silent|slow|full|soak [--out DIR]``; ``--help`` has the sizes.

Writes NAME.json and NAME.md. Exit code 1: something was lost, forked, applied twice, not resumed, too late, or grew.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from loadtests.__main__ import ROOT, machine
from loadtests.chaos import replicas, soak, stores
from loadtests.chaos.cluster import shown


def _replicas(given: argparse.Namespace) -> tuple[Any, list[str]]:
    size = replicas.Size(**_given(given, replicas.Size))
    report = replicas.run(size)
    most = f"at most {replicas.RESUME:g} s and the {report.undisturbed:.2f} s that an answer may take without one"
    slow = [f"answered {wait:.2f} s after a kill: {most}" for wait in report.late(replicas.RESUME)]
    left = [] if report.resumed == size.sessions else [f"{size.sessions - report.resumed} sessions did not go on"]
    none = [] if report.waits else ["no session was written or leased at a kill: nothing is shown"]
    return report, [*shown(report.problems), *report.faults, *slow, *left, *none]


def _stores(given: argparse.Namespace) -> tuple[Any, list[str]]:
    report = stores.run(given.campaign, stores.Size(**_given(given, stores.Size)))
    soon = report.saved is not None and report.saved <= stores.RECOVERY
    late = [] if soon else [f"not all was stored after {stores.RECOVERY:g} s"]
    left = [] if report.resumed == report.size.sessions else ["some sessions did not go on"]
    return report, [*shown(report.problems), *report.faults, *late, *left]


def _soak(given: argparse.Namespace) -> tuple[Any, list[str]]:
    with tempfile.TemporaryDirectory(prefix="deltamem-soak-") as folder:
        report = soak.run(soak.Size(**_given(given, soak.Size)), Path(folder))
    return report, [] if report.flat else ["it grows"]


CAMPAIGNS = {
    "replicas": (replicas.Size, _replicas),
    **dict.fromkeys(("cut", "silent", "slow", "full"), (stores.Size, _stores)),
    "soak": (soak.Size, _soak),
}


def _given(given: argparse.Namespace, size: Any) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(size)]
    return {name: getattr(given, name) for name in names if getattr(given, name, None) is not None}


def table(title: str, rows: dict[str, Any]) -> str:
    """Figures in Markdown."""
    return (
        "\n".join([f"## {title}", "", "| what | |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows.items())]) + "\n"
    )


def main(arguments: list[str] | None = None) -> int:
    """Run a campaign; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.chaos", description=__doc__)
    parser.add_argument("campaign", choices=CAMPAIGNS)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "chaos")
    for name, kind in {"sessions": int, "turns": int, "every": float, "kills": int, "workers": int, "pace": float,
                       "lease": float, "seconds": float, "rate": float, "warm": float}.items():  # fmt: skip
        of = [c for c, (size, _) in CAMPAIGNS.items() if name in {field.name for field in dataclasses.fields(size)}]
        parser.add_argument(f"--{name}", type=kind, help=f"of {', '.join(of)}")
    parser.add_argument("--alone", action="store_true", help="of soak: vLLM without a memory")
    given = parser.parse_args(arguments)
    report, wrong = CAMPAIGNS[given.campaign][1](given)
    given.out.mkdir(parents=True, exist_ok=True)
    text = f"{machine()}\n\n{table(given.campaign, report.rows())}"
    whole = {"machine": machine(), "campaign": given.campaign, "rows": report.rows(), "wrong": wrong}
    whole["report"] = dataclasses.asdict(report)
    (given.out / f"{given.campaign}.json").write_text(json.dumps(whole, indent=1), encoding="utf-8")
    (given.out / f"{given.campaign}.md").write_text(text, encoding="utf-8")
    Console().print("\n".join([text, *(f"WRONG: {each}" for each in wrong), f"all of it: {given.out}"]), markup=False)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
