"""Corrections of q, k and v in the rows that qkv_proj put out, of o in the residual: right, in place, nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from deltamem_vllm.ops.native import TILE, LayerConstants, LayerRows, LayerTable, NativeOps, tiled
from deltamem_vllm.ops.paged import Batch, PagedOps
from deltamem_vllm.ops.pooled import Book
from tests.ops.paging import World, int32, make_shape, random_inputs, truth
from tests.tolerances import KERNEL_READS

N, BLOCKS, TOKENS = 16, [5, 2, 9, 7, 3, 11], 83
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

pytestmark = pytest.mark.parametrize("ops", ["avx512", "avx2", "portable"], indirect=True)


@pytest.fixture
def native(ops: PagedOps) -> NativeOps:
    assert isinstance(ops, NativeOps)
    return ops


class Case(NamedTuple):
    """A step of one layer. ``around``: all of the memory that ``layer.rows`` is a part of."""

    layer: LayerRows
    constants: LayerConstants
    around: Tensor
    world: World
    matrix: Tensor
    state: Tensor

    def run(self, native: NativeOps, tokens: int = TOKENS, limit: int | None = None) -> LayerRows:
        """The layer's first ``tokens`` rows, as a step of one request."""
        if limit is not None:
            self.world.write_limit[BLOCKS[0]] = limit
        own = self.layer._replace(
            rows=self.layer.rows[:tokens],
            projected=None if self.layer.projected is None else self.layer.projected[:tokens],
            kept=None if self.layer.kept is None else self.layer.kept[:tokens],
            residual=None if self.layer.residual is None else self.layer.residual[:tokens],
        )
        batch = Batch(
            int32([BLOCKS]), int32([0, tokens]), int32([tokens]), self.world.write_limit, self.world.unwritten, N, 1
        )
        table = LayerTable.of(self.world.shape, [self.constants])
        native.scan_first(self.world.shape, own, table, Book.of([self.world.pages], N), batch)
        return own


def make(
    rank: int = 8,
    heads: int = 1,
    dtype: torch.dtype = torch.float32,
    columns: int = 2 * TILE,
    first: int = 0,
    width: int = 3 * TILE,
    appended: bool = True,
) -> Case:
    """Rows of ``width`` columns, and behind them the projected ones if ``appended``, in memory that is wider."""
    shape = make_shape(rank, heads)
    projected, bias, state = random_inputs(shape, TOKENS)
    random = torch.Generator().manual_seed(1)
    around = torch.full((TOKENS + 2, width + projected.shape[1] + 9), -0.0, dtype=dtype)  # adding zero changes it
    rows = around[1:-1, 3 : 3 + width]
    rows.copy_(torch.randn((TOKENS, width), generator=random))
    own = projected.to(dtype)
    if appended:
        rows = around[1:-1, 3 : 3 + width + projected.shape[1]]
        rows[:, width:] = own
    matrix = torch.randn((shape.width, columns), generator=random).to(dtype)
    reads = torch.full((TOKENS, shape.width), float("nan"))
    world = World(shape, block_size=N)
    world.seed(BLOCKS[0], state)
    layer = LayerRows(rows, None if appended else own, reads)
    return Case(layer, LayerConstants(bias, tiled(matrix), first), around, world, matrix, state)


def check(case: Case, native: NativeOps, tokens: int = TOKENS, run: Callable[[], LayerRows] | None = None) -> None:
    """Reads are the reference's, rows those that they lead to, rounded once; all else is as it was."""
    (layer, first), dtype = (case.layer, case.constants.first), case.matrix.dtype
    before, place = case.around.clone(), (layer.rows.storage_offset(), layer.rows.stride())
    rows = before.as_strided(layer.rows.shape, place[1], place[0])
    projected = layer.projected if layer.projected is not None else rows[:, -case.world.shape.projected_columns :]
    expected = truth(case.world.shape, projected[:tokens].float(), case.constants.bias, case.state)[0]
    own = case.run(native, tokens) if run is None else run()
    torch.testing.assert_close(own.reads.double(), expected, rtol=0, atol=KERNEL_READS)
    corrected = rows[:tokens, first : first + case.matrix.shape[1]]
    exact = corrected.double() + own.reads.double() @ case.matrix.double()
    got = layer.rows[:tokens, first : first + case.matrix.shape[1]]
    if dtype == torch.float32:
        torch.testing.assert_close(got.double(), exact, rtol=0, atol=5e-6)
    else:
        assert (got == exact.to(dtype)).float().mean() > 0.99, "more than one rounding"
        torch.testing.assert_close(got.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    corrected.copy_(got)
    assert torch.equal(case.around.view(torch.uint8), before.view(torch.uint8)), "something else was changed"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rank", "heads"), [(8, 1), (16, 1), (4, 4), (5, 1), (3, 7)])
def test_corrections_are_exact_and_touch_nothing_else(
    native: NativeOps, rank: int, heads: int, dtype: torch.dtype
) -> None:
    check(make(rank, heads, dtype), native)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("appended", [True, False])
@pytest.mark.parametrize(
    ("first", "columns", "width"),
    [(0, 1, 1), (0, 40, 40), (0, 3 * TILE, 3 * TILE), (5, 50, 60), (TILE, 2 * TILE, 3 * TILE), (90, 6, 96)],
)
def test_any_columns(
    native: NativeOps, first: int, columns: int, width: int, appended: bool, dtype: torch.dtype
) -> None:
    check(make(dtype=dtype, columns=columns, first=first, width=width, appended=appended), native)


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 15, 16, 17, 31, 33, 64, 65, TOKENS])
def test_a_rows_bits_do_not_depend_on_the_rows_beside_it(native: NativeOps, tokens: int) -> None:
    some, all_of_them = make(), make()
    check(some, native, tokens)
    all_of_them.run(native)
    assert torch.equal(some.layer.rows[:tokens], all_of_them.layer.rows[:tokens])


def test_threads_change_no_bit(native: NativeOps) -> None:
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            case = make(columns=96)
            check(case, native)
            results.append(case.around)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


def with_residual(case: Case, hidden: int, kept: bool) -> tuple[Case, Tensor, Tensor]:
    """The case with o corrected, too; the residual's surroundings, and the matrix."""
    random, dtype = torch.Generator().manual_seed(2), case.matrix.dtype
    around = torch.full((TOKENS + 2, hidden + 7), -0.0, dtype=dtype)
    residual = around[1:-1, 3 : 3 + hidden]
    residual.copy_(torch.randn((TOKENS, hidden), generator=random))
    matrix = torch.randn((case.world.shape.width, hidden), generator=random).to(dtype)
    layer = case.layer._replace(residual=residual, kept=case.layer.kept if kept else None)
    return case._replace(layer=layer, constants=case.constants._replace(in_residual=tiled(matrix))), around, matrix


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rank", "heads"), [(8, 1), (16, 1), (4, 4), (5, 1)])
@pytest.mark.parametrize("hidden", [2 * TILE, TILE + 9])
@pytest.mark.parametrize("tokens", [1, 7, TOKENS])
def test_o_is_corrected_in_the_residual(
    native: NativeOps, rank: int, heads: int, dtype: torch.dtype, hidden: int, tokens: int
) -> None:
    case, around, matrix = with_residual(make(rank, heads, dtype), hidden, kept=True)
    before = around.clone()
    check(case, native, tokens)
    expected = before[1:-1, 3 : 3 + hidden]
    exact = expected[:tokens].double() + case.layer.reads[:tokens].double() @ matrix.double()
    got = around[1:-1, 3 : 3 + hidden][:tokens]
    torch.testing.assert_close(got.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=5e-6)
    expected[:tokens] = got
    assert torch.equal(around.view(torch.uint8), before.view(torch.uint8)), "something else was changed"


@pytest.mark.parametrize("tokens", [1, 2, TOKENS])
def test_reads_that_nobody_keeps_correct_the_same(native: NativeOps, tokens: int) -> None:
    results = []
    for kept in (True, False):
        case, around, _ = with_residual(make(), 2 * TILE, kept)
        own = case.run(native, tokens)
        assert (own.kept is not None) == kept
        results.append((case.around, around, case.world.whole))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def test_residuals_of_who_reads_nothing_stay(native: NativeOps) -> None:
    case, around, matrix = with_residual(make(), 2 * TILE, kept=False)
    constants = case.constants._replace(in_residual=tiled(torch.full_like(matrix, float("inf"))))
    before = around.clone()
    case._replace(constants=constants).run(native, limit=-1)
    assert torch.equal(around.view(torch.uint8), before.view(torch.uint8))


def test_a_residual_that_does_not_fit_is_refused(native: NativeOps) -> None:
    case, around, matrix = with_residual(make(), 2 * TILE, kept=True)
    layer, residual, before = case.layer, case.layer.residual, (around.clone(), case.around.clone())
    assert residual is not None
    for constants, wrong, named in (
        (case.constants, residual[:-1], "residual: expected one for each of 83 tokens, got 82"),
        (case.constants, residual.half(), "residual: not of the dtype of the layer's matrix"),
        (case.constants, residual.double(), "residual: expected float32, bfloat16 or float16"),
        (case.constants, residual[:, :TILE], "residual: expected a matrix .* at most 32 columns .* got 64"),
        (case.constants, residual[:, ::2], "residual: the columns of a row must be contiguous"),
        (case.constants, residual[0], "residual: expected rows of columns, got 1 dimensions"),
        (case.constants._replace(in_residual=None), residual, "residual: the layer has no matrix of o"),
        (case.constants._replace(in_residual=tiled(matrix)[:, :4]), residual, "matrix of o"),
        (case.constants._replace(in_residual=tiled(matrix).double()), residual, "matrix of o"),
    ):
        with pytest.raises(RuntimeError, match=named):
            case._replace(constants=constants, layer=layer._replace(residual=wrong)).run(native)
    assert torch.equal(around, before[0])
    assert torch.equal(case.around, before[1])
    assert layer.reads.isnan().all()
    case.run(native)


def test_rows_of_who_reads_nothing_stay(native: NativeOps) -> None:
    """A request without memory, whose rows may hold anything: zero times infinity is not zero."""
    case = make()
    case.matrix.fill_(float("inf"))
    case = case._replace(constants=case.constants._replace(in_rows=tiled(case.matrix)))
    before = case.around.clone()
    own = case.run(native, limit=-1)
    assert (own.reads == 0).all()
    assert torch.equal(case.around, before)


def test_every_half_is_widened_and_narrowed_as_torch_does(native: NativeOps) -> None:
    """All 65,536 of them, plus a term that needs rounding: read 1 of 8 is 1, the others 0."""
    shape = make_shape(8, normalize_qk=False)
    for dtype in (torch.bfloat16, torch.float16):
        values = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
        rows = torch.cat([values.clone(), torch.zeros(shape.projected_columns, dtype=dtype)]).unsqueeze(0)
        rows[0, 65536] = 1.0  # q = (1, 0, …): reads are the state's first column
        world, state = World(shape, block_size=N), torch.zeros(1, 8, 8)
        state[0, 0, 0] = 1.0
        world.seed(BLOCKS[0], state)
        matrix = torch.zeros((8, 65536), dtype=dtype)
        matrix[0] = values.flip(0)
        matrix[0][~matrix[0].isfinite()] = 3.1415
        layer = LayerRows(rows, None, torch.full((1, 8), float("nan")))
        constants = LayerConstants(torch.zeros(shape.bias_columns), tiled(matrix))
        Case(layer, constants, rows, world, matrix, state).run(native, 1)
        assert layer.reads[0].tolist() == [1.0] + [0.0] * 7
        expected = (values.float() + matrix[0].float()).to(dtype)
        same = (rows[0, :65536] == expected) | (rows[0, :65536].isnan() & expected.isnan())
        assert same.all(), (dtype, values[~same][:5], rows[0, :65536][~same][:5], expected[~same][:5])


def test_what_does_not_fit_is_refused(native: NativeOps) -> None:
    case = make()
    layer, known, before = case.layer, case.constants, case.around.clone()
    assert known.in_rows is not None
    for constants, named in (
        (known._replace(in_rows=known.in_rows.double()), "matrix"),
        (known._replace(in_rows=known.in_rows[:, :4]), "matrix"),
        (known._replace(in_rows=known.in_rows.half()), "not of the dtype of the layer's matrix"),
        (known._replace(in_rows=tiled(torch.zeros(8, 4 * TILE))), "at most 96 columns from column 0 on, got 128"),
        (known._replace(first=2 * TILE), "at most 32 columns from column 64 on, got 64"),
        (known._replace(first=-1), "first column 0 or more, not -1"),
    ):
        with pytest.raises(RuntimeError, match=named):
            case._replace(constants=constants).run(native)
    for wrong, named in (
        (layer._replace(rows=layer.rows[:, :7]), "projected columns"),
        (layer._replace(rows=layer.rows[:, -case.world.shape.projected_columns :]), "at most 0 columns"),
        (layer._replace(rows=layer.rows.t()), "rows"),
        (layer._replace(rows=layer.rows.to(torch.int32)), "float32, bfloat16 or float16"),
    ):
        with pytest.raises(RuntimeError, match=named):
            case._replace(layer=wrong).run(native)
    assert torch.equal(case.around, before)
    assert (case.world.pages[BLOCKS[1]] == 7.0).all()
    case.run(native)
