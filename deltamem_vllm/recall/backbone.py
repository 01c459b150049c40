"""The Qwen3 backbone in plain torch, with the parameter names of Hugging Face.

Written out so that one call can hold many windows of a dialogue: tokens attend within their own
window only and positions restart in each, while the δ-mem states run on through all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from .memory import Memories

if TYPE_CHECKING:
    from transformers import Qwen3Config


@dataclass(frozen=True, kw_only=True)
class Size:
    """The dimensions of the backbone; the rest of the Qwen3 config is fixed."""

    vocab: int
    hidden: int = 128
    inner: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    eps: float = 1e-6
    theta: float = 10000.0


def hf_config(size: Size, *, eos: int, pad: int) -> Qwen3Config:
    """The same dimensions as a ``Qwen3Config``."""
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=size.vocab,
        hidden_size=size.hidden,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.head_dim,
        rms_norm_eps=size.eps,
        rope_parameters={"rope_type": "default", "rope_theta": size.theta},
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        attention_bias=False,
        eos_token_id=eos,
        pad_token_id=pad,
        bos_token_id=None,
        dtype="float32",
        architectures=["Qwen3ForCausalLM"],
    )


class Norm(nn.Module):
    """RMSNorm over the last dimension."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention with q/k norm and rotary positions."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        q_width, kv_width = size.heads * size.head_dim, size.kv_heads * size.head_dim
        self.size = size
        self.q_proj = nn.Linear(size.hidden, q_width, bias=False)
        self.k_proj = nn.Linear(size.hidden, kv_width, bias=False)
        self.v_proj = nn.Linear(size.hidden, kv_width, bias=False)
        self.o_proj = nn.Linear(q_width, size.hidden, bias=False)
        self.q_norm = Norm(size.head_dim, size.eps)
        self.k_norm = Norm(size.head_dim, size.eps)

    def forward(
        self, h: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor, delta: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """h: [B, T, D]; mask: [B, 1, T, T] additive; delta: (δq [B, T, Q], δo [B, T, D]) or None."""
        rows, length, _ = h.shape
        q, k, v = self.q_proj(h), self.k_proj(h), self.v_proj(h)
        if delta is not None:
            q = q + delta[0]
        shape = (rows, length, -1, self.size.head_dim)
        q = _rotate(self.q_norm(q.view(shape)), rope).transpose(1, 2)
        k = _rotate(self.k_norm(k.view(shape)), rope).transpose(1, 2)
        v = v.view(shape).transpose(1, 2)
        group = self.size.heads // self.size.kv_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        out: Tensor = self.o_proj(mixed.transpose(1, 2).reshape(rows, length, -1))
        return out if delta is None else out + delta[1]


class Mlp(nn.Module):
    """SwiGLU."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size.hidden, size.inner, bias=False)
        self.up_proj = nn.Linear(size.hidden, size.inner, bias=False)
        self.down_proj = nn.Linear(size.inner, size.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """One decoder layer; a memory, where there is one, sees the attention's input."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.self_attn = Attention(size)
        self.mlp = Mlp(size)
        self.input_layernorm = Norm(size.hidden, size.eps)
        self.post_attention_layernorm = Norm(size.hidden, size.eps)


class Body(nn.Module):
    """Embedding, layers and last norm (the ``model.`` part of the parameter names)."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(size.vocab, size.hidden)
        self.layers = nn.ModuleList(Layer(size) for _ in range(size.layers))
        self.norm = Norm(size.hidden, size.eps)


class Backbone(nn.Module):
    """Qwen3 for causal language modelling, tied embeddings."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        self.model = Body(size)
        self.reset()

    def reset(self) -> None:
        """Initialise by fan-in; a small model with HF's 0.02 starts much too quietly."""
        nn.init.normal_(self.model.embed_tokens.weight, std=0.3)
        for name, weight in self.named_parameters():
            if weight.dim() == 2 and "embed" not in name:
                out = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=(0.3 if out else 1.0) / math.sqrt(weight.shape[1]))

    @classmethod
    def load(cls, folder: Path) -> Backbone:
        """Read config.json and model.safetensors as saved by Hugging Face."""
        from transformers import Qwen3Config

        c: Any = Qwen3Config.from_pretrained(folder)
        size = Size(
            vocab=c.vocab_size,
            hidden=c.hidden_size,
            inner=c.intermediate_size,
            layers=c.num_hidden_layers,
            heads=c.num_attention_heads,
            kv_heads=c.num_key_value_heads,
            head_dim=c.head_dim,
            eps=c.rms_norm_eps,
            theta=c.rope_parameters["rope_theta"],
        )
        model = cls(size)
        weights = load_file(str(Path(folder) / "model.safetensors"))
        weights.pop("lm_head.weight", None)
        model.load_state_dict(weights)
        return model

    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        windows: Tensor,
        memories: Memories | None = None,
        states: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Run all windows of a batch at once.

        Args:
            ids, positions: [B, T].
            windows: [B, T] window number of each token, −1 for padding.
            memories: the δ-mem adapter, or None for the bare backbone.
            states: [L, B, R, R], the memory before the first token; zeros when None.

        Returns:
            hidden states after the last norm [B, T, D] (see ``logits``) and the states after the
            last token [L, B, R, R].
        """
        same = windows[:, :, None] == windows[:, None, :]
        mask = torch.zeros(same.shape).masked_fill_(~same.tril(), -1e30)[:, None]
        rope = _rope(positions, self.size)
        x = self.model.embed_tokens(ids)
        after = []
        for i, layer in enumerate(cast("Iterable[Layer]", self.model.layers)):
            h = layer.input_layernorm(x)
            delta = None
            if memories is not None:
                start = None if states is None else states[i]
                dq, do, state = memories.layers[i](h, windows >= 0, start)
                delta = (dq, do)
                after.append(state)
            x = x + layer.self_attn(h, rope, mask, delta)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.model.norm(x), torch.stack(after) if after else None

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] → [..., vocab]."""
        return hidden @ self.model.embed_tokens.weight.T


def _rope(positions: Tensor, size: Size) -> tuple[Tensor, Tensor]:
    steps = torch.arange(0, size.head_dim, 2, dtype=torch.float32) / size.head_dim
    angles = positions[:, :, None, None].float() * (1.0 / size.theta**steps)
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """x: [B, T, heads, head_dim]."""
    a, b = x.chunk(2, -1)
    return x * rope[0] + torch.cat([-b, a], -1) * rope[1]
