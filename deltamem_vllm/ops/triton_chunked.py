"""Long prefills in Triton, in three launches: chunks of every request side by side. As in ``csrc/cuda/chunked.cuh``.

1. activate: log rows into the pages, q into scratch, and for every chunk that has a successor what it makes of any
   state: a row of the state becomes s M + c, and M's rows and c are r + 1 scans of their own.
2. combine: per request, chunk after chunk: the next chunk's start state.
3. rescan: every chunk from its start state: reads, and bases of the pages that begin in it.

Chunk numbers need no look at the requests on the host: request i's first chunk has number
query_start_loc[i] // tokens + 2 i.

Pages filled and hit in the same step concern only the second phase, which follows sources as the single launch does
(`deltamem_vllm.ops.triton_kernels`) and takes their part from their chunks' summaries and, where a request starts
within a source's chunk, from log rows. Both are of the first launch; and the base that it reads, of a root's first
page, is written by none of the three.
"""

from __future__ import annotations

import triton
import triton.language as tl

from deltamem_vllm.ops.triton_kernels import (
    REQUESTS_AT_ONCE,
    _activated,
    _append,
    _kernel,
    _replay,
    _source,
)


@triton.jit
def _context(request, query_start_loc, seq_lens):
    start, stop = tl.load(query_start_loc + request), tl.load(query_start_loc + request + 1)
    return tl.load(seq_lens + request) - (stop - start)


@triton.jit
def _limit(
    request, block_table, table_stride, table_width, query_start_loc, seq_lens, write_limit, num_tokens, num_blocks, N,
):  # fmt: skip
    """A request's write limit; −1 where it is off, empty, or does not fit."""
    start, stop = tl.load(query_start_loc + request), tl.load(query_start_loc + request + 1)
    length = tl.load(seq_lens + request)
    fits = (stop > start) & (start >= 0) & (stop <= num_tokens) & (length >= stop - start)
    fits = fits & (length <= table_width * N)
    block = tl.load(block_table + request.to(tl.int64) * table_stride, mask=fits, other=-1)
    fits = fits & (block >= 0) & (block < num_blocks)
    return tl.load(write_limit + block, mask=fits, other=-1)


@triton.jit
def _request_of(number, query_start_loc, num_reqs, CHUNK):
    """The last request whose first chunk number is not above ``number``."""
    below = tl.zeros((), tl.int32)
    for first in range(0, num_reqs, REQUESTS_AT_ONCE):
        j = first + tl.arange(0, REQUESTS_AT_ONCE)
        start = tl.load(query_start_loc + j, mask=j < num_reqs, other=0)
        below += tl.sum(((j < num_reqs) & (start // CHUNK + 2 * j <= number)).to(tl.int32), 0)
    return below - 1


@triton.jit
def _span(number, request, query_start_loc, seq_lens, CHUNK):
    """Positions first … last − 1 of a chunk, and the request's length; last ≤ first: the number is not in use."""
    context = _context(request, query_start_loc, seq_lens)
    length = tl.load(seq_lens + request)
    index = context // CHUNK + number - (tl.load(query_start_loc + request) // CHUNK + 2 * request)
    return tl.maximum(index * CHUNK, context), tl.minimum((index + 1) * CHUNK, length), context, length


@_kernel
def activate_kernel(
    projected, row_stride, bias, pages, page_stride, num_blocks, block_table, table_stride, table_width,
    query_start_loc, seq_lens, write_limit, unwritten, reads, queries, summaries, num_tokens, num_rows, num_reqs,
    num_chunks, N, CHUNK,
    R: tl.constexpr, RP: tl.constexpr, VP: tl.constexpr, H: tl.constexpr, RANKWISE: tl.constexpr,
    HAS_LAMBDA: tl.constexpr, MODE: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """Grid (num_chunks, H). queries [T, W]; summaries [num_chunks, H, R + 1, R, R]; VP: a power of two above R."""
    number, head = tl.program_id(0), tl.program_id(1)
    i = tl.arange(0, RP)
    inside = i < R
    W: tl.constexpr = H * R
    G: tl.constexpr = W if RANKWISE else H
    LOG: tl.constexpr = 2 * W + (2 * G if HAS_LAMBDA else G)
    gate = head * R + i if RANKWISE else head + 0 * i
    words = (N + 31) // 32
    zeros = tl.zeros((RP,), tl.float32)
    far = tl.zeros((), tl.int64)

    tail = tl.minimum(tl.maximum(tl.load(query_start_loc + num_reqs), 0), num_rows)
    for row in range(tail + number, num_rows, num_chunks):
        tl.store(reads + (row + far) * W + head * R + i, zeros, mask=inside)

    request = _request_of(number, query_start_loc, num_reqs, CHUNK)
    start = tl.load(query_start_loc + tl.maximum(request, 0))
    limit = tl.full((), -1, tl.int32)
    if request >= 0:
        limit = _limit(
            request, block_table, table_stride, table_width, query_start_loc, seq_lens, write_limit, num_tokens,
            num_blocks, N,
        )  # fmt: skip
        if (limit < 0) & (number == start // CHUNK + 2 * request):
            stop = tl.minimum(tl.load(query_start_loc + request + 1), num_rows)
            for row in range(tl.maximum(start, 0), stop):
                tl.store(reads + (row + far) * W + head * R + i, zeros, mask=inside)
    if limit >= 0:
        first, last, context, length = _span(number, request, query_start_loc, seq_lens, CHUNK)
        beta_bias = tl.load(bias + gate, mask=inside, other=0.0)
        lambda_bias = zeros
        if HAS_LAMBDA:
            lambda_bias = tl.load(bias + G + gate, mask=inside, other=0.0)
        table = block_table + request.to(tl.int64) * table_stride
        vector = tl.arange(0, VP)
        # [vector, row, column]: unit vectors, and zero for the offset
        x = tl.where((vector[:, None, None] == i[None, None, :]) & (vector[:, None, None] < R), 1.0, 0.0)
        x = x + tl.zeros((VP, RP, RP), tl.float32)
        followed = last < length
        position = first
        while position < last:
            slot = position % N
            block = tl.load(table + position // N)
            alive = (block >= 0) & (block < num_blocks)
            safe = tl.where(alive, block, 0).to(tl.int64)
            word = tl.load(unwritten + safe * words + slot // 32)
            write = alive & (position < limit) & (((word >> (slot % 32)) & 1) == 0)
            token = start + position - context
            q, k, v, beta, lam = _activated(
                projected, row_stride, token, head, beta_bias, lambda_bias, R, RP, H, RANKWISE, HAS_LAMBDA, MODE,
                NORMALIZE,
            )  # fmt: skip
            tl.store(queries + (token + far) * W + head * R + i, q, mask=inside)
            log = pages + safe * page_stride + W * R + slot * LOG
            _append(log, head, k, v, beta, lam, write, alive, R, RP, H, RANKWISE, HAS_LAMBDA)
            if followed:
                k, v = tl.where(write, k, 0.0), tl.where(write, v, 0.0)
                beta, lam = tl.where(write, beta, 0.0), tl.where(write, lam, 1.0)
                erase = beta
                if MODE == 1:
                    erase = lam * beta
                predicted = tl.sum(x * k[None, None, :], 2)
                delta = tl.where(vector[:, None] == R, (beta * v)[None, :], 0.0) - erase[None, :] * predicted
                x = x * lam[None, :, None] + delta[:, :, None] * k[None, None, :]
            position += 1
        if followed & (first < last):
            at = (number + far) * H + head
            where = ((at * (R + 1) + vector[:, None, None]) * R + i[None, :, None]) * R + i[None, None, :]
            mask = (vector[:, None, None] <= R) & inside[None, :, None] & inside[None, None, :]
            tl.store(summaries + where, x, mask=mask)


@triton.jit
def _replay_span(
    state, first, last, table, pages, page_stride, num_blocks, N, LOG, head, R: tl.constexpr, RP: tl.constexpr,
    H: tl.constexpr, RANKWISE: tl.constexpr, HAS_LAMBDA: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Apply the log rows of positions first … last − 1 of a request."""
    position = first
    while position < last:
        slot = position % N
        block = tl.load(table + position // N)
        alive = (block >= 0) & (block < num_blocks)
        page = pages + tl.where(alive, block, 0).to(tl.int64) * page_stride
        stop = tl.minimum(N, slot + last - position)
        state = _replay(state, page, slot, tl.where(alive, stop, slot), LOG, head, R, RP, H, RANKWISE, HAS_LAMBDA, MODE)
        position += stop - slot
    return state


@_kernel
def combine_kernel(
    pages, page_stride, num_blocks, block_table, table_stride, table_width, query_start_loc, seq_lens, write_limit,
    summaries, starts, num_tokens, num_reqs, N, CHUNK,
    R: tl.constexpr, RP: tl.constexpr, H: tl.constexpr, RANKWISE: tl.constexpr, HAS_LAMBDA: tl.constexpr,
    MODE: tl.constexpr,
):  # fmt: skip
    """Grid (num_reqs, H). starts [num_chunks, H, R, R]."""
    request, head = tl.program_id(0), tl.program_id(1)
    i = tl.arange(0, RP)
    inside = i < R
    square = inside[:, None] & inside[None, :]
    cube = inside[:, None, None] & inside[None, :, None] & inside[None, None, :]
    W: tl.constexpr = H * R
    G: tl.constexpr = W if RANKWISE else H
    LOG: tl.constexpr = 2 * W + (2 * G if HAS_LAMBDA else G)
    far = tl.zeros((), tl.int64)
    flat = i[:, None] * R + i[None, :]
    limit = _limit(
        request, block_table, table_stride, table_width, query_start_loc, seq_lens, write_limit, num_tokens, num_blocks,
        N,
    )  # fmt: skip
    if limit >= 0:
        context, length = _context(request, query_start_loc, seq_lens), tl.load(seq_lens + request)
        depth = 0
        root, root_context = request, context
        source = _source(
            root, root_context, block_table, table_stride, query_start_loc, seq_lens, write_limit, num_reqs, num_tokens,
            num_blocks, N,
        )  # fmt: skip
        while source >= 0:
            depth += 1
            root = source
            root_context = _context(root, query_start_loc, seq_lens)
            source = _source(
                root, root_context, block_table, table_stride, query_start_loc, seq_lens, write_limit, num_reqs,
                num_tokens, num_blocks, N,
            )  # fmt: skip

        last = tl.maximum(root_context - 1, 0)
        table = block_table + root.to(tl.int64) * table_stride
        block = tl.load(table + last // N)
        alive = (block >= 0) & (block < num_blocks)
        page = pages + tl.where(alive, block, 0).to(tl.int64) * page_stride
        state = tl.load(page + head * (R * R) + flat, mask=square & alive, other=0.0)
        state = _replay_span(
            state, last // N * N, root_context, table, pages, page_stride, num_blocks, N, LOG, head, R, RP, H, RANKWISE,
            HAS_LAMBDA, MODE,
        )  # fmt: skip

        level = depth
        while level >= 0:
            now, begin, end = request, context, length
            for _ in range(level):
                end = begin
                now = _source(
                    now, begin, block_table, table_stride, query_start_loc, seq_lens, write_limit, num_reqs, num_tokens,
                    num_blocks, N,
                )  # fmt: skip
                begin = _context(now, query_start_loc, seq_lens)
            whole = tl.load(seq_lens + now)
            table = block_table + now.to(tl.int64) * table_stride
            index = begin // CHUNK
            number = tl.load(query_start_loc + now) // CHUNK + 2 * now
            while index * CHUNK < end:
                at = (number + far) * H + head
                if level == 0:
                    tl.store(starts + at * (R * R) + flat, state, mask=square)
                stop = (index + 1) * CHUNK
                if (stop <= end) & (stop < whole):
                    base = summaries + at * ((R + 1) * R * R)
                    # [l, row, column]: sum over l of S[row, l] M[l]
                    m = tl.load(
                        base + i[:, None, None] * (R * R) + i[None, :, None] * R + i[None, None, :],
                        mask=cube,
                        other=0.0,
                    )
                    offset = tl.load(base + R * R * R + flat, mask=square, other=0.0)
                    state = tl.sum(tl.trans(state)[:, :, None] * m, 0) + offset
                elif level > 0:
                    state = _replay_span(
                        state, tl.maximum(index * CHUNK, begin), tl.minimum(stop, end), table, pages, page_stride,
                        num_blocks, N, LOG, head, R, RP, H, RANKWISE, HAS_LAMBDA, MODE,
                    )  # fmt: skip
                index += 1
                number += 1
            level -= 1


@_kernel
def rescan_kernel(
    pages, page_stride, num_blocks, block_table, table_stride, table_width, query_start_loc, seq_lens, write_limit,
    reads, queries, starts, num_tokens, num_reqs, N, CHUNK,
    R: tl.constexpr, RP: tl.constexpr, H: tl.constexpr, RANKWISE: tl.constexpr, HAS_LAMBDA: tl.constexpr,
    MODE: tl.constexpr,
):  # fmt: skip
    """Grid (num_chunks, H)."""
    number, head = tl.program_id(0), tl.program_id(1)
    i = tl.arange(0, RP)
    inside = i < R
    square = inside[:, None] & inside[None, :]
    W: tl.constexpr = H * R
    G: tl.constexpr = W if RANKWISE else H
    LOG: tl.constexpr = 2 * W + (2 * G if HAS_LAMBDA else G)
    far = tl.zeros((), tl.int64)
    flat = i[:, None] * R + i[None, :]
    request = _request_of(number, query_start_loc, num_reqs, CHUNK)
    limit = tl.full((), -1, tl.int32)
    if request >= 0:
        limit = _limit(
            request, block_table, table_stride, table_width, query_start_loc, seq_lens, write_limit, num_tokens,
            num_blocks, N,
        )  # fmt: skip
    if limit >= 0:
        first, last, context, _ = _span(number, request, query_start_loc, seq_lens, CHUNK)
        if first < last:
            table = block_table + request.to(tl.int64) * table_stride
            state = tl.load(starts + ((number + far) * H + head) * (R * R) + flat, mask=square, other=0.0)
            alive = first >= 0
            position = first
            while position < last:
                slot = position % N
                block = tl.load(table + position // N)
                alive = alive & (block >= 0) & (block < num_blocks)
                page = pages + tl.where(alive, block, 0).to(tl.int64) * page_stride
                tl.store(page + head * (R * R) + flat, state, mask=square & alive & (slot == 0) & (position > 0))
                row = (tl.load(query_start_loc + request) + position - context + far) * W + head * R + i
                q = tl.load(queries + row, mask=inside, other=0.0)
                tl.store(reads + row, tl.where(alive, tl.sum(state * q[None, :], 1), 0.0), mask=inside)
                state = _replay(
                    state, page, slot, tl.where(alive, slot + 1, slot), LOG, head, R, RP, H, RANKWISE, HAS_LAMBDA, MODE
                )
                position += 1
