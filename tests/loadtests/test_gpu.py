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
from loadtests.gpu.goals import GOALS, goals
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
    launches = stack["torch: launches per layer"]  # of those that no compiler can fuse
    assert launches["memory"] == launches["without"] + 1, "the scan"
    assert launches["memory, unfused"] == launches["without"] + 4, "projection, scan, two corrections"
    assert len(stack["torch: longest kernels"]["memory"]) == 3
    tpot = next(value for key, value in stack.items() if "TPOT" in key)
    assert {"without ms", "memory %", "memory, unfused %", "without again %"} <= set(tpot)


def measured(ok: bool) -> dict[str, dict[str, object]]:
    """Results of a run whose every figure is 0.9, with Triton's missing."""
    parts: dict[str, dict[str, object]] = {"check": {"ok": ok}, "kernels": {}, "stack": {}}
    for goal in GOALS:
        row = {goal.value.format("cuda"): 0.9 + (goal.minus is not None), **({goal.minus: 1} if goal.minus else {})}
        parts[goal.part][goal.row.format("cuda")] = row
    return parts


def test_goals_are_judged() -> None:
    text = "\n".join(goals(measured(True)))
    assert "| time per token, 1 request | ≤ 2 | ≤ 1 | 0.9 %: aim | not measured |" in text
    assert "| time to the first token, 8k | ≤ 1 | ≤ 0.4 | 0.9 %: pass | not measured |" in text
    assert "| time to the first token, 32k | ≤ 0.5 | ≤ 0.2 | 0.9 %: FAIL | not measured |" in text
    assert "| further launches per layer | ≤ 1 | ≤ 0 | 0.9: pass | not measured |" in text
    assert "token after token, 8k, 1 request | ≥ 15 | ≥ 50 | 0.9 times faster: FAIL |" in text
    assert text.count("0.9") == len(GOALS)


@pytest.mark.parametrize("change", ["failed", "absent"])
def test_no_goal_has_a_figure_unless_the_checks_have_passed(change: str) -> None:
    parts = measured(False)
    if change == "absent":
        del parts["check"]
    text = "\n".join(goals(parts))
    assert "0.9" not in text
    assert "checks of this run have not passed" in text


def test_a_full_run_measures_what_the_goals_name(out: Path) -> None:
    """The tiny run's rows and values, with the sizes of the full one, are those that the goals look for."""
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))["parts"]

    def plain(row: str) -> str:
        return re.sub(r"\d+", "#", row.format("torch"))

    for goal in GOALS:
        rows = {plain(row): value for row, value in results[goal.part].items() if isinstance(value, dict)}
        assert plain(goal.row) in rows
        if "launch /" not in goal.value:  # there is one kernel in the tiny run, nothing to compare
            assert goal.value in rows[plain(goal.row)]
    assert "| time per token, 1 request | ≤ 2 | ≤ 1 | not measured | not measured |" in (out / "results.md").read_text(
        encoding="utf-8"
    )


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
