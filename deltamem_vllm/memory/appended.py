"""The memory's projection as more rows of a linear that reads the same input: one matrix product instead of two.

A product with 4·r more rows costs what its bytes cost; one of its own costs a launch, which is more than that in every
decode step. On a CPU, behind the first layer, product and memory are one node of the graph (`memory.written`).

Only where the linear is vLLM's plain one: quantised methods pack their weights in their own way, and a
wrapped linear (LoRA) has no weight of its own to append to.
"""

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from deltamem_vllm import compat
from deltamem_vllm.memory.layer import MemoryLayer
from deltamem_vllm.ops.native import Product


def can_append(linear: Any) -> bool:
    """Whether `append_rows` fits: an unquantised linear whose output is not gathered from other ranks."""
    return type(getattr(linear, "quant_method", None)) is UnquantizedLinearMethod and not (
        getattr(linear, "gather_output", False) and linear.tp_size > 1
    )


def append_rows(linear: Any, memory: MemoryLayer) -> None:
    """Have a linear put out the memory's projection behind its own columns, once its weights are loaded, and the memory
    read it there.

    Args:
        linear: `can_append`; [N, D] weights that have not been processed yet.
        memory: its projection [C, D] is kept in the linear's dtype, the same on every tensor-parallel rank.
    """
    assert memory.projection is not None
    linear.quant_method = AppendedLinearMethod(memory.projection, memory)
    memory.projection = None


def product_alone(linear: Any, x: torch.Tensor) -> Any:
    """What a linear puts out by itself: past hooks, and past a memory that reads with it. The first of its columns are
    its own."""
    method = getattr(linear, "quant_method", None)
    if not isinstance(method, AppendedLinearMethod):
        return linear.forward(x)
    return method.product(linear, x, None if linear.skip_bias_add else linear.bias)


class AppendedLinearMethod(UnquantizedLinearMethod):
    """vLLM's plain linear method, with rows added between loading and packing, and a memory behind the product."""

    def __init__(self, rows: torch.Tensor, memory: MemoryLayer) -> None:
        super().__init__()
        self._rows: torch.Tensor | None = rows
        self._memory = memory
        self._product: Product | None = None

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Append, then do what the plain method does. A second call appends nothing."""
        if self._rows is not None:
            rows = self._rows.to(layer.weight.device, layer.weight.dtype)  # type: ignore[arg-type]
            layer.weight = nn.Parameter(torch.cat([layer.weight.data, rows]), requires_grad=False)  # type: ignore[list-item]
            if layer.bias is not None:
                more = layer.bias.new_zeros(len(rows))  # type: ignore[operator]
                layer.bias = nn.Parameter(torch.cat([layer.bias.data, more]), requires_grad=False)  # type: ignore[list-item]
            self._rows = None
        super().process_weights_after_loading(layer)
        found = compat.onednn_product(layer)
        self._product = None if found is None else Product(*found)

    def product(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """[..., N + C] of [..., D], which the memory does not see."""
        return super().apply(layer, x, bias)

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """[..., N + C] of [..., D], read by the memory, and corrected where that is done in place."""
        if self._product is not None and self._memory.pages.follows:
            return self._memory.read_product(self._product, x, bias)
        out = self.product(layer, x, bias)
        self._memory.read(out.reshape(-1, out.shape[-1]))
        return out
