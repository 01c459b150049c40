"""The layers of a worker as one row: bound once, bound again where vLLM moves their pages, never over two groups."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deltamem_vllm.errors import ConfigError
from deltamem_vllm.memory.chain import Chain
from deltamem_vllm.memory.pages import PageMetadataBuilder, StatePages, WriteMasks
from deltamem_vllm.ops.dispatch import select
from deltamem_vllm.ops.native import LayerConstants, LayerRows, NativeOps
from deltamem_vllm.ops.paged import Batch
from tests.ops.paging import int32, make_shape, random_inputs, truth
from tests.tolerances import KERNEL_READS

SHAPE, N, LAYERS = make_shape(8), 16, 2


class Worker:
    """Two layers of a worker, with pages as vLLM binds them, and a step of one request."""

    def __init__(self) -> None:
        kernels = select("cpu", "native")
        assert isinstance(kernels, NativeOps)
        self.chain, self.masks = Chain(kernels), WriteMasks()
        config: Any = SimpleNamespace(
            cache_config=SimpleNamespace(block_size=N), compilation_config=SimpleNamespace(static_forward_context={})
        )
        self.layers = [
            StatePages(f"{i}.deltamem", i, SHAPE, kernels, self.masks, config, self.chain) for i in range(LAYERS)
        ]
        for layer in self.layers:
            layer.know(LayerConstants(random_inputs(SHAPE, 5)[1]))
        self.bind()

    def bind(self) -> None:
        for layer in self.layers:
            layer.bind_kv_cache(torch.zeros((8, 1, N, SHAPE.floats_per_token(N))))

    def batch(self) -> Batch:
        return Batch(int32([[3]]), int32([0, 5]), int32([5]), self.masks.limits, self.masks.unwritten, N, 1)

    def step(self, batches: dict[str, Batch] | None) -> list[torch.Tensor]:
        projected = random_inputs(SHAPE, 5)[0]
        reads = [torch.full((5, SHAPE.width), float("nan")) for _ in self.layers]
        first, second = (LayerRows(projected, None, out) for out in reads)
        self.chain.begin(first, batches)
        NativeOps.scan_next(second, self.layers[1].place)
        return reads


def test_pages_that_vllm_moves_are_followed() -> None:
    worker = Worker()
    projected, bias, state = random_inputs(SHAPE, 5)
    expected = truth(SHAPE, projected, bias, state)[0]
    for _ in range(2):
        for layer in worker.layers:
            layer.base_of(3).copy_(state)
        batch = worker.batch()
        for read in worker.step({layer.prefix: batch for layer in worker.layers}):
            torch.testing.assert_close(read.double(), expected, rtol=0, atol=KERNEL_READS)
        worker.bind()


def test_a_step_without_requests_touches_no_page() -> None:
    worker = Worker()
    for read in worker.step(None):
        assert (read == 0).all()
    assert all((layer.kv_cache == 0).all() for layer in worker.layers)


def test_layers_of_two_groups_are_refused_at_start() -> None:
    worker = Worker()
    layers = {layer.prefix: layer for layer in worker.layers}
    config: Any = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=layers))
    PageMetadataBuilder(None, list(layers), config, torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"1\.deltamem: vLLM has put these layers into another KV-cache group"):
        PageMetadataBuilder(None, ["0.deltamem"], config, torch.device("cpu"))
