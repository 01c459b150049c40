"""The memory's projection as more rows of a linear that reads the same input: one matrix product instead of two.

A product with 4·r more rows costs what its bytes cost; one of its own costs a launch, which is more than that in every
decode step. Only where the linear is vLLM's plain one: quantised methods pack their weights in their own way, and a
wrapped linear (LoRA) has no weight of its own to append to.
"""

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import UnquantizedLinearMethod


def can_append(linear: Any) -> bool:
    """Whether `append_rows` fits: an unquantised linear whose output is not gathered from other ranks."""
    return type(getattr(linear, "quant_method", None)) is UnquantizedLinearMethod and not (
        getattr(linear, "gather_output", False) and linear.tp_size > 1
    )


def append_rows(linear: Any, rows: torch.Tensor) -> None:
    """Have a linear put out ``len(rows)`` more columns, behind its own, once its weights are loaded.

    Args:
        linear: `can_append`; [N, D] weights that have not been processed yet.
        rows: [C, D], kept in the linear's dtype; the same on every tensor-parallel rank.
    """
    linear.quant_method = AppendedLinearMethod(rows)


class AppendedLinearMethod(UnquantizedLinearMethod):
    """vLLM's plain linear method, with rows added between loading and packing."""

    def __init__(self, rows: torch.Tensor) -> None:
        super().__init__()
        self._rows: torch.Tensor | None = rows

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
