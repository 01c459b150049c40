"""The plain call of a layer: the same bits by either way, and errors that say what is wrong."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch

from deltamem_vllm.ops import direct
from deltamem_vllm.ops.direct import DTYPES, EXTENSION, NextLayer, by_ctypes, by_extension
from deltamem_vllm.ops.dispatch import select
from deltamem_vllm.ops.native import NativeOps, find_library
from tests.ops.paging import make_shape
from tests.ops.stack import HIDDEN, LAYERS, TURN, Stack, same_bits

SHAPE = make_shape(8)
FP32 = DTYPES[torch.float32]


@pytest.fixture
def native() -> NativeOps:
    found = select("cpu", "native")
    assert isinstance(found, NativeOps)
    return found


@pytest.fixture(params=["extension", "ctypes"])
def call(request: pytest.FixtureRequest, native: NativeOps) -> NextLayer:
    library = find_library()
    assert library is not None
    function = ctypes.CDLL(str(library)).deltamem_next
    if request.param == "ctypes":
        return by_ctypes(function)
    found = by_extension(library.with_name(EXTENSION), function)
    assert found is not None, "the extension was not built"
    return found


@pytest.mark.parametrize("length", [4, 20])
@pytest.mark.parametrize("in_residual", [False, True])
def test_the_bits_are_those_of_the_operator(native: NativeOps, call: NextLayer, length: int, in_residual: bool) -> None:
    """Of reads that are kept, or of the residual that they correct."""
    results = []
    for plain in (False, True):
        stack, seen = Stack(SHAPE), list[torch.Tensor]()
        seen.append(stack.begin(native, length, stack.step(length, 0)).reads)
        for layer in range(1, LAYERS):
            own = stack.rows(layer, length)
            if in_residual:
                own = own._replace(kept=None, residual=stack.residual(layer, length))
            rows = own.rows.contiguous()
            if plain:
                call(rows, length, rows.shape[1], FP32, own.kept, SHAPE.width, own.residual, HIDDEN, layer)
            else:
                native.scan_next(own, layer)
            if own.residual is not None:
                assert not same_bits(own.residual, stack.residual(layer, length)), "o was not corrected"
            seen += [each for each in own[2:] if each is not None]
        results.append((*seen, *(world.whole for world in stack.worlds)))
    for one, other in zip(*results, strict=True):
        assert same_bits(one, other)


def test_what_does_not_fit_is_refused(native: NativeOps, call: NextLayer) -> None:
    stack = Stack(SHAPE)
    stack.begin(native, 4, stack.step(4, 0))
    own = stack.rows(1, 4)
    columns = own.rows.shape[1]
    before = [world.whole.clone() for world in stack.worlds]
    for count, wide, dtype, width, place, named in (
        (4, columns, FP32, 8, 2, f"layer 2, but {TURN} 1"),
        (3, columns, FP32, 8, 1, "rows: 3 rows in a step of 4 tokens"),
        (4, columns - 1, FP32, 8, 1, f"rows: expected at least the {columns} projected columns, got {columns - 1}"),
        (4, columns, 7, 8, 1, "rows: no dtype has number 7"),
        (4, columns, FP32, 7, 1, "reads: expected 8 contiguous floats for each of 4 tokens, got 4 rows of 7"),
    ):
        with pytest.raises(RuntimeError, match=named):
            call(own.rows, count, wide, dtype, own.reads, width, None, 0, place)
    residual = stack.residual(1, 4)
    with pytest.raises(RuntimeError, match=r"residual: expected a matrix .* at most 8 columns .* got 64"):
        call(own.rows, 4, columns, FP32, own.reads, 8, residual, 8, 1)
    assert same_bits(residual, stack.residual(1, 4))
    assert own.reads.isnan().all()
    for world, old in zip(stack.worlds, before, strict=True):
        assert same_bits(world.whole, old)
    call(own.rows, 4, columns, FP32, own.reads, 8, None, 0, 1)
    assert own.reads.isfinite().all()


def test_a_step_without_requests_reads_zero(native: NativeOps, call: NextLayer) -> None:
    native.scan_nothing(2)
    stack = Stack(SHAPE)
    own = stack.rows(1, 4)
    residual = stack.residual(1, 4)
    call(own.rows, 4, own.rows.shape[1], FP32, own.reads, 8, residual, HIDDEN, 1)
    assert (own.reads == 0).all()
    assert same_bits(residual, stack.residual(1, 4))
    native.scan_nothing(2)
    call(own.rows, 4, own.rows.shape[1], FP32, None, 0, None, 0, 1)


def test_other_arguments_are_refused(native: NativeOps) -> None:
    none: tuple[Any, ...] = (None, 8, None, 0, 1)
    for given, wrong in (
        ((1, 2, 3), TypeError),
        (("rows", 1, 1, 0, *none), TypeError),
        ((torch.empty(1, 1), 2**70, 1, 0, *none), OverflowError),
        ((torch.empty(1, 1), 1, 1, 0, torch.float32, 8, None, 0, 1), TypeError),
    ):
        with pytest.raises(wrong):
            direct.next_layer(*given)


def test_a_torch_that_does_not_tell_of_data_goes_another_way(
    native: NativeOps, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = find_library()
    assert library is not None
    monkeypatch.delattr(torch._C._dynamo.guards, "_torchinductor_pyobject_tensor_data_ptr")
    function = ctypes.CDLL(str(library)).deltamem_next
    assert by_extension(library.with_name(EXTENSION), function) is None


def test_without_the_extension_there_is_another_way(tmp_path: Path, native: NativeOps) -> None:
    library = find_library()
    assert library is not None
    function = ctypes.CDLL(str(library)).deltamem_next
    assert by_extension(tmp_path / EXTENSION, function) is None
    (tmp_path / EXTENSION).write_bytes(b"no library")
    assert by_extension(tmp_path / EXTENSION, function) is None
