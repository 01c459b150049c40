"""Delta-rule operators on this CPU: activation, scan and correction per token and layer, and what a decode step costs,
by instruction set and threads; after a check against fp32, arms alternated.

python -m loadtests.kernels [--tokens 2048] [--repeats 7]
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from rich.table import Table

from deltamem_vllm.ops import reference
from deltamem_vllm.ops.dispatch import select
from deltamem_vllm.ops.layout import RELEASED, MemoryShape
from deltamem_vllm.ops.native import LayerConstants, LayerRows, LayerTable, NativeOps, tiled
from deltamem_vllm.ops.paged import WRITE_ALL, Batch, PagedOps, mask_words
from deltamem_vllm.ops.pooled import Book
from loadtests.table import console

BLOCK = 32
TOLERANCE = 5e-6
ISAS = ("avx512", "avx2", "portable")
#: Requests of a decode step.
DECODES = (1, 8, 64)
#: Tokens of the naive loop: it takes tens of microseconds for each.
NAIVE_TOKENS = 64
#: Of a prefill in a row, after one that is not timed: what an arm leaves in the caches is not the next one's cost.
CALLS = 5
#: Of a layer of Qwen3-0.6B: columns of q, and of q, k and v; and a step of its prefill.
Q, QKV, STEP = 2048, 4096, 512


class Case:
    """``requests`` requests of ``tokens`` tokens each, on pages of their own."""

    def __init__(self, shape: MemoryShape, tokens: int, requests: int = 1) -> None:
        torch.manual_seed(0)
        blocks = -(-tokens // BLOCK)
        self.shape, self.tokens, self.requests = shape, tokens, requests
        self.projected = torch.randn(requests * tokens, shape.projected_columns)
        self.bias = torch.full((shape.bias_columns,), -2.5)
        self.pages = torch.zeros(requests * blocks, shape.page_floats(BLOCK))
        self.reads = torch.empty(requests * tokens, shape.width)
        limits = torch.full((requests * blocks,), WRITE_ALL, dtype=torch.int32)
        unwritten = torch.zeros((requests * blocks, mask_words(BLOCK)), dtype=torch.int32)
        table = torch.arange(requests * blocks, dtype=torch.int32).view(requests, -1)

        def batch(rows: int, length: int) -> Batch:
            starts = torch.arange(requests + 1, dtype=torch.int32) * rows
            return Batch(table, starts, torch.full_like(starts[1:], length), limits, unwritten, BLOCK, requests)

        self._all, self._last = batch(tokens, tokens), batch(1, tokens - BLOCK // 2 + 1)
        self._rows, self._row_reads = self.projected[:requests], self.reads[:requests]
        self._log = torch.empty(requests * tokens, shape.log_columns)
        self._step, self._book = batch(min(tokens, STEP), min(tokens, STEP)), Book.of([self.pages], BLOCK)

    def prefill(self, ops: PagedOps) -> None:
        """All tokens in one step."""
        ops.page_scan(self.shape, self.projected, self.bias, self.pages, self._all, self.reads)

    def decode(self, ops: PagedOps) -> None:
        """One token per request, with half a block to replay before it."""
        ops.page_scan(self.shape, self._rows, self.bias, self.pages, self._last, self._row_reads)

    def activate(self) -> None:
        """The native activation of all tokens, without a scan."""
        torch.ops.deltamem_native.activate(self.projected, self.bias, self.reads, self._log, self.shape.packed)

    def step(self, native: NativeOps, layer: LayerRows, table: LayerTable) -> None:
        """A layer's whole step: all of ``layer``'s rows, corrected where it has a matrix."""
        native.scan_first(self.shape, layer, table, self._book, self._step)

    def naive(self) -> None:
        """The official algorithm: activation in one go, then a loop over tokens in torch."""
        activated = reference.activate(self.shape, self.projected, self.bias)
        reference.scan(self.shape, *activated, torch.zeros(self.shape.heads, self.shape.rank, self.shape.rank))


def check(case: Case, ops: PagedOps) -> float:
    """Largest difference between an implementation's reads and the reference's."""
    activated = reference.activate(case.shape, case.projected, case.bias)
    state = torch.zeros(case.shape.heads, case.shape.rank, case.shape.rank)
    expected, _ = reference.scan(case.shape, *activated, state)
    case.reads.fill_(float("nan"))
    case.prefill(ops)
    difference = (case.reads - expected).abs()
    return float(difference.max()) if bool(difference.isfinite().all()) else float("inf")


class Layer:
    """What qkv_proj puts out for a step's tokens, of which q is corrected."""

    def __init__(self, case: Case) -> None:
        shape = case.shape
        self.case, self.matrix = case, torch.randn(shape.width, Q) / 100
        self.rows = torch.randn(STEP, QKV + shape.projected_columns)
        self.reads = torch.empty(STEP, shape.width)
        self._layer = LayerRows(self.rows, None, self.reads)
        self._without, self._with = (
            LayerTable.of(shape, [LayerConstants(case.bias, matrix)]) for matrix in (None, tiled(self.matrix))
        )

    def scanned(self, native: NativeOps) -> None:
        """Read and written, not corrected."""
        self.case.step(native, self._layer, self._without)

    def corrected(self, native: NativeOps) -> None:
        """Read, written and corrected."""
        self.case.step(native, self._layer, self._with)

    def product(self) -> None:
        """The correction as torch's matrix product, in place."""
        self.rows[:, :Q].addmm_(self.reads, self.matrix)

    def check(self, native: NativeOps) -> float:
        """Largest difference of corrected rows to what their reads lead to."""
        before = self.rows.double()
        self.corrected(native)
        before[:, :Q] += self.reads.double() @ self.matrix.double()
        difference = (self.rows.double() - before).abs()
        return float(difference.max()) if bool(difference.isfinite().all()) else float("inf")


@contextmanager
def running(isa: str, threads: int) -> Iterator[None]:
    """The native build for one instruction set, on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    torch.ops.deltamem_native.force_isa(isa)
    try:
        yield
    finally:
        torch.ops.deltamem_native.force_isa("")
        torch.set_num_threads(before)


@torch.inference_mode()  # as the engine calls the operators
def measure(tokens: int = 2048, repeats: int = 7, threads: tuple[int, ...] = (1, 2)) -> list[dict[str, Any]]:
    """Medians of ``repeats`` rounds in which all arms of a shape alternate.

    Returns:
        A row per shape and arm. Native ones: implementation ``native``, isa, threads, rank, heads; prefill_ns,
        activation_ns (one thread) and scan_ns (the difference; None on more threads) per token and layer; correct_ns,
        by which a step of `STEP` tokens takes longer per token and layer if it corrects q; and decode_1_us,
        decode_8_us, decode_64_us per step of so many requests and layer. The other arm: implementation ``naive torch
        loop``, threads 1, rank, heads, prefill_ns and correct_ns, of torch's product.

    Raises:
        SystemExit: an implementation differs from the reference: nothing is measured.
    """
    native = select("cpu", "native")
    assert isinstance(native, NativeOps)
    isas = [isa for isa in ISAS if torch.ops.deltamem_native.force_isa(isa)]
    torch.ops.deltamem_native.force_isa("")
    rows: list[dict[str, Any]] = []
    for rank, heads in ((8, 1), (8, 4), (16, 1)):
        shape = replace(RELEASED, rank=rank, heads=heads)
        case, naive = Case(shape, tokens), Case(shape, NAIVE_TOKENS)
        decodes = {n: Case(shape, 2 * BLOCK, n) for n in DECODES}
        layer = Layer(Case(shape, STEP))
        arms = [(isa, n) for isa in isas for n in threads]
        for isa, n in arms:
            with running(isa, n):
                if not (worst := max(check(case, native), layer.check(native))) <= TOLERANCE:
                    raise SystemExit(f"native ({isa}) differs from the reference by {worst:.1e}: nothing is measured")
                for each in decodes.values():
                    each.prefill(native)
        times: dict[tuple[Any, ...], list[float]] = {}
        for _ in range(repeats):
            for isa, n in arms:
                with running(isa, n):
                    _time(times, (isa, n, "prefill_ns"), partial(case.prefill, native), CALLS, tokens / 1e9)
                    _time(times, (isa, n, "activation_ns"), case.activate, CALLS, tokens / 1e9)
                    for name, work in (("scanned_ns", layer.scanned), ("corrected_ns", layer.corrected)):
                        _time(times, (isa, n, name), partial(work, native), CALLS, STEP / 1e9)
                    for count, each in decodes.items():
                        _time(times, (isa, n, f"decode_{count}_us"), partial(each.decode, native), 200, 1e-6)
            with running("", 1):
                _time(times, ("naive",), naive.naive, 1, NAIVE_TOKENS / 1e9)
                _time(times, ("product",), layer.product, CALLS, STEP / 1e9)
        for isa, n in arms:
            row: dict[str, Any] = {"implementation": "native", "isa": isa, "threads": n, "rank": rank, "heads": heads}
            row |= {key[2]: statistics.median(values) for key, values in times.items() if key[:2] == (isa, n)}
            row["correct_ns"] = row.pop("corrected_ns") - row.pop("scanned_ns")
            rows.append({**row, "scan_ns": row["prefill_ns"] - row["activation_ns"] if n == 1 else None})
        rows.append({
            "implementation": "naive torch loop", "isa": None, "threads": 1, "rank": rank, "heads": heads,
            "prefill_ns": statistics.median(times["naive",]), "correct_ns": statistics.median(times["product",]),
        })  # fmt: skip
    return rows


def _time(
    times: dict[tuple[Any, ...], list[float]], key: tuple[Any, ...], work: Callable[[], None], calls: int, unit: float
) -> None:
    work()
    start = time.perf_counter()
    for _ in range(calls):
        work()
    times.setdefault(key, []).append((time.perf_counter() - start) / calls / unit)


def main() -> None:
    """Check, then measure, then print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    rows = measure(args.tokens, args.repeats)
    measured = ("prefill", "activation", "scan", "correction", *(f"decode {n}" for n in DECODES))
    table = Table("arm", "threads", "rank", "heads", *measured)
    for row in rows:
        names = ("prefill_ns", "activation_ns", "scan_ns", "correct_ns")
        ns = ("" if row.get(name) is None else f"{row[name]:,.1f}" for name in names)
        us = (f"{row[name]:.1f}" if (name := f"decode_{n}_us") in row else "" for n in DECODES)
        arm = row["implementation"] if row["isa"] is None else f"native ({row['isa']})"
        table.add_row(arm, str(row["threads"]), str(row["rank"]), str(row["heads"]), *ns, *us)
    screen = console()
    screen.print(
        f"ns per token and layer over {args.tokens} tokens, of corrections over {STEP}; µs per decode step of 1, 8 and "
        f"64 requests and layer, half a block to replay; median of {args.repeats}"
    )
    screen.print(table)


if __name__ == "__main__":
    main()
