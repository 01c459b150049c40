"""One attention layer's memory: reads and writes it in a step, and corrects q, k, v and o by what was read.

    reads = scan(projected)                                   (`memory.scan`: the one node of a graph)
    q, k, v += reads · M_q, M_k, M_v    o += reads · M_o      (on a CPU that node's work too: that of o in the residual)

where M is a correction's matrix times alpha / rank and its trained scale, and ``projected`` = input · Wᵀ. Where in a
model that happens: `deltamem_vllm.memory.hooks`. Source: `delta-mem` §3 (arXiv 2605.12357).
"""

import itertools
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from deltamem_vllm.adapter.config import HEADS, Head
from deltamem_vllm.adapter.weights import LayerWeights
from deltamem_vllm.memory.correct import correct
from deltamem_vllm.memory.pages import StatePages
from deltamem_vllm.memory.scan import scan, scan_product, scan_rows
from deltamem_vllm.ops.native import LayerConstants, LayerRows, Product, tiled


class MemoryLayer(nn.Module):
    """The memory of one attention module.

    Args:
        weights: this layer's tensors; ``delta["q"|"k"|"v"]`` already cut to this tensor-parallel rank.
        pages: this layer's state pages.
        scaling: alpha / rank.
        dtype: the backbone's dtype; corrections are computed in it, the state in fp32.

    Attributes:
        projection: [C, D], or None where qkv_proj computes it.
        in_rows: the corrections of q, k and v as `LayerConstants` has them, once `correct_in_rows` was called.
        in_residual: that of o, once `correct_in_residual` was called.
    """

    def __init__(
        self, weights: LayerWeights, pages: StatePages, scaling: float, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.pages = pages
        self.width, self.dtype = pages.shape.width, dtype
        self.o_norm_eps = weights.o_norm_eps
        self._in_place = False
        self._reads: torch.Tensor | None = None
        self._residual: torch.Tensor | None = None
        self.in_rows: torch.Tensor | None
        self.in_residual: torch.Tensor | None
        self.projection: torch.Tensor | None
        self.bias: torch.Tensor
        self.o_norm_weight: torch.Tensor | None
        # Buffers, not parameters: vLLM's weight loader must not look for them in the checkpoint.
        put = self.register_buffer
        put("projection", weights.projection.to(device, dtype), persistent=False)
        put("in_rows", None, persistent=False)
        put("in_residual", None, persistent=False)
        put("bias", weights.bias.to(device, torch.float32), persistent=False)
        for head, delta in weights.delta.items():
            scaled = delta.to(device, torch.float32).t() * (scaling * weights.scale.get(head, 1.0))
            put(f"matrix_{head}", scaled.to(dtype).contiguous(), persistent=False)
        normed = weights.o_norm_weight
        put("o_norm_weight", None if normed is None else normed.to(device, torch.float32), persistent=False)
        self._known = LayerConstants(self.bias)
        pages.know(self._known)

    def matrix(self, head: str) -> torch.Tensor | None:
        """[R, width of the projection], scaled; None where that one is not corrected."""
        found: torch.Tensor | None = getattr(self, f"matrix_{head}", None)
        return found

    def correct_in_rows(self, widths: Mapping[Head, int]) -> None:
        """Have `read` correct q, k and v in place from now on, where they lie beside each other.

        Args:
            widths: of q, k and v.
        """
        self._in_place = True
        starts = dict(zip(widths, itertools.accumulate([0, *widths.values()]), strict=False))
        found = {head: matrix for head in widths if (matrix := self.matrix(head)) is not None}
        if not found:
            return
        first = min(starts[head] for head in found)
        stop = max(starts[head] + widths[head] for head in found)
        whole = torch.zeros((self.width, stop - first), dtype=self.dtype, device=self.bias.device)
        for head, matrix in found.items():
            whole[:, starts[head] - first :][:, : widths[head]] = matrix
            delattr(self, f"matrix_{head}")
        self.in_rows = tiled(whole)
        self._know(in_rows=self.in_rows, first=first)

    def correct_in_residual(self) -> bool:
        """Have `read` correct o in the residual from now on, of which `add_to` tells before.

        Only in fp32: a residual of 16 bits would be rounded once more. Returns whether it will.
        """
        matrix = self.matrix("o")
        if matrix is None or self.o_norm_weight is not None or self.dtype != torch.float32:
            return False
        self.in_residual = tiled(matrix)
        delattr(self, "matrix_o")
        self._know(in_residual=self.in_residual)
        return True

    def _know(self, **constants: Any) -> None:
        self._known = self._known._replace(**constants)
        self.pages.know(self._known)

    def add_to(self, residual: torch.Tensor) -> None:
        """Name what this step's o will be added to [T, D], after `correct_in_residual`."""
        self._residual = residual

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T, C] of the input [..., D] of the layer's q, k and v, where qkv_proj does not compute it."""
        assert self.projection is not None
        return F.linear(hidden.reshape(-1, hidden.shape[-1]), self.projection)

    def read(self, rows: torch.Tensor, projected: torch.Tensor | None = None) -> None:
        """Run the memory over this step's tokens, and keep what it reads for the corrections.

        Args:
            rows, projected: as `LayerRows` has them; corrected if `correct_in_rows` was called.
        """
        source = rows if projected is None else projected
        if self.pages.chain is not None:
            scan_rows(self.pages, self._in_chain(rows, projected))
        else:
            self._reads = self._room(source)
            scan(self.pages, source[:, -self.pages.shape.projected_columns :], self.bias, self._reads)

    def read_product(self, product: Product, hidden: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """What a linear puts out [..., N + C] for hidden [..., D], once `read` has run over it: both in one call.

        Args:
            product, bias: the linear's.
        """
        inputs = hidden.reshape(-1, hidden.shape[-1])
        rows = inputs.new_empty((inputs.shape[0], product.columns))
        scan_product(self.pages, self._in_chain(rows, None), inputs, bias, product)
        return rows.view(*hidden.shape[:-1], product.columns)

    def _in_chain(self, rows: torch.Tensor, projected: torch.Tensor | None) -> LayerRows:
        """What a layer of a chain is given; with room for reads only if a correction is left to be made from them."""
        if self.in_residual is not None and self._residual is None:
            raise RuntimeError(
                f"{self.pages.prefix}: the norm before this attention did not run, and o is corrected in the residual "
                "that it names: serve with --deltamem-kernel torch, and report it"
            )
        keeps = not self._in_place or any(self.matrix(head) is not None for head in HEADS)
        self._reads = self._room(rows if projected is None else projected) if keeps else None
        return LayerRows(rows, projected, self._reads, self._residual)

    def _room(self, tokens: torch.Tensor) -> torch.Tensor:
        """For what is read at so many tokens [T, …]."""
        return torch.empty((tokens.shape[0], self.width), dtype=torch.float32, device=tokens.device)

    def read_once(self, hidden: torch.Tensor) -> None:
        """Project the input [..., D] of q, k and v, which are made apart, and read, unless one of them has done so."""
        if self._reads is None:
            self.read(self.project(hidden))

    @property
    def reads(self) -> torch.Tensor:
        """[T, R] fp32: what this step has read."""
        assert self._reads is not None
        return self._reads

    def corrected(self, rows: torch.Tensor, widths: Mapping[Head, int]) -> list[torch.Tensor]:
        """q, k and v of rows [T, q | k | v | …], with their corrections; new tensors where they have one."""
        own = torch.split(rows[:, : sum(widths.values())], [*widths.values()], dim=-1)
        return [self.corrected_one(head, part) for head, part in zip(widths, own, strict=True)]

    def corrected_one(self, head: Head, part: torch.Tensor) -> torch.Tensor:
        """q, k or v [T, N] with its correction, where it has one."""
        matrix = self.matrix(head)
        return part if matrix is None else correct(part, self.reads, matrix)

    def correct_o(self, output: torch.Tensor) -> torch.Tensor:
        """o_proj's output [T, D] with its correction, unless the residual has that already."""
        matrix = self.matrix("o")
        if matrix is None:
            return output
        reads = self.reads
        if self.o_norm_weight is None:
            return correct(output, reads, matrix)
        wide = reads @ matrix.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.o_norm_eps) * self.o_norm_weight
        return output + wide.to(output.dtype)

    def forget_step(self) -> None:
        """Drop the step's tensors: nothing of one step may reach the next."""
        self._reads = self._residual = None
