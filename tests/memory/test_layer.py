"""What a memory does to the linears of an attention module, without an engine."""

from __future__ import annotations

import ast
import inspect
import textwrap
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.model_executor.models.qwen3 import Qwen3Attention

from deltamem_vllm.adapter.weights import LayerWeights
from deltamem_vllm.memory.hooks import ONLY_SPLIT
from deltamem_vllm.memory.layer import MemoryLayer
from deltamem_vllm.ops.native import TILE, LayerConstants
from tests.ops.paging import make_shape


def test_what_qkv_proj_puts_out_is_only_split() -> None:
    [name] = ONLY_SPLIT
    assert Qwen3Attention.__name__ == name
    tree = ast.parse(textwrap.dedent(inspect.getsource(Qwen3Attention.forward)))
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    uses = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == "qkv"]
    loads = [use for use in uses if isinstance(use.ctx, ast.Load)]
    assert len(uses) == 2, f"{name} does something else with what qkv_proj puts out"
    assert ast.unparse(parents[parents[loads[0]]]) == "qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)"


@pytest.mark.parametrize("heads", ["q", "k", "v", "qk", "kv", "qv", "qkv"])
def test_corrections_are_put_beside_each_other(heads: str) -> None:
    """The one matrix corrects every column as the matrices of q, k and v would."""
    shape, widths = make_shape(8), {"q": 48, "k": 16, "v": 16}
    random = torch.Generator().manual_seed(0)
    delta = {head: torch.randn(widths[head], 8, generator=random) for head in heads}
    weights: Any = LayerWeights(
        projection=torch.zeros(shape.projected_columns, 4), bias=torch.zeros(shape.bias_columns), delta=delta,
        scale={"k": 3.0}, o_norm_weight=None, o_norm_eps=1e-6,
    )  # fmt: skip
    known: list[LayerConstants] = []
    pages: Any = SimpleNamespace(shape=shape, chain=object(), know=known.append)
    memory = MemoryLayer(weights, pages, 0.5, torch.float32, torch.device("cpu"))
    expected = torch.zeros(8, 80)
    starts = {"q": 0, "k": 48, "v": 64}
    for head in heads:
        expected[:, starts[head] :][:, : widths[head]] = memory.matrix(head)
        assert torch.equal(memory.matrix(head), delta[head].t() * (1.5 if head == "k" else 0.5))
    memory.correct_in_rows(widths)
    assert memory.in_rows is not None
    first = starts[heads[0]]
    flat = memory.in_rows.transpose(0, 1).reshape(8, -1)
    stop = starts[heads[-1]] + widths[heads[-1]]
    assert known[-1].first == first
    assert known[-1].in_rows is memory.in_rows
    assert known[-1].bias is memory.bias
    assert torch.equal(flat[:, : stop - first], expected[:, first:stop])
    assert (flat[:, stop - first :] == 0).all()
    assert flat.shape[1] - (stop - first) < TILE
    assert [memory.matrix(head) for head in "qkv"] == [None] * 3
