"""What Inductor writes for a layer that makes its rows itself."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from deltamem_vllm.memory import written
from deltamem_vllm.memory.scan import scan_product
from deltamem_vllm.ops.native import LayerRows, Product
from tests.memory import inductor
from tests.memory.worker import SHAPE

PAGES = SimpleNamespace(place=5)
COLUMNS, HIDDEN = 72 + SHAPE.projected_columns, 24
PRODUCT, OPERATOR = "torch.ops._C.onednn_mm.default(", "torch.ops.deltamem.project_next.default("


def code_of(
    rows_of: Any,
    dtype: torch.dtype = torch.float32,
    read: torch.dtype | None = torch.float32,
    residual_of: Any = None,
) -> str:
    """What is written for a call with these rows, reads of this dtype and this residual; nothing is run."""

    def layer(hidden: Tensor, handler: Tensor) -> list[Tensor]:
        rows, residual = rows_of(hidden), None if residual_of is None else residual_of(hidden)
        reads = None if read is None else torch.empty((hidden.shape[0], SHAPE.width), dtype=read)
        scan_product(PAGES, LayerRows(rows, None, reads, residual), hidden, None, Product(handler, COLUMNS))
        return [each * 2 for each in (rows, reads, residual) if each is not None]

    results = 1 + (read is not None) + (residual_of is not None)
    hidden, handler = torch.empty((4, HIDDEN), dtype=dtype), torch.empty((), dtype=torch.int64)
    return inductor.code_of(layer, (hidden, handler), [hidden], results)


def whole(hidden: Tensor) -> Tensor:
    return hidden.new_empty((hidden.shape[0], COLUMNS))


def layers(count: int) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """As many layers with a memory, of a norm, a product, and a wider product in between, as a decoder's have."""

    def run(hidden: Tensor, handler: Tensor, up: Tensor, down: Tensor) -> Tensor:
        residual = hidden + 1
        for _ in range(count):
            normed = residual * torch.rsqrt(residual.pow(2).mean(-1, keepdim=True) + 1e-6)
            rows = normed.new_empty((normed.shape[0], COLUMNS))
            scan_product(PAGES, LayerRows(rows, None, None, residual), normed, None, Product(handler, COLUMNS))
            own = rows[:, :HIDDEN]
            own = own * torch.rsqrt(own.pow(2).mean(-1, keepdim=True) + 1e-6)
            residual = residual + torch.nn.functional.silu(own @ up) @ down
        return residual

    return run


def test_a_layer_takes_over_what_the_layer_before_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each new buffer is a call of torch, in each layer of each step."""
    up, down = torch.empty(HIDDEN, 512), torch.empty(512, HIDDEN)
    inputs = torch.empty(4, HIDDEN), torch.empty((), dtype=torch.int64), up, down

    def new(count: int) -> int:
        return inductor.code_of(layers(count), inputs, inputs[:1], 1).count("= empty_strided_cpu(")

    each = new(5) - new(4)
    monkeypatch.setattr(written, "_keep_free_buffers", lambda residual: None)
    anew = new(5) - new(4)
    assert each <= anew - 2, f"{each} in each layer, and {anew} if no layer took any over"


@pytest.mark.parametrize(("dtype", "number"), [(torch.float32, 0), (torch.bfloat16, 1), (torch.float16, 2)])
def test_a_layer_is_a_product_and_a_plain_call(dtype: torch.dtype, number: int) -> None:
    code = code_of(whole, dtype)
    assert OPERATOR not in code
    assert code.count(PRODUCT) == 1
    [call] = [line for line in code.splitlines() if written.CALL in line]
    made = re.search(rf"(\w+) = empty_strided_cpu\(\((\w+), {COLUMNS}\)", code)
    assert made is not None, "no room for the rows"
    kept = re.search(rf"(\w+) = empty_strided_cpu\(\({made[2]}, {SHAPE.width}\)", code)
    assert kept is not None, "no room for the reads"
    assert call.endswith(f"({made[1]}, {made[2]}, {COLUMNS}, {number}, {kept[1]}, {SHAPE.width}, None, 0, 5)")
    assert code.index(PRODUCT) < code.index(call)


def test_a_residual_is_corrected_where_it_lies() -> None:
    """No copy of it is made, and no room for reads that nobody keeps."""
    code = code_of(whole, read=None, residual_of=lambda hidden: hidden + 1)
    [call] = [line for line in code.splitlines() if written.CALL in line]
    found = re.search(rf", {COLUMNS}, 0, None, 0, (\w+), {HIDDEN}, 5\)$", call)
    assert found is not None, call
    assert code.count(f" {found[1]} = empty_strided_cpu(") == 1
    assert code.count("empty_strided_cpu((") == 4, "rows, residual and the two results"
    assert OPERATOR not in code


def test_what_the_call_cannot_take_stays_an_operator() -> None:
    for code in (
        code_of(whole, residual_of=lambda hidden: hidden.double()),
        code_of(whole, residual_of=lambda hidden: (hidden @ hidden.t()).expand(hidden.shape[0], -1)[:, :3]),
        code_of(lambda hidden: hidden.new_empty((hidden.shape[0], COLUMNS + 1))[:, 1:]),
        code_of(lambda hidden: hidden.new_empty((COLUMNS, hidden.shape[0])).t()),
        code_of(lambda hidden: hidden.new_empty((hidden.shape[0] + 1, COLUMNS))),
        code_of(whole, torch.float64),
        code_of(whole, read=torch.float16),
    ):
        assert OPERATOR in code
        assert PRODUCT not in code
        assert written.CALL not in code


def test_a_torch_that_is_not_understood_keeps_the_operator(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any) -> list[str]:
        raise AttributeError("no such thing as a layout")

    monkeypatch.setattr(written, "_direct", fails)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        code = code_of(whole)
    assert OPERATOR in code
    assert written.CALL not in code
    assert "layers are called through torch's dispatcher" in caplog.text
