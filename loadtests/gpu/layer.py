"""One decoder layer as vLLM compiles it: what is around the scan and the attention, which no compiler looks into.

An arm's layer is compiled once and called for all layers, with their weights as inputs. The scan and the attention are
custom operators that find pages and caches in the `Model` that runs, as the served ones do in vLLM's forward context.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from deltamem_vllm.memory.correct import correct
from loadtests.gpu.common import SHAPE

ARMS = ("without", "memory", "memory, unfused", "without again")
"""The second has the projection in qkv's weight and corrections that a compiler can fuse; the third a projection of its
own and corrections as matrix products: what quantised linears and eager mode get."""

Weights = dict[str, Tensor]
Layer = Callable[[Tensor, Tensor, Weights, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class Model(Protocol):
    """What runs the operators of one step."""

    def scan(self, projected: Tensor, bias: Tensor, reads: Tensor, layer: int) -> None:
        """Activate, read, write."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, layer: int) -> None:
        """Write k and v into the cache, and attend."""


running: list[Model] = []
"""The model of this step, the last one."""


def _scan(projected: Tensor, bias: Tensor, reads: Tensor, layer: Tensor) -> None:
    running[-1].scan(projected, bias, reads, int(layer))


def _attend(q: Tensor, k: Tensor, v: Tensor, out: Tensor, layer: Tensor) -> None:
    running[-1].attend(q, k, v, out, int(layer))


_library = torch.library.Library("deltamem_gpu", "FRAGMENT")
_library.define("scan(Tensor projected, Tensor bias, Tensor(a!) reads, Tensor layer) -> ()")
_library.define("attend(Tensor q, Tensor k, Tensor v, Tensor(a!) out, Tensor layer) -> ()")
for _name, _function in (("scan", _scan), ("attend", _attend)):
    for _device in ("CPU", "CUDA"):
        _library.impl(_name, _function, _device)
    _library.impl(_name, lambda *_: None, "Meta")


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * weight


def _rotated(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Head norm and rotary embedding of ``x [T, heads · head_dim]``; cos and sin are [T, head_dim / 2]."""
    heads = _norm(x.view(x.shape[0], -1, weight.shape[0]), weight)
    a, b = heads.float().chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype).view(x.shape)


def _product(out: Tensor, reads: Tensor, matrix: Tensor) -> Tensor:
    return torch.addmm(out, reads.to(out.dtype), matrix)


def layer_of(arm: str, q_size: int, kv_size: int) -> Layer:
    """The layer of an arm, not compiled: (normed x [T, hidden], residual, weights, cos, sin, its number as a tensor on
    the host) to the next layer's normed x and residual.
    """
    memory, fused = arm.startswith("memory"), arm == "memory"
    add = correct if fused else _product

    def layer(
        h: Tensor, residual: Tensor, w: Weights, cos: Tensor, sin: Tensor, number: Tensor
    ) -> tuple[Tensor, Tensor]:
        qkv = F.linear(h, w["both" if fused else "qkv"])
        q, k, v = qkv[:, : q_size + 2 * kv_size].split([q_size, kv_size, kv_size], -1)
        if memory:
            projected = qkv[:, q_size + 2 * kv_size :] if fused else F.linear(h, w["memory"])
            reads = torch.empty((h.shape[0], SHAPE.width), dtype=torch.float32, device=h.device)
            torch.ops.deltamem_gpu.scan(projected, w["bias"], reads, number)
            q = add(q, reads, w["for_q"])
        q, k = _rotated(q, w["head_norm"], cos, sin), _rotated(k, w["head_norm"], cos, sin)
        out = torch.empty((h.shape[0], q_size), dtype=h.dtype, device=h.device)
        torch.ops.deltamem_gpu.attend(q, k, v, out, number)
        out = F.linear(out, w["o"])
        if memory:
            out = add(out, reads, w["for_o"])
        residual = residual + out
        gate, up = F.linear(_norm(residual, w["norm"]), w["up"]).chunk(2, -1)
        residual = residual + F.linear(F.silu(gate) * up, w["down"])
        return _norm(residual, w["norm"]), residual

    return layer
