"""One step in which requests start behind pages that others fill in that same step, in every order."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from deltamem_vllm.ops.layout import MemoryShape
from deltamem_vllm.ops.paged import WRITE_ALL, PagedOps
from tests.ops.paging import FEW_SHAPES, World, name_of, random_inputs, truth
from tests.tolerances import KERNEL_READS, KERNEL_STATE

__all__ = [
    "test_a_decode_fills_the_page_that_a_new_request_hits",
    "test_any_forest_of_requests_that_share_pages",
    "test_duplicates_of_a_prefix_are_mixed",
]


@dataclass
class Node:
    """A request: all its tokens from position 0 on, how many came before this step, its blocks."""

    tokens: Tensor
    context: int
    blocks: list[int]
    state: Tensor
    limit: int
    has_history: bool = False
    masked: set[int] = field(default_factory=set)


def _forest(rng: random.Random, shape: MemoryShape, world: World, free: list[int]) -> tuple[list[Node], Tensor]:
    """Requests of two conversations. Later ones start at a block boundary within the rows of an earlier one."""
    bias = random_inputs(shape, 1, seed=1)[1]
    size = world.block_size
    nodes: list[Node] = []
    for tree in range(2):
        length = rng.randint(2, 4 * size)
        tokens, _, state = random_inputs(shape, length, seed=rng.randrange(1 << 30))
        blocks = [free.pop() for _ in range(-(-length // size))]
        limit = rng.choice([WRITE_ALL, WRITE_ALL, size + 1, 3])
        root = Node(tokens, rng.randint(0, min(length - 1, 2 * size)), blocks, state, limit)
        root.has_history = root.context > 0
        root.masked = {p for p in range(length) if rng.random() < 0.2 * tree}
        own = [root]
        for _ in range(rng.randint(1, 3)):
            parent = rng.choice(own)
            # the first boundary in the parent's rows that is not its context, to its last
            starts = [p for p in range(size, len(parent.tokens) + 1, size) if p > parent.context]
            if not starts:
                continue
            start = rng.choice(starts)
            more = random_inputs(shape, rng.choice([1, size, size + 3]), seed=rng.randrange(1 << 30))[0]
            length = start + len(more)
            blocks = parent.blocks[: start // size] + [free.pop() for _ in range(-(-length // size) - start // size)]
            child = Node(torch.cat([parent.tokens[:start], more]), start, blocks, state, limit)
            child.masked = {p for p in parent.masked if p < start}
            own.append(child)
        nodes += own
    return nodes, bias


@pytest.mark.parametrize("shape", FEW_SHAPES, ids=name_of)
@pytest.mark.parametrize("seed", range(4))
def test_any_forest_of_requests_that_share_pages(ops: PagedOps, shape: MemoryShape, seed: int) -> None:
    rng = random.Random(seed)
    world = World(shape, block_size=rng.choice([2, 4]), num_blocks=64, room=rng.random() < 0.5)
    free = list(range(64))
    rng.shuffle(free)
    nodes, bias = _forest(rng, shape, world, free)
    world.pages.fill_(float("nan"))  # what this step writes must not be read as it was
    for node in nodes:
        world.seed(node.blocks[0], node.state, node.limit)
        world.mask(node.blocks, node.masked)
        if node.has_history:
            world.scan(ops, bias, [(node.tokens[: node.context], 0, node.blocks)])
    order = rng.sample(nodes, len(nodes)) if seed % 2 else sorted(nodes, key=lambda node: -node.context)
    reads = world.scan(ops, bias, [(n.tokens[n.context :], n.context, n.blocks) for n in order])
    for node, part in zip(order, reads.split([len(n.tokens) - n.context for n in order]), strict=True):
        expected, final = truth(shape, node.tokens, bias, node.state, node.limit, node.masked)
        torch.testing.assert_close(part.double(), expected[node.context :], rtol=0, atol=KERNEL_READS)
        end = world.state_after(ops, node.blocks, len(node.tokens))
        torch.testing.assert_close(end.double(), final, rtol=0, atol=KERNEL_STATE)


@pytest.mark.parametrize("shape", FEW_SHAPES, ids=name_of)
@pytest.mark.parametrize("first", [True, False])
def test_a_decode_fills_the_page_that_a_new_request_hits(ops: PagedOps, shape: MemoryShape, first: bool) -> None:
    """A batch of single tokens, as a captured graph runs it; the neighbours are at block boundaries of their own."""
    projected, bias, state = random_inputs(shape, 10)
    other = random_inputs(shape, 9, seed=1)
    world = World(shape, block_size=4)
    world.pages.fill_(float("nan"))
    for block, begin in ((1, state), (5, other[2])):
        world.seed(block, begin)
    world.scan(ops, bias, [(projected[:7], 0, [1, 2]), (other[0][:8], 0, [5, 6])])
    # token 7 fills block 2 · a new request whose prompt is tokens 0 … 8 hits blocks 1 and 2 · somebody else
    step = [(projected[7:8], 7, [1, 2]), (projected[8:9], 8, [1, 2, 3]), (other[0][8:], 8, [5, 6, 7])]
    reads = world.scan(ops, bias, step if first else step[::-1])
    reads = reads if first else reads.flip(0)
    expected = truth(shape, projected, bias, state)[0]
    torch.testing.assert_close(reads[:2].double(), expected[7:9], rtol=0, atol=KERNEL_READS)
    expected = truth(shape, other[0], bias, other[2])[0]
    torch.testing.assert_close(reads[2:].double(), expected[8:], rtol=0, atol=KERNEL_READS)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (2, 0, 1)])
def test_duplicates_of_a_prefix_are_mixed(ops: PagedOps, order: tuple[int, ...]) -> None:
    """Two requests fill blocks of the same content; a third one's blocks are some of the one's and some of the
    other's."""
    shape = FEW_SHAPES[1]
    projected, bias, state = random_inputs(shape, 13)
    world = World(shape, block_size=4)
    world.pages.fill_(float("nan"))
    for block in (1, 8):
        world.seed(block, state)
    requests = [(projected[:10], 0, [1, 2, 3]), (projected[:12], 0, [8, 9, 10]), (projected[8:], 8, [1, 9, 12, 13])]
    reads = world.scan(ops, bias, [requests[i] for i in order])
    parts = dict(zip(order, reads.split([len(requests[i][0]) for i in order]), strict=True))
    expected = truth(shape, projected, bias, state)[0]
    torch.testing.assert_close(parts[2].double(), expected[8:], rtol=0, atol=KERNEL_READS)
    torch.testing.assert_close(
        world.state_after(ops, [1, 9, 12, 13], 13).double(), truth(shape, projected, bias, state)[1], rtol=0,
        atol=KERNEL_STATE,
    )  # fmt: skip
