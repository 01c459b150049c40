"""The gated delta rule over a sequence, for training on a CPU.

Per token, with S[value, key]:  r = S q  (before the write),  S' = (1 − β)∘S + β∘(v − S k) kᵀ.
``scan_reference`` is the plain truth; ``scan`` is the same with a compiled forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
_Loop = TypeVar("_Loop", bound=Callable[..., None])

_compiled: Callable[[_Loop], _Loop] = numba.njit(parallel=True, fastmath=False)


def scan_reference(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, written: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Read and write token by token.

    Args:
        q, k, v, beta: [B, T, R].
        written: [B, T] bool; False tokens (padding) read 0 and write nothing.
        state: [B, R, R], left unchanged.

    Returns:
        reads [B, T, R] and the state after the last token [B, R, R].
    """
    reads = []
    for t in range(q.shape[1]):
        on = written[:, t, None]
        reads.append(torch.einsum("bij,bj->bi", state, q[:, t]) * on)
        predicted = torch.einsum("bij,bj->bi", state, k[:, t])
        b = (beta[:, t] * on)[:, :, None]
        state = (1 - b) * state + b * (v[:, t] - predicted)[:, :, None] * k[:, t][:, None, :]
    return torch.stack(reads, 1), state


@_compiled
def _forward(
    q: Array, k: Array, v: Array, beta: Array, written: Mask, state: Array, reads: Array, before: Array
) -> None:  # pragma: no cover - compiled
    rows, length, rank = q.shape
    for b in numba.prange(rows):
        s = state[b].copy()
        for t in range(length):
            before[b, t] = s
            if not written[b, t]:
                continue
            for i in range(rank):
                read = np.float32(0.0)
                predicted = np.float32(0.0)
                for j in range(rank):
                    read += s[i, j] * q[b, t, j]
                    predicted += s[i, j] * k[b, t, j]
                reads[b, t, i] = read
                gate = beta[b, t, i]
                for j in range(rank):
                    s[i, j] += gate * ((v[b, t, i] - predicted) * k[b, t, j] - s[i, j])
        before[b, length] = s


@_compiled
def _backward(
    q: Array,
    k: Array,
    v: Array,
    beta: Array,
    written: Mask,
    before: Array,
    dreads: Array,
    dlast: Array,
    dq: Array,
    dk: Array,
    dv: Array,
    dbeta: Array,
) -> None:  # pragma: no cover - compiled
    rows, length, rank = q.shape
    for b in numba.prange(rows):
        grad = dlast[b].copy()
        for t in range(length - 1, -1, -1):
            if not written[b, t]:
                continue
            s = before[b, t]
            for i in range(rank):
                predicted = np.float32(0.0)
                through = np.float32(0.0)
                decay = np.float32(0.0)
                for j in range(rank):
                    predicted += s[i, j] * k[b, t, j]
                    through += grad[i, j] * k[b, t, j]
                    decay += grad[i, j] * s[i, j]
                gate = beta[b, t, i]
                error = v[b, t, i] - predicted
                dbeta[b, t, i] = error * through - decay
                dv[b, t, i] = gate * through
                for j in range(rank):
                    dk[b, t, j] += gate * (error * grad[i, j] - through * s[i, j])
                    dq[b, t, j] += dreads[b, t, i] * s[i, j]
                    grad[i, j] = (1 - gate) * grad[i, j] - gate * through * k[b, t, j] + dreads[b, t, i] * q[b, t, j]
        dlast[b] = grad


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, written: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        inputs = [x.detach().contiguous() for x in (q, k, v, beta, written, state)]
        rows, length, rank = q.shape
        reads = torch.zeros_like(inputs[0])
        before = q.new_empty(rows, length + 1, rank, rank)
        _forward(*(x.numpy() for x in (*inputs, reads, before)))
        ctx.save_for_backward(*inputs[:5], before)
        return reads, before[:, -1].clone()

    @staticmethod
    def backward(ctx: Any, dreads: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, before = ctx.saved_tensors
        dlast = dlast.clone(memory_format=torch.contiguous_format)
        grads = [torch.zeros_like(inputs[0]) for _ in range(4)]
        arrays = (*inputs, before, dreads.contiguous(), dlast, *grads)
        _backward(*(x.detach().numpy() for x in arrays))
        return (*grads, None, dlast)


def scan(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, written: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """``scan_reference``, compiled, with gradients for q, k, v, beta and state; fp32 on CPU."""
    reads, last = _Scan.apply(q, k, v, beta, written, state)  # type: ignore[no-untyped-call]
    return reads, last
