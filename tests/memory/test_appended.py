"""A linear that puts out a memory's projection too: what the memory sees of it, in one call or in two."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from deltamem_vllm.adapter.weights import LayerWeights
from deltamem_vllm.memory.appended import AppendedLinearMethod, append_rows, can_append, product_alone
from deltamem_vllm.memory.layer import MemoryLayer
from deltamem_vllm.ops.native import LayerRows
from tests.memory.worker import SHAPE, TOKENS, Worker
from tests.ops.paging import random_inputs, truth
from tests.tolerances import KERNEL_READS

OWN, HIDDEN = 24, 40
COLUMNS = SHAPE.projected_columns


class Linear(nn.Module):
    """As vLLM's, before its weights are processed."""

    gather_output, tp_size, skip_bias_add = False, 1, False

    def __init__(self, with_bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(OWN, HIDDEN) / 6, requires_grad=False)
        self.bias = nn.Parameter(torch.randn(OWN), requires_grad=False) if with_bias else None
        self.quant_method: Any = UnquantizedLinearMethod()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.quant_method.apply(self, x, self.bias)
        return out


class Appended(Worker):
    """The second layer has such a linear."""

    def __init__(self, with_bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.memories = [
            MemoryLayer(
                LayerWeights(torch.randn(COLUMNS, HIDDEN) / 6, random_inputs(SHAPE, 1)[1], {}, {}, None, 1e-6),
                pages, 1.0, torch.float32, torch.device("cpu"),
            )
            for pages in self.layers
        ]  # fmt: skip
        for layer in self.layers:
            layer.base_of(3).copy_(random_inputs(SHAPE, 1)[2])
        self.memory, self.linear = self.memories[1], Linear(with_bias)
        self.own, self.projection = self.linear.weight.clone(), self.memory.projection
        assert can_append(self.linear)
        append_rows(self.linear, self.memory)
        self.method: AppendedLinearMethod = self.linear.quant_method
        self.method.process_weights_after_loading(self.linear)

    def begin(self) -> None:
        """Run the first layer."""
        reads = torch.empty(TOKENS, SHAPE.width)
        self.chain.begin(LayerRows(random_inputs(SHAPE, TOKENS)[0], None, reads), self.batches())

    def expected(self, x: Tensor) -> Tensor:
        """What the linear puts out."""
        assert self.projection is not None
        return F.linear(x, torch.cat([self.own, self.projection]), self.linear.bias)


def no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where vLLM computes the linear without oneDNN."""
    monkeypatch.setattr("deltamem_vllm.compat.onednn_product", lambda linear: None)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("apart", [False, True])
def test_the_memory_reads_what_the_linear_puts_out(
    apart: bool, with_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if apart:
        no_product(monkeypatch)
    worker, x = Appended(with_bias), torch.randn(TOKENS, HIDDEN)
    worker.begin()
    out = worker.linear(x)
    torch.testing.assert_close(out, worker.expected(x), rtol=0, atol=1e-5)
    reads, _ = truth(SHAPE, out[:, OWN:], worker.memory.bias, random_inputs(SHAPE, 1)[2])
    torch.testing.assert_close(worker.memory.reads.double(), reads, rtol=0, atol=KERNEL_READS)
    assert (worker.memory.reads != 0).any()


def test_one_call_and_two_have_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for apart in (False, True):
        with monkeypatch.context() as patch:
            if apart:
                no_product(patch)
            worker, x = Appended(), torch.randn(1, TOKENS, HIDDEN)  # as the Transformers backend hands it in
            worker.begin()
            out = worker.linear(x)
            assert out.shape == (1, TOKENS, OWN + COLUMNS)
            found.append((out, worker.memory.reads, *(layer.kv_cache for layer in worker.layers)))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("apart", [False, True])
def test_a_linear_can_be_asked_without_its_memory(apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside of any step, where a memory would refuse to run."""
    if apart:
        no_product(monkeypatch)
    worker, x = Appended(with_bias=True), torch.randn(TOKENS, HIDDEN)
    before = [layer.kv_cache.clone() for layer in worker.layers]
    torch.testing.assert_close(product_alone(worker.linear, x), worker.expected(x), rtol=0, atol=1e-5)
    assert all(torch.equal(layer.kv_cache, old) for layer, old in zip(worker.layers, before, strict=True))
    with pytest.raises(RuntimeError, match="out, or run twice"):
        worker.linear(x)
    plain = Linear(with_bias=True)
    plain.quant_method.process_weights_after_loading(plain)
    assert torch.equal(product_alone(plain, x), plain(x))


def test_rows_are_appended_once() -> None:
    worker, x = Appended(), torch.randn(TOKENS, HIDDEN)
    worker.linear.weight = nn.Parameter(torch.cat([worker.own, worker.projection]), requires_grad=False)
    worker.method.process_weights_after_loading(worker.linear)
    assert product_alone(worker.linear, x).shape[-1] == OWN + COLUMNS
