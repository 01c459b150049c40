"""One wrapped attention layer: projections of the layer's input, the memory read, the corrections.

    pre-hook on the attention module     h → reads = scan(h · Wᵀ)          (deltamem::scan)
    hook on qkv_proj (or q/k/v_proj)     output += reads · B_qᵀ (B_k, B_v)
    hook on o_proj                       output += reads · B_oᵀ

Hooks rather than subclasses: the same few lines serve every backbone whose attention has these projections, native
or through the Transformers backend, fused or not, eager or compiled. Source: `delta-mem` §3 (arXiv 2605.12357).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from deltamem_vllm.adapter.config import Head
from deltamem_vllm.adapter.weights import LayerWeights
from deltamem_vllm.memory.pages import StatePages

QKV: tuple[Head, ...] = ("q", "k", "v")


class MemoryLayer(nn.Module):
    """The memory of one attention module.

    Args:
        weights: this layer's tensors; ``delta["q"|"k"|"v"]`` already cut to this tensor-parallel rank.
        pages: this layer's state pages.
        scaling: alpha / rank.
        dtype: the backbone's dtype; corrections are computed in it, the state in fp32.
    """

    def __init__(
        self, weights: LayerWeights, pages: StatePages, scaling: float, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.pages = pages
        self.width = pages.shape.width
        self.scaling = scaling
        self.scale = dict(weights.scale)
        self.o_norm_eps = weights.o_norm_eps
        self._reads: torch.Tensor | None = None
        self.projection: torch.Tensor
        self.bias: torch.Tensor
        self.o_norm_weight: torch.Tensor
        # Buffers, not parameters: vLLM's weight loader must not look for them in the checkpoint.
        put = self.register_buffer
        put("projection", weights.projection.to(device, dtype), persistent=False)
        put("bias", weights.bias.to(device, torch.float32), persistent=False)
        for head, matrix in weights.delta.items():
            put(f"delta_{head}", matrix.to(device, dtype).contiguous(), persistent=False)
        self.has_o_norm = weights.o_norm_weight is not None
        if weights.o_norm_weight is not None:
            put("o_norm_weight", weights.o_norm_weight.to(device, torch.float32), persistent=False)

    def read(self, hidden: torch.Tensor) -> None:
        """Run the memory over this step's tokens; ``hidden [..., T, D]``. The reads wait for `correct`."""
        rows = hidden.reshape(-1, hidden.shape[-1])
        projected = F.linear(rows, self.projection)
        reads = torch.empty((rows.shape[0], self.width), dtype=torch.float32, device=rows.device)
        torch.ops.deltamem.scan(projected, self.bias, reads, self.pages.prefix)
        self._reads = reads.to(rows.dtype)

    def correction(self, head: Head) -> torch.Tensor:
        """δ of one projection, ``[T, out]``: reads · Bᵀ · (alpha / rank) · g."""
        assert self._reads is not None
        delta = F.linear(self._reads, getattr(self, f"delta_{head}")) * self.scaling
        if (g := self.scale.get(head, 1.0)) != 1.0:
            delta = delta * g
        if head == "o" and self.has_o_norm:
            wide = delta.float()
            wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.o_norm_eps) * self.o_norm_weight
            delta = wide.to(delta.dtype)
        return delta

    def forget_reads(self) -> None:
        """Drop the step's reads: nothing of one step may reach the next."""
        self._reads = None


def attach(module: Any, memory: MemoryLayer, active: frozenset[Head], sizes: tuple[int, int]) -> None:
    """Hook a memory onto an attention module.

    Args:
        module: has ``o_proj`` and either ``qkv_proj`` or ``q_proj``, ``k_proj``, ``v_proj``.
        memory: becomes the submodule ``deltamem``.
        active: corrections in use, of q, k, v, o.
        sizes: local output widths of q and of k (= v), which order the fused output as q | k | v.
    """
    module.deltamem = memory
    module.register_forward_pre_hook(_read_hook, with_kwargs=True)
    if hasattr(module, "qkv_proj"):
        heads: list[Head] = [h for h in QKV if h in active]
        if heads:
            module.qkv_proj.register_forward_hook(_fused_hook(memory, heads, sizes))
    else:
        for head in QKV:
            if head in active:
                getattr(module, f"{head}_proj").register_forward_hook(_plain_hook(memory, head))
    module.o_proj.register_forward_hook(_last_hook(memory, "o" in active))


def _read_hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    hidden = kwargs.get("hidden_states")
    if hidden is None:  # positional: after integer positions in native attention, first in Transformers' own
        hidden = next(a for a in args if isinstance(a, torch.Tensor) and a.is_floating_point())
    module.deltamem.read(hidden)


def _add(output: Any, delta: torch.Tensor) -> Any:
    """Add to a linear's output; vLLM's linears return (output, bias), the Transformers backend's just the output."""
    if isinstance(output, tuple):
        return (_add(output[0], delta), *output[1:])
    return output + delta.view(output.shape)


def _fused_hook(memory: MemoryLayer, heads: list[Head], sizes: tuple[int, int]) -> Callable[..., Any]:
    q_size, kv_size = sizes
    widths: dict[Head, int] = {"q": q_size, "k": kv_size, "v": kv_size}

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        value = output[0] if isinstance(output, tuple) else output
        parts = []
        for head, width in widths.items():
            if head in heads:
                parts.append(memory.correction(head))
            else:
                parts.append(value.new_zeros((value.numel() // value.shape[-1], width)))
        if heads == ["q"]:  # the usual case touches only the columns of q
            q, rest = value.split([q_size, value.shape[-1] - q_size], dim=-1)
            value = torch.cat([q + parts[0].view(q.shape), rest], dim=-1)
            return (value, *output[1:]) if isinstance(output, tuple) else value
        return _add(output, torch.cat(parts, dim=-1))

    return hook


def _plain_hook(memory: MemoryLayer, head: Head) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        return _add(output, memory.correction(head))

    return hook


def _last_hook(memory: MemoryLayer, corrects: bool) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        result = _add(output, memory.correction("o")) if corrects else output
        memory.forget_reads()
        return result

    return hook
