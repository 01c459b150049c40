"""Part 4: what the memory costs a whole model: a decoder stack of Qwen3-4B's shape with random weights, in CUDA graphs.

Arms alternate: without memory, with it as the plugin computes it, with it and the projection appended to qkv's weight,
and without it once more, which shows the noise. Time per output token (TPOT) and to the first (TTFT, the prompt's
forward; embedding and head are left out of all arms).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from deltamem_vllm.ops.paged import WRITE_ALL, Batch, PagedOps, mask_words
from loadtests.gpu.common import BLOCK, SHAPE, Part

ARMS = ("without", "memory", "memory, appended", "without again")


@dataclass(frozen=True)
class Size:
    """A decoder's sizes."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int


QWEN3_4B = Size(36, 2560, 32, 8, 128, 9728)
SMALL = Size(2, 64, 4, 2, 16, 96)


class Stack:
    """A decoder of random weights and what one step of it needs.

    Args:
        requests, context, rows: each of the requests has ``rows`` new tokens behind ``context`` ones.
    """

    def __init__(self, part: Part, size: Size, weights: list[dict[str, Tensor]]) -> None:
        self.part, self.size, self.weights = part, size, weights
        self.ops: PagedOps | None = None

    @staticmethod
    def random(part: Part, size: Size) -> list[dict[str, Tensor]]:
        """Weights of all layers, about as large as trained ones."""
        dtype = torch.float32 if part.tiny else torch.bfloat16

        def matrix(rows: int, columns: int) -> Tensor:
            return (torch.randn((rows, columns), device=part.device) * columns**-0.5).to(dtype)

        q, kv = size.heads * size.head_dim, size.kv_heads * size.head_dim
        layers = []
        for _ in range(size.layers):
            qkv, memory = matrix(q + 2 * kv, size.hidden), matrix(SHAPE.projected_columns, size.hidden)
            layers.append({
                "qkv": qkv, "memory": memory, "both": torch.cat([qkv, memory]), "o": matrix(size.hidden, q),
                "up": matrix(2 * size.inner, size.hidden), "down": matrix(size.hidden, size.inner),
                "delta_q": matrix(q, SHAPE.width) * 0.05, "delta_o": matrix(size.hidden, SHAPE.width) * 0.05,
                "bias": torch.full((SHAPE.bias_columns,), -2.5, device=part.device),
                "norm": torch.ones(size.hidden, dtype=dtype, device=part.device),
                "head_norm": torch.ones(size.head_dim, dtype=dtype, device=part.device),
            })  # fmt: skip
        return layers

    def prepare(self, requests: int, context: int, rows: int) -> None:
        """Inputs, KV cache and pages of one step."""
        size, device, dtype = self.size, self.part.device, self.weights[0]["qkv"].dtype
        self.requests, self.context, self.rows = requests, context, rows
        self.x = torch.randn((requests * rows, size.hidden), device=device).to(dtype)
        length = context + rows
        cache = (requests, size.kv_heads, length, size.head_dim)
        self.caches = [
            tuple(torch.randn(cache, device=device, dtype=dtype) for _ in range(2)) if context else None
            for _ in range(size.layers)
        ]
        per = -(-length // BLOCK)
        blocks = requests * per
        self.pages = [torch.zeros((blocks, SHAPE.page_floats(BLOCK)), device=device) for _ in range(size.layers)]
        self.batch = Batch(
            torch.arange(blocks, dtype=torch.int32, device=device).view(requests, per),
            torch.arange(requests + 1, dtype=torch.int32, device=device) * rows,
            torch.full((requests,), length, dtype=torch.int32, device=device),
            torch.full((blocks,), WRITE_ALL, dtype=torch.int32, device=device),
            torch.zeros((blocks, mask_words(BLOCK)), dtype=torch.int32, device=device),
            BLOCK,
            requests,
            rows,
        )
        angles = torch.arange(context, length, device=device)[:, None] * torch.logspace(
            0, -6, size.head_dim // 2, device=device
        )
        self.cos, self.sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def forward(self, arm: str) -> Tensor:
        """One step of the whole stack."""
        x = self.x
        for i, w in enumerate(self.weights):
            x = x + self._attention(arm, i, w, F.rms_norm(x, (self.size.hidden,), w["norm"]))
            h = F.rms_norm(x, (self.size.hidden,), w["norm"])
            gate, up = F.linear(h, w["up"]).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, w["down"])
        return x

    def _attention(self, arm: str, i: int, w: dict[str, Tensor], h: Tensor) -> Tensor:
        size = self.size
        q_size, kv_size = size.heads * size.head_dim, size.kv_heads * size.head_dim
        reads: Tensor | None = None
        if arm == "memory, appended":
            q, k, v, projected = F.linear(h, w["both"]).split([q_size, kv_size, kv_size, SHAPE.projected_columns], -1)
            reads = self._read(i, w, projected.contiguous())
        else:
            q, k, v = F.linear(h, w["qkv"]).split([q_size, kv_size, kv_size], -1)
            if arm == "memory":
                reads = self._read(i, w, F.linear(h, w["memory"]))
        if reads is not None:
            q = torch.addmm(q, reads, w["delta_q"].T)
        q, k = self._rotated(q, size.heads, w), self._rotated(k, size.kv_heads, w)
        v = v.view(self.requests, self.rows, size.kv_heads, size.head_dim).transpose(1, 2)
        cache = self.caches[i]
        if cache is not None:  # one token: a key head's query heads are rows of one attention, which need no mask
            keys, values = cache
            keys[:, :, self.context :], values[:, :, self.context :] = k, v
            group = size.heads // size.kv_heads
            out = F.scaled_dot_product_attention(
                q.reshape(self.requests, size.kv_heads, group, size.head_dim), keys, values
            ).reshape(self.requests, q_size)
        else:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            out = out.transpose(1, 2).reshape(-1, q_size)
        result = F.linear(out, w["o"])
        return result if reads is None else torch.addmm(result, reads, w["delta_o"].T)

    def _read(self, i: int, w: dict[str, Tensor], projected: Tensor) -> Tensor:
        reads = torch.empty((projected.shape[0], SHAPE.width), dtype=torch.float32, device=projected.device)
        assert self.ops is not None
        self.ops.page_scan(SHAPE, projected, w["bias"], self.pages[i], self.batch, reads)
        return reads.to(projected.dtype)

    def _rotated(self, x: Tensor, heads: int, w: dict[str, Tensor]) -> Tensor:
        """Head norm and rotary embedding: [requests, heads, rows, head_dim]."""
        x = x.reshape(self.requests, self.rows, heads, self.size.head_dim)
        x = F.rms_norm(x, (self.size.head_dim,), w["head_norm"]).transpose(1, 2)
        a, b = x.chunk(2, -1)
        return torch.cat([a * self.cos - b * self.sin, b * self.cos + a * self.sin], -1)


class _Counter(TorchDispatchMode):
    """Counts operators that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def nodes(part: Part, stack: Stack) -> dict[str, float]:
    """Kernels per layer of each arm: counted by the profiler on a GPU, as operators on a CPU."""
    counted = {}
    for arm in ARMS[:3]:
        stack.forward(arm)
        if part.device.type == "cpu":
            with _Counter() as counter:
                stack.forward(arm)
            count = counter.count
        else:
            from torch.profiler import ProfilerActivity, profile

            with profile(activities=[ProfilerActivity.CUDA]) as profiler:
                stack.forward(arm)
                torch.cuda.synchronize()
            count = sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events())
        counted[arm] = round(count / stack.size.layers, 2)
    return counted


def alternate(part: Part, stack: Stack, inner: int, repeats: int) -> dict[str, float]:
    """Milliseconds per step of each arm, median over repeats that take turns; extra cost and noise in percent."""
    steps: dict[str, Callable[[], object]] = {}
    for arm in ARMS:
        steps[arm] = part.captured(lambda arm=arm: stack.forward(arm))
    took: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for _ in range(repeats):
        for arm, step in steps.items():
            took[arm].append(part.seconds(step, repeats=1, inner=inner)[0] * 1e3)
    result = {f"{arm} ms": round(statistics.median(values), 4) for arm, values in took.items()}
    base = statistics.median(took["without"])
    for arm in ARMS[1:]:
        paired = [100 * (a / b - 1) for a, b in zip(took[arm], took["without"], strict=True)]
        result[f"{arm} %"] = round(statistics.median(paired), 3)
    result["tokens/s without"] = round(stack.requests * stack.rows / base * 1e3, 1)
    return result


@torch.inference_mode()
def main() -> None:
    """TPOT and TTFT for every kernel; a size that fails is noted."""
    part = Part.begin("stack")
    size = SMALL if part.tiny else QWEN3_4B
    stack = Stack(part, size, Stack.random(part, size))
    decodes = [(1, 20), (2, 20)] if part.tiny else [(1, 2040), (32, 2040), (256, 1016)]
    prompts = [24] if part.tiny else [512, 8192, 32768]
    failed = False
    for name, kernel in part.kernels().items():
        if name.endswith("one launch"):
            continue
        stack.ops = kernel
        cases = [(f"TPOT, B={b}, context {c}", (b, c, 1), 10) for b, c in decodes]
        cases += [(f"TTFT, {t} tokens", (1, 0, t), 4 if t <= 8192 else 1) for t in prompts]
        for what, step, inner in cases:
            try:
                stack.prepare(*step)
                if what == f"TPOT, B={decodes[0][0]}, context {decodes[0][1]}":
                    part.note(f"{name}: kernels per layer", nodes(part, stack))
                part.note(f"{name}: {what}", alternate(part, stack, 1 if part.tiny else inner, repeats=5))
            except Exception as error:  # noqa: BLE001  the next size may fit
                part.note(f"{name}: {what}: failed", f"{type(error).__name__}: {error}")
                failed = True
            if part.device.type == "cuda":
                torch.cuda.empty_cache()
    raise SystemExit(int(failed))


if __name__ == "__main__":
    main()
