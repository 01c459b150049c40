"""What the memory is said to do, against random queries, real weights and the rows that tokens leave."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from deltamem_vllm import metrics
from deltamem_vllm.adapter.weights import load_adapter
from deltamem_vllm.memory.watching import Attention, gate_means
from deltamem_vllm.ops import reference
from deltamem_vllm.ops.layout import MemoryShape
from deltamem_vllm.sessions.meters import Meters, Sample
from deltamem_vllm.sessions.quality import RECENT, Corrections, Quality, SampleOfMemory, corrections_of
from tests.server.conftest import FIXTURE

DIRECTIONS = 20_000


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def measured(matrix: np.ndarray, state: np.ndarray, norm: tuple[np.ndarray, float] | None = None) -> float:
    """Root mean square of |δo| over random queries of norm 1 per head; ``matrix [D, H·r]``, ``state [H, r, r]``."""
    heads, rank, _ = state.shape
    queries = random(DIRECTIONS, heads, rank, seed=1)
    queries /= np.linalg.norm(queries, axis=-1, keepdims=True)
    reads = np.einsum("hij,nhj->nhi", state, queries).reshape(DIRECTIONS, -1)
    delta = reads @ matrix.T
    if norm is not None:
        weight, epsilon = norm
        delta = delta / np.sqrt(np.square(delta).mean(-1, keepdims=True) + epsilon) * weight
    return math.sqrt(np.square(delta).sum(-1).mean())


@pytest.mark.parametrize("heads", [1, 4])
def test_corrections_are_as_large_as_random_queries_make_them(heads: int) -> None:
    layers, rank, width = 3, 8, 48
    matrices, states = random(layers, width, heads * rank), random(layers, heads, rank, rank, seed=2)
    grams = [np.einsum("dhi,dhj->hij", *[m.reshape(width, heads, rank)] * 2) for m in matrices]
    found = Corrections(np.stack(grams), width).of(states)
    wanted = [measured(m, s) for m, s in zip(matrices, states, strict=True)]
    assert found == pytest.approx(wanted, rel=0.02)


def test_a_normalised_correction_has_its_weights_size_whatever_the_state() -> None:
    rank, width = 8, 48
    matrix, state, weight = random(width, rank), random(1, 1, rank, rank, seed=2), 1 + 0.1 * random(width, seed=3)
    gram = (matrix.T @ matrix)[None, None]
    norm = (float(np.square(weight).mean()), 1e-6)
    for scale in (1.0, 100.0):
        found = float(Corrections(gram, width, (norm,)).of(state * np.float32(scale))[0])
        assert found == pytest.approx(measured(matrix, state[0] * scale, (weight, 1e-6)), rel=0.05)


def test_an_adapters_own_scaling_is_in_them() -> None:
    adapter = load_adapter(FIXTURE / "adapter")
    found = corrections_of(adapter)
    assert found is not None
    shape = adapter.shape
    states = random(len(adapter.layers), shape.heads, shape.rank, shape.rank)
    for layer, state, size in zip(adapter.layers.values(), states, found.of(states), strict=True):
        matrix = layer.delta["o"].float().numpy() * adapter.config.scaling * layer.scale["o"]
        assert size == pytest.approx(measured(matrix, state), rel=0.02)


def quality() -> tuple[Quality, Meters]:
    meters = Meters()
    made = Quality(meters, (3, 7), Corrections(np.stack([np.eye(2, dtype=np.float32)[None]] * 2), 2))
    return made, meters


def value(samples: list[Sample], metric: metrics.Metric, *labels: str) -> Any:
    found = [value for name, have, value in samples if (name, have) == (metric.name, labels)]
    assert len(found) <= 1
    return found[0] if found else None


def test_a_memory_that_does_nothing_is_called_inert_until_it_does_something() -> None:
    made, meters = quality()
    made.note_sample(SampleOfMemory(outputs={0: 2.0, 1: 2.0}))
    for _ in range(RECENT):
        assert value(made.samples(), metrics.INERT) == 0
        made.note_commit(np.full((2, 1, 2, 2), 1e-6, np.float32))
    assert value(made.samples(), metrics.INERT) == 1
    made.note_commit(np.ones((2, 1, 2, 2), np.float32))
    assert value(made.samples(), metrics.INERT) == 0
    assert value(meters.samples(), metrics.MEMORY_COMMITS, "inert") == RECENT
    assert value(meters.samples(), metrics.MEMORY_COMMITS, "live") == 1


def test_norms_and_ratios_of_known_states() -> None:
    made, meters = quality()
    state = np.stack([np.eye(2, dtype=np.float32)[None], 3 * np.eye(2, dtype=np.float32)[None]])
    made.note_commit(state)
    assert value(meters.samples(), metrics.CORRECTION_RATIO) is None, "the size of outputs is not known yet"
    made.note_sample(SampleOfMemory(outputs={0: 2.0, 1: 2.0}, gates={0: (0.25, None), 1: (0.5, 0.75)}))
    made.note_commit(state)
    samples = [*made.samples(), *meters.samples()]
    assert value(samples, metrics.LAYER_STATE_NORM, "3") == pytest.approx(math.sqrt(2))
    assert value(samples, metrics.LAYER_STATE_NORM, "7") == pytest.approx(math.sqrt(18))
    assert value(samples, metrics.STATE_NORM)[-1] == pytest.approx(2 * math.sqrt(10))
    assert value(samples, metrics.LAYER_CORRECTION_RATIO, "3") == pytest.approx(0.5), "|B S q| is 1"
    assert value(samples, metrics.LAYER_CORRECTION_RATIO, "7") == pytest.approx(1.5)
    assert value(samples, metrics.GATE_MEAN, "beta", "3") == 0.25
    assert value(samples, metrics.GATE_MEAN, "lambda", "7") == 0.75
    assert value(samples, metrics.GATE_MEAN, "lambda", "3") is None


def test_a_state_that_cannot_be_measured_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    made, _ = quality()
    for _ in range(3):
        made.note_commit(np.ones((5, 1, 2, 2), np.float32))
    assert caplog.text.count("is not measured any more") == 1


@pytest.mark.parametrize("own_lambda", [False, True])
def test_gates_are_those_of_the_rows_that_were_written(own_lambda: bool) -> None:
    shape = MemoryShape(
        rank=4, heads=2, rankwise_gates=True, couple_lambda=not own_lambda, update_mode="standard", normalize_qk=True
    )
    tokens, count = 16, 9
    k, v = torch.randn(count, shape.width), torch.randn(count, shape.width)
    beta, lam = torch.rand(count, shape.gates) + 0.01, torch.rand(count, shape.gates)
    rows = reference.log_rows(shape, k, v, beta, lam)
    rows[2:5] = reference.idle_row(shape, rows)
    pages = torch.full((3, shape.page_floats(tokens)), 7.0)
    pages[1, shape.state_floats : shape.state_floats + rows.numel()] = rows.flatten()
    layer: Any = SimpleNamespace(shape=shape, pages=pages)
    (found,) = gate_means([layer], 1, count)
    written = [0, 1, 5, 6, 7, 8]
    assert found[0] == pytest.approx(float(beta[written].mean()))
    assert found[1] == (pytest.approx(float(lam[written].mean())) if own_lambda else None)
    pages[1] = 0
    assert gate_means([layer], 1, count) == []


def test_the_size_of_an_attention_output_is_that_of_its_projections() -> None:
    hidden, head, q, kv = 32, 8, 32, 16
    module: Any = torch.nn.Module()
    module.qkv_proj, module.o_proj = torch.nn.Linear(hidden, q + 2 * kv + 5, bias=False), torch.nn.Linear(q, hidden)
    module.deltamem = SimpleNamespace(bias=torch.zeros(1), dtype=torch.float32)  # its projection: the last columns
    module.qkv_proj.register_forward_hook(lambda *_: pytest.fail("a hook ran, which adds corrections"))
    norm: Any = SimpleNamespace(weight=torch.rand(hidden) * 3)
    found = Attention(module, norm, (q, kv), head, hidden).typical_output()
    values = module.qkv_proj.weight[q + kv : q + 2 * kv] * norm.weight
    wide = values.view(kv // head, head, hidden).repeat_interleave(q // kv, 0).reshape(q, hidden)
    whole = module.o_proj.weight @ wide  # E |W n + b|² = |W|² + |b|² for white n
    exact = math.sqrt(float((whole.square().sum() + module.o_proj.bias.square().sum()).detach()))
    assert found == pytest.approx(exact, rel=0.15)
