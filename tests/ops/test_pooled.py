"""Seeds and takes of many requests in all layers at once."""

from __future__ import annotations

import pytest
import torch

from deltamem_vllm.ops.dispatch import select
from deltamem_vllm.ops.layout import MemoryShape
from deltamem_vllm.ops.paged import PagedOps
from deltamem_vllm.ops.paged_torch import TorchOps
from deltamem_vllm.ops.pooled import EMPTY, NO_SLOT, Book, LayerByLayer, PoolOps, pool_ops, staged
from tests.ops.paging import FEW_SHAPES, UNTOUCHED, World, int32, name_of, random_inputs, truth
from tests.tolerances import KERNEL_STATE

__all__ = ["test_refusals_of_the_pool", "test_seeds_go_where_they_should_and_nowhere_else", "test_takes"]
LAYERS = 3


def _worlds(shape: MemoryShape) -> tuple[list[World], Book]:
    worlds = [World(shape, num_blocks=8) for _ in range(LAYERS)]
    return worlds, Book.of([world.pages for world in worlds], 16)


def _states(shape: MemoryShape, count: int, seed: int) -> torch.Tensor:
    side = (count, LAYERS, shape.heads, shape.rank, shape.rank)
    return torch.randn(side, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", FEW_SHAPES, ids=name_of)
def test_seeds_go_where_they_should_and_nowhere_else(pool: PoolOps, shape: MemoryShape) -> None:
    worlds, book = _worlds(shape)
    states, staging = _states(shape, 5, 0), _states(shape, 2, 1)
    before = states.clone()
    pool.seed(shape, book, int32([6, 1, 3, 2]), int32([4, EMPTY, staged(1), 0]), states, staging)
    pool.seed(shape, book, int32([5]), int32([2]), states, None)
    wanted = {6: states[4], 1: torch.zeros_like(states[0]), 3: staging[1], 2: states[0], 5: states[2]}
    for layer, world in enumerate(worlds):
        for block, state in wanted.items():
            assert torch.equal(world.pages[block, : shape.state_floats], state[layer].flatten())
            assert (world.pages[block, shape.state_floats :] == UNTOUCHED).all()
        assert (world.whole[[0, 4, 7]] == UNTOUCHED).all()
        assert (world.whole[:, world.pages.shape[1] :] == UNTOUCHED).all()
    assert torch.equal(states, before)


@pytest.mark.parametrize("shape", FEW_SHAPES, ids=name_of)
@pytest.mark.parametrize("with_staging", [True, False])
def test_takes(ops: PagedOps, pool: PoolOps, shape: MemoryShape, with_staging: bool) -> None:
    worlds, book = _worlds(shape)
    inputs = [random_inputs(shape, 20, seed=layer) for layer in range(LAYERS)]
    for world, (projected, bias, state) in zip(worlds, inputs, strict=True):
        world.seed(6, state)
        world.scan(ops, bias, [(projected, 0, [6, 1])])
    states = torch.full_like(_states(shape, 5, 0), UNTOUCHED)
    staging = torch.full_like(states[:3], float("nan")) if with_staging else None
    pool.take(shape, book, int32([1, 6, 6]), int32([4, 0, 16]), int32([3, 0, NO_SLOT]), states, staging)
    for layer, (projected, bias, state) in enumerate(inputs):
        ends = {n: truth(shape, projected[:n], bias, state)[1] for n in (20, 0, 16)}
        for slot, length in ((3, 20), (0, 0)):
            torch.testing.assert_close(states[slot, layer].double(), ends[length], rtol=0, atol=KERNEL_STATE)
        for row, length in enumerate((20, 0, 16) if staging is not None else ()):
            assert staging is not None
            torch.testing.assert_close(staging[row, layer].double(), ends[length], rtol=0, atol=KERNEL_STATE)
    assert (states[[1, 2, 4]] == UNTOUCHED).all()


def test_refusals_of_the_pool(pool: PoolOps) -> None:
    shape = FEW_SHAPES[0]
    worlds, book = _worlds(shape)
    states = _states(shape, 2, 0)
    with pytest.raises((ValueError, RuntimeError), match="states"):
        pool.seed(shape, book, int32([1]), int32([0]), states[:, :2], None)
    with pytest.raises((ValueError, RuntimeError), match=r"orders|counts"):
        pool.take(shape, book, int32([1]), int32([0, 1]), int32([0]), states, None)
    with pytest.raises((ValueError, RuntimeError), match="staging"):
        pool.take(shape, book, int32([1, 2]), int32([0, 1]), int32([0, 1]), states, states[:1])
    with pytest.raises(ValueError, match="alike"):
        Book.of([worlds[0].pages, worlds[1].pages[:4]], 16)
    with pytest.raises(ValueError, match="nothing is staged"):
        LayerByLayer(TorchOps()).seed(shape, book, int32([1]), int32([staged(0)]), states, None)
    assert all((world.whole == UNTOUCHED).all() for world in worlds)


@pytest.mark.parametrize(
    ("blocks", "counts", "slots", "message"),
    [
        ([1, 8], [0, 0], [0, 1], "order 1 names block 8 of 8"),
        ([1, 2], [0, 17], [0, 1], "order 1 asks for 17 of 16 tokens"),
        ([1, 2], [0, 0], [0, 2], "order 1 names slot 2 of 2"),
    ],
)
def test_a_native_take_that_does_not_fit_changes_nothing(
    blocks: list[int], counts: list[int], slots: list[int], message: str
) -> None:
    native = pool_ops(select("cpu", "native"))
    shape = FEW_SHAPES[0]
    _, book = _worlds(shape)
    states = torch.full_like(_states(shape, 2, 0), UNTOUCHED)
    with pytest.raises(RuntimeError, match=message):
        native.take(shape, book, int32(blocks), int32(counts), int32(slots), states, None)
    assert (states == UNTOUCHED).all()


@pytest.mark.parametrize(
    ("blocks", "sources", "message"),
    [
        ([1, -1], [0, 0], "order 1 names block -1 of 8"),
        ([1, 2], [EMPTY, 2], "order 1 names slot 2 of 2"),
        ([1, 2], [0, staged(1)], "order 1 names staged row 1 of 1"),
    ],
)
def test_a_native_seed_that_does_not_fit_changes_nothing(blocks: list[int], sources: list[int], message: str) -> None:
    native = pool_ops(select("cpu", "native"))
    shape = FEW_SHAPES[0]
    worlds, book = _worlds(shape)
    with pytest.raises(RuntimeError, match=message):
        native.seed(shape, book, int32(blocks), int32(sources), _states(shape, 2, 0), _states(shape, 1, 1))
    assert all((world.whole == UNTOUCHED).all() for world in worlds)
