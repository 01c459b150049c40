"""One wrapped attention layer: the memory is read and written where q, k and v are made, and corrects them and o.

    hooks on qkv_proj (or q/k/v_proj)    reads = scan(projected)          (`memory.scan`: the one node of a graph)
                                         output += reads · M_q, M_k, M_v  (on a CPU that node's work too, in place)
    hook on o_proj                       output += reads · M_o

where M is a correction's matrix times alpha / rank and its trained scale, and ``projected`` = input · Wᵀ comes out of
qkv_proj itself, as more of its columns, where its weight can be appended to (`deltamem_vllm.memory.appended`).

Hooks rather than subclasses: the same few lines serve every backbone whose attention has these projections, native
or through the Transformers backend, fused or not, eager or compiled. Source: `delta-mem` §3 (arXiv 2605.12357).
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from deltamem_vllm.adapter.config import Head
from deltamem_vllm.adapter.weights import LayerWeights
from deltamem_vllm.memory.appended import append_rows, can_append
from deltamem_vllm.memory.correct import correct
from deltamem_vllm.memory.pages import StatePages
from deltamem_vllm.memory.scan import scan, scan_rows
from deltamem_vllm.ops.native import LayerRows, tiled

QKV: tuple[Head, ...] = ("q", "k", "v")
ONLY_SPLIT = ("Qwen3Attention", "Qwen3MoeAttention", "Qwen2Attention", "LlamaAttention", "MistralAttention")
"""vLLM 0.32's attention modules that do nothing with qkv_proj's output but split it into q, k and v at once: what they
are handed need not be one run of memory (columns of wider rows), nor one tensor (`Parts`)."""


class Parts:
    """q, k and v as they leave `split`, which is all that the modules `ONLY_SPLIT` do with what qkv_proj puts out.

    Put together as one tensor, a corrected q is a kernel of its own, since that tensor is taken apart again; by itself
    it is computed where it is read, in the kernel of q's norm.
    """

    def __init__(self, *parts: torch.Tensor) -> None:
        self._parts = parts

    def split(self, sizes: Sequence[int], dim: int = -1) -> tuple[torch.Tensor, ...]:
        """The parts, which are cut so already."""
        if list(sizes) != [part.shape[-1] for part in self._parts] or dim != -1:
            raise ValueError(f"q, k and v are {[part.shape[-1] for part in self._parts]} wide, not {sizes} along {dim}")
        return self._parts


class MemoryLayer(nn.Module):
    """The memory of one attention module.

    Args:
        weights: this layer's tensors; ``delta["q"|"k"|"v"]`` already cut to this tensor-parallel rank.
        pages: this layer's state pages.
        scaling: alpha / rank.
        dtype: the backbone's dtype; corrections are computed in it, the state in fp32.

    Attributes:
        projection: [C, D], or None where qkv_proj computes it.
        in_rows, first: the corrections of q, k and v as `LayerRows` has them, once `correct_in_rows` was called.
    """

    def __init__(
        self, weights: LayerWeights, pages: StatePages, scaling: float, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.pages = pages
        self.width, self.dtype = pages.shape.width, dtype
        self.o_norm_eps = weights.o_norm_eps
        self._reads: torch.Tensor | None = None
        self.first = 0
        self.in_rows: torch.Tensor | None
        self.projection: torch.Tensor | None
        self.bias: torch.Tensor
        self.o_norm_weight: torch.Tensor | None
        # Buffers, not parameters: vLLM's weight loader must not look for them in the checkpoint.
        put = self.register_buffer
        put("projection", weights.projection.to(device, dtype), persistent=False)
        put("in_rows", None, persistent=False)
        put("bias", weights.bias.to(device, torch.float32), persistent=False)
        for head, delta in weights.delta.items():
            scaled = delta.to(device, torch.float32).t() * (scaling * weights.scale.get(head, 1.0))
            put(f"matrix_{head}", scaled.to(dtype).contiguous(), persistent=False)
        normed = weights.o_norm_weight
        put("o_norm_weight", None if normed is None else normed.to(device, torch.float32), persistent=False)

    def matrix(self, head: str) -> torch.Tensor | None:
        """[R, width of the projection], scaled; None where that one is not corrected."""
        found: torch.Tensor | None = getattr(self, f"matrix_{head}", None)
        return found

    def correct_in_rows(self, widths: Mapping[Head, int]) -> None:
        """Have `read_rows` correct q, k and v in place from now on, where they lie beside each other.

        Args:
            widths: of q, k and v.
        """
        starts = dict(zip(widths, itertools.accumulate([0, *widths.values()]), strict=False))
        found = {head: matrix for head in widths if (matrix := self.matrix(head)) is not None}
        if not found:
            return
        self.first = min(starts[head] for head in found)
        stop = max(starts[head] + widths[head] for head in found)
        whole = torch.zeros((self.width, stop - self.first), dtype=self.dtype, device=self.bias.device)
        for head, matrix in found.items():
            whole[:, starts[head] - self.first :][:, : widths[head]] = matrix
            delattr(self, f"matrix_{head}")
        self.in_rows = tiled(whole)

    def read_rows(self, rows: torch.Tensor, projected: torch.Tensor | None) -> None:
        """`read`, and correct in place what qkv_proj put out.

        Args:
            rows: [T, q | k | v | projected], or [T, q | k | v] where ``projected`` is given.
        """
        reads = torch.empty((rows.shape[0], self.width), dtype=torch.float32, device=rows.device)
        scan_rows(self.pages, LayerRows(rows, projected, self.bias, self.in_rows, self.first, reads))
        self._reads = reads

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T, C] of the input [..., D] of the layer's q, k and v, where qkv_proj does not compute it."""
        assert self.projection is not None
        return F.linear(hidden.reshape(-1, hidden.shape[-1]), self.projection)

    def correct_qkv(self, rows: torch.Tensor, widths: Mapping[Head, int]) -> list[torch.Tensor]:
        """q, k and v of rows [T, q | k | v | …], corrected."""
        parts = []
        own = torch.split(rows[:, : sum(widths.values())], [*widths.values()], dim=-1)
        for head, part in zip(widths, own, strict=True):
            matrix = self.matrix(head)
            parts.append(part if matrix is None else correct(part, self.reads, matrix))
        return parts

    def read(self, projected: torch.Tensor) -> torch.Tensor:
        """Run the memory over this step's tokens; returns the reads [T, R] fp32, and keeps them for the corrections.

        Args:
            projected: [T, C], which may be columns of a wider tensor.
        """
        reads = torch.empty((projected.shape[0], self.width), dtype=torch.float32, device=projected.device)
        if self.pages.chain is not None:
            scan_rows(self.pages, LayerRows(None, projected, self.bias, None, 0, reads))
        else:
            scan(self.pages, projected, self.bias, reads)
        self._reads = reads
        return reads

    def read_once(self, hidden: torch.Tensor) -> None:
        """Project the input [..., D] of the layer's q, k and v here and read, unless one of them has done so."""
        if self._reads is None:
            self.read(self.project(hidden))

    @property
    def reads(self) -> torch.Tensor:
        """[T, R] fp32: what this step has read."""
        assert self._reads is not None
        return self._reads

    def correct_o(self, output: torch.Tensor) -> torch.Tensor:
        """o_proj's output [T, D] with its correction."""
        reads, matrix = self.reads, self.matrix("o")
        if matrix is None:
            return output
        if self.o_norm_weight is None:
            return correct(output, reads, matrix)
        wide = reads @ matrix.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.o_norm_eps) * self.o_norm_weight
        return output + wide.to(output.dtype)

    def forget_reads(self) -> None:
        """Drop the step's reads: nothing of one step may reach the next."""
        self._reads = None


def attach(module: Any, memory: MemoryLayer, sizes: tuple[int, int]) -> bool:
    """Hook a memory onto an attention module whose weights have not been loaded yet.

    Args:
        module: has ``o_proj`` and either ``qkv_proj`` or ``q_proj``, ``k_proj``, ``v_proj``.
        memory: becomes the submodule ``deltamem``.
        sizes: local output widths of q and of k (= v), which order the fused output as q | k | v.

    Returns:
        Whether qkv_proj computes the memory's projection too.
    """
    module.deltamem = memory
    module.o_proj.register_forward_hook(_last_hook(memory))
    if not hasattr(module, "qkv_proj"):
        for head in QKV:
            linear = getattr(module, f"{head}_proj")
            linear.register_forward_pre_hook(_first_hook(memory))
            linear.register_forward_hook(_plain_hook(memory, head))
        return False
    widths: dict[Head, int] = {"q": sizes[0], "k": sizes[1], "v": sizes[1]}
    appended = can_append(module.qkv_proj)
    if appended:
        assert memory.projection is not None
        append_rows(module.qkv_proj, memory.projection)
        memory.projection = None
    only_split = type(module).__name__ in ONLY_SPLIT
    if memory.pages.chain is not None:
        memory.correct_in_rows(widths)
        module.qkv_proj.register_forward_hook(_rows_hook(memory, sum(widths.values()), appended, only_split))
    else:
        if not appended:
            module.qkv_proj.register_forward_pre_hook(_first_hook(memory))
        module.qkv_proj.register_forward_hook(_fused_hook(memory, widths, appended, only_split))
    return appended


def _changed(output: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A linear's output with its rows [T, N] changed; vLLM's linears return (output, bias), the Transformers backend's
    just the output."""
    if isinstance(output, tuple):
        return (_changed(output[0], change), *output[1:])
    rows = change(output.reshape(-1, output.shape[-1]))
    return rows.view(*output.shape[:-1], rows.shape[-1])


def _first_hook(memory: MemoryLayer) -> Callable[..., Any]:
    """Reads before the linear runs, from the input as it is given."""

    def hook(module: nn.Module, args: Any) -> None:
        memory.read_once(args[0])

    return hook


def _rows_hook(memory: MemoryLayer, width: int, appended: bool, only_split: bool) -> Callable[..., Any]:
    """Reads and corrects what the linear puts out, in place, and hands on its columns of q, k and v."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        value, *rest = output if isinstance(output, tuple) else (output,)
        rows = value.reshape(-1, value.shape[-1])
        memory.read_rows(rows, None if appended else memory.project(args[0]))
        result = rows[:, :width].view(*value.shape[:-1], width)
        if not only_split:
            result = result.contiguous()
        return (result, *rest) if isinstance(output, tuple) else result

    return hook


def _fused_hook(
    memory: MemoryLayer, widths: Mapping[Head, int], appended: bool, only_split: bool
) -> Callable[..., Any]:
    """Reads, and hands on q, k and v corrected: apart, or put together again."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        value, *rest = output if isinstance(output, tuple) else (output,)
        rows = value.reshape(-1, value.shape[-1])
        if appended:
            memory.read(rows[:, -memory.pages.shape.projected_columns :])
        made = memory.correct_qkv(rows, widths)
        result = Parts(*made) if only_split else torch.cat(made, dim=-1).view(*value.shape[:-1], sum(widths.values()))
        return (result, *rest) if isinstance(output, tuple) else result

    return hook


def _plain_hook(memory: MemoryLayer, head: Head) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        reads, matrix = memory.reads, memory.matrix(head)
        return output if matrix is None else _changed(output, lambda rows: correct(rows, reads, matrix))

    return hook


def _last_hook(memory: MemoryLayer) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        result = _changed(output, memory.correct_o)
        memory.forget_reads()
        return result

    return hook
