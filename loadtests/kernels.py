"""Delta-rule operators: ns per token and layer of each implementation, alternated, after a check against fp32.

python -m loadtests.kernels [--tokens 2048] [--repeats 7]
"""

import argparse
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table

from deltamem_vllm.ops import reference
from deltamem_vllm.ops.dispatch import select
from deltamem_vllm.ops.layout import MemoryShape
from deltamem_vllm.ops.paged import WRITE_ALL, Batch, PagedOps, mask_words

BLOCK = 32
TOLERANCE = 5e-6


class Case:
    """One request of ``tokens`` tokens on pages of its own."""

    def __init__(self, shape: MemoryShape, tokens: int) -> None:
        torch.manual_seed(0)
        blocks = -(-tokens // BLOCK)
        self.shape, self.tokens = shape, tokens
        self.projected = torch.randn(tokens, shape.projected_columns)
        self.bias = torch.full((shape.bias_columns,), -2.5)
        self.pages = torch.zeros(blocks, shape.page_floats(BLOCK))
        self.table = torch.arange(blocks, dtype=torch.int32).view(1, -1)
        self.limits = torch.full((blocks,), WRITE_ALL, dtype=torch.int32)
        self.unwritten = torch.zeros((blocks, mask_words(BLOCK)), dtype=torch.int32)
        self.reads = torch.empty(tokens, shape.width)

    def prefill(self, ops: PagedOps) -> None:
        """All tokens in one step."""
        self._step(ops, 0, self.tokens)

    def decode(self, ops: PagedOps) -> None:
        """The last token alone, as a decode step sees it: half a block to replay before it."""
        self._step(ops, self.tokens - BLOCK // 2, self.tokens - BLOCK // 2 + 1)

    def _step(self, ops: PagedOps, start: int, stop: int) -> None:
        rows, length = torch.tensor([0, stop - start], dtype=torch.int32), torch.tensor([stop], dtype=torch.int32)
        batch = Batch(self.table, rows, length, self.limits, self.unwritten, BLOCK, 1)
        ops.page_scan(self.shape, self.projected[start:stop], self.bias, self.pages, batch, self.reads)


def check(case: Case, ops: PagedOps) -> float:
    """Largest difference between an implementation's reads and the reference's."""
    activated = reference.activate(case.shape, case.projected, case.bias)
    state = torch.zeros(case.shape.heads, case.shape.rank, case.shape.rank)
    expected, _ = reference.scan(case.shape, *activated, state)
    case.reads.fill_(float("nan"))
    case.prefill(ops)
    return float((case.reads - expected).abs().max())


def main() -> None:
    """Check, then measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    native, slow = select("cpu", "native"), select("cpu", "torch")
    table = Table("rank", "heads", "native prefill ns/token", "native decode step µs", "torch prefill ns/token")
    for rank, heads in ((8, 1), (8, 4), (16, 1)):
        shape = MemoryShape(
            rank=rank, heads=heads, rankwise_gates=True, couple_lambda=True, update_mode="standard", normalize_qk=True
        )
        case = Case(shape, args.tokens)
        for ops in (native, slow):
            if (worst := check(case, ops)) > TOLERANCE:
                raise SystemExit(f"{ops.name} differs from the reference by {worst:.1e}: nothing is measured")
        prefill, decode, torch_prefill = [], [], []
        for _ in range(args.repeats):  # arms alternate, so that both see the same machine
            prefill.append(_seconds(lambda case=case: case.prefill(native)) / args.tokens * 1e9)
            torch_prefill.append(_seconds(lambda case=case: case.prefill(slow)) / args.tokens * 1e9)
            decode.append(_seconds(lambda case=case: [case.decode(native) for _ in range(200)]) / 200 * 1e6)
        row = (f"{statistics.median(x):.{d}f}" for x, d in ((prefill, 0), (decode, 1), (torch_prefill, 0)))
        table.add_row(str(rank), str(heads), *row)
    console = Console()
    console.print(f"{native.description}, one thread, {args.tokens} tokens, median of {args.repeats}, one layer")
    console.print(table)


def _seconds(work: object) -> float:
    start = time.perf_counter()
    work()  # type: ignore[operator]
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
