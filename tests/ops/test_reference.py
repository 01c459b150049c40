"""The reference against the official code's own numbers, and against the update rule worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from deltamem_vllm.ops import reference
from tests.ops.paging import FEW_SHAPES, SHAPES, make_shape, name_of, random_inputs
from tests.tolerances import OFFICIAL_TRACE

TRACE = load_file(Path(__file__).parents[1] / "fixtures" / "official_trace.safetensors")
LAYERS = sorted({tuple(key.split("/")[:2]) for key in TRACE})


@pytest.mark.parametrize(("case", "layer"), LAYERS)
def test_reference_is_the_official_code(case: str, layer: str) -> None:
    def official(name: str) -> Tensor:
        return TRACE[f"{case}/{layer}/{name}"]

    shape = make_shape(8, 4 if "h4" in case else 1)
    names = ("memory_q_proj", "memory_k_proj", "memory_v_proj", "beta_proj")
    projection = torch.cat([official(f"weights/{name}") for name in names])
    projected = official("attn_input") @ projection.T
    activated = reference.activate(shape, projected, official("weights/beta_bias"))
    for got, name in zip(activated, ("mem_q", "mem_k", "mem_v", "beta", "lambda"), strict=True):
        torch.testing.assert_close(got.flatten(1), official(name), rtol=0, atol=OFFICIAL_TRACE)
    zero = torch.zeros(shape.heads, 8, 8)
    reads, _ = reference.scan(shape, *activated, zero)
    torch.testing.assert_close(reads, official("reads"), rtol=0, atol=OFFICIAL_TRACE)
    for head in "qo":
        delta = reads @ official(f"weights/delta_{head}_proj").T * 2.0
        torch.testing.assert_close(delta, official(f"delta_{head}"), rtol=0, atol=OFFICIAL_TRACE)


@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_step_is_the_formula_element_by_element(shape: reference.MemoryShape) -> None:
    projected, bias, state = random_inputs(shape, 1)
    _, k, v, beta, lam = (x[0].double() for x in reference.activate(shape, projected, bias))
    state = state.double()
    got = reference.step(shape, k, v, beta, lam, state)
    for h in range(shape.heads):
        for i in range(shape.rank):
            gate = i if shape.rankwise_gates else 0
            b, forget = beta[h, gate], lam[h, gate]
            if shape.update_mode == "no_lambda":
                assert forget == 1
            elif shape.couple_lambda:
                assert forget == pytest.approx(1 - b)
            keep = {"standard": forget, "lambda_outside": forget, "no_lambda": 1.0}[shape.update_mode]
            erase = {"standard": b, "lambda_outside": forget * b, "no_lambda": b}[shape.update_mode]
            p = sum(state[h, i, j] * k[h, j] for j in range(shape.rank))
            for j in range(shape.rank):
                expected = keep * state[h, i, j] - erase * p * k[h, j] + b * v[h, i] * k[h, j]
                assert got[h, i, j] == pytest.approx(float(expected), abs=1e-12)


def test_read_comes_before_the_write() -> None:
    shape = make_shape(2)
    one = torch.ones(1, 1, 2)
    zero = torch.zeros(1, 2, 2)
    reads, state = reference.scan(shape, one, one, one, one, one * 0, zero)
    assert (reads == 0).all()
    assert (state == 1).all()


def test_a_zero_vector_stays_zero_and_tanh_comes_before_the_norm() -> None:
    shape = make_shape(2)
    projected = torch.tensor([[0.0, 0.0, 3.0, 0.5, 5.0, -5.0, 0.0, 0.0]])
    q, k, v, beta, lam = reference.activate(shape, projected, torch.zeros(2))
    assert (q == 0).all()
    u = torch.tanh(torch.tensor([3.0, 0.5]))
    torch.testing.assert_close(k[0, 0], u / u.norm())
    assert torch.equal(v[0, 0], projected[0, 4:6])
    assert torch.equal(beta + lam, torch.ones_like(beta))


@pytest.mark.parametrize("shape", FEW_SHAPES, ids=name_of)
def test_replay_of_the_log_is_the_state(shape: reference.MemoryShape) -> None:
    projected, bias, state = random_inputs(shape, 12)
    q, *rest = reference.activate(shape, projected, bias)
    _, final = reference.scan(shape, q, *rest, state)
    rows = reference.log_rows(shape, *rest)
    assert rows.shape == (12, shape.log_columns)
    assert torch.equal(reference.replay(shape, state, rows), final)
    idle = reference.idle_row(shape, rows).expand(5, -1)
    assert torch.equal(reference.replay(shape, final, idle), final)
    assert torch.equal(reference.replay(shape, final, rows[:0]), final)
