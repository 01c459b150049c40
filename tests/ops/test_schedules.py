"""Random schedules: several requests, chunked, decoded, with rejected drafts, limits and masks, in any order."""

from __future__ import annotations

import random

import pytest
import torch

from deltamem_vllm.ops.layout import MemoryShape
from deltamem_vllm.ops.paged import WRITE_ALL, PagedOps
from tests.ops.paging import FEW_SHAPES, UNTOUCHED, World, name_of, random_inputs, truth
from tests.tolerances import KERNEL_READS, KERNEL_STATE


@pytest.mark.parametrize("shape", FEW_SHAPES, ids=name_of)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("room", [False, True], ids=["", "room"])
def test_any_schedule_gives_the_reads_of_one_whole_scan(
    ops: PagedOps, shape: MemoryShape, room: bool, seed: int
) -> None:
    rng = random.Random(seed)
    world = World(shape, block_size=rng.choice([4, 16]), num_blocks=64, room=room)
    free = list(range(64))
    rng.shuffle(free)
    lengths = [rng.randint(1, 40) for _ in range(4)]
    limits = [rng.choice([0, 7, WRITE_ALL, WRITE_ALL]) for _ in lengths]
    inputs = [random_inputs(shape, length, seed=10 * seed + i) for i, length in enumerate(lengths)]
    bias = inputs[0][1]
    # room for drafts that overshoot the end
    blocks = [[free.pop() for _ in range((length + 6) // world.block_size + 1)] for length in lengths]
    shares = (0, 0, 0.4, 1)
    masked = [[p for p in range(n) if rng.random() < share] for n, share in zip(lengths, shares, strict=True)]
    for own, limit, mask, (_, _, state) in zip(blocks, limits, masked, inputs, strict=True):
        world.seed(own[0], state, limit)
        world.mask(own, mask)
    reads = [torch.full((length, shape.width), float("nan")) for length in lengths]
    done = [0] * len(lengths)

    while any(count < length for count, length in zip(done, lengths, strict=True)):
        waiting = [i for i in range(len(lengths)) if done[i] < lengths[i]]
        batch = rng.sample(waiting, rng.randint(1, len(waiting)))
        step = []
        for i in batch:
            count = rng.choice([1, 1, rng.randint(1, lengths[i] - done[i])])
            drafts = random_inputs(shape, rng.randint(0, 5), seed=rng.randrange(1 << 30))[0]
            tokens = torch.cat([inputs[i][0][done[i] : done[i] + count], drafts])
            step.append((i, count, tokens))
        result = world.scan(ops, bias, [(tokens, done[i], blocks[i]) for i, _, tokens in step])
        parts = result.split([len(tokens) for _, _, tokens in step])
        for (i, count, _), part in zip(step, parts, strict=True):
            reads[i][done[i] : done[i] + count] = part[:count]
            done[i] += count

    for i, (projected, _, state) in enumerate(inputs):
        expected, final = truth(shape, projected, bias, state, limits[i], masked[i])
        torch.testing.assert_close(reads[i].double(), expected, rtol=0, atol=KERNEL_READS)
        end = world.state_after(ops, blocks[i], lengths[i])
        torch.testing.assert_close(end.double(), final, rtol=0, atol=KERNEL_STATE)
    assert (world.pages[free] == UNTOUCHED).all()


@pytest.mark.parametrize("scale", [1e-9, 1e-5, 1e-2, 1.0, 30.0, 1e4])
@pytest.mark.parametrize("shape", FEW_SHAPES[:3], ids=name_of)
def test_activations_hold_at_every_scale(ops: PagedOps, shape: MemoryShape, scale: float) -> None:
    """Tiny keys are where a careless tanh loses its digits, large gates where a careless exp overflows."""
    projected, bias, state = random_inputs(shape, 12)
    values = projected[:, 2 * shape.width : 3 * shape.width].clone()
    projected *= scale
    projected[:, 2 * shape.width : 3 * shape.width] = values
    world = World(shape)
    world.seed(3, state)
    expected, final = truth(shape, projected, bias, state)
    reads = world.scan(ops, bias, [(projected, 0, [3])])
    torch.testing.assert_close(reads.double(), expected, rtol=0, atol=KERNEL_READS)
    torch.testing.assert_close(world.state(ops, 3, 12).double(), final, rtol=0, atol=KERNEL_STATE)


def test_infinite_gates_and_keys(ops: PagedOps) -> None:
    shape = FEW_SHAPES[0]
    projected, bias, state = random_inputs(shape, 4)
    projected[0, 3 * shape.width :] = float("inf")
    projected[1, 3 * shape.width :] = float("-inf")
    projected[2, :3] = torch.tensor([float("inf"), float("-inf"), 0.0])
    world = World(shape)
    world.seed(3, state)
    reads = world.scan(ops, bias, [(projected, 0, [3])])
    expected = truth(shape, projected, bias, state)[0]
    assert reads.isfinite().all()
    torch.testing.assert_close(reads.double(), expected, rtol=0, atol=KERNEL_READS)
