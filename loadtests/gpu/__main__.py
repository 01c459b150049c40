"""Build, check and measure everything on one NVIDIA GPU: ``python -m loadtests.gpu [--out DIR]``.

Needs torch with CUDA, Triton, nvcc and pytest, not vLLM. Ends within nine minutes: every part is a process of its own
with a time limit, and what a part has measured before it fails or runs out of time is kept. Writes ``results.json`` and
``results.md``. ``--tiny`` runs the same code in small on a CPU and proves only that the script works.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from loadtests.gpu.table import markdown

#: Seconds each part may take; together less than nine minutes.
PARTS = {"build": 90, "check": 180, "kernels": 100, "stack": 160}
ROOT = Path(__file__).parents[2]


def run(parts: list[str], out: Path, tiny: bool, budgets: dict[str, float]) -> dict[str, str]:
    """Run parts in turn; returns what went wrong, by part."""
    out.mkdir(parents=True, exist_ok=True)
    problems = {}
    for part in parts:
        (out / f"{part}.json").unlink(missing_ok=True)
        start = time.monotonic()
        command = [sys.executable, "-m", f"loadtests.gpu.{part}", "--out", str(out), *(["--tiny"] if tiny else [])]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        try:
            code = subprocess.run(
                command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, timeout=budgets[part], check=False
            ).returncode
        except subprocess.TimeoutExpired:
            problems[part] = f"out of time after {budgets[part]:.0f} s"
        else:
            if code:
                problems[part] = f"exit code {code}"
        print(f"== {part}: {problems.get(part, 'ok')}, {time.monotonic() - start:.0f} s", flush=True)  # noqa: T201
    return problems


def collect(parts: list[str], out: Path) -> dict[str, dict[str, Any]]:
    """What the parts have written."""
    files = {part: out / f"{part}.json" for part in parts}
    return {part: json.loads(file.read_text(encoding="utf-8")) for part, file in files.items() if file.is_file()}


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code: 0 if every part ended well."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of them, separated by commas")
    parser.add_argument("--tiny", action="store_true", help="in small, on a CPU")
    args = parser.parse_args(arguments)
    parts = args.parts.split(",")
    if unknown := sorted(set(parts) - set(PARTS)):
        parser.error(f"unknown parts: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    out = args.out.resolve()
    problems = run(parts, out, args.tiny, {**PARTS})
    results = collect(parts, out)
    (out / "results.json").write_text(json.dumps({"parts": results, "problems": problems}, indent=1), encoding="utf-8")
    table = markdown(results, problems)
    (out / "results.md").write_text(table, encoding="utf-8")
    print(table)  # noqa: T201
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
