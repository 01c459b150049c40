"""What a layer's memory takes in a decode step on this CPU, called as a compiled model calls it and finding the caches
as there: since the layer before it a layer's weights have gone through them.

    python -m loadtests.decode [--repeats 40] [--models 5]

Qwen3-0.6B's shape, fp32, one thread. What takes turns is qkv_proj: vLLM's product alone; the same with the memory's
projection in its weight; and that with the memory behind it, which reads, writes and corrects q, and o in the residual,
in a plain call as it is served (`memory.written`), or as an operator. The figures are differences. A product's time
depends, by more than a memory takes, on where in memory its weight happens to lie: what the memory does is told beside
the product of the very same weight, and all is measured with several models.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from vllm import _custom_ops as vllm_ops

from deltamem_vllm.ops import direct
from deltamem_vllm.ops.dispatch import select
from deltamem_vllm.ops.layout import RELEASED, MemoryShape
from deltamem_vllm.ops.native import LayerConstants, LayerRows, LayerTable, NativeOps, tiled
from deltamem_vllm.ops.paged import WRITE_ALL, Batch, mask_words
from deltamem_vllm.ops.pooled import Book
from loadtests.kernels import QKV, Q, running
from loadtests.table import console, shown

BATCHES = (1, 8, 64)
LAYERS = 6
"""Of their own weights and pages: more than a cache keeps until a layer's turn comes again."""
HIDDEN, OTHERS = 1024, 11264
"""Columns of a layer's input, and of its other linears together."""
BLOCK, APART = 128, 2 * 128 * 8 * 128
"""Tokens of a page, and floats from one page to the next: those of the layer's keys and values."""
CONTEXT = 64
TOLERANCE = 1e-4
FP32 = direct.DTYPES[torch.float32]
CUT = 0.2
"""Share of the largest and of the smallest differences that are left out: pauses of the machine."""


Call: TypeAlias = Callable[[int, Tensor, Tensor], Any]
"""Of a layer's number, its input, and the residual."""


class Weight:
    """A linear as vLLM packs it for oneDNN; called as Inductor calls it."""

    def __init__(self, weight: Tensor) -> None:
        self.columns, self._handler = len(weight), vllm_ops.create_onednn_mm(weight.t(), 32)
        self.handler: Any = self._handler.handler_tensor

    def __call__(self, hidden: Tensor) -> Tensor:
        """[T, columns]."""
        out = torch.empty(len(hidden), self.columns)
        torch.ops._C.onednn_mm.default(out, hidden, None, self.handler)
        return out


class Model:
    """As much of a model's layers as takes part: weights, pages, and ``requests`` requests behind `CONTEXT` tokens that
    have room for ``most`` more."""

    def __init__(self, native: NativeOps, shape: MemoryShape, requests: int, most: int) -> None:
        torch.manual_seed(0)
        self.native, self.shape, self.requests, self.rows = native, shape, requests, requests
        self.columns, self.width = QKV + shape.projected_columns, shape.width
        weights = [torch.randn(self.columns, HIDDEN) / 32 for _ in range(LAYERS)]
        self.others = [Weight(torch.randn(OTHERS, HIDDEN) / 32) for _ in range(2)]
        self.qkv = [Weight(each) for each in weights]
        self.plain = [Weight(each[:QKV].contiguous()) for each in weights]
        blocks_each = -(-(CONTEXT + most) // BLOCK)
        blocks = blocks_each * requests + 1
        self.pages = [torch.zeros(blocks, APART)[:, : 2 * shape.page_floats(BLOCK)] for _ in range(LAYERS)]
        self.for_q = [torch.randn(shape.width, Q) / 10 for _ in range(LAYERS)]
        self.for_o = [torch.randn(shape.width, HIDDEN) / 10 for _ in range(LAYERS)]
        biases = [torch.full((shape.bias_columns,), -2.5) for _ in range(LAYERS)]
        parts = zip(biases, self.for_q, self.for_o, strict=True)
        constants = [LayerConstants(bias, tiled(q), 0, tiled(o)) for bias, q, o in parts]
        self.book, self.table = Book.of(self.pages, BLOCK), LayerTable.of(shape, constants)
        self.limits = torch.full((blocks,), WRITE_ALL, dtype=torch.int32)
        self.unwritten = torch.zeros((blocks, mask_words(BLOCK)), dtype=torch.int32)
        self.blocks = (1 + torch.randperm(blocks_each * requests, dtype=torch.int32)).view(requests, blocks_each)
        self.tokens = 0
        self.step(self.plain_call, CONTEXT)

    def hidden(self, tokens: int) -> Tensor:
        """A layer's input, or its residual."""
        return torch.randn(tokens, HIDDEN)

    def alone(self, layer: int, hidden: Tensor, residual: Tensor) -> None:
        """qkv_proj of a model without memory."""
        self.plain[layer](hidden)

    def product(self, layer: int, hidden: Tensor, residual: Tensor) -> None:
        """qkv_proj with the memory's projection in its weight."""
        self.qkv[layer](hidden)

    def plain_call(self, layer: int, hidden: Tensor, residual: Tensor) -> Tensor:
        """qkv_proj, and then the memory as in what Inductor writes; what qkv_proj put out."""
        rows = self.qkv[layer](hidden)
        self.next(rows, residual, layer)
        return rows

    def next(self, rows: Tensor, residual: Tensor, layer: int) -> None:
        """The memory in a plain call."""
        direct.next_layer(rows, self.rows, self.columns, FP32, None, 0, residual, HIDDEN, layer)

    def operator(self, layer: int, hidden: Tensor, residual: Tensor) -> Tensor:
        """qkv_proj, and then the memory as an operator of torch; what qkv_proj put out."""
        rows = self.qkv[layer](hidden)
        torch.ops.deltamem_native.scan_next.default(rows, None, None, residual, layer)
        return rows

    def begin(self, new: int) -> Batch:
        """Run the first layer of a step, which looks up what all of them share."""
        starts = torch.arange(self.requests + 1, dtype=torch.int32) * new
        lengths = torch.full((self.requests,), self.tokens + new, dtype=torch.int32)
        batch = Batch(self.blocks, starts, lengths, self.limits, self.unwritten, BLOCK, self.requests)
        rows = self.qkv[0](self.hidden(new * self.requests))
        own = LayerRows(rows, None, None, self.hidden(new * self.requests))
        self.native.scan_first(self.shape, own, self.table, self.book, batch)
        self.rows = new * self.requests  # as what Inductor writes knows it, which asks no tensor
        self.tokens += new
        return batch

    def step(self, call: Call, new: int = 1) -> list[float]:
        """One step in which a layer's weights go through the caches before each call; seconds of each layer but the
        first. Where a call leaves the memory out, its tokens are written behind it: the next step would have to replay
        them otherwise, which no served step does. Behind the others the product is made once more, so that each call
        leaves the same to the next one."""
        self.begin(new)
        took = []
        for layer in range(1, LAYERS):
            hidden, residual = (self.hidden(new * self.requests) for _ in range(2))
            self.others[layer % 2](hidden)
            begun = time.perf_counter()
            written = call(layer, hidden, residual)
            took.append(time.perf_counter() - begun)
            if written is None:
                self.operator(layer, hidden, residual)
            else:
                self.product(layer, hidden, residual)
        return took

    def warm(self) -> list[float]:
        """One step whose layers follow each other at once; seconds of each layer's memory but the first's."""
        weights = range(1, LAYERS)
        known = [(self.qkv[n](self.hidden(self.requests)), self.hidden(self.requests)) for n in weights]
        self.begin(1)
        took = []
        for layer, (rows, residual) in enumerate(known, 1):
            begun = time.perf_counter()
            self.next(rows, residual, layer)
            took.append(time.perf_counter() - begun)
        return took

    def check(self, call: Call) -> float:
        """Largest difference of a step's rows and residuals to what the product, the plain operators and further
        products make."""
        pages = [each.clone() for each in self.pages]
        batch, worst = self.begin(1), 0.0
        for layer in range(1, LAYERS):
            hidden, residual = self.hidden(self.requests), self.hidden(self.requests)
            expected, reads = self.qkv[layer](hidden), torch.empty(self.requests, self.width)
            projected, bias = expected[:, QKV:], self.table.layers[layer].bias
            self.native.page_scan(self.shape, projected, bias, pages[layer], batch, reads)
            expected[:, :Q] = (expected[:, :Q].double() + reads.double() @ self.for_q[layer].double()).float()
            added_to = (residual.double() + reads.double() @ self.for_o[layer].double()).float()
            difference = torch.cat([call(layer, hidden, residual) - expected, residual - added_to], dim=1).abs()
            worst = max(worst, float(difference.max()) if bool(difference.isfinite().all()) else float("inf"))
        return worst


def added(times: Sequence[float], base: Sequence[float]) -> float:
    """The mean of differences in µs, without the `CUT` largest and smallest."""
    differences = sorted((one - other) * 1e6 for one, other in zip(times, base, strict=True))
    cut = int(CUT * len(differences))
    return statistics.fmean(differences[cut : len(differences) - cut])


def measure_model(model: Model, repeats: int) -> dict[str, float]:
    """µs by name, of one model; arms take turns step by step, in changing order."""
    if not (worst := max(model.check(model.plain_call), model.check(model.operator))) <= TOLERANCE:
        raise SystemExit(f"a layer's rows differ by {worst:.1e} from what they should be: nothing is measured")
    arms: dict[str, Call] = {
        "alone": model.alone, "product": model.product, "call": model.plain_call, "operator": model.operator
    }  # fmt: skip
    order, warm = [*arms], list[float]()
    times: dict[str, list[float]] = {arm: [] for arm in arms}
    for _ in range(repeats):
        random.shuffle(order)
        for arm in order:
            times[arm] += model.step(arms[arm])
        warm += model.warm()
    return {
        "product, µs": statistics.median(times["alone"]) * 1e6,
        "projection, µs": added(times["product"], times["alone"]),
        "memory, µs": added(times["call"], times["product"]),
        "memory as an operator, µs": added(times["operator"], times["product"]),
        "caches full, µs": statistics.median(warm) * 1e6,
    }


@torch.inference_mode()  # as the engine calls the operators
def measure(repeats: int = 40, batches: Sequence[int] = BATCHES, models: int = 5) -> list[dict[str, Any]]:
    """A row per batch: requests; µs of the plain product; what the projection adds to it; what the memory adds to both,
    in a plain call and as an operator; and its call right behind the layer before. Means over models, with the standard
    errors of what is added.

    Raises:
        SystemExit: an answer is wrong: nothing is measured.
    """
    native = select("cpu", "native")
    assert isinstance(native, NativeOps)
    rows = []
    with running("", 1):
        for requests in batches:
            found = [measure_model(Model(native, RELEASED, requests, 5 * repeats + 2), repeats) for _ in range(models)]
            row: dict[str, Any] = {"requests": requests}
            for name in found[0]:
                values = [each[name] for each in found]
                row[name] = statistics.fmean(values)
                if name.startswith(("projection", "memory")):
                    row[f"{name} ±"] = statistics.stdev(values) / math.sqrt(models)
            rows.append(row)
    return rows


def main() -> None:
    """Check, then measure, then print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--models", type=int, default=5)
    given = parser.parse_args()
    console().print(shown(measure(given.repeats, models=given.models)))


if __name__ == "__main__":
    main()
