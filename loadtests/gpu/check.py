"""Part 2: every kernel against the fp32 and fp64 reference, with the tests' own cases, on the device.

The cases are those of ``tests/ops``: shapes, masks, split windows, permuted batches, poisoned outputs, untouched
neighbours, and requests that hit pages which others fill in the same launch.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from loadtests.gpu.common import Part

ROOT = Path(__file__).parents[2]


def main() -> None:
    """Run the suite; note how many cases passed and what failed."""
    part = Part.begin("check")
    env = {**os.environ, "DELTAMEM_GPU_OUT": str(part.out.resolve()), "DELTAMEM_GPU_TINY": "1" if part.tiny else ""}
    log = part.out / "check.log"
    some = ["-k", "long_prefill or wider or takes or duplicates or followed"] if part.tiny else []
    with log.open("w", encoding="utf-8") as file:
        code = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", "loadtests/gpu/suite.py",
             *some],
            cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT, check=False,
        ).returncode  # fmt: skip
    text = log.read_text(encoding="utf-8")
    for word in ("passed", "failed", "error"):
        found = re.findall(rf"(\d+) {word}", text)
        part.note(word, int(found[-1]) if found else 0)
    part.note("failures", re.findall(r"^(?:FAILED|ERROR) (.*)", text, flags=re.MULTILINE)[:40])
    part.note("ok", code == 0)
    if code:
        print(text[-4000:])  # noqa: T201
        raise SystemExit(1)


if __name__ == "__main__":
    main()
