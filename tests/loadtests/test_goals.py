"""The CPU's goals: each finds its figure in what the benchmarks return, and is judged the right way round."""

from __future__ import annotations

import itertools
import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from deltamem_vllm.ops.dispatch import select
from deltamem_vllm.ops.layout import RELEASED
from deltamem_vllm.ops.native import NativeOps, tiled
from deltamem_vllm.report.arm import Timing
from deltamem_vllm.report.compare import per_token
from loadtests import decode, goals, hooks, overhead, plot, sessions, table
from loadtests.__main__ import PARTS, markdown

ROWS: dict[str, list[dict[str, Any]]] = {
    "operators": [
        {"implementation": "native", "isa": "avx2", "threads": 1, "rank": rank, "heads": 1, "scan_ns": 10.0 * rank,
         "activation_ns": 5.0}
        for rank in (8, 16)
    ],
    "sessions": [
        {"name": "warm load: both", "value": 90.0, "unit": "µs", "goal": "<= 100"},
        {"name": "durable commits of known sessions, grouped", "value": 20_000.0, "unit": "/s", "goal": ">= 10000"},
        {"name": "verified cold restores, 1 thread", "value": 10.0, "unit": "/s", "goal": ">= 20000"},
    ],
    "overhead": [
        *({"what": what, "vanilla ms": 50.0, "memory %": 1.25, "vanilla again %": 0.1}
          for what in ("TPOT, B=1", "TPOT, B=8", "TTFT, 128 tokens", "TTFT, 2048 tokens")),
        *({"what": f"TPOT, B={batch}, beside LoRA", "vanilla ms": 50.0, "memory %": 9.0, "lora / memory": 1.15}
          for batch in (1, 8)),
    ],
    "history": [{"turn": 10, "full ms": 5.0, "elide ms": 4.0}, {"turn": 20, "full ms": 9.0, "elide ms": 4.0}],
    "long history": [
        {"history": tokens, "full ms": full, "elide ms": 80.0, "elide / full": 80.0 / full}
        for tokens, full in ((8192, 1000.0), (32768, 1500.0))
    ],
}  # fmt: skip


def test_every_goal_finds_its_figure() -> None:
    figures = {goal.what: goal.find(ROWS) for goal in goals.GOALS}
    assert None not in figures.values(), figures
    assert all(goal.find({}) is None for goal in goals.GOALS)


@pytest.mark.parametrize(
    ("what", "verdict"),
    [
        ("time per token, 1 request", "pass"),
        ("time per token, 8 requests", "FAIL"),
        ("LoRA's time per token to ours, 1", "FAIL"),
        ("LoRA's time per token to ours, 8", "pass"),
        ("time to the first token, 8,192 tokens elided, to full replay", "pass"),
        ("time to the first token, 32,768 tokens elided, to full replay", "FAIL"),
        ("scan, rank 8", "FAIL"),
        ("durable commits, grouped", "pass"),
        ("verified cold restores", "FAIL"),
    ],
)
def test_goals_are_judged(what: str, verdict: str) -> None:
    goal = next(goal for goal in goals.GOALS if goal.what == what)
    figure = goal.find(ROWS)
    assert figure is not None
    assert goal.verdict(figure) == verdict


@pytest.mark.parametrize(("again", "said"), [(0.4, "pass"), (-1.31, "unclear: vanilla against itself is -1.31 %")])
def test_a_figure_within_the_noise_says_nothing(again: float, said: str) -> None:
    row = {"what": "TPOT, B=1", "memory %": -2.0, "memory % ±": 0.25, "vanilla again %": again}
    line = next(line for line in goals.table({"overhead": [row]}) if line.startswith("| time per token, 1 request"))
    assert line.endswith(f"| -2.00 ± 0.25 | {said} |")


def test_starts_are_averaged_and_rounds_kept() -> None:
    figures = ((1, -2.0), (1, 0.0), (2, 4.0), (1, 0.0))
    rounds = [{"start": start, "vanilla ms": 2.0, "memory %": percent} for start, percent in figures]
    of_token, of_prompt = [rounds[0], rounds[1], rounds[2]], [rounds[3]]
    rows = overhead.mean([{"what": "TPOT", **each} for each in of_token] + [{"what": "TTFT", **of_prompt[0]}])
    error = {"memory % ±": pytest.approx(2.5), "rounds": 3}  # of -1 and 4, the medians of two starts
    assert rows == [
        {"what": "TPOT", "vanilla ms": 2.0, "memory %": pytest.approx(1.5), **error, "by round": of_token},
        {"what": "TTFT", "vanilla ms": 2.0, "memory %": 0.0, "by round": of_prompt},
    ]
    assert overhead.mean([{"what": "TPOT", **each} for each in rounds[:2]])[0]["memory % ±"] == pytest.approx(1.0)
    disturbed = [{**rounds[1], "memory %": percent} for percent in (0.6, -11.5, 0.8)]
    assert overhead.mean([{"what": "TPOT", **each} for each in disturbed])[0]["memory %"] == pytest.approx(0.6)
    assert table.markdown(rows) == [
        "| what | vanilla ms | memory % | memory % ± | rounds |",
        "|---|---|---|---|---|",
        "| TPOT | 2.00 | 1.50 | 2.50 | 3 |",
        "| TTFT | 2.00 | 0.00 |  |  |",
    ]


def test_every_arm_starts_once_in_each_place() -> None:
    orders = [overhead.turned(overhead.CLOSE, number) for number in range(len(overhead.CLOSE))]
    assert all(sorted(each) == sorted(overhead.CLOSE) for each in (*orders, *zip(*orders, strict=True)))


def test_arms_take_memory_in_each_place_of_the_order_equally_often() -> None:
    arms = list(overhead.CLOSE)
    orders = overhead.taking(arms)
    assert len({*orders}) == len(orders) == 2 * len(arms)
    for half in (orders[: len(arms)], orders[len(arms) :]):
        assert all(sorted(each) == sorted(arms) for each in (*half, *zip(*half, strict=True)))
    follows = Counter(pair for order in orders for pair in itertools.pairwise(order))
    assert len(follows) == len(arms) * (len(arms) - 1)
    assert {*follows.values()} == {2}


class Counted:
    """An arm without an engine: its steps take as long as the number of times that its weights were moved."""

    def __init__(self) -> None:
        self.moved = self.left = 0
        self.dropped = False
        self.cores: list[int] = []
        self.timing = Timing(0.0, [], 0.0)

    def run_on(self, core: int) -> None:
        self.cores.append(core)

    def move_out(self) -> None:
        assert not self.dropped
        self.dropped = True

    def move_in(self) -> tuple[int, int]:
        assert self.dropped
        self.dropped = False
        self.moved += 1
        return 1, 1

    def begin(self, prompts: list[list[int]], tokens: int) -> None:
        assert not self.dropped
        self.left, self.timing = tokens, Timing(float(self.moved), [], 0.0)

    def step(self) -> bool:
        self.left -= 1
        self.timing.gaps.append(float(self.moved))
        return self.left > 0

    def end(self) -> Timing:
        return self.timing


def test_every_row_is_of_other_places_of_the_weights() -> None:
    """Before each round every arm moves its weights, and all of them to one core: where a round has several prompts,
    they run on the same."""
    arms: dict[str, Any] = {name: Counted() for name in overhead.CLOSE}
    rows = overhead.measure(arms, 100, [2], [128, 2048], tokens=3, rounds=4)
    assert [row["what"] for row in rows] == ["TPOT, B=2"] * 4 + ["TTFT, 128 tokens"] * 4 + ["TTFT, 2048 tokens"] * 2
    places = [row["vanilla ms"] / 1e3 for row in rows]
    assert all(place == round(place) for place in places), "a row mixes places"
    assert len(set(places)) == len(rows), "two rows are of the same places"
    assert all(row["memory %"] == row["vanilla again %"] == 0 for row in rows), "an arm was left where it was"
    assert len({tuple(arm.cores) for arm in arms.values()}) == 1, "arms of one round run on different cores"
    assert {*arms["vanilla"].cores} == {*sorted(os.sched_getaffinity(0))[:4]}, "four rounds, a core each"


def test_memory_is_compared_with_both_engines_of_vanilla() -> None:
    took = {
        name: [Timing(0.0, [seconds], 0.0)]
        for name, seconds in (("vanilla", 1.0), ("memory", 1.2), ("vanilla again", 1.5))
    }
    row = overhead.row("TPOT", took, per_token)
    assert row["vanilla again %"] == pytest.approx(50.0)
    assert row["memory %"] == pytest.approx(100 * ((1.2 + 1.2 / 1.5) / 2 - 1))


def test_a_picture_where_an_arm_was_not_measured(tmp_path: Path) -> None:
    rows = [
        {"what": "TPOT, B=1", "vanilla ms": 50.0, "memory %": 1.0, "lora %": 40.0},
        {"what": "TTFT", "vanilla ms": 9.0, "memory %": 1.0},
    ]
    plot.draw({"overhead": rows}, tmp_path / "some.png", "a machine")
    assert (tmp_path / "some.png").exists()


def test_what_was_not_measured_is_said() -> None:
    text = markdown({}, {"overhead": "SystemExit: differs"})
    assert text.count("not measured") == len(goals.GOALS)
    assert f"Nothing of *{PARTS['overhead'][0]}*: SystemExit: differs" in text


def test_a_picture_of_what_there_is(tmp_path: Path) -> None:
    plot.draw({}, tmp_path / "none.png", "nothing")
    assert not (tmp_path / "none.png").exists()
    plot.draw(ROWS, tmp_path / "some.png", "a machine")
    assert (tmp_path / "some.png").read_bytes().startswith(b"\x89PNG")


def test_hooks_are_measured_on_a_real_session_service() -> None:
    rows = hooks.measure(running=4, steps=40)
    assert {row["hook"] for row in rows} == {"arrive", "first step", "decode step", "finish", "state"}
    assert all(0 < row["p50 µs"] <= row["p99 µs"] for row in rows)


def test_a_decode_step_is_measured() -> None:
    rows = decode.measure(repeats=2, batches=(1, 3), models=2)
    assert [row["requests"] for row in rows] == [1, 3]
    for row in rows:
        assert len(row) == 9
        assert all(math.isfinite(value) for value in row.values())
        assert all(value > 0 for name, value in row.items() if not name.startswith(("projection", "memory")))


@torch.inference_mode()
def test_no_step_replays_what_another_arm_left_out() -> None:
    native = select("cpu", "native")
    assert isinstance(native, NativeOps)
    model = decode.Model(native, RELEASED, 1, 8)
    for call in (model.alone, model.product, model.plain_call, model.operator):
        model.step(call)
        for layer, pages in enumerate(model.pages):
            page = pages[model.blocks[0, 0]]
            end = RELEASED.state_floats + decode.BLOCK * RELEASED.log_columns
            assert page[end + 1].view(torch.int32) == model.tokens, f"{call.__name__}: layer {layer} stands still"


def test_what_a_decode_step_adds_is_a_mean_without_pauses() -> None:
    alone = [1e-3, 2e-3, 1e-3, 2e-3, 1e-3, 2e-3, 1e-3, 2e-3, 1e-3, 2e-3]
    assert decode.added([each + 5e-6 for each in alone[:8]] + [1.0, 0.0], alone) == pytest.approx(5)


def test_a_wrong_decode_step_has_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "tiled", lambda matrix: tiled(2 * matrix))
    with pytest.raises(SystemExit, match="nothing is measured"):
        decode.measure(repeats=1, batches=(1,), models=2)


def test_sessions_are_measured_on_real_stores() -> None:
    rows = sessions.rows(count=20, layers=2, rounds=3)
    assert all(0 < row["least"] <= row["value"] <= row["most"] for row in rows)
    found = {row["name"]: row["value"] for row in rows}
    measured = {"sessions": [{"name": name, "value": value} for name, value in found.items()]}
    assert [g.what for g in goals.GOALS if g.find(measured)] == [
        g.what for g in goals.GOALS if g.find({"sessions": ROWS["sessions"]})
    ]
