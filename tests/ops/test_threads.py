"""What one step gives does not depend on how many threads share it, nor on who gets which part."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from deltamem_vllm.ops.layout import MemoryShape
from deltamem_vllm.ops.paged import WRITE_OFF, PagedOps
from tests.ops.paging import FEW_SHAPES, World, name_of, random_inputs, truth
from tests.tolerances import KERNEL_READS

SHAPES = FEW_SHAPES[:4]
#: Enough work for every shape here to be shared out.
LONG, SHORT, MANY = 1300, 70, 40


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def one_long_and_a_short(world: World, ops: PagedOps) -> Tensor:
    """Activated in pieces, then scanned by heads; one request without memory in between."""
    projected, bias, state = random_inputs(world.shape, LONG)
    free = iter(range(world.num_blocks))
    blocks = [next(free) for _ in range(LONG // world.block_size + 1)]
    other = [next(free) for _ in range(SHORT // world.block_size + 1)]
    off = next(free)
    world.write_limit[off] = WRITE_OFF
    world.seed(blocks[0], state)
    world.seed(other[0], -state, limit=SHORT - 7)
    world.mask(blocks, range(9, 50, 3))
    head = world.scan(ops, bias, [(projected[:21], 0, blocks)])
    rest = [(projected[21:], 21, blocks), (projected[:5], 0, [off]), (projected[:SHORT], 0, other)]
    return torch.cat([head, world.scan(ops, bias, rest, extra_rows=3, strided=True)])


def many_short(world: World, ops: PagedOps) -> Tensor:
    """Whole requests, each on one thread."""
    projected, bias, state = random_inputs(world.shape, SHORT)
    size = SHORT // world.block_size + 1
    requests = []
    for i in range(MANY):
        blocks = list(range(i * size, (i + 1) * size))
        world.seed(blocks[0], state * (i + 1) / MANY)
        requests.append((projected, 0, blocks))
    return world.scan(ops, bias, requests)


def one_begins_what_others_resume_from(world: World, ops: PagedOps) -> Tensor:
    """All hit, in one step, a block that the last of the list begins in it: they may not run side by side with it."""
    projected, bias, state = random_inputs(world.shape, LONG)
    size = world.block_size
    count = LONG // size
    first = list(range(count + 1))
    world.seed(0, state)
    hits = [((i + 1) * count // MANY * size, 1000 + i) for i in range(MANY)]
    requests = [(projected[at : at + 1], at, [*first[: at // size], own]) for at, own in hits]
    return world.scan(ops, bias, [*requests, (projected, 0, first)])


def world_of(shape: MemoryShape) -> World:
    world = World(shape, block_size=16, num_blocks=1050)
    world.pages.fill_(float("nan"))
    return world


@pytest.mark.parametrize("case", [one_long_and_a_short, many_short, one_begins_what_others_resume_from])
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_the_same_bits_on_any_number_of_threads(ops: PagedOps, shape: MemoryShape, case: object) -> None:
    if ops.name != "native":
        pytest.skip("torch runs the operators of this implementation one by one")
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        world = world_of(shape)
        reads = case(world, ops)  # type: ignore[operator]
        assert reads.isfinite().all()
        results.append((reads, world.pages.nan_to_num(7.0)))
    for reads, pages in results[1:]:
        assert torch.equal(reads, results[0][0])
        assert torch.equal(pages, results[0][1])


@pytest.mark.parametrize("shape", FEW_SHAPES[:2], ids=name_of)
def test_shared_work_is_the_reference(ops: PagedOps, shape: MemoryShape) -> None:
    if ops.name != "native":
        pytest.skip("torch runs the operators of this implementation one by one")
    torch.set_num_threads(2)
    projected, bias, state = random_inputs(shape, LONG)
    expected = truth(shape, projected, bias, state)[0]
    reads = one_begins_what_others_resume_from(world_of(shape), ops)
    torch.testing.assert_close(reads[MANY:].double(), expected, rtol=0, atol=KERNEL_READS)
    at = [(i + 1) * (LONG // 16) // MANY * 16 for i in range(MANY)]
    torch.testing.assert_close(reads[:MANY].double(), expected[at], rtol=0, atol=KERNEL_READS)
