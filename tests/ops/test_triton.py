"""The Triton operators: in Triton's interpreter, where a process of its own runs `suite_triton.py`, and compiled for
GPUs that need not be there.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import NIGHTLY

ROOT = Path(__file__).parents[2]
TRITON = os.environ.get("DELTAMEM_TEST_TRITON") or str(Path(sys.prefix) / "triton")
#: One each day, all at night.
CAPABILITIES = ["80", "90", "100"] if NIGHTLY else ["90"]


def _run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    if not Path(TRITON, "triton").is_dir():
        pytest.fail(
            f"the Triton operators need Triton in {TRITON}: run deploy/cpu/install.sh, or name another folder in "
            "DELTAMEM_TEST_TRITON (pip install --no-deps --target DIR triton==3.6.0)"
        )
    path = os.pathsep.join(filter(None, [str(ROOT), TRITON, os.environ.get("PYTHONPATH")]))
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env={**clean, "PYTHONPATH": path, **env}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip


@pytest.mark.timeout(1200)  # less than a minute of computing
def test_the_suite_passes_in_the_interpreter() -> None:
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore"]
    run = _run("-m", "pytest", *options, "tests/ops/suite_triton.py", TRITON_INTERPRET="1")
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed
    assert int(passed[1]) >= 85, run.stdout
    assert "skipped" not in run.stdout


@pytest.mark.timeout(1200)
def test_the_compiler_takes_every_kernel(tmp_path: Path) -> None:
    run = _run("tests/ops/compile_triton.py", *CAPABILITIES, TRITON_CACHE_DIR=str(tmp_path))
    assert run.returncode == 0, run.stdout + run.stderr[-4000:]
    lines = run.stdout.splitlines()
    assert len(lines) == 7 * 3 * len(CAPABILITIES), "seven kernels, three shapes"
    assert all(int(line.split()[-1]) > 0 for line in lines)
