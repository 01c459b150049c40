"""The truth: δ-mem's delta rule in plain torch, in the dtype of its inputs (arXiv 2605.12357 and its official
code).

Every kernel of this package is tested against this file directly. It has no options beyond `MemoryShape`, no
pages and no batching. All tensors of a call share one dtype; fp32 is the truth served, fp64 judges fp32 in
tests.

Shapes: projected [T, C] · q, k, v [T, H, r] · beta, lam [T, H, r] or [T, H, 1] · S [H, r, r], S[value, key].
"""

from __future__ import annotations

import torch
from torch import Tensor

from deltamem_vllm.ops.layout import MemoryShape

# The norm's floor: a vector of exact zeros stays zero instead of becoming NaN.
NORM_FLOOR = 1e-6

Activated = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def activate(shape: MemoryShape, projected: Tensor, bias: Tensor) -> Activated:
    """Turn the fused projection into what the rule consumes.

    Args:
        projected: [T, projected_columns] = q̃ | k̃ | v | β̃ | λ̃.
        bias: [bias_columns] = β's bias, then λ's if it has its own gate.

    Returns:
        q, k, v [T, H, r] and beta, lam [T, H, r] (rankwise) or [T, H, 1] (per head).
    """
    q, k, v = projected[:, : 3 * shape.width].reshape(-1, 3, shape.heads, shape.rank).unbind(1)
    gates = torch.sigmoid(projected[:, 3 * shape.width :] + bias)
    if shape.normalize_qk:
        q, k = _normalize(q), _normalize(k)
    return q, k, v, *_gate_pair(shape, gates)


def step(shape: MemoryShape, k: Tensor, v: Tensor, beta: Tensor, lam: Tensor, state: Tensor) -> Tensor:
    """Write one token: k, v [H, r], beta, lam [H, r or 1], state [H, r, r] → the next state (a new tensor).

    S'_ij = a_i·S_ij − e_i·p_i·k_j + w_i·v_i·k_j with p = S k. A gate belongs to a row (value), never to a
    column.
    """
    if shape.update_mode == "standard":
        keep, erase = lam, beta
    elif shape.update_mode == "lambda_outside":
        keep, erase = lam, lam * beta
    else:
        keep, erase = torch.ones_like(beta), beta
    predicted = torch.einsum("hij,hj->hi", state, k)
    write = (beta * v)[..., None] * k[:, None]
    return keep[..., None] * state - (erase * predicted)[..., None] * k[:, None] + write


def scan(
    shape: MemoryShape,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    lam: Tensor,
    state: Tensor,
    write: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Read, then write, token by token.

    Args:
        state: [H, r, r] before the first token; not changed.
        write: bool [T]; a token that is False reads the state and leaves it as it was. None: all write.

    Returns:
        reads [T, R] with r_t = S q_t *before* token t's own write, and the state after the last token.
    """
    reads = q.new_empty(q.shape[0], shape.width)
    for t in range(q.shape[0]):
        reads[t] = torch.einsum("hij,hj->hi", state, q[t]).flatten()
        if write is None or bool(write[t]):
            state = step(shape, k[t], v[t], beta[t], lam[t], state)
    return reads, state


def log_rows(shape: MemoryShape, k: Tensor, v: Tensor, beta: Tensor, lam: Tensor) -> Tensor:
    """What these tokens leave in a page: [T, log_columns]."""
    columns = [k, v, beta, lam] if shape.has_lambda else [k, v, beta]
    return torch.cat([column.flatten(1) for column in columns], dim=1)


def idle_row(shape: MemoryShape, like: Tensor) -> Tensor:
    """The log row [log_columns] of a token that was not written: replaying it changes nothing (β = 0, λ =
    1).
    """
    row = like.new_zeros(shape.log_columns)
    if shape.has_lambda:
        row[-shape.gates :] = 1.0
    return row


def replay(shape: MemoryShape, base: Tensor, log: Tensor) -> Tensor:
    """The state after the tokens of ``log`` [n, log_columns], from ``base`` [H, r, r] (a new tensor)."""
    k, v = log[:, : 2 * shape.width].reshape(-1, 2, shape.heads, shape.rank).unbind(1)
    beta, lam = _gate_pair(shape, log[:, 2 * shape.width :])
    state = base.clone()
    for t in range(log.shape[0]):
        state = step(shape, k[t], v[t], beta[t], lam[t], state)
    return state


def _normalize(x: Tensor) -> Tensor:
    u = torch.tanh(x)
    norm: Tensor = torch.linalg.vector_norm(u, dim=-1, keepdim=True)
    return u / norm.clamp_min(NORM_FLOOR)


def _gate_pair(shape: MemoryShape, gates: Tensor) -> tuple[Tensor, Tensor]:
    """β and λ as [T, H, r or 1] from activated gate columns [T, bias_columns]."""
    per_head = (gates.shape[0], shape.heads, shape.gates // shape.heads)
    beta = gates[:, : shape.gates].reshape(per_head)
    if shape.has_lambda:
        return beta, gates[:, shape.gates :].reshape(per_head)
    return beta, torch.ones_like(beta) if shape.update_mode == "no_lambda" else 1 - beta
