"""Whether vLLM may capture steps in CUDA graphs is decided by the kernels that serve."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.attention.backend import AttentionCGSupport

from deltamem_vllm.memory.pages import PageBackend, StatePages, WriteMasks
from deltamem_vllm.ops.cuda import CudaOps
from deltamem_vllm.ops.dispatch import select
from deltamem_vllm.ops.layout import RELEASED
from deltamem_vllm.ops.native import NativeOps
from deltamem_vllm.ops.paged_torch import TorchOps


def _config() -> Any:
    return SimpleNamespace(
        cache_config=SimpleNamespace(block_size=16), compilation_config=SimpleNamespace(static_forward_context={})
    )


def _support(kernels: list[Any]) -> AttentionCGSupport:
    config = _config()
    config.compilation_config.static_forward_context["layers.0.attn"] = torch.nn.Identity()
    for i, own in enumerate(kernels):
        StatePages(f"layers.{i}.deltamem", i, RELEASED, own, WriteMasks(), config)
    return PageBackend.get_builder_cls().get_cudagraph_support(config, None)


class _Gpu(TorchOps):
    graph_safe = True


def test_kernels_that_walk_the_batch_on_the_host_are_not_captured() -> None:
    assert _support([TorchOps()]) is AttentionCGSupport.NEVER
    assert _support([select("cpu", "native")]) is AttentionCGSupport.NEVER


def test_kernels_that_read_device_tensors_only_are_captured_in_decode_steps() -> None:
    assert _support([_Gpu(), _Gpu()]) is AttentionCGSupport.UNIFORM_BATCH


def test_all_layers_count() -> None:
    assert _support([_Gpu(), TorchOps()]) is AttentionCGSupport.NEVER
    assert _support([]) is AttentionCGSupport.NEVER


@pytest.mark.parametrize(("kernels", "safe"), [(CudaOps, True), (NativeOps, False), (TorchOps, False)])
def test_what_each_implementation_says(kernels: Any, safe: bool) -> None:
    assert kernels.graph_safe is safe
