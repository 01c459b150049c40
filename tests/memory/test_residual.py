"""o corrected in the residual, before it is added there: the same sum, where decoder layer and dtype allow it."""

from __future__ import annotations

import ast
import inspect
import textwrap
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vllm.model_executor.models import qwen3

from deltamem_vllm.adapter.weights import LayerWeights
from deltamem_vllm.memory.hooks import ADDS_O_AT_ONCE, attach, attach_to_residual
from deltamem_vllm.memory.layer import MemoryLayer
from deltamem_vllm.ops.native import LayerRows
from tests.memory.worker import SHAPE, TOKENS, Worker
from tests.ops.paging import random_inputs

HIDDEN, Q, KV = 40, 24, 8


def test_what_attention_puts_out_is_only_added() -> None:
    [name] = ADDS_O_AT_ONCE
    tree = ast.parse(textwrap.dedent(inspect.getsource(getattr(qwen3, name).forward)))
    body: Any = tree.body[0]
    told = [ast.unparse(statement) for statement in body.body]
    assert told == [
        "if residual is None:\n    residual = hidden_states\n    hidden_states = self.input_layernorm(hidden_states)\n"
        "else:\n    hidden_states, residual = self.input_layernorm(hidden_states, residual)",
        "hidden_states = self.self_attn(positions=positions, hidden_states=hidden_states)",
        "hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)",
        "hidden_states = self.mlp(hidden_states)",
        "return (hidden_states, residual)",
    ], f"{name} does something else with what attention puts out"


class Norm(nn.Module):
    """Adds, and hands on what it has added to, as vLLM's."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        return x if residual is None else (x + residual, x + residual)


class Linear(nn.Module):
    """One that is not vLLM's plain one: the memory's projection is a product of its own."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, columns) / 6, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t().to(x.dtype)


class Attention(nn.Module):
    """Of which q is all that counts."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv_proj, self.o_proj = Linear(Q + 2 * KV, HIDDEN), Linear(HIDDEN, Q)

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.o_proj(self.qkv_proj(hidden)[:, :Q].contiguous())
        return out


class Qwen3DecoderLayer(nn.Module):
    """The part of one that matters: what it hands to its MLP, and the residual."""

    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm, self.self_attn, self.post_attention_layernorm = Norm(), Attention(), Norm()

    def forward(self, hidden: Tensor, residual: Tensor | None) -> Tensor:
        if residual is None:
            residual = hidden
            hidden = self.input_layernorm(hidden)
        else:
            hidden, residual = self.input_layernorm(hidden, residual)
        found: Tensor = self.post_attention_layernorm(self.self_attn(hidden), residual)[1]
        return found


class OtherDecoderLayer(Qwen3DecoderLayer):
    """Nobody has looked at what it does with o."""


def weights(heads: str = "qo", normed: bool = False) -> LayerWeights:
    sizes = {"q": Q, "k": KV, "v": KV, "o": HIDDEN}
    random = torch.Generator().manual_seed(1)
    delta: Any = {head: torch.randn(sizes[head], SHAPE.width, generator=random) for head in heads}
    projection = torch.randn(SHAPE.projected_columns, HIDDEN, generator=random) / 6
    bias, norm = random_inputs(SHAPE, 1)[1], torch.ones(HIDDEN) if normed else None
    return LayerWeights(projection, bias, delta, {}, norm, 1e-6)


class Model:
    """The second layer of a worker; the first is its chain's, and has nothing to correct."""

    def __init__(self, kind: type[Qwen3DecoderLayer], own: LayerWeights, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.worker = Worker()
        self.memories = [
            MemoryLayer(each, pages, 1.0, dtype, torch.device("cpu"))
            for each, pages in zip((weights(""), own), self.worker.layers, strict=True)
        ]
        self.layer, self.memory = kind(), self.memories[1]
        attach(self.layer.self_attn, self.memory, (Q, KV))
        attach_to_residual(self.layer, self.memory)
        for pages in self.worker.layers:
            pages.base_of(3).copy_(random_inputs(SHAPE, 1)[2])
        self.dtype = dtype

    def run(self, first: bool = False) -> Tensor:
        """A step. first: the layer is given no residual."""
        reads = torch.empty(TOKENS, SHAPE.width)
        self.worker.chain.begin(LayerRows(random_inputs(SHAPE, TOKENS)[0], None, reads), self.worker.batches())
        random = torch.Generator().manual_seed(2)
        hidden, residual = (torch.randn(TOKENS, HIDDEN, generator=random).to(self.dtype) for _ in range(2))
        kept = hidden.clone(), residual.clone()
        out: Tensor = self.layer(hidden, None if first else residual)
        assert first or torch.equal(hidden, kept[0])
        assert torch.equal(residual, kept[1]), "what the layer was given is not its own"
        assert self.memory._residual is None
        return out


def test_the_sum_is_the_same() -> None:
    here, there = Model(Qwen3DecoderLayer, weights()), Model(OtherDecoderLayer, weights())
    assert here.memory.in_residual is not None
    assert there.memory.in_residual is None
    got, expected = here.run(), there.run()
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)
    assert (got != expected).any(), "both took the same way"
    without = Model(OtherDecoderLayer, weights("q"))
    assert (without.run() - expected).abs().max() > 0.01, "o was not corrected"


def test_in_a_models_first_layer_the_residual_is_what_its_norm_reads() -> None:
    here, there = Model(Qwen3DecoderLayer, weights()), Model(OtherDecoderLayer, weights())
    torch.testing.assert_close(here.run(first=True), there.run(first=True), rtol=0, atol=2e-5)


@pytest.mark.parametrize("heads", ["o", "qo", "ko", "qkvo", "qkv", ""])
def test_whatever_else_is_corrected(heads: str) -> None:
    here, there = Model(Qwen3DecoderLayer, weights(heads)), Model(OtherDecoderLayer, weights(heads))
    torch.testing.assert_close(here.run(), there.run(), rtol=0, atol=2e-5)
    for one, other in zip(here.worker.layers, there.worker.layers, strict=True):
        assert torch.equal(one.kv_cache, other.kv_cache)


@pytest.mark.parametrize(
    ("own", "dtype"),
    [(weights(), torch.bfloat16), (weights(normed=True), torch.float32), (weights("q"), torch.float32)],
    ids=["rounded once more", "normed", "not corrected"],
)
def test_else_o_stays_behind_o_proj(own: LayerWeights, dtype: torch.dtype) -> None:
    here, there = Model(Qwen3DecoderLayer, own, dtype), Model(OtherDecoderLayer, own, dtype)
    assert here.memory.in_residual is None
    assert torch.equal(here.run(), there.run())


def test_attention_without_the_norm_before_it_is_refused() -> None:
    """Its o would go without a correction, and nobody would know."""
    model = Model(Qwen3DecoderLayer, weights())
    with pytest.raises(RuntimeError, match=r"1\.deltamem: the norm before this attention did not run"):
        model.layer.self_attn(torch.randn(TOKENS, HIDDEN))


def test_without_a_chain_o_stays_behind_o_proj() -> None:
    asked: list[str] = []
    memory: Any = SimpleNamespace(pages=SimpleNamespace(chain=None), correct_in_residual=lambda: asked.append("in"))
    attach_to_residual(Qwen3DecoderLayer(), memory)
    assert not asked
