"""The native CPU kernels (csrc/), loaded as a torch library. No Python API inside: one file serves every
Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from deltamem_vllm.ops import direct
from deltamem_vllm.ops.layout import MemoryShape
from deltamem_vllm.ops.paged import Batch
from deltamem_vllm.ops.pooled import Book

LIBRARY = "_native.so"
TILE = 32
"""Columns of one tile of a correction's matrix (`kMatrixTile` in csrc/cpu/delta_rule.h)."""


def find_library(name: str = LIBRARY) -> Path | None:
    """A built library, or None.

    An editable install keeps it beside the installed package and not in the source tree, so every folder that
    makes up this package is searched.
    """
    import deltamem_vllm.ops

    for folder in deltamem_vllm.ops.__path__:
        if (path := Path(folder) / name).is_file():
            return path
    return None


class LayerConstants(NamedTuple):
    """What of one layer is the same in every step; R: reads per token.

    Attributes:
        bias: as in `PagedOps.page_scan`.
        in_rows: the correction of rows from column ``first`` on, as `tiled` makes it, in their dtype. Sums are fp32,
            rounded once. A row whose reads are all zero is left as it is. None: nothing is corrected.
        first: column of `LayerRows.rows`.
        in_residual: in the same way that of `LayerRows.residual`, from its first column on.
    """

    bias: Tensor
    in_rows: Tensor | None = None
    first: int = 0
    in_residual: Tensor | None = None


@dataclass(frozen=True)
class LayerTable:
    """The constants of a chain's layers, as kernels are told of them.

    Attributes:
        layers: whose tensors are neither replaced nor resized.
        entries: [L, words] int64, with their addresses.
    """

    layers: tuple[LayerConstants, ...]
    entries: Tensor

    @staticmethod
    def of(shape: MemoryShape, layers: Sequence[LayerConstants]) -> LayerTable:
        """The table of some layers.

        Raises:
            RuntimeError: a tensor does not fit.
        """
        native = torch.ops.deltamem_native
        entries = torch.zeros((len(layers), native.entry_words()), dtype=torch.int64)
        for layer, entry in zip(layers, entries, strict=True):
            native.layer_entry(*layer, entry, shape.packed)
        return LayerTable(tuple(layers), entries)


class LayerRows(NamedTuple):
    """One layer's tensors in a step of T tokens; C: projected columns, R: reads per token.

    Attributes:
        rows: [T, q | k | v | projected], or [T, q | k | v] where ``projected`` is given: what the layer's linear put
            out, corrected in place where the layer has a matrix. [T, C] where the projection is all there is.
        projected: [T, C], or None: the last columns of ``rows``.
        kept: [T, R] fp32, out: what is read. None: only the layer's corrections in place need it.
        residual: [T, D], to which the correction of o is added, whose layer must have a matrix of it. None: whoever
            calls does that.
    """

    rows: Tensor
    projected: Tensor | None
    kept: Tensor | None
    residual: Tensor | None = None

    @property
    def reads(self) -> Tensor:
        """What is ``kept``."""
        assert self.kept is not None
        return self.kept


class Product(NamedTuple):
    """A linear's weight as vLLM has packed it for oneDNN. It goes with the linear, which whoever has one keeps.

    Attributes:
        handler: [] int64, of vLLM.
        columns: that the product puts out.
    """

    handler: Tensor
    columns: int


def tiled(matrix: Tensor) -> Tensor:
    """A correction's matrix [R, N] as [ceil(N / TILE), R, TILE]: columns that are used together lie beside each other.
    The last tile is filled up with zeros."""
    rank, columns = matrix.shape
    padded = torch.nn.functional.pad(matrix, (0, -columns % TILE))
    return padded.view(rank, -1, TILE).transpose(0, 1).contiguous()


def _check_plain(name: str, tensor: Tensor, count: int, dtype: torch.dtype) -> None:
    if tensor.dim() != 2 or len(tensor) != count or not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise RuntimeError(
            f"{name}: expected {count} contiguous rows on a CPU, got shape {list(tensor.shape)}, strides "
            f"{list(tensor.stride())} on {tensor.device}"
        )
    if tensor.dtype != dtype:
        raise RuntimeError(f"{name}: expected {dtype}, got {tensor.dtype}")


def _plain(tensor: Tensor | None) -> tuple[Tensor | None, int]:
    """With its columns."""
    return tensor, 0 if tensor is None else tensor.shape[1]


class NativeOps:
    """`deltamem_vllm.ops.paged.PagedOps` and `deltamem_vllm.ops.pooled.PoolOps` in C++ (SIMD), on a CPU.

    Raises:
        OSError: the library cannot be loaded.
        RuntimeError: from a call: a tensor or an index does not fit; nothing was changed.
    """

    name = "native"
    graph_safe = False  # walks the batch on the host

    def __init__(self, library: Path) -> None:
        if not hasattr(torch.ops.deltamem_native, "page_scan"):
            torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
            direct.bind(library)  # once: another file of the library would register its operators again
        self._scan = torch.ops.deltamem_native.page_scan.default
        self._first = torch.ops.deltamem_native.scan_first.default
        self._state = torch.ops.deltamem_native.page_state.default
        self._take = torch.ops.deltamem_native.take.default
        self._seed = torch.ops.deltamem_native.seed.default
        #: instruction set chosen for this machine: portable, avx2 or avx512
        self.isa: str = torch.ops.deltamem_native.isa()
        self.description = f"native ({self.isa})"

    def page_scan(
        self,
        shape: MemoryShape,
        projected: Tensor,
        bias: Tensor,
        pages: Tensor,
        batch: Batch,
        reads: Tensor,
    ) -> None:
        """See `PagedOps.page_scan`."""
        self._scan(projected, bias, pages, *batch[:5], reads, *batch[5:7], shape.packed)

    def scan_first(self, shape: MemoryShape, layer: LayerRows, table: LayerTable, book: Book, batch: Batch) -> None:
        """`page_scan` of the first of a book's layers, which begins a step: each of the others is then one call of
        `scan_next`, in their order and in this thread, with rows of its own and all else as here.

        Args:
            table: of the same layers as the book; both live until the step's last layer has run.
        """
        self._first(*layer, table.entries, *book.parts, book.width, *batch[:7], shape.packed)

    @staticmethod
    def scan_nothing(layers: int) -> None:
        """Begins a step of so many layers that has no request: `scan_next` only zeroes their reads."""
        torch.ops.deltamem_native.scan_nothing(layers)

    @staticmethod
    def scan_next(layer: LayerRows, place: int) -> None:
        """One further layer of the step that `scan_first` or `scan_nothing` has begun.

        Args:
            layer: of as many tokens as the first one.
            place: in the book, from 1.

        Raises:
            RuntimeError: it is not this layer's turn, or a tensor does not fit; nothing was changed.
        """
        torch.ops.deltamem_native.scan_next(*layer, place)

    @staticmethod
    def project_next(layer: LayerRows, hidden: Tensor, bias: Tensor | None, product: Product, place: int) -> None:
        """The linear whose output a layer's rows are, and then `scan_next`.

        Args:
            layer: rows [T, columns of the product], out, nothing is projected apart; all contiguous.
            hidden, bias: [T, D] and [columns], of the rows' dtype.

        Raises:
            RuntimeError: as of `scan_next`, or the product cannot be made; rows may have been written.
        """
        rows, _, kept, residual = layer
        count = len(hidden)
        if rows.dtype not in direct.DTYPES:
            raise RuntimeError(f"rows: expected one of {', '.join(map(str, direct.DTYPES))}, got {rows.dtype}")
        for name, tensor, dtype in (
            ("rows", rows, rows.dtype),
            ("reads", kept, torch.float32),
            ("residual", residual, rows.dtype),
        ):
            if tensor is not None:
                _check_plain(name, tensor, count, dtype)
        torch.ops._C.onednn_mm(rows, hidden, bias, product.handler)
        number = direct.DTYPES[rows.dtype]
        direct.next_layer(rows, count, rows.shape[1], number, *_plain(kept), *_plain(residual), place)

    def page_state(
        self,
        shape: MemoryShape,
        pages: Tensor,
        block_ids: Tensor,
        counts: Tensor,
        block_size: int,
        out: Tensor,
    ) -> None:
        """See `PagedOps.page_state`."""
        self._state(pages, block_ids, counts, out, block_size, shape.packed)

    def take(
        self,
        shape: MemoryShape,
        book: Book,
        block_ids: Tensor,
        counts: Tensor,
        slots: Tensor,
        states: Tensor,
        staging: Tensor | None,
    ) -> None:
        """See `PoolOps.take`."""
        self._take(*book.parts, block_ids, counts, slots, states, staging, book.block_size, shape.packed)

    def seed(
        self,
        shape: MemoryShape,
        book: Book,
        block_ids: Tensor,
        sources: Tensor,
        states: Tensor,
        staging: Tensor | None,
    ) -> None:
        """See `PoolOps.seed`."""
        self._seed(*book.parts, block_ids, sources, states, staging, shape.packed)
