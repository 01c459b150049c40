"""What a layer's memory takes in a decode step on this CPU, called as a compiled model calls it and finding the caches
as there: since the layer before it a layer's weights have gone through them.

    python -m loadtests.decode [--repeats 60]

Qwen3-0.6B's shape, fp32, one thread: q, k, v and the memory's projection are one product, of which q is corrected.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from deltamem_vllm.ops.dispatch import select
from deltamem_vllm.ops.layout import MemoryShape
from deltamem_vllm.ops.native import LayerConstants, LayerRows, LayerTable, NativeOps, tiled
from deltamem_vllm.ops.paged import WRITE_ALL, Batch, mask_words
from deltamem_vllm.ops.pooled import Book
from loadtests.kernels import QKV, Q, running

BATCHES = (1, 8, 64)
LAYERS = 6
"""Of their own weights and pages: more than a cache keeps until a layer's turn comes again."""
HIDDEN, OTHERS = 1024, 11264
"""Columns of a layer's input, and of its other linears together."""
BLOCK, APART = 128, 2 * 128 * 8 * 128
"""Tokens of a page, and floats from one page to the next: those of the layer's keys and values."""
CONTEXT = 64
TOLERANCE = 1e-4


class Model:
    """As much of a model's layers as takes part: weights, pages, and ``requests`` requests behind `CONTEXT` tokens that
    have room for ``most`` more."""

    def __init__(self, native: NativeOps, shape: MemoryShape, requests: int, most: int) -> None:
        torch.manual_seed(0)
        self.native, self.shape, self.requests = native, shape, requests
        self.others = [torch.randn(OTHERS, HIDDEN) / 32 for _ in range(2)]
        self.qkv = [torch.randn(QKV + shape.projected_columns, HIDDEN) / 32 for _ in range(LAYERS)]
        each = -(-(CONTEXT + most) // BLOCK)
        blocks = each * requests + 1
        self.pages = [torch.zeros(blocks, APART)[:, : 2 * shape.page_floats(BLOCK)] for _ in range(LAYERS)]
        self.matrices = [torch.randn(shape.width, Q) / 10 for _ in range(LAYERS)]
        biases = [torch.full((shape.bias_columns,), -2.5) for _ in range(LAYERS)]
        constants = [LayerConstants(b, tiled(m)) for b, m in zip(biases, self.matrices, strict=True)]
        self.book, self.table = Book.of(self.pages, BLOCK), LayerTable.of(shape, constants)
        self.limits = torch.full((blocks,), WRITE_ALL, dtype=torch.int32)
        self.unwritten = torch.zeros((blocks, mask_words(BLOCK)), dtype=torch.int32)
        self.blocks = (1 + torch.randperm(each * requests, dtype=torch.int32)).view(requests, each)
        self.tokens = 0
        self.run(CONTEXT)

    def batch(self, new: int) -> Batch:
        """So many further tokens of each request."""
        starts = torch.arange(self.requests + 1, dtype=torch.int32) * new
        lengths = torch.full((self.requests,), self.tokens + new, dtype=torch.int32)
        return Batch(self.blocks, starts, lengths, self.limits, self.unwritten, BLOCK, self.requests)

    def rows(self, layer: int, tokens: int) -> LayerRows:
        """What the layer's linear puts out for random inputs."""
        out = F.linear(torch.randn(tokens, HIDDEN), self.qkv[layer])
        return LayerRows(out, None, torch.full((tokens, self.shape.width), float("nan")))

    def call(self, layer: int, rows: LayerRows, batch: Batch | None) -> float:
        """A layer's memory; its seconds. batch: of the first layer; None: no request has a memory."""
        out, _, reads = rows
        begun = time.perf_counter()
        if layer:  # as Inductor writes it
            torch.ops.deltamem_native.scan_next.default(out, None, reads, layer)
        elif batch is None:
            self.native.scan_nothing(LAYERS)
        else:
            self.native.scan_first(self.shape, rows, self.table, self.book, batch)
        return time.perf_counter() - begun

    def run(self, new: int = 1, idle: bool = False, between: bool = False) -> list[float]:
        """One step; seconds of each layer but the first, which looks up what all of them share.

        Args:
            idle: no request has a memory.
            between: a layer's weights go through the caches before each call, else nothing does.
        """
        batch = None if idle else self.batch(new)
        known = [] if between else [self.rows(layer, new * self.requests) for layer in range(LAYERS)]
        took = []
        for layer in range(LAYERS):
            if between:
                F.linear(torch.randn(self.requests, HIDDEN), self.others[layer % 2])
            rows = self.rows(layer, new * self.requests) if between else known[layer]
            took.append(self.call(layer, rows, batch))
        self.tokens += 0 if idle else new
        return took[1:]

    def check(self) -> float:
        """Largest difference of a step's corrected rows to what the plain operators and a product make of them."""
        pages: list[Tensor] = [each.clone() for each in self.pages]
        batch, worst = self.batch(1), 0.0
        for layer in range(LAYERS):
            rows = self.rows(layer, self.requests)
            expected, reads = rows.rows.clone(), torch.empty_like(rows.reads)
            projected, bias = expected[:, QKV:], self.table.layers[layer].bias
            self.native.page_scan(self.shape, projected, bias, pages[layer], batch, reads)
            expected[:, :Q] = (expected[:, :Q].double() + reads.double() @ self.matrices[layer].double()).float()
            self.call(layer, rows, batch)
            difference = (rows.rows - expected).abs().max()
            worst = max(worst, float(difference) if bool(difference.isfinite()) else float("inf"))
        self.tokens += 1
        return worst


@torch.inference_mode()  # as the engine calls the operators
def measure(repeats: int = 60, batches: Sequence[int] = BATCHES) -> list[dict[str, Any]]:
    """Medians, of steps that take turns. A row per batch: requests; and µs of a layer between a model's weights, of the
    same call where no request has a memory, and of a layer right behind the one before.

    Raises:
        SystemExit: an answer is wrong: nothing is measured.
    """
    native = select("cpu", "native")
    assert isinstance(native, NativeOps)
    shape = MemoryShape(
        rank=8, heads=1, rankwise_gates=True, couple_lambda=True, update_mode="standard", normalize_qk=True
    )
    arms: dict[str, dict[str, bool]] = {
        "µs": {"between": True},
        "no memory, µs": {"between": True, "idle": True},
        "caches full, µs": {},
    }
    rows = []
    with running("", 1):
        for requests in batches:
            model = Model(native, shape, requests, 2 * repeats + 1)
            if not (worst := model.check()) <= TOLERANCE:
                raise SystemExit(f"a layer's rows differ by {worst:.1e} from what they should be: nothing is measured")
            times: dict[str, list[float]] = {arm: [] for arm in arms}
            for _ in range(repeats):
                for arm, how in arms.items():
                    times[arm] += model.run(**how)
            rows.append({"requests": requests, **{arm: statistics.median(times[arm]) * 1e6 for arm in arms}})
    return rows


def main() -> None:
    """Check, then measure, then print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--repeats", type=int, default=60)
    rows = measure(parser.parse_args().repeats)
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(f"{value:.1f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
