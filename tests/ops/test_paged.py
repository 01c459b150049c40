"""Native and torch, each against the reference, and everything that a step must not change."""

from __future__ import annotations

import pytest
import torch

from deltamem_vllm.ops.layout import MemoryShape
from deltamem_vllm.ops.paged import WRITE_OFF, PagedOps
from tests.ops.paging import (
    FEW_SHAPES,
    SHAPES,
    UNTOUCHED,
    World,
    check_strided,
    int32,
    make_shape,
    name_of,
    random_inputs,
    truth,
)
from tests.tolerances import KERNEL_READS, KERNEL_STATE

BLOCKS = [5, 2, 7, 11, 3]
few_shapes = pytest.mark.parametrize("shape", FEW_SHAPES, ids=name_of)


def same(ops: PagedOps, actual: torch.Tensor, expected: torch.Tensor) -> None:
    """The same bits; for torch only nearly: its tanh and sigmoid round differently in the tail of a vector
    loop, so a token's activation depends on how many tokens came with it.
    """
    if ops.name == "native":
        assert torch.equal(actual, expected)
    else:
        close(actual, expected, KERNEL_STATE)


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_scan_is_the_reference(ops: PagedOps, shape: MemoryShape) -> None:
    projected, bias, state = random_inputs(shape, 50)
    world = World(shape)
    world.seed(BLOCKS[0], state)
    reads = world.scan(ops, bias, [(projected, 0, BLOCKS)])
    expected, final = truth(shape, projected, bias, state)
    close(reads, expected, KERNEL_READS)
    close(world.state_after(ops, BLOCKS, 50), final, KERNEL_STATE)
    # the state at every position, from the pages alone
    for length in (1, 15, 16, 17, 48, 49):
        close(
            world.state_after(ops, BLOCKS, length),
            truth(shape, projected[:length], bias, state)[1],
            KERNEL_STATE,
        )


@few_shapes
@pytest.mark.parametrize("block_size", [1, 3, 16, 32, 128])
def test_any_block_size(ops: PagedOps, shape: MemoryShape, block_size: int) -> None:
    projected, bias, state = random_inputs(shape, 40)
    world = World(shape, block_size=block_size, num_blocks=48)
    blocks = list(range(45, 1, -1))
    world.seed(blocks[0], state)
    expected, final = truth(shape, projected, bias, state)
    close(world.scan(ops, bias, [(projected, 0, blocks)]), expected, KERNEL_READS)
    close(world.state_after(ops, blocks, 40), final, KERNEL_STATE)


@few_shapes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened_exactly(ops: PagedOps, shape: MemoryShape, dtype: torch.dtype) -> None:
    projected, bias, state = random_inputs(shape, 20)
    projected[0, :3] = torch.tensor([1e-7, 6e-5, -3e-8])  # subnormal in fp16
    half = projected.to(dtype)
    reads = []
    for tokens in (half, half.float()):
        world = World(shape)
        world.seed(BLOCKS[0], state)
        reads.append(world.scan(ops, bias, [(tokens, 0, BLOCKS)]))
    assert torch.equal(*reads)


@few_shapes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_columns_of_a_wider_matrix(ops: PagedOps, shape: MemoryShape, dtype: torch.dtype) -> None:
    """``projected`` may be a slice of what one GEMM made for several users; what lies beside it is never looked at."""
    check_strided(ops, shape, dtype)


@few_shapes
@pytest.mark.parametrize("chunks", [[1] * 50, [7] * 7 + [1], [16, 16, 18], [15, 1, 1, 33], [40, 10]])
def test_split_window_is_the_whole_window(ops: PagedOps, shape: MemoryShape, chunks: list[int]) -> None:
    projected, bias, state = random_inputs(shape, 50)
    whole, split = World(shape), World(shape)
    for world in (whole, split):
        world.seed(BLOCKS[0], state)
    expected = whole.scan(ops, bias, [(projected, 0, BLOCKS)])
    done, reads = 0, []
    for count in chunks:
        reads.append(split.scan(ops, bias, [(projected[done : done + count], done, BLOCKS)]))
        done += count
    same(ops, torch.cat(reads), expected)
    same(ops, split.pages, whole.pages)


@few_shapes
def test_permuted_batch_gives_the_same_bits(ops: PagedOps, shape: MemoryShape) -> None:
    sizes, blocks = [1, 20, 3, 33], [[1], [2, 3], [4], [5, 6, 7]]
    inputs = [random_inputs(shape, size, seed=size) for size in sizes]
    bias = inputs[0][1]
    results = []
    for order in ([0, 1, 2, 3], [3, 0, 2, 1]):
        world = World(shape)
        for (_, _, state), own in zip(inputs, blocks, strict=True):
            world.seed(own[0], state)
        reads = world.scan(ops, bias, [(inputs[i][0], 0, blocks[i]) for i in order])
        parts = dict(zip(order, reads.split([sizes[i] for i in order]), strict=True))
        results.append(([parts[i] for i in range(4)], world.pages))
    for first, second in zip(results[0][0], results[1][0], strict=True):
        assert torch.equal(first, second)
    assert torch.equal(results[0][1], results[1][1])


@few_shapes
@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 2, 0]])
def test_pages_filled_and_hit_in_the_same_step(ops: PagedOps, shape: MemoryShape, order: list[int]) -> None:
    """Three requests with one prompt, in any order: the second hits a block that the first one fills in this step, the
    third one that the second fills."""
    projected, bias, state = random_inputs(shape, 50)
    world = World(shape)
    world.seed(1, state)
    requests = [(projected[:20], 0, [1, 2]), (projected[16:40], 16, [1, 3, 4]), (projected[32:], 32, [1, 3, 5, 6])]
    reads = world.scan(ops, bias, [requests[i] for i in order])
    parts = dict(zip(order, reads.split([len(requests[i][0]) for i in order]), strict=True))
    expected = truth(shape, projected, bias, state)[0]
    for i, (own, context, _) in enumerate(requests):
        close(parts[i], expected[context : context + len(own)], KERNEL_READS)


@few_shapes
def test_nothing_else_is_touched(ops: PagedOps, shape: MemoryShape) -> None:
    projected, bias, state = random_inputs(shape, 20)
    world = World(shape)
    world.seed(9, state)
    world.scan(ops, bias, [(projected, 0, [9, 4])], extra_rows=3)
    others = [block for block in range(world.num_blocks) if block not in (9, 4)]
    assert (world.pages[others] == UNTOUCHED).all()
    floats, columns = shape.state_floats, shape.log_columns
    assert torch.equal(world.pages[9, :floats], state.flatten()), "the seeded base is never overwritten"
    assert (world.pages[4, floats + 4 * columns :] == UNTOUCHED).all(), "log rows of later tokens"
    assert (world.whole[:, world.pages.shape[1] :] == UNTOUCHED).all(), "between the pages"


def test_rows_of_no_request_read_zero(ops: PagedOps) -> None:
    projected, bias, state = random_inputs(make_shape(), 4)
    world = World(make_shape())
    world.seed(1, state)
    reads = world.scan(ops, bias, [(projected, 0, [1])], extra_rows=5)
    assert (reads[4:] == 0).all()
    assert reads[:4].isfinite().all()


@few_shapes
def test_write_limit_freezes_the_state(ops: PagedOps, shape: MemoryShape) -> None:
    projected, bias, state = random_inputs(shape, 40)
    for limit in (0, 1, 16, 21, 39, 40, 100):
        world = World(shape)
        world.seed(BLOCKS[0], state, limit)
        reads = world.scan(ops, bias, [(projected, 0, BLOCKS)])
        expected, final = truth(shape, projected, bias, state, limit)
        close(reads, expected, KERNEL_READS)
        close(world.state_after(ops, BLOCKS, 40), final, KERNEL_STATE)
        if limit < 40:  # exactly, not nearly: the log row of an unwritten token is a no-op
            frozen = world.state_after(ops, BLOCKS, 40)
            before = world.state_after(ops, BLOCKS, limit) if limit else state
            assert torch.equal(frozen, before)


@few_shapes
@pytest.mark.parametrize("block_size", [16, 64])
def test_masked_tokens_read_and_are_not_written(ops: PagedOps, shape: MemoryShape, block_size: int) -> None:
    """A hole in the middle of a prompt: as if its tokens had only looked; bit-equal to other tokens in the hole."""
    projected, bias, state = random_inputs(shape, 40)
    for holes in ([0], [39], range(5, 9), [*range(10, 33), 35], range(31, 33), range(40)):
        world = World(shape, block_size)
        world.seed(BLOCKS[0], state)
        world.mask(BLOCKS, holes)
        reads = world.scan(ops, bias, [(projected, 0, BLOCKS)])
        expected, final = truth(shape, projected, bias, state, masked=list(holes))
        close(reads, expected, KERNEL_READS)
        close(world.state_after(ops, BLOCKS, 40), final, KERNEL_STATE)
        poisoned = projected.clone()
        poisoned[list(holes), shape.width :] = float("nan")
        other = World(shape, block_size)
        other.seed(BLOCKS[0], state)
        other.mask(BLOCKS, holes)
        other.scan(ops, bias, [(poisoned, 0, BLOCKS)])
        assert torch.equal(other.state_after(ops, BLOCKS, 40), world.state_after(ops, BLOCKS, 40))


def test_unwritten_tokens_leave_no_trace_of_bad_numbers(ops: PagedOps) -> None:
    shape = make_shape(couple_lambda=False)
    projected, bias, state = random_inputs(shape, 8)
    projected[4:, shape.width :] = float("nan")
    world = World(shape)
    world.seed(1, state, limit=4)
    reads = world.scan(ops, bias, [(projected, 0, [1])])
    assert reads.isfinite().all()
    assert world.state(ops, 1, 8).isfinite().all()


@few_shapes
def test_memory_off_touches_no_page(ops: PagedOps, shape: MemoryShape) -> None:
    projected, bias, state = random_inputs(shape, 20)
    world = World(shape)
    world.write_limit[6] = WRITE_OFF
    world.pages[6] = float("nan")  # would show in the reads if it were read
    world.seed(1, state)
    reads = world.scan(ops, bias, [(projected, 0, [6, 99999]), (projected, 0, [1, 2]), (projected[:1], 7, [6])])
    assert (reads[:20] == 0).all()
    assert (reads[40:] == 0).all()
    close(reads[20:40], truth(shape, projected, bias, state)[0], KERNEL_READS)
    assert world.pages[6].isnan().all()
    assert (world.pages[[b for b in range(24) if b not in (6, 1, 2)]] == UNTOUCHED).all()


@few_shapes
@pytest.mark.parametrize("accepted", [13, 15, 16, 17])
def test_rejected_drafts_are_overwritten(ops: PagedOps, shape: MemoryShape, accepted: int) -> None:
    projected, bias, state = random_inputs(shape, 40)
    drafts = random_inputs(shape, 6, seed=1)[0]
    plain, drafted = World(shape), World(shape)
    for world in (plain, drafted):
        world.seed(BLOCKS[0], state)
        world.scan(ops, bias, [(projected[:accepted], 0, BLOCKS)])
    drafted.scan(ops, bias, [(drafts, accepted, BLOCKS)])  # all six rejected
    tail = projected[accepted:]
    reads = [world.scan(ops, bias, [(tail, accepted, BLOCKS)]) for world in (plain, drafted)]
    assert torch.equal(*reads)
    assert torch.equal(plain.state_after(ops, BLOCKS, 40), drafted.state_after(ops, BLOCKS, 40))


def test_a_mixed_batch_of_decodes_and_prefills(ops: PagedOps) -> None:
    shape = make_shape()
    projected, bias, state = random_inputs(shape, 40)
    world = World(shape)
    for block in (1, 4):
        world.seed(block, state)
    world.scan(ops, bias, [(projected[:32], 0, [1, 2])])
    reads = world.scan(
        ops, bias, [(projected[32:33], 32, [1, 2, 3]), (projected[:0], 0, []), (projected[:20], 0, [4, 5])]
    )
    expected = truth(shape, projected, bias, state)[0]
    close(reads[0], expected[32], KERNEL_READS)
    close(reads[1:], expected[:20], KERNEL_READS)


def test_one_bad_session_does_not_reach_another(ops: PagedOps) -> None:
    shape = make_shape()
    projected, bias, state = random_inputs(shape, 10)
    world = World(shape)
    world.seed(1, torch.full_like(state, float("nan")))
    world.seed(2, state)
    bad = projected.clone()
    bad[3] = float("inf")
    world.seed(3, state)
    reads = world.scan(ops, bias, [(projected, 0, [1]), (bad, 0, [3]), (projected, 0, [2])])
    assert reads[:10].isnan().all()
    close(reads[20:], truth(shape, projected, bias, state)[0], KERNEL_READS)


def test_page_state_of_many(ops: PagedOps) -> None:
    shape = make_shape(8, 4)
    projected, bias, state = random_inputs(shape, 30)
    world = World(shape)
    world.seed(BLOCKS[0], state)
    world.scan(ops, bias, [(projected, 0, BLOCKS)])
    out = torch.full((3, 4, 8, 8), float("nan"))
    ops.page_state(shape, world.pages, int32([2, 5, 5]), int32([3, 0, 16]), 16, out)
    assert torch.equal(out[1], state)
    for i, length in ((0, 19), (2, 16)):
        close(out[i], truth(shape, projected[:length], bias, state)[1], KERNEL_STATE)
    empty = out[:0]
    ops.page_state(shape, world.pages, int32([]), int32([]), 16, empty)
