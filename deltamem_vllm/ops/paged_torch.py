"""The paged delta rule in plain torch: any device, slow. The fallback that `dispatch` announces.

The contract of both functions is `deltamem_vllm.ops.paged.PagedOps`; the native kernels share it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deltamem_vllm.ops import reference
from deltamem_vllm.ops.layout import MemoryShape
from deltamem_vllm.ops.paged import Batch, Request, check_page_scan, check_page_state, plan_requests


class TorchOps:
    """`PagedOps` in plain torch."""

    name = "torch"
    description = "torch (slow)"
    graph_safe = False  # walks the batch on the host

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
        check_page_scan(shape, projected, bias, pages, batch, reads)
        plan = plan_requests(batch, len(projected), len(pages))
        reads.zero_()
        for request in plan:
            if request.limit >= 0:
                rows = slice(request.start, request.stop)
                activated = reference.activate(shape, projected[rows].float(), bias.float())
                reads[rows] = _scan_request(shape, activated, pages, request, batch)

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
        check_page_state(shape, pages, block_ids, counts, block_size, out)
        for i, (block, count) in enumerate(zip(block_ids.tolist(), counts.tolist(), strict=True)):
            base, log = _views(shape, pages[block], block_size)
            out[i] = reference.replay(shape, base, log[:count])


def _views(shape: MemoryShape, page: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """base [H, r, r] and log [N, log_columns] of one page, sharing its memory."""
    base = page[: shape.state_floats].view(shape.heads, shape.rank, shape.rank)
    log = page[shape.state_floats : shape.content_floats(block_size)].view(block_size, shape.log_columns)
    return base, log


def _masked(positions: Tensor, request: Request, batch: Batch) -> Tensor:
    """bool [tokens]: whose bit is set in `Batch.unwritten`."""
    pages, slots = positions // batch.block_size - request.first_page, positions % batch.block_size
    blocks = torch.tensor(request.blocks, device=positions.device)[pages]
    masked: Tensor = (batch.unwritten[blocks, slots // 32] >> (slots % 32)) & 1 == 1
    return masked


def _scan_request(
    shape: MemoryShape, activated: reference.Activated, pages: Tensor, request: Request, batch: Batch
) -> Tensor:
    """Log and read one request's tokens; returns reads [tokens, R]."""
    q, k, v, beta, lam = activated
    block_size = batch.block_size
    length, context = q.shape[0], request.context
    positions = torch.arange(context, context + length, device=q.device)
    write = (positions < request.limit) & ~_masked(positions, request, batch)
    rows = reference.log_rows(shape, k, v, beta, lam)
    rows = torch.where(write[:, None], rows, reference.idle_row(shape, rows))

    base, log = _views(shape, pages[request.blocks[0]], block_size)
    replayed = (context - 1) % block_size + 1 if context else 0
    state = reference.replay(shape, base, log[:replayed])

    reads = q.new_empty(length, shape.width)
    done = 0
    while done < length:
        position = context + done
        page, slot = position // block_size, position % block_size
        count = min(block_size - slot, length - done)
        base, log = _views(shape, pages[request.blocks[page - request.first_page]], block_size)
        if slot == 0 and position > 0:
            base.copy_(state)
        part = slice(done, done + count)
        log[slot : slot + count] = rows[part]
        reads[part], state = reference.scan(shape, q[part], k[part], v[part], beta[part], lam[part], state, write[part])
        done += count
    return reads
