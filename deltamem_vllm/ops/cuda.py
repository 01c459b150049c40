"""The CUDA kernels (csrc/cuda), loaded as a torch library. No Python API inside: one file serves every Python."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from deltamem_vllm.ops.layout import UPDATE_MODES, MemoryShape
from deltamem_vllm.ops.paged import Batch
from deltamem_vllm.ops.pooled import Book

CUDA_LIBRARY = "_cuda.so"


class CudaOps:
    """`deltamem_vllm.ops.paged.PagedOps` and `deltamem_vllm.ops.pooled.PoolOps` in CUDA.

    Args:
        library: the built `CUDA_LIBRARY`.
        chunk: tokens per chunk of a prefill that is cut into chunks, a multiple of the block size; 0 never cuts, −1
            (what is served) cuts long ones.

    Shapes, dtypes and devices are checked and raise. Indices live on the device and are not fetched, so that calls can
    be captured in a CUDA graph: one that does not fit is not followed, and its request reads zero.

    Raises:
        OSError: the library cannot be loaded.
        RuntimeError: from a call: a tensor does not fit, or a rank above 64; nothing was changed.
    """

    name = "cuda"
    description = "native (CUDA)"
    graph_safe = True

    def __init__(self, library: Path, chunk: int = -1) -> None:
        if not hasattr(torch.ops.deltamem_cuda, "page_scan"):
            torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
        ops = torch.ops.deltamem_cuda
        self._scan, self._state = ops.page_scan.default, ops.page_state.default
        self._take, self._seed = ops.take.default, ops.seed.default
        self._chunk = chunk

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
        self._scan(
            projected, bias, pages, *batch[:5], reads, *batch[5:7], *_arguments(shape), batch.longest, self._chunk
        )  # fmt: skip

    def page_state(
        self,
        shape: MemoryShape,
        pages: Tensor,
        block_ids: Tensor,
        counts: Tensor,
        block_size: int,
        out: Tensor,
    ) -> None:
        """See `PagedOps.page_state`; an entry that does not fit becomes NaN."""
        self._state(pages, block_ids, counts, out, block_size, *_arguments(shape))

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
        self._take(*book.parts, block_ids, counts, slots, states, staging, book.block_size, *_arguments(shape))

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
        self._seed(*book.parts, block_ids, sources, states, staging, *_arguments(shape))


def _arguments(shape: MemoryShape) -> tuple[int, int, bool, bool, int, bool]:
    mode = UPDATE_MODES.index(shape.update_mode)  # the order is that of the kernels' `mode`
    return shape.rank, shape.heads, shape.rankwise_gates, shape.couple_lambda, mode, shape.normalize_qk
