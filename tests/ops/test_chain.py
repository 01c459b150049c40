"""A step that goes from layer to layer: the bits of layers that run by themselves, and no layer out of its turn."""

from __future__ import annotations

import threading

import pytest
import torch

from deltamem_vllm.ops.layout import MemoryShape
from deltamem_vllm.ops.native import TILE, LayerConstants, LayerRows, LayerTable, NativeOps, tiled
from deltamem_vllm.ops.paged import PagedOps
from tests.ops.paging import FEW_SHAPES, int32, make_shape, name_of
from tests.ops.stack import LAYERS, TURN, N, Stack, same_bits

pytestmark = pytest.mark.parametrize("ops", ["avx512", "avx2", "portable"], indirect=True)


@pytest.fixture
def native(ops: PagedOps) -> NativeOps:
    assert isinstance(ops, NativeOps)
    return ops


@pytest.mark.parametrize("shape", FEW_SHAPES, ids=name_of)
def test_the_bits_are_those_of_layers_by_themselves(native: NativeOps, shape: MemoryShape) -> None:
    results = []
    for chained in (False, True):
        stack, reads = Stack(shape), []
        for number, length in enumerate((20, 2, 3)):
            batch = stack.step(length, number)
            for layer in range(LAYERS):
                own = stack.rows(layer, length)
                if not chained:
                    bias = stack.inputs[layer][1]
                    native.page_scan(shape, own.rows, bias, stack.worlds[layer].pages, batch, own.reads)
                elif layer == 0:
                    own = stack.begin(native, length, batch)
                else:
                    native.scan_next(own, layer)
                reads.append(own.reads)
        results.append((torch.cat(reads), *(world.whole for world in stack.worlds)))
    assert results[1][0].isfinite().all()
    for one, other in zip(*results, strict=True):
        assert same_bits(one, other)


def test_a_step_without_requests_reads_zero(native: NativeOps) -> None:
    stack = Stack(make_shape(8))
    before = [world.whole.clone() for world in stack.worlds]
    native.scan_nothing(LAYERS)
    for layer in range(1, LAYERS):
        own = stack.rows(layer, 4)
        native.scan_next(own, layer)
        assert (own.reads == 0).all()
    for world, old in zip(stack.worlds, before, strict=True):
        assert same_bits(world.whole, old)


def test_a_layer_out_of_its_turn_is_refused(native: NativeOps) -> None:
    stack = Stack(make_shape(8))

    def run(layer: int) -> None:
        if layer:
            native.scan_next(stack.rows(layer, 4), layer)
        else:
            stack.begin(native, 4, stack.step(4, 0))

    for order, turn in (([0, 2], 1), ([0, 1, 1], 2), ([0, 1, 2, 1], 0), ([0, 1, 2, 3], 0)):
        *good, bad = order
        for layer in good:
            run(layer)
        own = stack.rows(bad % LAYERS, 4)
        before = [world.whole.clone() for world in stack.worlds]
        with pytest.raises(RuntimeError, match=f"layer {bad}, but {TURN} {turn}"):
            native.scan_next(own, bad)
        assert own.reads.isnan().all()
        for world, old in zip(stack.worlds, before, strict=True):
            assert same_bits(world.whole, old)
        for layer in range(LAYERS):  # a step that failed leaves nothing to the next
            run(layer)


def test_a_step_is_its_threads_own(native: NativeOps) -> None:
    stack, errors = Stack(make_shape(8)), list[str]()
    native.scan_nothing(LAYERS)

    def elsewhere() -> None:
        try:
            native.scan_next(stack.rows(1, 4), 1)
        except RuntimeError as error:
            errors.append(str(error))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert len(errors) == 1
    assert TURN in errors[0]
    native.scan_next(stack.rows(1, 4), 1)
    native.scan_next(stack.rows(2, 4), 2)


def test_what_does_not_fit_is_refused(native: NativeOps) -> None:
    stack = Stack(make_shape(8))
    shape, batch = stack.shape, stack.step(4, 0)
    with pytest.raises(RuntimeError, match="bias: expected shape"):
        LayerTable.of(shape, [LayerConstants(torch.zeros(1))])
    garbage = batch._replace(block_table=int32([[5, 2], [99, 7]]))
    with pytest.raises(RuntimeError, match="request 1 uses block 99"):
        stack.begin(native, 4, garbage)
    with pytest.raises(RuntimeError, match=f"{TURN} 0"):
        native.scan_next(stack.rows(1, 4), 1)
    with pytest.raises(RuntimeError, match="cannot hold 64 tokens"):
        stack.begin(native, 4, batch._replace(block_size=4 * N))
    two = LayerTable.of(shape, stack.table.layers[:2])
    with pytest.raises(RuntimeError, match="table: expected shape"):
        native.scan_first(shape, stack.rows(0, 4), two, stack.book, batch)
    with pytest.raises(RuntimeError, match=f"{TURN} 0"):
        native.scan_next(stack.rows(1, 4), 1)
    stack.begin(native, 4, batch)
    with pytest.raises(RuntimeError, match="3 rows in a step of 4 tokens"):
        native.scan_next(stack.rows(1, 3), 1)
    own = stack.rows(1, 4)
    columns = shape.projected_columns
    before = [world.whole.clone() for world in stack.worlds]
    for wrong, named in (
        (own._replace(kept=own.reads[:3]), "reads: expected 8 contiguous floats for each of 4 tokens, got 3 rows"),
        (own._replace(kept=torch.full((4, 7), float("nan"))), "reads: .* got 4 rows of 7, 7 apart"),
        (own._replace(kept=torch.full((4, 9), float("nan"))[:, :8]), "reads: .* 9 apart"),
        (own._replace(kept=torch.full((8, 4), float("nan")).t()), "reads: the columns of a row must be contiguous"),
        (own._replace(kept=own.reads.half()), "reads: .* not of float32"),
        (own._replace(kept=own.reads.double()), "reads: expected float32"),
        (own._replace(kept=own.reads[0]), "reads: expected rows of columns, got 1 dimensions"),
        (own._replace(rows=own.rows[:, 1:]), "projected columns"),
        (own._replace(rows=own.rows.unsqueeze(0)), "rows: expected rows of columns, got 3 dimensions"),
        (own._replace(rows=own.rows.double()), "rows: expected float32"),
        (own._replace(rows=torch.zeros(4, 2 * columns)[:, ::2]), "rows: the columns of a row must be contiguous"),
        (own._replace(rows=torch.zeros(2 * columns).as_strided((4, columns), (8, 1))), "rows must not overlap"),
        (own._replace(projected=own.rows[:, 1:]), "projected: expected the 32 projected columns, got 31"),
        (own._replace(projected=torch.zeros(4, columns + 1)), "projected: expected the 32 projected columns, got 33"),
    ):
        with pytest.raises(RuntimeError, match=named):
            native.scan_next(wrong, 1)
        assert wrong.reads.isnan().all()
    for world, old in zip(stack.worlds, before, strict=True):
        assert same_bits(world.whole, old)
    native.scan_next(own, 1)
    assert own.reads.isfinite().all()


def test_rows_that_are_not_those_of_their_projection_are_refused(native: NativeOps) -> None:
    stack = Stack(make_shape(8))
    matrix = tiled(torch.ones(8, TILE))
    stack.table = LayerTable.of(stack.shape, [LayerConstants(bias, matrix) for _, bias, _ in stack.inputs])
    around = torch.zeros(6, TILE)
    own = stack.rows(0, 4)
    first = LayerRows(around[1:5], own.rows, own.reads)
    native.scan_first(stack.shape, first, stack.table, stack.book, stack.step(4, 0))
    assert (around[1:5] != 0).any()
    around.zero_()
    own = stack.rows(1, 4)
    for rows in (around[1:4], around[1:6]):
        with pytest.raises(RuntimeError, match=f"rows: expected one for each of 4 tokens, got {len(rows)}"):
            native.scan_next(LayerRows(rows, own.rows, own.reads), 1)
    assert (around == 0).all()
    assert own.reads.isnan().all()
