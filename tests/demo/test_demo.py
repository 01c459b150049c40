"""``make demo`` as a person runs it, on real vLLM and the bundled model."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from deltamem_vllm.demo.__main__ import main
from deltamem_vllm.demo.server import group_members


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A temporary folder with a short name: vLLM makes Unix sockets in it, whose paths are limited."""
    folder = Path(tempfile.mkdtemp(prefix="dm"))
    yield folder
    shutil.rmtree(folder)


def test_the_demo_shows_what_it_claims_and_leaves_nothing_behind(temporary: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "deltamem_vllm.demo"],
        env={**os.environ, "TMPDIR": str(temporary), "COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 of 4 questions are answered right, without it 0 of 4" in done.stdout
    assert "All of the above was checked" in done.stdout
    killed = re.findall(r"killed process group (\d+)", done.stdout)
    assert len(killed) == 1
    assert group_members(int(killed[0])) == []
    assert list(temporary.iterdir()) == []


def test_without_a_model_it_fails_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "/no/such/model"]) == 1
    assert "/no/such/model does not exist" in capsys.readouterr().out
