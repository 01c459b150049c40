"""A linear that puts out a memory's projection too: what the memory sees of it, in one call or in two."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from deltamem_vllm.adapter.weights import LayerWeights
from deltamem_vllm.memory.appended import AppendedLinearMethod, append_rows, can_append, product_alone
from deltamem_vllm.memory.chain import Chain
from deltamem_vllm.memory.layer import MemoryLayer
from deltamem_vllm.memory.pages import StatePages, WriteMasks
from deltamem_vllm.ops.dispatch import select
from deltamem_vllm.ops.native import LayerRows, NativeOps
from deltamem_vllm.ops.paged import Batch
from tests.ops.paging import int32, make_shape, random_inputs, truth
from tests.tolerances import KERNEL_READS

SHAPE, N, OWN, HIDDEN, TOKENS = make_shape(8), 16, 24, 40, 5
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


class Worker:
    """Two layers, the second of which has such a linear, in a step of one request."""

    def __init__(self, with_bias: bool = False) -> None:
        torch.manual_seed(0)
        kernels = select("cpu", "native")
        assert isinstance(kernels, NativeOps)
        self.chain, self.masks = Chain(kernels), WriteMasks()
        config: Any = SimpleNamespace(
            cache_config=SimpleNamespace(block_size=N), compilation_config=SimpleNamespace(static_forward_context={})
        )
        self.layers = [StatePages(f"{i}.deltamem", i, SHAPE, kernels, self.masks, config, self.chain) for i in range(2)]
        self.memories = [
            MemoryLayer(
                LayerWeights(torch.randn(COLUMNS, HIDDEN) / 6, random_inputs(SHAPE, 1)[1], {}, {}, None, 1e-6),
                pages, 1.0, torch.float32, torch.device("cpu"),
            )
            for pages in self.layers
        ]  # fmt: skip
        for layer in self.layers:
            layer.bind_kv_cache(torch.zeros((8, 1, N, SHAPE.floats_per_token(N))))
            layer.base_of(3).copy_(random_inputs(SHAPE, 1)[2])
        self.memory, self.linear = self.memories[1], Linear(with_bias)
        self.own, self.projection = self.linear.weight.clone(), self.memory.projection
        assert can_append(self.linear)
        append_rows(self.linear, self.memory)
        self.method: AppendedLinearMethod = self.linear.quant_method
        self.method.process_weights_after_loading(self.linear)

    def begin(self) -> None:
        """Run the first layer."""
        batch = Batch(int32([[3]]), int32([0, TOKENS]), int32([TOKENS]), self.masks.limits, self.masks.unwritten, N, 1)
        reads = torch.empty(TOKENS, SHAPE.width)
        rows = LayerRows(random_inputs(SHAPE, TOKENS)[0], None, reads)
        self.chain.begin(rows, {layer.prefix: batch for layer in self.layers})

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
    worker, x = Worker(with_bias), torch.randn(TOKENS, HIDDEN)
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
            worker, x = Worker(), torch.randn(1, TOKENS, HIDDEN)  # as the Transformers backend hands it in
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
    worker, x = Worker(with_bias=True), torch.randn(TOKENS, HIDDEN)
    before = [layer.kv_cache.clone() for layer in worker.layers]
    torch.testing.assert_close(product_alone(worker.linear, x), worker.expected(x), rtol=0, atol=1e-5)
    assert all(torch.equal(layer.kv_cache, old) for layer, old in zip(worker.layers, before, strict=True))
    with pytest.raises(RuntimeError, match="out, or run twice"):
        worker.linear(x)
    plain = Linear(with_bias=True)
    plain.quant_method.process_weights_after_loading(plain)
    assert torch.equal(product_alone(plain, x), plain(x))


def test_rows_are_appended_once() -> None:
    worker, x = Worker(), torch.randn(TOKENS, HIDDEN)
    worker.linear.weight = nn.Parameter(torch.cat([worker.own, worker.projection]), requires_grad=False)
    worker.method.process_weights_after_loading(worker.linear)
    assert product_alone(worker.linear, x).shape[-1] == OWN + COLUMNS
