"""A layer together with vLLM's product before it: the bits of the two by themselves, and nothing out of its turn."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

from deltamem_vllm import compat
from deltamem_vllm.ops.dispatch import select
from deltamem_vllm.ops.native import LayerConstants, LayerRows, LayerTable, NativeOps, Product, tiled
from tests.ops.paging import make_shape
from tests.ops.stack import LAYERS, TURN, Stack, same_bits

SHAPE = make_shape(8)
HIDDEN, Q, QKV = 24, 40, 72


@pytest.fixture
def native() -> NativeOps:
    found = select("cpu", "native")
    assert isinstance(found, NativeOps)
    return found


def linear(bias: Tensor | None = None, columns: int = QKV + SHAPE.projected_columns) -> Any:
    """As vLLM leaves an unquantised one on a CPU, its weight packed."""
    weight = torch.randn(columns, HIDDEN, generator=torch.Generator().manual_seed(1)) / 4
    made = SimpleNamespace(weight=nn.Parameter(weight.clone(), requires_grad=False), bias=bias, plain=weight)
    dispatch_cpu_unquantized_gemm(made, remove_weight=False)
    return made


def product_of(layer: Any) -> Product:
    found = compat.onednn_product(layer)
    assert found is not None
    return Product(*found)


@dataclass
class Corrected(Stack):
    """Each layer corrects q, of rows that its linear makes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        matrix = torch.randn(SHAPE.width, Q, generator=torch.Generator().manual_seed(2))
        self.table = LayerTable.of(SHAPE, [LayerConstants(bias, tiled(matrix)) for _, bias, _ in self.inputs])

    def hidden(self, layer: int, tokens: int) -> Tensor:
        return torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(10 + layer))

    def unmade(self, tokens: int) -> LayerRows:
        rows, reads = (torch.full((tokens, n), float("nan")) for n in (QKV + SHAPE.projected_columns, SHAPE.width))
        return LayerRows(rows, None, reads)


@pytest.mark.parametrize("tokens", [2, 20])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_bits_are_those_of_the_product_and_the_layer(native: NativeOps, tokens: int, with_bias: bool) -> None:
    bias = torch.linspace(-1, 1, QKV + SHAPE.projected_columns) if with_bias else None
    made, results = linear(bias), []
    for together in (False, True):
        stack, seen = Corrected(SHAPE), list[Tensor]()
        for layer in range(LAYERS):
            own, hidden = stack.unmade(tokens), stack.hidden(layer, tokens)
            if together and layer:
                native.project_next(own, hidden, bias, product_of(made), layer)
            else:
                own.rows.copy_(made.cpu_linear(hidden, made.weight, bias))
                if layer:
                    native.scan_next(own, layer)
                else:
                    native.scan_first(SHAPE, own, stack.table, stack.book, stack.step(tokens, 0))
            plain = F.linear(hidden, made.plain, bias)
            torch.testing.assert_close(own.rows[:, Q:], plain[:, Q:], rtol=0, atol=1e-5)
            assert (own.rows[:, :Q] - plain[:, :Q]).abs().max() > 0.01, "q was not corrected"
            seen += [own.rows, own.reads]
        results.append((*seen, *(world.whole for world in stack.worlds)))
    for one, other in zip(*results, strict=True):
        assert same_bits(one, other)


def test_a_step_without_requests_makes_the_product_and_reads_zero(native: NativeOps) -> None:
    stack, made = Corrected(SHAPE), linear()
    native.scan_nothing(LAYERS)
    for layer in range(1, LAYERS):
        own, hidden = stack.unmade(4), stack.hidden(layer, 4)
        native.project_next(own, hidden, None, product_of(made), layer)
        assert same_bits(own.rows, made.cpu_linear(hidden, made.weight, None))
        assert (own.reads == 0).all()


def test_what_does_not_fit_is_refused(native: NativeOps) -> None:
    stack, made = Corrected(SHAPE), linear()
    product = product_of(made)
    own, hidden = stack.unmade(4), stack.hidden(1, 4)
    first = stack.unmade(4)
    first.rows.zero_()
    native.scan_first(SHAPE, first, stack.table, stack.book, stack.step(4, 0))
    before = [world.whole.clone() for world in stack.worlds]
    for wrong, inputs, named in (
        (own, stack.hidden(1, 3), "rows: expected 3 contiguous rows on a CPU, got shape .4, 104."),
        (own._replace(rows=own.rows[:3]), hidden, "rows: expected 4 contiguous rows on a CPU, got shape .3, 104."),
        (own._replace(rows=own.rows[:, 1:]), hidden, "rows: expected 4 contiguous rows .* strides .104, 1."),
        (own._replace(rows=own.rows[0]), hidden, "rows: expected 4 contiguous rows on a CPU, got shape .104."),
        (own._replace(rows=own.rows.to("meta")), hidden, "rows: expected 4 contiguous rows on a CPU, got .* on meta"),
        (
            own._replace(rows=own.rows.double()),
            hidden,
            r"rows: expected one of torch\.float32, torch\.bfloat16, torch\.float16, got torch\.float64",
        ),
        (own._replace(kept=own.reads.half()), hidden, "reads: expected torch.float32, got torch.float16"),
        (own._replace(kept=own.reads[:3]), hidden, "reads: expected 4 contiguous rows on a CPU, got shape .3, 8."),
        (own, hidden[0], "rows: expected 24 contiguous rows"),
        (own._replace(residual=torch.zeros(3, 40)), hidden, "residual: expected 4 contiguous rows"),
        (own._replace(residual=torch.zeros(4, 41)[:, 1:]), hidden, "residual: expected 4 contiguous rows"),
        (own._replace(residual=torch.zeros(4, 40).half()), hidden, "residual: expected torch.float32, got .*16"),
    ):
        with pytest.raises(RuntimeError, match=named):
            native.project_next(wrong, inputs, None, product, 1)
    assert own.rows.isnan().all(), "a product was made"
    with pytest.raises(RuntimeError, match="memory descriptor"):  # oneDNN's own: the input is narrow
        native.project_next(own, hidden[:, 1:].contiguous(), None, product, 1)
    with pytest.raises(RuntimeError, match=f"layer 2, but {TURN} 1"):
        native.project_next(own, hidden, None, product, 2)
    narrow = own._replace(kept=own.reads[:, 1:].contiguous())
    with pytest.raises(RuntimeError, match="reads: expected 8 contiguous floats for each of 4 tokens, got 4 rows of 7"):
        native.project_next(narrow, hidden, None, product, 1)
    assert own.reads.isnan().all()
    for world, old in zip(stack.worlds, before, strict=True):
        assert same_bits(world.whole, old)
    native.project_next(own, hidden, None, product, 1)
    assert own.reads.isfinite().all()


def test_only_a_linear_of_onednn_has_a_product() -> None:
    made = linear(columns=48)
    assert product_of(made).columns == 48
    other = SimpleNamespace(cpu_linear=lambda x, weight, bias: F.linear(x, weight, bias))
    for layer in (other, SimpleNamespace(cpu_linear=F.linear), SimpleNamespace()):
        assert compat.onednn_product(layer) is None
