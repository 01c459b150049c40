"""The running state that native kernels keep behind an open page's content: it spares the replay and changes no bit."""

from __future__ import annotations

import pytest
import torch

from deltamem_vllm.ops.layout import MemoryShape
from deltamem_vllm.ops.paged import PagedOps
from tests.ops.paging import FEW_SHAPES, UNTOUCHED, World, name_of, random_inputs, truth
from tests.tolerances import KERNEL_READS, KERNEL_STATE

N = 16


@pytest.mark.parametrize("shape", FEW_SHAPES, ids=name_of)
def test_the_bits_are_those_of_a_replay(ops: PagedOps, shape: MemoryShape) -> None:
    projected, bias, state = random_inputs(shape, 2 * N + 3)
    results = []
    for room in (False, True):
        world = World(shape, block_size=N, room=room)
        world.seed(5, state)
        reads = [world.scan(ops, bias, [(projected[:3], 0, [5, 2, 9])])]
        reads += [world.scan(ops, bias, [(projected[t : t + 1], t, [5, 2, 9])]) for t in range(3, len(projected))]
        results.append((torch.cat(reads), world.pages[:, : shape.content_floats(N)]))
    for replayed, kept in zip(*results, strict=True):
        assert torch.equal(replayed, kept)


@pytest.mark.parametrize("ops", ["avx512", "avx2", "portable"], indirect=True)
def test_it_is_what_a_decode_step_starts_from(ops: PagedOps) -> None:
    """Where there is room, nothing of the page but the running state is read: its log may be garbage."""
    shape = FEW_SHAPES[1]
    projected, bias, state = random_inputs(shape, 9)
    world = World(shape, block_size=N, room=True)
    world.seed(5, state)
    world.scan(ops, bias, [(projected[:8], 0, [5])])
    world.pages[5, : shape.content_floats(N)] = float("nan")
    read = world.scan(ops, bias, [(projected[8:], 8, [5])])
    torch.testing.assert_close(read[0].double(), truth(shape, projected, bias, state)[0][8], rtol=0, atol=KERNEL_READS)


@pytest.mark.parametrize("shape", FEW_SHAPES, ids=name_of)
def test_one_of_rejected_drafts_is_not_taken(ops: PagedOps, shape: MemoryShape) -> None:
    """A step ends in a page with drafts that are rejected; the next one fills the page and goes on, and as many of its
    tokens are kept as there were drafts: the page had been left with that count before, of other tokens."""
    projected, bias, state = random_inputs(shape, N + 2)
    drafts = random_inputs(shape, N, seed=1)[0]
    world, blocks = World(shape, block_size=N, room=True), [5, 2]
    world.seed(5, state)
    world.scan(ops, bias, [(projected[:9], 0, blocks)])
    world.scan(ops, bias, [(torch.cat([projected[9:10], drafts[:3]]), 9, blocks)])  # one is kept: 10 tokens
    tokens = torch.cat([projected[10:13], drafts[:5]])
    world.scan(ops, bias, [(tokens, 10, blocks)])  # three are kept: 13, where the drafts before ended
    reads = world.scan(ops, bias, [(projected[13:], 13, blocks)])
    expected, final = truth(shape, projected, bias, state)
    torch.testing.assert_close(reads.double(), expected[13:], rtol=0, atol=KERNEL_READS)
    torch.testing.assert_close(world.state_after(ops, blocks, N + 2).double(), final, rtol=0, atol=KERNEL_STATE)


def test_a_page_without_room_keeps_its_neighbours(ops: PagedOps) -> None:
    """One float too few: nothing is kept, and nothing behind the page is touched."""
    shape = FEW_SHAPES[0]
    projected, bias, state = random_inputs(shape, 8)
    for less in (0, 1):
        world = World(shape, block_size=N, room=True)
        world.pages = world.whole[:, : world.pages.shape[1] - less]
        world.seed(5, state)
        world.scan(ops, bias, [(projected, 0, [5])])
        assert (world.whole[:, shape.content_floats(N) + shape.state_floats + 2 - less :] == UNTOUCHED).all()
        if less:
            assert (world.whole[:, shape.content_floats(N) :] == UNTOUCHED).all()
