"""The paged delta rule in Triton, for GPUs where nothing was compiled. Import it only where Triton is installed."""

from __future__ import annotations

from torch import Tensor

from deltamem_vllm.ops import triton_chunked as chunked
from deltamem_vllm.ops import triton_kernels as kernels
from deltamem_vllm.ops.layout import UPDATE_MODES, MemoryShape
from deltamem_vllm.ops.paged import (
    Batch,
    check_page_scan_tensors,
    check_page_state_tensors,
)
from deltamem_vllm.ops.pooled import Book, check_pool, check_take

WARPS = 1
#: From so many tokens in one request on, a step is cut into chunks; and how long these are.
WORTH_CHUNKS, SHORTEST_CHUNK, LONGEST_CHUNK = 192, 64, 256
#: Ranks above keep more than a warp's registers in a chunk's summary.
LARGEST_CHUNKED_RANK = 16


class TritonOps:
    """`deltamem_vllm.ops.paged.PagedOps` and `deltamem_vllm.ops.pooled.PoolOps` in Triton.

    Shapes and dtypes are checked and raise. Indices live on the device and are not fetched, so that a launch can be
    captured in a CUDA graph: one that does not fit is not followed, and its request reads zero.

    Args:
        chunk: tokens per chunk of a prefill that is cut into chunks, a multiple of the block size; 0 never cuts, −1
            (what is served) cuts long ones.

    Raises:
        ImportError: Triton is not installed.
    """

    name = "triton"
    description = "triton"
    graph_safe = True

    def __init__(self, chunk: int = -1) -> None:
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
        check_page_scan_tensors(shape, projected, bias, pages, batch, reads)
        if batch.num_reqs == 0 or projected.shape[0] == 0:
            reads.zero_()
            return
        if chunk := self._chunk_of(shape, projected.shape[0], batch):
            _scan_in_chunks(shape, projected, bias, pages, batch, reads, chunk)
            return
        kernels.page_scan_kernel[(batch.num_reqs, shape.heads)](
            projected,
            projected.stride(0),
            bias,
            pages,
            pages.stride(0),
            pages.shape[0],
            batch.block_table,
            batch.block_table.stride(0),
            batch.block_table.shape[1],
            batch.query_start_loc,
            batch.seq_lens,
            batch.write_limit,
            batch.unwritten,
            reads,
            projected.shape[0],
            reads.shape[0],
            batch.num_reqs,
            batch.block_size,
            *_constants(shape),
            NORMALIZE=shape.normalize_qk,
            num_warps=WARPS,
        )

    def _chunk_of(self, shape: MemoryShape, tokens: int, batch: Batch) -> int:
        """Tokens per chunk of a step; 0: it runs in one launch."""
        if self._chunk >= 0:
            return self._chunk
        longest = batch.longest or tokens - batch.num_reqs + 1
        if longest < WORTH_CHUNKS or shape.rank > LARGEST_CHUNKED_RANK:
            return 0
        length = SHORTEST_CHUNK
        while length < LONGEST_CHUNK and 2 * length * length < longest:
            length *= 2
        return -(-length // batch.block_size) * batch.block_size

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
        check_page_state_tensors(shape, pages, block_ids, counts, block_size, out)
        if len(block_ids) == 0:
            return
        kernels.page_state_kernel[(len(block_ids), shape.heads)](
            pages, pages.stride(0), pages.shape[0], block_ids, counts, out, block_size,
            *_constants(shape), num_warps=WARPS,
        )  # fmt: skip

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
        check_take(shape, book, (block_ids, counts, slots), states, staging)
        if len(block_ids) == 0:
            return
        pages = book.layers[0]
        kernels.take_kernel[(len(block_ids), len(book.layers), shape.heads)](
            book.addresses, pages.stride(0), pages.shape[0], block_ids, counts, slots, states.shape[0], states,
            states if staging is None else staging, book.block_size, len(book.layers),
            *_constants(shape), STAGED=staging is not None, num_warps=WARPS,
        )  # fmt: skip

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
        check_pool(shape, book, (block_ids, sources), states, staging)
        if len(block_ids) == 0:
            return
        pages, floats = book.layers[0], shape.state_floats
        kernels.seed_kernel[(len(block_ids), len(book.layers))](
            book.addresses, pages.stride(0), pages.shape[0], block_ids, sources, states.shape[0], states,
            0 if staging is None else staging.shape[0], states if staging is None else staging,
            len(book.layers), floats, _power_of_two(floats), STAGED=staging is not None, num_warps=WARPS,
        )  # fmt: skip


def _scan_in_chunks(
    shape: MemoryShape, projected: Tensor, bias: Tensor, pages: Tensor, batch: Batch, reads: Tensor, chunk: int
) -> None:
    tokens, rank, heads = projected.shape[0], shape.rank, shape.heads
    count = tokens // chunk + 2 * batch.num_reqs
    queries = reads.new_empty((tokens, shape.width))
    summaries = reads.new_empty((count, heads, rank + 1, rank, rank))
    starts = reads.new_empty((count, heads, rank, rank))
    at = (
        pages, pages.stride(0), pages.shape[0], batch.block_table, batch.block_table.stride(0),
        batch.block_table.shape[1], batch.query_start_loc, batch.seq_lens, batch.write_limit,
    )  # fmt: skip
    constants = _constants(shape)
    chunked.activate_kernel[(count, heads)](
        projected, projected.stride(0), bias, *at, batch.unwritten, reads, queries, summaries, tokens, reads.shape[0],
        batch.num_reqs, count, batch.block_size, chunk, *constants[:2], _power_of_two(rank + 1), *constants[2:],
        NORMALIZE=shape.normalize_qk, num_warps=1 if rank <= 8 else 4,
    )  # fmt: skip
    chunked.combine_kernel[(batch.num_reqs, heads)](
        *at, summaries, starts, tokens, batch.num_reqs, batch.block_size, chunk, *constants,
        num_warps=1 if rank <= 8 else 4,
    )  # fmt: skip
    chunked.rescan_kernel[(count, heads)](
        *at, reads, queries, starts, tokens, batch.num_reqs, batch.block_size, chunk, *constants, num_warps=WARPS
    )  # fmt: skip


def _constants(shape: MemoryShape) -> tuple[int, int, int, bool, bool, int]:
    mode = UPDATE_MODES.index(shape.update_mode)
    return shape.rank, _power_of_two(shape.rank), shape.heads, shape.rankwise_gates, shape.has_lambda, mode


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
