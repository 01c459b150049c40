"""How one layer's memory lies in tensors: the fused projection, a token's log row, a page.

Conventions of the whole `ops` folder, with H state heads of side r, R = H·r and G gates
(G = R if gates are per state row, else H):

    state       S[H, r, r] fp32, S[value, key]; head j owns columns j·r … j·r+r−1 of every R-wide tensor
    projection  q̃[R] | k̃[R] | v[R] | β̃[G] | λ̃[G, only if λ has its own gate]      before activation
    log row     k[R] | v[R] | β[G] | λ[G, only if λ has its own gate]                what one token wrote
    page        base[H, r, r] | log[N, log_columns] | padding                        one KV block of N tokens

A page keeps the state *before* its first token and what each token wrote, never the state after it. So the
state at any position is replay(base, log[:n]): a rejected draft token is overwritten, an overshot one is
ignored, a full block is immutable (and can be prefix-cached), and a preempted request recomputes. The price
is at most N short steps to get back to a state.

Padding is the kernels' own, and only they know what it holds. Those on a CPU keep the state after an open page's last
token there, where there is room, so that a decode step need not replay (csrc/cpu/kernels.cpp). Whoever replays is right
without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

UpdateMode = Literal["standard", "lambda_outside", "no_lambda"]
UPDATE_MODES: tuple[UpdateMode, ...] = get_args(UpdateMode)
SMALLEST_KERNEL_BLOCK = 16
"""vLLM may split a block for attention's kernel; a page's content is sized so that a part this small still holds it."""


@dataclass(frozen=True, kw_only=True)
class MemoryShape:
    """What the delta rule of one adapter computes; every layer of an adapter has the same shape.

    Args:
        rank: r, side of one state matrix, at least 1.
        heads: H, state matrices per layer, at least 1.
        rankwise_gates: one gate per state row (value dimension); False: one per state head.
        couple_lambda: λ = 1 − β; False: λ has its own pre-activation.
        update_mode: which coefficients keep, erase and write take (δ-mem's three update modes).
        normalize_qk: tanh, then L2 norm per head, on q and k.

    Raises:
        ValueError: a value outside these ranges.
    """

    rank: int
    heads: int
    rankwise_gates: bool
    couple_lambda: bool
    update_mode: UpdateMode
    normalize_qk: bool

    def __post_init__(self) -> None:
        if self.rank < 1 or self.heads < 1:
            raise ValueError(f"rank and heads must be at least 1, got rank={self.rank}, heads={self.heads}")
        if self.update_mode not in UPDATE_MODES:
            raise ValueError(f"update_mode must be one of {', '.join(UPDATE_MODES)}, got {self.update_mode!r}")

    @property
    def width(self) -> int:
        """R = H·r: columns of q, k, v and of the reads."""
        return self.rank * self.heads

    @property
    def gates(self) -> int:
        """G: columns of β, and of λ where it is stored."""
        return self.width if self.rankwise_gates else self.heads

    @property
    def has_lambda(self) -> bool:
        """λ has its own pre-activation and its own column in the log (no_lambda never uses it)."""
        return not self.couple_lambda and self.update_mode != "no_lambda"

    @property
    def projected_columns(self) -> int:
        """C: columns of the fused projection."""
        return 3 * self.width + self.bias_columns

    @property
    def bias_columns(self) -> int:
        """Length of the bias: β's G values, then λ's G if it has its own gate."""
        return self.gates * (2 if self.has_lambda else 1)

    @property
    def log_columns(self) -> int:
        """fp32 values that one token leaves in its page."""
        return 2 * self.width + self.bias_columns

    @property
    def state_floats(self) -> int:
        """fp32 values of one layer's state."""
        return self.heads * self.rank * self.rank

    @cached_property
    def packed(self) -> int:
        """The whole shape in one int64, as the native operators take it (`make_shape` in csrc/bindings/page_ops.cpp):
        rank in bits 0–15, heads 16–31, update mode 32–33, then rankwise gates, coupled λ, normalised q and k.

        Raises:
            ValueError: a rank or a number of heads above 65,535.
        """
        if max(self.rank, self.heads) > 0xFFFF:
            raise ValueError(f"native kernels take ranks and heads up to 65535, got {self.rank} and {self.heads}")
        flags = self.rankwise_gates | self.couple_lambda << 1 | self.normalize_qk << 2
        return self.rank | self.heads << 16 | UPDATE_MODES.index(self.update_mode) << 32 | flags << 34

    def floats_per_token(self, block_size: int) -> int:
        """fp32 values a page needs per token slot, its share of the base included (rounded up)."""
        return self.log_columns + -(-self.state_floats // block_size)

    def page_floats(self, block_size: int) -> int:
        """fp32 values of one page of ``block_size`` tokens, padding included."""
        return block_size * self.floats_per_token(block_size)

    def content_floats(self, block_size: int) -> int:
        """fp32 values of one page that are ever read or written; the rest is padding."""
        return self.state_floats + block_size * self.log_columns


RELEASED = MemoryShape(
    rank=8, heads=1, rankwise_gates=True, couple_lambda=True, update_mode="standard", normalize_qk=True
)
"""The released adapters': what is tried, and measured, where no other one is known."""
