"""The Triton operators, in Triton's interpreter: a process of their own runs `suite_triton.py`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TRITON = os.environ.get("DELTAMEM_TEST_TRITON") or str(Path(sys.prefix) / "triton")


@pytest.mark.timeout(1200)  # half a minute of computing
def test_the_suite_passes_in_the_interpreter() -> None:
    if not Path(TRITON, "triton").is_dir():
        pytest.fail(
            f"the Triton operators need Triton in {TRITON}: run deploy/cpu/install.sh, or name another folder in "
            "DELTAMEM_TEST_TRITON (pip install --no-deps --target DIR triton==3.6.0)"
        )
    path = os.pathsep.join(filter(None, [str(ROOT), TRITON, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore"]
    run = subprocess.run(
        [*command, "tests/ops/suite_triton.py"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed
    assert int(passed[1]) >= 90, run.stdout
    assert "skipped" not in run.stdout
