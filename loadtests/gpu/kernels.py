"""Part 3: microseconds of each kernel in a CUDA graph, beside what the bytes alone would take on this card.

Percentages of the copy bandwidth are printed for sets far beyond the second-level cache only; for the others a launch
costs more than its bytes.
"""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

import torch

from deltamem_vllm.ops.layout import MemoryShape
from deltamem_vllm.ops.paged import WRITE_ALL, Batch, PagedOps, mask_words
from deltamem_vllm.ops.pooled import Book, pool_ops
from loadtests.gpu.common import BLOCK, SHAPE, Part, median_us

LAYERS = 36
COPIES = 16


class Step:
    """One engine step on one layer: ``requests`` with ``rows`` tokens each behind ``context`` ones."""

    def __init__(self, part: Part, shape: MemoryShape, requests: int, context: int, rows: int) -> None:
        device, per = part.device, -(-(context + rows) // BLOCK)
        self.shape, self.rows = shape, rows
        blocks = requests * per
        # Copies take turns where a step is repeated: in a model the pages of a layer are out of the cache when their
        # turn comes again.
        count = 2 if part.tiny else (COPIES if rows == 1 and requests <= 1024 else 1)
        self.copies = [torch.zeros((blocks, shape.page_floats(BLOCK)), device=device) for _ in range(count)]
        self.pages = self.copies[0]
        self.projected = torch.randn((requests * rows, shape.projected_columns), device=device).to(torch.bfloat16)
        self.bias = torch.full((shape.bias_columns,), -2.5, device=device)
        self.reads = torch.empty((requests * rows, shape.width), device=device)
        order = torch.randperm(blocks, device=device).to(torch.int32).view(requests, per)
        self.batch = Batch(
            order,
            torch.arange(requests + 1, dtype=torch.int32, device=device) * rows,
            torch.full((requests,), context + rows, dtype=torch.int32, device=device),
            torch.full((blocks,), WRITE_ALL, dtype=torch.int32, device=device),
            torch.zeros((blocks, mask_words(BLOCK)), dtype=torch.int32, device=device),
            BLOCK,
            requests,
            rows,
        )

    def run(self, ops: PagedOps, turn: int = 0) -> None:
        """The step."""
        pages = self.copies[turn % len(self.copies)]
        ops.page_scan(self.shape, self.projected, self.bias, pages, self.batch, self.reads)

    def run_all(self, ops: PagedOps, turns: int) -> None:
        """So many steps, one after the other."""
        for turn in range(turns):
            self.run(ops, turn)

    def bytes(self, replayed: int) -> int:
        """Bytes a step must move at least, ``replayed`` log rows to get to the state."""
        shape, tokens = self.shape, self.projected.shape[0]
        requests = self.batch.num_reqs
        row = 4 * shape.log_columns
        per_token = 2 * shape.projected_columns + row + 4 * shape.width
        bases = requests * (1 + self.rows // BLOCK) * 4 * shape.state_floats
        return tokens * per_token + requests * replayed * row + bases


def _agree(part: Part, step: Step, ops: dict[str, PagedOps]) -> None:
    """All kernels give the same reads for what is about to be measured; else nothing is measured."""
    first: torch.Tensor | None = None
    for name, kernel in ops.items():
        step.pages.zero_()
        step.reads.fill_(float("nan"))
        step.run(kernel)
        if first is None:
            first = step.reads.clone()
        worst = float((step.reads - first).abs().nan_to_num(1e9).max())
        if worst > 1e-4:
            raise SystemExit(f"{name} differs by {worst:.1e} from the others: nothing is measured")


def _floor(size: int, bandwidth: float) -> float:
    """Microseconds that the bytes alone take."""
    return round(size / bandwidth * 1e6, 3)


def _moved(size: int, seconds: float, bandwidth: float) -> dict[str, float]:
    """A row of a large set."""
    return {
        "us": median_us([seconds]),
        "bytes": size,
        "GB/s": round(size / seconds / 1e9, 1),
        "% of copy": round(100 * size / seconds / bandwidth, 1),
    }


def copy_bandwidth(part: Part) -> float:
    """Bytes per second of a large copy on the device, read and written counted."""
    size = 1 << (16 if part.tiny else 31)
    a = torch.zeros(size, dtype=torch.uint8, device=part.device)
    b = torch.empty_like(a)
    seconds = statistics.median(part.seconds(lambda: b.copy_(a), inner=3))
    part.note("copy GB/s", round(2 * size / seconds / 1e9, 1))
    return 2 * size / seconds


def node(part: Part) -> None:
    """Microseconds that a graph node costs which does next to nothing: the floor of every launch."""
    x = torch.zeros(32, device=part.device)
    graph = part.captured(lambda: [x.add_(1.0) for _ in range(100)])
    part.note("empty graph node us", median_us([s / 100 for s in part.seconds(graph)]))


def decode(part: Part, ops: dict[str, PagedOps], bandwidth: float) -> None:
    """One token of each request, half a block to replay, a hundred steps to a graph."""
    ops = {name: kernel for name, kernel in ops.items() if not name.endswith("one launch")}  # decodes always are
    inner = 2 if part.tiny else 100
    for heads in (1, 4):
        shape = MemoryShape(**{**SHAPE.__dict__, "heads": heads})
        for requests in (1, 2) if part.tiny else (1, 32, 256, 1024):
            step = Step(part, shape, requests, 40 if part.tiny else 1032, 1)
            _agree(part, step, ops)
            row: dict[str, Any] = {"bytes": step.bytes(8), "floor of its bytes": _floor(step.bytes(8), bandwidth)}
            for name, kernel in ops.items():
                graph = part.captured(partial(step.run_all, kernel, inner))
                row[name] = median_us([s / inner for s in part.seconds(graph)])
            part.note(f"decode us, B={requests}, heads={heads}", row)


def prefill(part: Part, ops: dict[str, PagedOps], bandwidth: float) -> None:
    """Whole prompts on one layer. ``one launch`` walks over the tokens in order, as the official kernel does, and the
    ratio is what the chunks gain over it."""
    sizes = [(1, 64)] if part.tiny else [(1, 512), (1, 8192), (1, 32768), (64, 128), (8, 2048)]
    for requests, rows in sizes:
        step = Step(part, SHAPE, requests, 0, rows)
        _agree(part, step, ops)
        row: dict[str, Any] = {"bytes": step.bytes(0), "floor of its bytes": _floor(step.bytes(0), bandwidth)}
        for name, kernel in ops.items():
            row[name] = median_us(part.seconds(part.captured(partial(step.run, kernel))))
        for name in ("cuda", "triton"):
            if name in row and f"{name}, one launch" in row:
                row[f"{name}: one launch / chunks"] = round(row[f"{name}, one launch"] / row[name], 1)
        part.note(f"prefill us, {requests} x {rows} tokens", row)


def update(part: Part, ops: dict[str, PagedOps], bandwidth: float) -> None:
    """One token each for so many states that none is cached."""
    requests = 64 if part.tiny else 1 << 18
    step = Step(part, SHAPE, requests, 1, 1)
    _agree(part, step, ops)
    for name, kernel in ops.items():
        seconds = statistics.median(part.seconds(partial(step.run, kernel)))
        part.note(f"update of {requests} states, {name}", _moved(step.bytes(1), seconds, bandwidth))


def pool(part: Part, ops: dict[str, PagedOps], bandwidth: float) -> None:
    """Seeds and takes of many sessions in all layers, one launch each."""
    sessions, layers = (8, 2) if part.tiny else (1 << 14, LAYERS)
    pages = [torch.zeros((sessions, SHAPE.page_floats(BLOCK)), device=part.device) for _ in range(layers)]
    book = Book.of(pages, BLOCK)
    states = torch.randn((sessions, layers, 1, SHAPE.rank, SHAPE.rank), device=part.device)
    blocks = torch.randperm(sessions, device=part.device).to(torch.int32)
    slots = torch.randperm(sessions, device=part.device).to(torch.int32)
    none = torch.zeros_like(blocks)
    moved = 2 * states.numel() * 4
    for name, kernel in ops.items():
        if name.endswith("one launch"):
            continue
        own = pool_ops(kernel)
        own.seed(SHAPE, book, blocks, slots, states, None)
        taken = torch.full_like(states, float("nan"))
        own.take(SHAPE, book, blocks, none, slots, taken, None)
        if not torch.equal(taken, states):
            raise SystemExit(f"{name}: states came back different: nothing is measured")
        seed = statistics.median(part.seconds(partial(own.seed, SHAPE, book, blocks, slots, states, None)))
        take = statistics.median(part.seconds(partial(own.take, SHAPE, book, blocks, none, slots, taken, None)))
        for what, seconds in (("seed", seed), ("take", take)):
            part.note(f"{what} of {sessions} sessions, {name}", _moved(moved, seconds, bandwidth))


def main() -> None:
    """Everything; a part that fails is noted and does not hide the others."""
    part = Part.begin("kernels")
    ops = part.kernels()
    bandwidth = copy_bandwidth(part)
    failed = False
    for measure in (node, decode, prefill, update, pool):
        try:
            measure(part) if measure is node else measure(part, ops, bandwidth)  # type: ignore[call-arg]
        except (Exception, SystemExit) as error:  # noqa: BLE001
            part.note(f"{measure.__name__}: failed", f"{type(error).__name__}: {error}")
            failed = True
    raise SystemExit(int(failed))


if __name__ == "__main__":
    main()
