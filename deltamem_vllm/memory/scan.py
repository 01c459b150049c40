"""The custom op that stands in the model's graph: activate, read and write one layer's memory for one step.

``deltamem::scan(projected[T, C], bias, reads[T, R] (out), layer) -> ()``. It finds the step's metadata and the
layer's pages in vLLM's forward context, so the compiled graph holds nothing that changes between steps. Where layers
form a chain (`deltamem_vllm.memory.chain`) it is the first one's operator, and the others' is
``deltamem_native::scan_next``, which goes on from there.
"""

from typing import Any

import torch
from vllm.forward_context import get_forward_context

from deltamem_vllm.ops.dispatch import Preference, select
from deltamem_vllm.ops.layout import MemoryShape
from deltamem_vllm.ops.native import NativeOps
from deltamem_vllm.ops.paged import PagedOps

OP = "deltamem::scan"


def kernels_for(device: torch.device, prefer: Preference, shape: MemoryShape) -> PagedOps:
    """The paged operators for an adapter on a device; chosen, and announced, once per process."""
    return select(device.type, prefer, shape)


def _scan(projected: torch.Tensor, bias: torch.Tensor, reads: torch.Tensor, layer: str) -> None:
    context: Any = get_forward_context()
    pages: Any = context.no_compile_layers[layer]
    if pages.chain is not None:  # the first layer of a chain; the others are not looked up here
        pages.chain.begin(projected, bias, context.attn_metadata, reads)
        return
    if context.attn_metadata is None:  # profiling and warm-up: no request, no page
        reads.zero_()
        return
    pages.kernels.page_scan(pages.shape, projected, bias, pages.pages, context.attn_metadata[layer], reads)


def scan(pages: Any, projected: torch.Tensor, bias: torch.Tensor, reads: torch.Tensor) -> None:
    """One layer's memory for one step, as a node of the graph; arguments as of `PagedOps.page_scan`.

    Args:
        pages: the layer's `StatePages`.
    """
    if pages.place:
        NativeOps.scan_next(projected, bias, reads, pages.place)
    else:
        torch.ops.deltamem.scan(projected, bias, reads, pages.prefix)


def _scan_shape(projected: torch.Tensor, bias: torch.Tensor, reads: torch.Tensor, layer: str) -> None:
    """Under tracing nothing runs: ``reads`` already has its shape."""


_library = torch.library.Library("deltamem", "FRAGMENT")
_library.define("scan(Tensor projected, Tensor bias, Tensor(a!) reads, str layer) -> ()")
for _device in ("CPU", "CUDA"):
    _library.impl("scan", _scan, _device)
_library.impl("scan", _scan_shape, "Meta")
