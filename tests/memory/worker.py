"""Two layers of a worker's chain, with pages as vLLM binds them, and a step of one request."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from deltamem_vllm.memory.chain import Chain
from deltamem_vllm.memory.pages import StatePages, WriteMasks
from deltamem_vllm.ops.dispatch import select
from deltamem_vllm.ops.native import NativeOps
from deltamem_vllm.ops.paged import Batch
from tests.ops.paging import int32, make_shape

SHAPE, N, LAYERS, TOKENS = make_shape(8), 16, 2, 5


class Worker:
    """The layers; the request is in block 3 and has `TOKENS` tokens."""

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
        self.bind()

    def bind(self) -> None:
        for layer in self.layers:
            layer.bind_kv_cache(torch.zeros((8, 1, N, SHAPE.floats_per_token(N))))

    def batches(self) -> dict[str, Batch]:
        """By layer, the step's."""
        batch = Batch(int32([[3]]), int32([0, TOKENS]), int32([TOKENS]), self.masks.limits, self.masks.unwritten, N, 1)
        return {layer.prefix: batch for layer in self.layers}
