"""However vLLM is configured, answers and memories stay the official code's."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest

from tests.engine.asking import Ask
from tests.engine.engine import Engine
from tests.engine.official import Case, case
from tests.engine.runs import RUNS
from tests.engine.setups import OPTIONS, setup

EXPECTED = "qwen3_tsw_r8"


AT_NIGHT = ("uncached", "own_process", "pp2")


@pytest.fixture(
    scope="module", params=[pytest.param(n, marks=pytest.mark.nightly) if n in AT_NIGHT else n for n in OPTIONS]
)
def configured(request: pytest.FixtureRequest) -> Iterator[tuple[str, Engine, Case]]:
    expected = case(EXPECTED)
    with Engine(setup(request.param, expected), request.param) as engine:
        yield request.param, engine, expected


def check_launches(calls: dict[str, int], layers: int) -> None:
    """Per layer the model's own four products, and one further launch: the memory's projection is in one of those
    products, its corrections are in kernels that are there without it."""
    products = sum(count for name, count in calls.items() if name.endswith(("onednn_mm", "mm", "linear")))
    assert products == 4 * layers
    assert scans(calls) == layers


def scans(calls: dict[str, int]) -> int:
    """Launches of a memory, which are taken out: the first layer's, and those that go on from it."""
    return calls.pop("deltamem.scan_rows", 0) + calls.pop("deltamem_native.scan_next", 0)


@pytest.mark.nightly
def test_a_memory_adds_one_launch_per_layer() -> None:
    expected = case(EXPECTED)
    counted = []
    for adapter in (None, expected.adapter):
        made = dataclasses.replace(setup("compiled", expected), adapter=adapter)
        with Engine(made, f"launches {'with' if adapter else 'without'} memory") as engine:
            engine.one(Ask(expected.prompt("first_turn"), None, n=2))
            counted.append(engine.launches())
    without, with_memory = counted
    assert scans(with_memory) == 3
    assert with_memory == without


@pytest.mark.parametrize("run", RUNS)
def test_answers_and_memory_stay_the_same(configured: tuple[str, Engine, Case], run: str) -> None:
    _, engine, expected = configured
    RUNS[run](engine, expected, prompt=False)


def test_the_configuration_was_at_work(configured: tuple[str, Engine, Case]) -> None:
    name, engine, _ = configured
    match name:
        case "uncached":
            assert engine.metric("vllm:prefix_cache_hits") == 0
        case "ngram":
            assert engine.metric("vllm:spec_decode_num_accepted_tokens") > 0
            assert engine.metric("vllm:spec_decode_num_drafts") > 0
        case "compiled":
            assert engine.compiled_graphs() > 0
            check_launches(engine.launches(), layers=3)
        case "v2_async":
            assert engine.setting("scheduler_config.async_scheduling")
            assert engine.setting("use_v2_model_runner")
            assert "using the V1 model runner" not in engine.log
        case "pp2":
            assert engine.setting("parallel_config.pipeline_parallel_size") == 2
        case "tp2":
            assert engine.setting("parallel_config.tensor_parallel_size") == 2
    if name != "uncached":
        assert engine.metric("vllm:prefix_cache_hits") > 0
