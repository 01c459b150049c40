"""The custom ops that stand in the model's graph: activate, read and write one layer's memory for one step.

``deltamem::scan(projected[T, C], bias, reads[T, R] (out), layer) -> ()``. It finds the step's metadata and the
layer's pages in vLLM's forward context, so the compiled graph holds nothing that changes between steps.

Where layers form a chain (`deltamem_vllm.memory.chain`) the first one's operator is ``deltamem::scan_rows``, and the
others' is ``deltamem_native::scan_next``, which goes on from there, or ``deltamem::project_next``, which makes the rows
too, by vLLM's own product; in what Inductor writes that is vLLM's operator and a plain call, no operator of ours
(`deltamem_vllm.memory.written`). All correct q, k and v too, in place, in the rows that qkv_proj put out, and o in the
residual to which it will be added. What of a layer is the same in every step, its bias and the corrections' matrices,
they are told of once and not in each call: between two layers a model's weights go through the caches, and whatever a
call touches is fetched from memory again.
"""

from typing import Any

import torch
from vllm.forward_context import get_forward_context

from deltamem_vllm import compat
from deltamem_vllm.memory import written
from deltamem_vllm.ops.dispatch import Preference, select
from deltamem_vllm.ops.layout import MemoryShape
from deltamem_vllm.ops.native import LayerRows, NativeOps, Product
from deltamem_vllm.ops.paged import PagedOps

OP = "deltamem::scan"


def kernels_for(device: torch.device, prefer: Preference, shape: MemoryShape) -> PagedOps:
    """The paged operators for an adapter on a device; chosen, and announced, once per process."""
    return select(device.type, prefer, shape)


def _scan(projected: torch.Tensor, bias: torch.Tensor, reads: torch.Tensor, layer: str) -> None:
    context: Any = get_forward_context()
    if context.attn_metadata is None:  # profiling and warm-up: no request, no page
        reads.zero_()
        return
    pages: Any = context.no_compile_layers[layer]
    pages.kernels.page_scan(pages.shape, projected, bias, pages.pages, context.attn_metadata[layer], reads)


def _scan_rows(
    rows: torch.Tensor,
    projected: torch.Tensor | None,
    reads: torch.Tensor | None,
    residual: torch.Tensor | None,
    layer: str,
) -> None:
    context: Any = get_forward_context()
    pages: Any = context.no_compile_layers[layer]
    pages.chain.begin(LayerRows(rows, projected, reads, residual), context.attn_metadata)


def _project_next(
    rows: torch.Tensor,
    reads: torch.Tensor | None,
    residual: torch.Tensor | None,
    hidden: torch.Tensor,
    bias: torch.Tensor | None,
    handler: torch.Tensor,
    place: int,
) -> None:
    layer, product = LayerRows(rows, None, reads, residual), Product(handler, rows.shape[-1])
    NativeOps.project_next(layer, hidden, bias, product, place)


def scan(pages: Any, projected: torch.Tensor, bias: torch.Tensor, reads: torch.Tensor) -> None:
    """One layer's memory for one step, as a node of the graph; arguments as of `PagedOps.page_scan`.

    Args:
        pages: the layer's `StatePages`, which is in no chain.
    """
    torch.ops.deltamem.scan(projected, bias, reads, pages.prefix)


def scan_rows(pages: Any, layer: LayerRows) -> None:
    """One layer's memory and its corrections in place for one step, as a node of the graph.

    Args:
        pages: the layer's `StatePages`, which is in a chain.
    """
    if pages.follows:
        NativeOps.scan_next(layer, pages.place)
    else:
        torch.ops.deltamem.scan_rows(*layer, pages.prefix)


def scan_product(
    pages: Any, layer: LayerRows, hidden: torch.Tensor, bias: torch.Tensor | None, product: Product
) -> None:
    """`scan_rows`, and before it the linear that makes the rows, as one node of the graph.

    Args:
        pages: the layer's `StatePages`, which `follows` another one.
    """
    torch.ops.deltamem.project_next(layer.rows, layer.kept, layer.residual, hidden, bias, product.handler, pages.place)


def _nothing(*_: Any) -> None:
    """Under tracing nothing runs: ``reads`` already has its shape, and rows keep theirs."""


_library = torch.library.Library("deltamem", "FRAGMENT")
_library.define("scan(Tensor projected, Tensor bias, Tensor(a!) reads, str layer) -> ()")
_library.define(
    "scan_rows(Tensor(a!) rows, Tensor? projected, Tensor(b!)? reads, Tensor(c!)? residual, str layer) -> ()"
)
_library.define(
    "project_next(Tensor(a!) rows, Tensor(b!)? reads, Tensor(c!)? residual, Tensor hidden, Tensor? bias, "
    "Tensor handler, int place) -> ()"
)
for _device in ("CPU", "CUDA"):
    _library.impl("scan", _scan, _device)
_library.impl("scan_rows", _scan_rows, "CPU")
_library.impl("project_next", _project_next, "CPU")
for _op in ("scan", "scan_rows", "project_next"):
    _library.impl(_op, _nothing, "Meta")
compat.write_calls("deltamem.project_next.default", written.project_next)
