"""A small paged world for the tests: pages full of 7.0, scrambled block ids, and a step on them."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deltamem_vllm.ops import reference
from deltamem_vllm.ops.layout import UPDATE_MODES, MemoryShape
from deltamem_vllm.ops.paged import WRITE_ALL, Batch, PagedOps, mask_words
from tests.tolerances import KERNEL_READS

UNTOUCHED = 7.0
GARBAGE = -12345


def make_shape(rank: int = 8, heads: int = 1, **changes: object) -> MemoryShape:
    """A shape with the official scripts' settings unless changed."""
    settings: dict[str, object] = {
        "rankwise_gates": True,
        "couple_lambda": True,
        "update_mode": "standard",
        "normalize_qk": True,
    }
    return MemoryShape(rank=rank, heads=heads, **{**settings, **changes})  # type: ignore[arg-type]


#: modes × gates × λ × heads × ranks; the unnormalised rule on a few of them.
SHAPES = [
    make_shape(rank, heads, rankwise_gates=rankwise, couple_lambda=couple, update_mode=mode)
    for rank, heads, rankwise, couple, mode in itertools.product(
        (1, 4, 5, 8, 16), (1, 4), (True, False), (True, False), UPDATE_MODES
    )
] + [
    make_shape(rank, 2, normalize_qk=False, couple_lambda=couple)
    for rank, couple in itertools.product((5, 8), (True, False))
]
#: one of each kind, for tests of behaviour rather than of arithmetic.
FEW_SHAPES = [
    make_shape(8),
    make_shape(8, 4, couple_lambda=False),
    make_shape(16, rankwise_gates=False),
    make_shape(5, 2, couple_lambda=False, update_mode="lambda_outside", rankwise_gates=False),
    make_shape(4, 2, update_mode="no_lambda"),
]


def name_of(shape: MemoryShape) -> str:
    flags = [
        "row" if shape.rankwise_gates else "head",
        "coupled" if shape.couple_lambda else "free",
        shape.update_mode,
        *([] if shape.normalize_qk else ["raw"]),
    ]
    return f"r{shape.rank}h{shape.heads}-" + "-".join(flags)


def int32(values: list[int] | list[list[int]]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@dataclass
class World:
    """Pages of one layer. Every float nobody may touch holds 7.0; pages are wider and further apart than
    needed. ``room``: wider by what kernels may keep beside a page's content (`deltamem_vllm.ops.layout`).
    """

    shape: MemoryShape
    block_size: int = 16
    num_blocks: int = 24
    room: bool = False
    whole: Tensor = field(init=False)
    pages: Tensor = field(init=False)
    write_limit: Tensor = field(init=False)
    unwritten: Tensor = field(init=False)

    def __post_init__(self) -> None:
        width = self.shape.page_floats(self.block_size)
        if self.room:
            width += self.shape.state_floats + 2 * self.shape.heads
        self.whole = torch.full((self.num_blocks, width + 5), UNTOUCHED)
        self.pages = self.whole[:, :width]
        self.write_limit = torch.full((self.num_blocks,), WRITE_ALL, dtype=torch.int32)
        self.unwritten = torch.zeros((self.num_blocks, mask_words(self.block_size)), dtype=torch.int32)

    def mask(self, blocks: list[int], positions: Iterable[int]) -> None:
        """Do not write these positions of a request."""
        for position in positions:
            slot = position % self.block_size
            bit = 1 << slot % 32
            self.unwritten[blocks[position // self.block_size], slot // 32] |= bit - (1 << 32) * (bit >= 1 << 31)

    def seed(self, block: int, state: Tensor, limit: int = WRITE_ALL) -> None:
        self.pages[block, : self.shape.state_floats] = state.flatten()
        self.write_limit[block] = limit

    def scan(
        self,
        ops: PagedOps,
        bias: Tensor,
        requests: list[tuple[Tensor, int, list[int]]],
        extra_rows: int = 0,
        strided: bool = False,
    ) -> Tensor:
        """One step. A request is (projected [t, C] of its new tokens, tokens before them, its blocks). ``strided``:
        the rows are columns of a wider tensor, which is not changed.
        """
        width = max(len(blocks) for _, _, blocks in requests) + 1
        # two rows and a column more than anybody needs, all garbage
        table = torch.full((len(requests) + 2, width + 3), GARBAGE, dtype=torch.int32)[:, :width]
        for i, (_, _, blocks) in enumerate(requests):
            table[i, : len(blocks)] = int32(blocks)
        counts = [len(projected) for projected, _, _ in requests]
        starts = [0, *itertools.accumulate(counts), GARBAGE]
        lengths = [context + len(projected) for projected, context, _ in requests] + [GARBAGE]
        tokens = torch.cat([projected for projected, _, _ in requests])
        tokens = torch.cat([tokens, tokens.new_full((extra_rows, tokens.shape[1]), float("nan"))])
        reads = torch.full((len(tokens), self.shape.width), float("nan"))
        wide = tokens
        if strided:
            tokens, wide = columns_of_a_wider(tokens)
        before = wide.clone()
        ops.page_scan(
            self.shape,
            tokens,
            bias,
            self.pages,
            Batch(
                table, int32(starts), int32(lengths), self.write_limit, self.unwritten, self.block_size, len(requests)
            ),
            reads,
        )
        torch.testing.assert_close(wide, before, rtol=0, atol=0, equal_nan=True)
        return reads

    def state(self, ops: PagedOps, block: int, count: int) -> Tensor:
        shape = self.shape
        out = torch.full((1, shape.heads, shape.rank, shape.rank), float("nan"))
        ops.page_state(shape, self.pages, int32([block]), int32([count]), self.block_size, out)
        return out[0]

    def state_after(self, ops: PagedOps, blocks: list[int], length: int) -> Tensor:
        """The state after ``length`` ≥ 1 tokens of a request."""
        last = length - 1
        return self.state(ops, blocks[last // self.block_size], last % self.block_size + 1)


def columns_of_a_wider(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The same rows as columns of a wider tensor full of NaN, at an odd offset; and that tensor."""
    wide = tokens.new_full((len(tokens), tokens.shape[1] + 10), float("nan"))
    inner = wide[:, 3:-7]
    inner.copy_(tokens)
    return inner, wide


def random_inputs(shape: MemoryShape, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """projected [tokens, C], bias, state. Unnormalised keys are kept small, or the state explodes by
    design.
    """
    generator = torch.Generator().manual_seed(seed)
    scale = 1.0 if shape.normalize_qk else 0.3
    projected = torch.randn(tokens, shape.projected_columns, generator=generator) * scale
    bias = torch.randn(shape.bias_columns, generator=generator)
    state = torch.randn(shape.heads, shape.rank, shape.rank, generator=generator) * 0.2
    return projected, bias, state


def truth(
    shape: MemoryShape,
    projected: Tensor,
    bias: Tensor,
    state: Tensor,
    limit: int = WRITE_ALL,
    masked: Collection[int] = (),
) -> tuple[Tensor, Tensor]:
    """Reads and final state by the reference in fp64, token positions from 0; ``masked`` ones only read."""
    activated = reference.activate(shape, projected.double(), bias.double())
    write = torch.tensor([position < limit and position not in masked for position in range(len(projected))])
    return reference.scan(shape, *activated, state.double(), write)


def check_strided(ops: PagedOps, shape: MemoryShape, dtype: torch.dtype, block_size: int = 4) -> None:
    """Rows that are columns of a wider tensor give the bits of contiguous ones: a prefill beside a decode, one request
    behind a page that the first fills, and rows of no request.
    """
    projected, bias, state = random_inputs(shape, 11)
    projected = projected.to(dtype)
    results = []
    for strided in (False, True):
        world = World(shape, block_size=block_size)
        for block in (5, 9):
            world.seed(block, state)
        world.scan(ops, bias, [(projected[:1], 0, [9])], strided=strided)
        requests = [(projected[:10], 0, [5, 2, 7]), (projected[1:2], 1, [9])]
        requests += [(projected[block_size:], block_size, [5, 3, 8])]
        reads = world.scan(ops, bias, requests, extra_rows=2, strided=strided)
        assert reads.isfinite().all()
        results.append((reads, world.whole))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    expected = truth(shape, projected[:10], bias, state)[0]
    torch.testing.assert_close(results[1][0][:10].double(), expected, rtol=0, atol=KERNEL_READS)
