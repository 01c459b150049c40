"""The paged delta rule in Triton: decode and prefill in one launch, `page_state`, seeds and takes.

One program runs one head of one request: S[value, key] stays in registers, tokens go by in order. Nothing is read
from the host, so a launch can be part of a CUDA graph.

**Pages filled and hit in the same launch.** A request may start behind a page that another request writes in this
very launch (`deltamem_vllm.ops.paged.PagedOps.page_scan`). Programs of one launch run in any order, so a program
never reads what its launch writes. Instead it computes that part again, from what nobody changes:

* Only a *full* page is ever shared, so a request asks only where its context is a multiple of N (and above 0)
  whether some request of the batch has the page before it in its own block table and writes the page's last slot,
  context − 1, in this launch. There is at most one: two requests never write the same slot. Its *source* starts
  earlier, so following sources ends at a *root*, whose first page nobody else writes: what the root reads of it
  (the seeded or older base, the rows before its own context) is older than the launch.
* From the root's state, the program then goes through the projected rows of root, …, source up to its own context,
  without reads and without storing anything: the very arithmetic by which those requests' own programs come to the
  same state. Their write masks are its own, since requests that share a page share its masks and the first block.
* Stores go to `reads`, to log rows at positions from the program's own context on, and to bases of pages that start
  there or later: nobody else's.

The latency is that of waiting for the source, without waiting. Shapes and layouts: `deltamem_vllm.ops.layout`.
"""

from __future__ import annotations

import triton
import triton.language as tl

REQUESTS_AT_ONCE = tl.constexpr(128)

# Sizes differ from step to step: compiled once for all of them, not once per 1, multiple of 16 and other.
_SIZES = (
    "row_stride", "page_stride", "num_blocks", "table_stride", "table_width", "num_tokens", "num_rows", "num_reqs", "N",
    "num_slots", "num_staged", "num_chunks", "CHUNK",
)  # fmt: skip


def _kernel(function):  # type: ignore[no-untyped-def]
    sizes = [name for name in function.__code__.co_varnames[: function.__code__.co_argcount] if name in _SIZES]
    return triton.jit(function, do_not_specialize=sizes)


@triton.jit
def _tanh(x):
    """No cancellation for small x; NaN stays NaN."""
    a = tl.abs(x)
    e = tl.exp(-2.0 * a)
    s = a * a
    tail = 0.13333333333333333 + s * (-0.053968253968253968 + s * 0.021869488536155203)
    small = a * (1.0 + s * (-0.33333333333333333 + s * tail))
    y = tl.where(a < 0.25, small, (1.0 - e) / (1.0 + e))
    return tl.where(x < 0, -y, y)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _normalize(x, NORMALIZE: tl.constexpr):
    if NORMALIZE:
        u = _tanh(x)
        norm = tl.sqrt(tl.sum(u * u, 0))
        x = u / tl.where(norm < 1e-6, 1e-6, norm)
    return x


@triton.jit
def _write(state, k, v, beta, lam, MODE: tl.constexpr):
    """S' = keep S + (β v − erase S k) kᵀ; modes as in UPDATE_MODES."""
    predicted = tl.sum(state * k[None, :], 1)
    erase = beta
    if MODE == 1:
        erase = lam * beta
    delta = beta * v - erase * predicted
    return state * lam[:, None] + delta[:, None] * k[None, :]


@triton.jit
def _replay(
    state, page, first, count, LOG, head, R: tl.constexpr, RP: tl.constexpr, H: tl.constexpr, RANKWISE: tl.constexpr,
    HAS_LAMBDA: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Apply log rows first … count − 1 of a page to one head's state."""
    i = tl.arange(0, RP)
    inside = i < R
    G = H * R if RANKWISE else H
    gate = head * R + i if RANKWISE else head + 0 * i
    for t in range(first, count):
        row = page + H * R * R + t * LOG
        k = tl.load(row + head * R + i, mask=inside, other=0.0)
        v = tl.load(row + H * R + head * R + i, mask=inside, other=0.0)
        beta = tl.load(row + 2 * H * R + gate, mask=inside, other=0.0)
        lam = 1.0 - beta
        if MODE == 2:
            lam = 1.0 + 0.0 * i
        if HAS_LAMBDA:
            lam = tl.load(row + 2 * H * R + G + gate, mask=inside, other=0.0)
        state = _write(state, k, v, beta, lam, MODE)
    return state


@triton.jit
def _activated(
    projected, row_stride, token, head, beta_bias, lambda_bias, R: tl.constexpr, RP: tl.constexpr,
    H: tl.constexpr, RANKWISE: tl.constexpr, HAS_LAMBDA: tl.constexpr, MODE: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """One token and head of the fused projection: q, k, v, β, λ, [RP] each."""
    i = tl.arange(0, RP)
    inside = i < R
    W: tl.constexpr = H * R
    G: tl.constexpr = W if RANKWISE else H
    row = projected + token.to(tl.int64) * row_stride + head * R + i
    q = _normalize(tl.load(row, mask=inside, other=0.0).to(tl.float32), NORMALIZE)
    k = _normalize(tl.load(row + W, mask=inside, other=0.0).to(tl.float32), NORMALIZE)
    v = tl.load(row + 2 * W, mask=inside, other=0.0).to(tl.float32)
    gates = projected + token.to(tl.int64) * row_stride + 3 * W + (head * R + i if RANKWISE else head + 0 * i)
    beta = _sigmoid(tl.load(gates, mask=inside, other=0.0).to(tl.float32) + beta_bias)
    lam = 1.0 - beta
    if MODE == 2:
        lam = tl.full((RP,), 1.0, tl.float32)
    if HAS_LAMBDA:
        lam = _sigmoid(tl.load(gates + G, mask=inside, other=0.0).to(tl.float32) + lambda_bias)
    return q, k, v, beta, lam


@triton.jit
def _append(
    log, head, k, v, beta, lam, write, keep, R: tl.constexpr, RP: tl.constexpr, H: tl.constexpr,
    RANKWISE: tl.constexpr, HAS_LAMBDA: tl.constexpr,
):  # fmt: skip
    """Store one head's columns of a log row, where ``keep``; of an idle row, where the token is not written."""
    i = tl.arange(0, RP)
    inside = i < R
    W: tl.constexpr = H * R
    G: tl.constexpr = W if RANKWISE else H
    gate = head * R + i if RANKWISE else head + 0 * i
    stored = inside if RANKWISE else i == 0  # one store per gate column
    tl.store(log + head * R + i, tl.where(write, k, 0.0), mask=inside & keep)
    tl.store(log + W + head * R + i, tl.where(write, v, 0.0), mask=inside & keep)
    tl.store(log + 2 * W + gate, tl.where(write, beta, 0.0), mask=stored & keep)
    if HAS_LAMBDA:
        tl.store(log + 2 * W + G + gate, tl.where(write, lam, 1.0), mask=stored & keep)


@triton.jit
def _source(
    request, context, block_table, table_stride, query_start_loc, seq_lens, write_limit, num_reqs, num_tokens,
    num_blocks, N,
):  # fmt: skip
    """The request that writes, in this launch, the last slot of the page before ``context``; −1: none does."""
    found = tl.full((), -1, tl.int32)
    if (context > 0) & (context % N == 0):
        page = context // N - 1
        mine = tl.load(block_table + request.to(tl.int64) * table_stride + page)
        for first in range(0, num_reqs, REQUESTS_AT_ONCE):
            j = first + tl.arange(0, REQUESTS_AT_ONCE)
            inside = j < num_reqs
            start = tl.load(query_start_loc + j, mask=inside, other=0)
            stop = tl.load(query_start_loc + j + 1, mask=inside, other=0)
            length = tl.load(seq_lens + j, mask=inside, other=0)
            before = length - (stop - start)
            covers = inside & (start >= 0) & (stop > start) & (stop <= num_tokens)
            covers = covers & (before >= 0) & (before < context) & (length >= context)
            row = block_table + j.to(tl.int64) * table_stride
            same = covers & (tl.load(row + page, mask=covers, other=-1) == mine)
            block = tl.load(row, mask=same, other=-1)
            same = same & (block >= 0) & (block < num_blocks)
            same = same & (tl.load(write_limit + block, mask=same, other=-1) >= 0)  # off: its table may hold anything
            found = tl.maximum(found, tl.max(tl.where(same, j, -1), 0))
    return found


@_kernel
def page_scan_kernel(
    projected, row_stride, bias, pages, page_stride, num_blocks, block_table, table_stride, table_width,
    query_start_loc, seq_lens, write_limit, unwritten, reads, num_tokens, num_rows, num_reqs, N,
    R: tl.constexpr, RP: tl.constexpr, H: tl.constexpr, RANKWISE: tl.constexpr, HAS_LAMBDA: tl.constexpr,
    MODE: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """Grid (num_reqs, H). See `deltamem_vllm.ops.paged.PagedOps.page_scan`; indices that do not fit are not followed:
    such a request reads zero and writes nothing from there on.

    table_width: columns of block_table; num_tokens, num_rows: rows of projected and of reads; page_stride: floats;
    row_stride: elements from one row of projected to the next.
    """
    request, head = tl.program_id(0), tl.program_id(1)
    i = tl.arange(0, RP)
    inside = i < R
    square = inside[:, None] & inside[None, :]
    W: tl.constexpr = H * R
    G: tl.constexpr = W if RANKWISE else H
    LOG: tl.constexpr = 2 * W + (2 * G if HAS_LAMBDA else G)
    gate = head * R + i if RANKWISE else head + 0 * i
    words = (N + 31) // 32
    zeros = tl.zeros((RP,), tl.float32)
    far = tl.zeros((), tl.int64)  # widens offsets
    corner = i[:, None] * R + i[None, :] + head * (R * R)

    # rows of no request: the programs share them
    tail = tl.minimum(tl.maximum(tl.load(query_start_loc + num_reqs), 0), num_rows)
    for row in range(tail + request, num_rows, num_reqs):
        tl.store(reads + (row + far) * W + head * R + i, zeros, mask=inside)

    start, stop = tl.load(query_start_loc + request), tl.load(query_start_loc + request + 1)
    length = tl.load(seq_lens + request)
    context = length - (stop - start)
    fits = (stop > start) & (start >= 0) & (stop <= num_tokens) & (context >= 0) & (length <= table_width * N)
    row_of_table = block_table + request.to(tl.int64) * table_stride
    first_block = tl.load(row_of_table, mask=fits, other=-1)
    fits = fits & (first_block >= 0) & (first_block < num_blocks)
    limit = tl.load(write_limit + first_block, mask=fits, other=-1)
    fits = fits & (limit >= 0)

    if fits:
        beta_bias = tl.load(bias + gate, mask=inside, other=0.0)
        lambda_bias = zeros
        if HAS_LAMBDA:
            lambda_bias = tl.load(bias + G + gate, mask=inside, other=0.0)

        # follow sources to the root
        depth = 0
        root, root_context = request, context
        source = _source(
            root, root_context, block_table, table_stride, query_start_loc, seq_lens, write_limit, num_reqs, num_tokens,
            num_blocks, N,
        )  # fmt: skip
        while source >= 0:
            depth += 1
            root = source
            root_context = tl.load(seq_lens + root) - (
                tl.load(query_start_loc + root + 1) - tl.load(query_start_loc + root)
            )
            source = _source(
                root, root_context, block_table, table_stride, query_start_loc, seq_lens, write_limit, num_reqs,
                num_tokens, num_blocks, N,
            )  # fmt: skip

        # the root's state before its first token
        last = tl.maximum(root_context - 1, 0)
        block = tl.load(block_table + root.to(tl.int64) * table_stride + last // N)
        alive = (block >= 0) & (block < num_blocks)
        count = tl.where((root_context > 0) & alive, last % N + 1, 0)
        page = pages + tl.where(alive, block, 0).to(tl.int64) * page_stride
        state = tl.load(page + corner, mask=square & alive, other=0.0)
        state = _replay(state, page, 0, count, LOG, head, R, RP, H, RANKWISE, HAS_LAMBDA, MODE)

        # root, …, source, the request itself
        level = depth
        while level >= 0:
            now, position, end = request, context, length
            for _ in range(level):
                end = position
                now = _source(
                    now, position, block_table, table_stride, query_start_loc, seq_lens, write_limit, num_reqs,
                    num_tokens, num_blocks, N,
                )  # fmt: skip
                position = tl.load(seq_lens + now) - (
                    tl.load(query_start_loc + now + 1) - tl.load(query_start_loc + now)
                )
            own = level == 0
            token = tl.load(query_start_loc + now)
            table = block_table + now.to(tl.int64) * table_stride
            while position < end:
                slot = position % N
                block = tl.load(table + position // N)
                alive = alive & (block >= 0) & (block < num_blocks)
                safe = tl.where(alive, block, 0).to(tl.int64)
                page = pages + safe * page_stride
                tl.store(page + corner, state, mask=square & (own & alive & (slot == 0) & (position > 0)))
                word = tl.load(unwritten + safe * words + slot // 32)
                write = alive & (position < limit) & (((word >> (slot % 32)) & 1) == 0)

                q, k, v, beta, lam = _activated(
                    projected, row_stride, token, head, beta_bias, lambda_bias, R, RP, H, RANKWISE, HAS_LAMBDA, MODE,
                    NORMALIZE,
                )  # fmt: skip
                read = tl.sum(state * q[None, :], 1)
                tl.store(reads + token.to(tl.int64) * W + head * R + i, tl.where(alive, read, 0.0), mask=inside & own)
                _append(
                    page + W * R + slot * LOG, head, k, v, beta, lam, write, own & alive, R, RP, H, RANKWISE, HAS_LAMBDA
                )
                state = tl.where(write, _write(state, k, v, beta, lam, MODE), state)
                position += 1
                token += 1
            level -= 1
    else:
        for row in range(tl.maximum(start, 0), tl.minimum(stop, num_rows)):
            tl.store(reads + (row + far) * W + head * R + i, zeros, mask=inside)


@triton.jit
def _state_after(
    pages, page_stride, num_blocks, block, count, N, head, R: tl.constexpr, RP: tl.constexpr, H: tl.constexpr,
    RANKWISE: tl.constexpr, HAS_LAMBDA: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """One head's state after ``count`` tokens of a block; NaN where either does not fit."""
    i = tl.arange(0, RP)
    square = (i < R)[:, None] & (i < R)[None, :]
    W: tl.constexpr = H * R
    G: tl.constexpr = W if RANKWISE else H
    LOG: tl.constexpr = 2 * W + (2 * G if HAS_LAMBDA else G)
    fits = (block >= 0) & (block < num_blocks) & (count >= 0) & (count <= N)
    page = pages + tl.where(fits, block, 0).to(tl.int64) * page_stride
    state = tl.load(page + head * (R * R) + i[:, None] * R + i[None, :], mask=square & fits, other=0.0)
    state = _replay(state, page, 0, tl.where(fits, count, 0), LOG, head, R, RP, H, RANKWISE, HAS_LAMBDA, MODE)
    return tl.where(fits, state, float("nan"))


@_kernel
def page_state_kernel(
    pages, page_stride, num_blocks, block_ids, counts, out, N,
    R: tl.constexpr, RP: tl.constexpr, H: tl.constexpr, RANKWISE: tl.constexpr, HAS_LAMBDA: tl.constexpr,
    MODE: tl.constexpr,
):  # fmt: skip
    """Grid (n, H). See `PagedOps.page_state`; an index that does not fit leaves NaN."""
    entry, head = tl.program_id(0), tl.program_id(1)
    i = tl.arange(0, RP)
    square = (i < R)[:, None] & (i < R)[None, :]
    corner = i[:, None] * R + i[None, :] + head * (R * R)
    block, count = tl.load(block_ids + entry), tl.load(counts + entry)
    state = _state_after(
        pages, page_stride, num_blocks, block, count, N, head, R, RP, H, RANKWISE, HAS_LAMBDA, MODE
    )  # fmt: skip
    tl.store(out + entry.to(tl.int64) * (H * R * R) + corner, state, mask=square)


@_kernel
def take_kernel(
    addresses, page_stride, num_blocks, block_ids, counts, slots, num_slots, states, staging, N,
    L: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, H: tl.constexpr, RANKWISE: tl.constexpr,
    HAS_LAMBDA: tl.constexpr, MODE: tl.constexpr, STAGED: tl.constexpr,
):  # fmt: skip
    """Grid (n, L, H). See `deltamem_vllm.ops.pooled.PoolOps.take`."""
    entry, layer, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i = tl.arange(0, RP)
    square = (i < R)[:, None] & (i < R)[None, :]
    corner = i[:, None] * R + i[None, :] + head * (R * R)
    FLOATS: tl.constexpr = H * R * R
    block, count, slot = tl.load(block_ids + entry), tl.load(counts + entry), tl.load(slots + entry)
    pages = tl.load(addresses + layer).to(tl.pointer_type(tl.float32))
    state = _state_after(
        pages, page_stride, num_blocks, block, count, N, head, R, RP, H, RANKWISE, HAS_LAMBDA, MODE
    )  # fmt: skip
    pooled = (slot >= 0) & (slot < num_slots)
    where = (tl.where(pooled, slot, 0).to(tl.int64) * L + layer) * FLOATS
    tl.store(states + where + corner, state, mask=square & pooled)
    if STAGED:
        tl.store(staging + (entry.to(tl.int64) * L + layer) * FLOATS + corner, state, mask=square)


@_kernel
def seed_kernel(
    addresses, page_stride, num_blocks, block_ids, sources, num_slots, states, num_staged, staging,
    L: tl.constexpr, FLOATS: tl.constexpr, POWER: tl.constexpr, STAGED: tl.constexpr,
):  # fmt: skip
    """Grid (n, L). See `deltamem_vllm.ops.pooled.PoolOps.seed`; FLOATS = H·r·r, POWER the power of two above."""
    entry, layer = tl.program_id(0), tl.program_id(1)
    i = tl.arange(0, POWER)
    block, source = tl.load(block_ids + entry), tl.load(sources + entry)
    pooled = (source >= 0) & (source < num_slots)
    where = (tl.where(pooled, source, 0).to(tl.int64) * L + layer) * FLOATS
    state = tl.load(states + where + i, mask=(i < FLOATS) & pooled, other=0.0)
    fits = (source == -1) | pooled
    if STAGED:
        row = -2 - source
        staged = (row >= 0) & (row < num_staged)
        where = (tl.where(staged, row, 0).to(tl.int64) * L + layer) * FLOATS
        state = tl.where(staged, tl.load(staging + where + i, mask=(i < FLOATS) & staged, other=0.0), state)
        fits = fits | staged
    fits = fits & (block >= 0) & (block < num_blocks)
    pages = tl.load(addresses + layer).to(tl.pointer_type(tl.float32))
    page = pages + tl.where(fits, block, 0).to(tl.int64) * page_stride
    tl.store(page + i, state, mask=(i < FLOATS) & fits)
