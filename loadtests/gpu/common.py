"""What the parts share: arguments, a file of results that grows, kernels, time."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from deltamem_vllm.ops.cuda import CUDA_LIBRARY, CudaOps
from deltamem_vllm.ops.layout import RELEASED
from deltamem_vllm.ops.paged import PagedOps
from deltamem_vllm.ops.paged_torch import TorchOps

BLOCK = 16
#: Qwen3-4B with the released adapter: one head of rank 8, corrections on q and o.
SHAPE = RELEASED


@dataclass
class Part:
    """One part of a run: where its results go, and how big it is. Results are written as they come, so that what was
    measured before a failure is not lost."""

    name: str
    out: Path
    tiny: bool
    device: torch.device
    results: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def begin(name: str) -> Part:
        """From the command line: ``--out DIR [--tiny]``. Tiny runs anywhere, and proves only that the script works."""
        parser = argparse.ArgumentParser(prog=f"loadtests.gpu.{name}")
        parser.add_argument("--out", type=Path, required=True)
        parser.add_argument("--tiny", action="store_true")
        args = parser.parse_args()
        device = torch.device("cpu" if args.tiny else "cuda")
        torch.manual_seed(0)
        return Part(name, args.out, args.tiny, device)

    def note(self, key: str, value: Any) -> None:
        """Keep a result, on disk too."""
        self.results[key] = value
        whole = self.out / f"{self.name}.json"
        partial = whole.with_suffix(".part")
        partial.write_text(json.dumps(self.results, indent=1), encoding="utf-8")
        partial.replace(whole)
        print(f"{self.name}: {key} = {json.dumps(value)}", flush=True)  # noqa: T201

    def kernels(self) -> dict[str, PagedOps]:
        """What is to be measured, by name; what cannot be had is noted with its reason."""
        if self.tiny:
            return {"torch": TorchOps()}
        found: dict[str, PagedOps] = {}
        library = self.out / CUDA_LIBRARY
        made: tuple[tuple[str, Callable[[], PagedOps]], ...] = (
            ("cuda", lambda: CudaOps(library)),
            ("cuda, one launch", lambda: CudaOps(library, chunk=0)),
            ("triton", _triton),
            ("triton, one launch", lambda: _triton(chunk=0)),
        )
        for name, make in made:
            try:
                found[name] = make()
            except Exception as error:  # noqa: BLE001  one missing library must not hide the others
                self.note(f"{name}: missing", f"{type(error).__name__}: {error}")
        return found

    def seconds(self, work: Callable[[], object], repeats: int = 7, inner: int = 1) -> list[float]:
        """Seconds of ``work``, ``repeats`` times, each the mean of ``inner`` calls; after one warm-up."""
        work()
        if self.device.type == "cpu":
            took = []
            for _ in range(repeats):
                start = time.perf_counter()
                for _ in range(inner):
                    work()
                took.append((time.perf_counter() - start) / inner)
            return took
        took = []
        for _ in range(repeats):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(inner):
                work()
            end.record()
            end.synchronize()
            took.append(begin.elapsed_time(end) / 1e3 / inner)
        return took

    def captured(self, work: Callable[[], object]) -> Callable[[], object]:
        """``work`` as a CUDA graph, warmed up; on a CPU as it is."""
        if self.device.type == "cpu":
            return work
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            work()
            work()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph.replay


def _triton(chunk: int = -1) -> PagedOps:
    from deltamem_vllm.ops.triton_ops import TritonOps

    return TritonOps(chunk)


def median_us(seconds: list[float]) -> float:
    """Microseconds, three digits."""
    return round(statistics.median(seconds) * 1e6, 3)
