"""However vLLM is configured, answers and memories stay the official code's."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest

from deltamem_vllm.memory.written import CALL
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


def check_launches(calls: dict[str, int], layers: int) -> dict[str, int]:
    """What a model with memory calls, as one without it would.

    The memory is one further operator of the whole model, in its first layer. In each of the others its projection is
    in qkv_proj's product, and it reads and writes in a plain call of the native library. Corrections are in kernels
    that are there without them.
    """
    calls = dict(calls)
    assert calls.pop("deltamem.scan_rows") == 1
    assert calls.pop(CALL) == layers - 1
    products = [name for name in calls if name.endswith(("onednn_mm", "mm", "linear"))]
    assert sum(calls[name] for name in products) == 4 * layers
    assert not [name for name in calls if name.startswith("deltamem")]
    return calls


@pytest.mark.nightly
def test_a_memory_adds_one_launch() -> None:
    expected = case(EXPECTED)
    counted = []
    for adapter in (None, expected.adapter):
        made = dataclasses.replace(setup("compiled", expected), adapter=adapter)
        with Engine(made, f"launches {'with' if adapter else 'without'} memory") as engine:
            engine.one(Ask(expected.prompt("first_turn"), None, n=2))
            counted.append(engine.launches())
    without, with_memory = counted
    assert check_launches(with_memory, layers=3) == without


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
