"""Part 4: what the memory costs a whole model: a decoder stack of Qwen3-4B's shape with random weights, each layer
compiled by Inductor, each step a CUDA graph.

Arms take turns: without memory, with it, with it where nothing can be fused, and without it once more, which shows the
noise. Time per output token (TPOT) and to the first (TTFT, the prompt's forward; embedding and head are left out of all
arms). Nothing is measured unless the arms with memory agree and the one without differs.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

from deltamem_vllm.ops.paged import WRITE_ALL, Batch, PagedOps, mask_words
from loadtests.gpu.common import BLOCK, SHAPE, Part
from loadtests.gpu.layer import ARMS, Layer, Weights, layer_of, running


@dataclass(frozen=True)
class Size:
    """A decoder's sizes."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int

    @property
    def q(self) -> int:
        """Columns of q."""
        return self.heads * self.head_dim

    @property
    def kv(self) -> int:
        """Columns of k, and of v."""
        return self.kv_heads * self.head_dim


QWEN3_4B = Size(36, 2560, 32, 8, 128, 9728)
SMALL = Size(2, 64, 4, 2, 16, 96)


class Stack:
    """A decoder of random weights and what one step of it needs."""

    def __init__(self, part: Part, size: Size) -> None:
        self.part, self.size = part, size
        self.weights = [self._random() for _ in range(size.layers)]
        self.numbers = [torch.tensor(i) for i in range(size.layers)]
        self.ops: PagedOps | None = None
        torch._dynamo.config.recompile_limit = 32  # of all arms together: they are one function to Dynamo
        # A tiny run proves that the layers can be traced; a C++ compiler takes longer than all the rest of it.
        backend = "eager" if part.tiny else "inductor"
        compiled = {
            arm: torch.compile(layer_of(arm, size.q, size.kv), backend=backend, fullgraph=True) for arm in ARMS[:3]
        }
        self.layers: dict[str, Layer] = {**compiled, ARMS[3]: compiled[ARMS[0]]}

    def _random(self) -> Weights:
        """One layer's weights, about as large as trained ones."""
        size, device = self.size, self.part.device
        dtype = torch.float32 if self.part.tiny else torch.bfloat16

        def matrix(rows: int, columns: int, sums: int) -> Tensor:
            made: Tensor = torch.randn((rows, columns), device=device) * sums**-0.5
            return made.to(dtype)

        both = matrix(size.q + 2 * size.kv + SHAPE.projected_columns, size.hidden, size.hidden)
        qkv, memory = both.split([size.q + 2 * size.kv, SHAPE.projected_columns])
        return {
            "both": both, "qkv": qkv, "memory": memory, "o": matrix(size.hidden, size.q, size.q),
            "up": matrix(2 * size.inner, size.hidden, size.hidden), "down": matrix(size.hidden, size.inner, size.inner),
            "for_q": matrix(SHAPE.width, size.q, 1), "for_o": matrix(SHAPE.width, size.hidden, 1),
            "bias": torch.full((SHAPE.bias_columns,), -2.5, device=device),
            "norm": torch.ones(size.hidden, dtype=dtype, device=device),
            "head_norm": torch.ones(size.head_dim, dtype=dtype, device=device),
        }  # fmt: skip

    def prepare(self, requests: int, context: int, rows: int) -> None:
        """Inputs, KV cache and pages of one step: each of the requests has ``rows`` new tokens behind ``context``."""
        size, device, dtype = self.size, self.part.device, self.weights[0]["qkv"].dtype
        self.requests, self.context, self.rows = requests, context, rows
        length = context + rows
        cache = (requests, size.kv_heads, length, size.head_dim)
        self.caches = [
            tuple(torch.randn(cache, device=device, dtype=dtype) for _ in range(2)) if context else None
            for _ in range(size.layers)
        ]
        per = -(-length // BLOCK)
        blocks = requests * per
        # Written with short keys and small gates: no state grows, none is empty.
        self.pages = [torch.rand((blocks, SHAPE.page_floats(BLOCK)), device=device) * 0.3 for _ in range(size.layers)]
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
        self.x = torch.randn((requests * rows, size.hidden), device=device).to(dtype)
        self.h = self.x.clone()
        self.cos, self.sin = (f(angles).repeat(requests, 1) for f in (torch.cos, torch.sin))
        if requests * rows > 1:  # compiled for one token, and once for any other number, as vLLM does
            for tensor in (self.x, self.h, self.cos, self.sin):
                torch._dynamo.mark_dynamic(tensor, 0)
        running[:] = [self]

    def forward(self, arm: str, layers: int | None = None) -> Tensor:
        """One step of the whole stack, or of its first layers."""
        h, residual = self.h, self.x
        for w, number in zip(self.weights[:layers], self.numbers, strict=False):
            h, residual = self.layers[arm](h, residual, w, self.cos, self.sin, number)
        return h

    def scan(self, projected: Tensor, bias: Tensor, reads: Tensor, layer: int) -> None:
        """See `loadtests.gpu.layer.Model`."""
        assert self.ops is not None
        self.ops.page_scan(SHAPE, projected, bias, self.pages[layer], self.batch, reads)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, layer: int) -> None:
        """See `loadtests.gpu.layer.Model`."""
        size, cache = self.size, self.caches[layer]
        q, k, v = (x.unflatten(0, (self.requests, self.rows)).unflatten(2, (-1, size.head_dim)) for x in (q, k, v))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if cache is None:
            got = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
        else:  # one token: a key head's query heads are rows of one attention, which need no mask
            keys, values = cache
            keys[:, :, self.context :], values[:, :, self.context :] = k, v
            group = size.heads // size.kv_heads
            q = q.reshape(self.requests, size.kv_heads, group, size.head_dim)
            got = F.scaled_dot_product_attention(q, keys, values)
        out.copy_(got.reshape(out.shape))


def agree(stack: Stack) -> dict[str, float]:
    """How far one layer's arms lie apart, relative to its values.

    Raises:
        SystemExit: the fused memory is not the unfused one, or has no effect.
    """
    one = {arm: stack.forward(arm, layers=1).double() for arm in ARMS[:3]}
    scale = one["memory"].norm()
    apart = float((one["memory"] - one["memory, unfused"]).norm() / scale)
    effect = float((one["memory"] - one["without"]).norm() / scale)
    if not apart < 0.02 or not effect > 4 * apart:
        raise SystemExit(f"memory fused and unfused differ by {apart:.1e}, memory and none by {effect:.1e}")
    return {"fused to unfused": apart, "memory to none": effect}


_LAUNCHES = ("aten::mm", "aten::addmm", "deltamem_gpu::")


def launches(stack: Stack) -> tuple[dict[str, float], dict[str, list[str]]]:
    """Per arm, launches per layer, and the three kernels that take longest with their part of the time. On a CPU only
    what no compiler can fuse: matrix products and custom operators."""
    counted, longest = {}, {}
    on_cpu = stack.part.device.type == "cpu"
    for arm in ARMS[:3]:
        stack.forward(arm)
        with profile(activities=[ProfilerActivity.CPU if on_cpu else ProfilerActivity.CUDA]) as profiler:
            stack.forward(arm)
            if not on_cpu:
                torch.cuda.synchronize()
        time, count = Counter[str](), 0
        for event in profiler.events():
            if on_cpu and not event.name.startswith(_LAUNCHES):
                continue
            if not on_cpu and event.device_type != DeviceType.CUDA:
                continue
            count += 1
            time[event.name[:60]] += event.time_range.elapsed_us()
        counted[arm] = round(count / stack.size.layers, 2)
        longest[arm] = [f"{name} {100 * t / max(time.total(), 1e-9):.0f} %" for name, t in time.most_common(3)]
    return counted, longest


def alternate(part: Part, stack: Stack, inner: int, repeats: int) -> dict[str, float]:
    """Milliseconds per step of each arm, median over repeats that take turns; extra cost and noise in percent."""
    steps: dict[str, Callable[[], object]] = {}
    for arm in ARMS:
        steps[arm] = part.captured(partial(stack.forward, arm))
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
    stack = Stack(part, SMALL if part.tiny else QWEN3_4B)
    decodes = [(1, 20), (2, 20)] if part.tiny else [(1, 2040), (32, 2040), (256, 1016)]
    prompts = [24] if part.tiny else [512, 8192, 32768]
    cases = [(f"TPOT, B={b}, context {c}", (b, c, 1), 10) for b, c in decodes]
    cases += [(f"TTFT, {t} tokens", (1, 0, t), 4 if t <= 8192 else 1) for t in prompts]
    failed = False
    for name, kernel in part.kernels().items():
        if name.endswith("one launch"):
            continue
        stack.ops = kernel
        for what, step, inner in cases:
            try:
                stack.prepare(*step)
                apart = agree(stack)
                if what == cases[0][0]:
                    counted, longest = launches(stack)
                    part.note(f"{name}: arms apart", apart)
                    part.note(f"{name}: launches per layer", counted)
                    part.note(f"{name}: longest kernels", longest)
                part.note(f"{name}: {what}", alternate(part, stack, 1 if part.tiny else inner, repeats=5))
            except (Exception, SystemExit) as error:  # noqa: BLE001  the next size may fit
                part.note(f"{name}: {what}: failed", f"{type(error).__name__}: {error}")
                failed = True
            if part.device.type == "cuda":
                torch.cuda.empty_cache()
    raise SystemExit(int(failed))


if __name__ == "__main__":
    main()
