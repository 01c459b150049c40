"""The contract of the paged delta rule, and the checks that its torch and native forms share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from deltamem_vllm.ops.layout import MemoryShape

#: write_limit of a request whose tokens are all written.
WRITE_ALL = 2**31 - 1
#: write_limit of a request without memory: reads are zero and no page is touched.
WRITE_OFF = -1

PROJECTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Batch(NamedTuple):
    """Which tokens of one engine step belong to which request, and which of them are written.

    Attributes:
        block_table: [≥ num_reqs, M] int32, stride(1) = 1: the block of a request's position p is entry p // N.
        query_start_loc: [≥ num_reqs + 1] int32: request i owns rows start[i] … start[i+1]−1.
        seq_lens: [≥ num_reqs] int32: tokens of a request, those of this step included.
        write_limit: [blocks] int32, looked up at a request's first block. Tokens at positions ≥ limit read and are
            not written; `WRITE_OFF`: no memory; `WRITE_ALL`: nothing is limited.
        unwritten: [blocks, `mask_words`(N)] int32: bit i of a block's words: the token in slot i of the block reads
            and is not written.
        block_size: N, tokens per page.
        num_reqs: requests in this batch; later rows of the tables are never looked at.
        longest: no request has more rows than this in this step; 0: not known. A hint by which kernels on a GPU choose
            how to cut the work, since they look at nothing else on the host.
    """

    block_table: Tensor
    query_start_loc: Tensor
    seq_lens: Tensor
    write_limit: Tensor
    unwritten: Tensor
    block_size: int
    num_reqs: int
    longest: int = 0


def mask_words(block_size: int) -> int:
    """int32 words that hold one bit per token of a block."""
    return -(-block_size // 32)


class PagedOps(Protocol):
    """The delta rule over pages. Both functions raise (ValueError or RuntimeError) before they change
    anything: for tensors that do not fit, and on the host for indices that do not. Kernels on a GPU do not fetch
    indices: they never follow one that does not fit, and its request reads zero.

    Attributes:
        name: of the implementation.
        description: for the log, ISA or architecture included.
        graph_safe: reads only device tensors and waits for nothing, so that launches can be captured in a CUDA graph
            and replayed with other contents of the same tensors.
    """

    name: str
    description: str
    graph_safe: bool

    def page_scan(
        self,
        shape: MemoryShape,
        projected: Tensor,
        bias: Tensor,
        pages: Tensor,
        batch: Batch,
        reads: Tensor,
    ) -> None:
        """Read, then write, every token of a batch of requests; one layer, one engine step.

        The order of the requests does not matter, not even where they share pages: vLLM lets a request hit the
        prefix cache on a full block that another one fills in the same step. The hitting request starts
        behind the filling one, so requests run by ascending context.

        Args:
            projected: [T, projected_columns] fp32, bf16 or fp16: q̃ | k̃ | v | β̃ | λ̃. stride(1) = 1; any stride(0)
                from projected_columns on, so that it may be columns of a wider projection.
            bias: [bias_columns] fp32.
            pages: [blocks, ≥ content_floats] fp32, stride(1) = 1; any stride(0). Changed in place. Needs no
                initial value but the base of a request's first page, which the caller seeds.
            batch: requests and write masks.
            reads: [≥ T, R] fp32, contiguous, overwritten: S q before the token's own write, zero for rows of
                no request.
        """
        ...

    def page_state(
        self,
        shape: MemoryShape,
        pages: Tensor,
        block_ids: Tensor,
        counts: Tensor,
        block_size: int,
        out: Tensor,
    ) -> None:
        """The states after the first ``counts[i]`` tokens of block ``block_ids[i]``.

        Args:
            pages: as in `page_scan`, not changed.
            block_ids: [n] int32.
            counts: [n] int32, each 0 … N.
            out: [n, H, r, r] fp32, contiguous, overwritten.
        """
        ...


@dataclass(frozen=True)
class Request:
    """One request's part of a step: rows start … stop−1, ``context`` tokens before them, its blocks from the
    page that holds position max(context − 1, 0) on."""

    start: int
    stop: int
    context: int
    limit: int
    first_page: int
    blocks: list[int]


def plan_requests(batch: Batch, num_tokens: int, num_blocks: int) -> list[Request]:
    """Check every index a step will use, before the step changes anything; requests without tokens are left
    out, the others sorted by context (see `PagedOps.page_scan`).
    """
    block_table, query_start_loc, seq_lens, write_limit, _, block_size, num_reqs, _ = batch
    _check_sizes(batch)
    starts = query_start_loc[: num_reqs + 1].tolist()
    lengths = seq_lens[:num_reqs].tolist()
    plan = []
    for i in range(num_reqs):
        start, stop = starts[i], starts[i + 1]
        if stop <= start:
            continue
        context = lengths[i] - (stop - start)
        last_page = (lengths[i] - 1) // block_size
        if start < 0 or stop > num_tokens or context < 0 or last_page >= block_table.shape[1]:
            raise ValueError(
                f"page_scan: request {i} has rows {start} to {stop} of {num_tokens} "
                f"and sequence length {lengths[i]}; "
                f"its block table holds {block_table.shape[1]} blocks of {block_size} tokens"
            )
        _check_blocks(i, [first := int(block_table[i, 0])], num_blocks)
        limit = int(write_limit[first])
        first_page = max(context - 1, 0) // block_size
        blocks = [] if limit < 0 else block_table[i, first_page : last_page + 1].tolist()
        _check_blocks(i, blocks, num_blocks)
        plan.append(Request(start, stop, context, limit, first_page, blocks))
    return sorted(plan, key=lambda request: request.context)


def check_page_scan(
    shape: MemoryShape,
    projected: Tensor,
    bias: Tensor,
    pages: Tensor,
    batch: Batch,
    reads: Tensor,
) -> None:
    """Shapes and dtypes of `page_scan`; raises ValueError naming the tensor."""
    if projected.dtype not in PROJECTED_DTYPES:
        raise ValueError(f"page_scan: projected is {projected.dtype}, expected float32, bfloat16 or float16")
    _check("projected", projected, projected.dtype, (None, shape.projected_columns))
    overlap = projected.shape[0] > 1 and projected.stride(0) < shape.projected_columns
    if len(projected) and (projected.stride(1) != 1 or overlap):
        raise ValueError(
            "projected: the columns of a row must be contiguous and rows must not overlap, "
            f"got stride {projected.stride()}"
        )
    _check("bias", bias, torch.float32, (shape.bias_columns,))
    _check("block_table", batch.block_table, torch.int32, (None, None))
    _check("write_limit", batch.write_limit, torch.int32, (pages.shape[0],))
    _check("unwritten", batch.unwritten, torch.int32, (pages.shape[0], mask_words(batch.block_size)))
    _check("reads", reads, torch.float32, (None, shape.width))
    if reads.shape[0] < projected.shape[0]:
        raise ValueError(f"page_scan: reads has {reads.shape[0]} rows for {projected.shape[0]} tokens")
    _check_pages(shape, pages, batch.block_size)


def check_page_scan_tensors(
    shape: MemoryShape,
    projected: Tensor,
    bias: Tensor,
    pages: Tensor,
    batch: Batch,
    reads: Tensor,
) -> None:
    """What kernels on a GPU need of `page_scan`'s tensors beyond `check_page_scan`; no index is fetched."""
    if batch.block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {batch.block_size}")
    check_page_scan(shape, projected, bias, pages, batch, reads)
    _check("query_start_loc", batch.query_start_loc, torch.int32, (None,))
    _check("seq_lens", batch.seq_lens, torch.int32, (None,))
    _check_sizes(batch)
    if batch.block_table.stride(1) != 1 and batch.block_table.shape[1] > 1:
        raise ValueError(
            f"block_table: the entries of a row must be contiguous, got stride {batch.block_table.stride()}"
        )
    contiguous = {"bias": bias, "reads": reads, **batch._asdict()}
    for name in ("bias", "reads", "query_start_loc", "seq_lens", "write_limit", "unwritten"):
        if not contiguous[name].is_contiguous():
            raise ValueError(f"{name} must be contiguous, got stride {contiguous[name].stride()}")
    devices = {t.device for t in (projected, bias, pages, reads, *batch[:5])}
    if len(devices) > 1:
        raise ValueError(f"page_scan: all tensors must be on one device, got {sorted(map(str, devices))}")


def check_page_state_tensors(
    shape: MemoryShape, pages: Tensor, block_ids: Tensor, counts: Tensor, block_size: int, out: Tensor
) -> None:
    """Shapes and dtypes of `page_state`; raises ValueError naming the tensor. No index is fetched."""
    n = block_ids.shape[0]
    _check("block_ids", block_ids, torch.int32, (None,))
    _check("counts", counts, torch.int32, (n,))
    _check("out", out, torch.float32, (n, shape.heads, shape.rank, shape.rank))
    _check_pages(shape, pages, block_size)


def check_page_state(
    shape: MemoryShape, pages: Tensor, block_ids: Tensor, counts: Tensor, block_size: int, out: Tensor
) -> None:
    """Shapes, dtypes and indices of `page_state`; raises ValueError naming the tensor."""
    check_page_state_tensors(shape, pages, block_ids, counts, block_size, out)
    for i, (block, count) in enumerate(zip(block_ids.tolist(), counts.tolist(), strict=True)):
        if not (0 <= block < pages.shape[0] and 0 <= count <= block_size):
            raise ValueError(
                f"page_state: entry {i} asks for {count} of {block_size} tokens of block {block} of {pages.shape[0]}"
            )


def _check_sizes(batch: Batch) -> None:
    starts, lengths, rows = batch.query_start_loc.shape[0], batch.seq_lens.shape[0], batch.block_table.shape[0]
    if batch.num_reqs < 0 or starts < batch.num_reqs + 1 or min(lengths, rows) < batch.num_reqs:
        raise ValueError(
            f"page_scan: {batch.num_reqs} requests, but query_start_loc has {starts} entries, "
            f"seq_lens {lengths} and block_table {rows} rows"
        )


def _check_pages(shape: MemoryShape, pages: Tensor, block_size: int) -> None:
    _check("pages", pages, torch.float32, (None, None))
    need = shape.content_floats(block_size)
    if block_size < 1 or pages.shape[1] < need or pages.stride(1) != 1:
        raise ValueError(
            f"pages: {block_size} tokens of {shape} need {need} consecutive floats, "
            f"got {pages.shape[1]} with stride {pages.stride(1)}"
        )


def _check(name: str, tensor: Tensor, dtype: torch.dtype, sizes: tuple[int | None, ...]) -> None:
    fits = tensor.dim() == len(sizes) and all(
        want is None or want == got for want, got in zip(sizes, tensor.shape, strict=True)
    )
    if tensor.dtype != dtype or not fits:
        want = ", ".join("any" if size is None else str(size) for size in sizes)
        raise ValueError(f"{name}: expected {dtype} [{want}], got {tensor.dtype} {list(tensor.shape)}")


def _check_blocks(request: int, blocks: list[int], num_blocks: int) -> None:
    for block in blocks:
        if not 0 <= block < num_blocks:
            raise ValueError(f"page_scan: request {request} uses block {block}, but there are {num_blocks} pages")
