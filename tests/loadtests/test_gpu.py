"""What of the GPU script can be proven without a GPU: that every part runs, in small, on a CPU; that one part's failure
hides no other's results; and the table."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from loadtests.gpu import __main__ as script
from loadtests.gpu.build import command
from loadtests.gpu.table import markdown

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of one tiny run of everything."""
    folder = tmp_path_factory.mktemp("gpu")
    run = subprocess.run(
        [sys.executable, "-m", "loadtests.gpu", "--tiny", "--out", str(folder)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    return folder


def test_every_part_leaves_its_results(out: Path) -> None:
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert results["problems"] == {}
    assert list(results["parts"]) == list(script.PARTS)
    assert results["parts"]["check"]["ok"] is True
    assert results["parts"]["check"]["passed"] > 10
    kernels = results["parts"]["kernels"]
    assert all(any(key.startswith(what) for key in kernels) for what in ("copy", "decode", "prefill", "update", "take"))
    stack = results["parts"]["stack"]
    assert stack["torch: kernels per layer"]["memory"] > stack["torch: kernels per layer"]["without"]
    tpot = next(value for key, value in stack.items() if "TPOT" in key)
    assert {"without ms", "memory %", "memory, appended %", "without again %"} <= set(tpot)


def test_the_table_has_every_row(out: Path) -> None:
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))["parts"]
    text = (out / "results.md").read_text(encoding="utf-8")
    for part in results.values():
        for key in part:
            assert f"\n| {key} |" in text


def test_the_parts_together_end_within_nine_minutes() -> None:
    assert sum(script.PARTS.values()) <= 9 * 60 - 10


def test_a_part_that_fails_or_hangs_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``kernels`` gets no time, ``nonsense`` does not exist; ``build`` still reports."""
    (tmp_path / "kernels.json").write_text('{"left over": 1}', encoding="utf-8")
    budgets = {"nonsense": 60.0, "kernels": 0.01, "build": 120.0}
    problems = script.run(list(budgets), tmp_path, True, budgets)
    assert problems == {"nonsense": "exit code 1", "kernels": "out of time after 0 s"}
    results = script.collect(list(budgets), tmp_path)
    assert list(results) == ["build"], "results of an earlier run are not taken for this one's"
    text = markdown(results, problems)
    assert "| gpu | none: a tiny run on the CPU |" in text
    assert "**kernels: out of time after 0 s**" in text


def test_unknown_parts_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script.main(["--parts", "build,speed"])
    assert re.search(r"unknown parts: speed; there are build, check, kernels, stack", capsys.readouterr().err)


def test_the_build_names_the_gpu_and_every_source() -> None:
    line = command("nvcc", Path("x/_cuda.so"), (10, 0))
    assert "arch=compute_100,code=sm_100" in line
    sources = [Path(word) for word in line if word.endswith((".cu", ".cpp"))]
    assert [path.name for path in sources] == ["kernels.cu", "cuda_ops.cpp"]
    assert all(path.is_file() for path in sources)


def test_a_partial_incomplete_part_is_marked() -> None:
    text = markdown({"stack": {"a": {"x": 1, "y": 2}, "b": {"x": 3, "y": 4}, "c": "d|e"}}, {"stack": "exit code 1"})
    assert "**Incomplete: exit code 1**" in text
    assert "| what | x | y |\n|---|---|---|\n| a | 1 | 2 |\n| b | 3 | 4 |" in text
    assert "| c | d\\|e |" in text
