"""The layers of a worker as one row: bound once, bound again where vLLM moves their pages, never over two groups."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deltamem_vllm.errors import ConfigError
from deltamem_vllm.memory.pages import PageMetadataBuilder
from deltamem_vllm.ops.native import LayerConstants, LayerRows, NativeOps
from deltamem_vllm.ops.paged import Batch
from tests.memory.worker import SHAPE, TOKENS, Worker
from tests.ops.paging import random_inputs, truth
from tests.tolerances import KERNEL_READS


class Known(Worker):
    """Layers that have told the chain of themselves."""

    def __init__(self) -> None:
        super().__init__()
        for layer in self.layers:
            layer.know(LayerConstants(random_inputs(SHAPE, TOKENS)[1]))

    def step(self, batches: dict[str, Batch] | None) -> list[torch.Tensor]:
        projected = random_inputs(SHAPE, TOKENS)[0]
        reads = [torch.full((TOKENS, SHAPE.width), float("nan")) for _ in self.layers]
        first, second = (LayerRows(projected, None, out) for out in reads)
        self.chain.begin(first, batches)
        NativeOps.scan_next(second, self.layers[1].place)
        return reads


def test_pages_that_vllm_moves_are_followed() -> None:
    worker = Known()
    projected, bias, state = random_inputs(SHAPE, TOKENS)
    expected = truth(SHAPE, projected, bias, state)[0]
    for _ in range(2):
        for layer in worker.layers:
            layer.base_of(3).copy_(state)
        for read in worker.step(worker.batches()):
            torch.testing.assert_close(read.double(), expected, rtol=0, atol=KERNEL_READS)
        worker.bind()


def test_a_step_without_requests_touches_no_page() -> None:
    worker = Known()
    for read in worker.step(None):
        assert (read == 0).all()
    assert all((layer.kv_cache == 0).all() for layer in worker.layers)


def test_layers_of_two_groups_are_refused_at_start() -> None:
    worker = Known()
    layers = {layer.prefix: layer for layer in worker.layers}
    config: Any = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=layers))
    PageMetadataBuilder(None, list(layers), config, torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"1\.deltamem: vLLM has put these layers into another KV-cache group"):
        PageMetadataBuilder(None, ["0.deltamem"], config, torch.device("cpu"))
