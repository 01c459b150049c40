"""The δ-mem adapter as trained and saved: one head of rank 8 per layer, corrections on q and o."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .scan import scan, scan_reference

if TYPE_CHECKING:
    from .backbone import Size

RANK, ALPHA = 8, 16.0


class Memory(nn.Module):
    """The memory of one layer. D hidden, Q query, K key/value width of its attention."""

    def __init__(self, hidden: int, q_width: int, kv_width: int, *, beta_bias: float) -> None:
        super().__init__()
        self.memory_q_proj = _projection(hidden)
        self.memory_k_proj = _projection(hidden)
        self.memory_v_proj = _projection(hidden)
        # Reading where one writes: a token then finds what its like has written from the start.
        self.memory_q_proj.data.copy_(self.memory_k_proj.data)
        self.delta_q_proj = nn.Parameter(torch.randn(q_width, RANK) * 0.1)
        self.delta_o_proj = nn.Parameter(torch.randn(hidden, RANK) * 0.1)
        self.beta_proj = nn.Parameter(torch.zeros(RANK, hidden))
        self.beta_bias = nn.Parameter(torch.full((RANK,), beta_bias))
        self.register_buffer("delta_k_proj", torch.zeros(kv_width, RANK))
        self.register_buffer("delta_v_proj", torch.zeros(kv_width, RANK))
        self.last_beta = torch.zeros(())
        self.exact = False

    def forward(self, h: Tensor, written: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """h: [B, T, D]; written: [B, T] bool; state: [B, R, R] or None (zeros).

        Returns δq [B, T, Q], δo [B, T, D] and the state after the last token [B, R, R].
        """
        q, k = (_direction(F.linear(h, w)) for w in (self.memory_q_proj, self.memory_k_proj))
        v = F.linear(h, self.memory_v_proj)
        beta = torch.sigmoid(F.linear(h, self.beta_proj, self.beta_bias))
        self.last_beta = beta[written].mean()
        if state is None:
            state = h.new_zeros(h.shape[0], RANK, RANK)
        rule = scan_reference if self.exact else scan
        reads, state = rule(q, k, v, beta, written, state)
        scale = ALPHA / RANK
        dq = F.linear(reads, self.delta_q_proj) * scale
        return dq, F.linear(reads, self.delta_o_proj) * scale, state


def _projection(hidden: int) -> nn.Parameter:
    bound = 1 / math.sqrt(hidden)
    return nn.Parameter(torch.empty(RANK, hidden).uniform_(-bound, bound))


def _direction(x: Tensor) -> Tensor:
    x = torch.tanh(x)
    length: Tensor = x.norm(dim=-1, keepdim=True)
    return x / length.clamp_min(1e-6)


class Memories(nn.Module):
    """One memory per layer of a backbone."""

    def __init__(self, size: Size, *, beta_bias: float = -3.0) -> None:
        super().__init__()
        self.beta_bias_init = beta_bias
        widths = (size.hidden, size.heads * size.head_dim, size.kv_heads * size.head_dim)
        self.layers = nn.ModuleList(Memory(*widths, beta_bias=beta_bias) for _ in range(size.layers))

    def _each(self) -> Iterable[Memory]:
        return cast("Iterable[Memory]", self.layers)

    def use_reference(self, on: bool = True) -> Memories:
        """Scan with the plain torch loop instead of the compiled rule."""
        for layer in self._each():
            layer.exact = on
        return self

    def mean_beta(self) -> Tensor:
        """The mean write gate of the last call, over layers, tokens and rows."""
        return torch.stack([layer.last_beta for layer in self._each()]).mean()

    def save(self, folder: Path) -> None:
        """Write the official folder: config, .pt and a .safetensors of the same tensors."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"model.layers.{i}.self_attn.{name}": tensor.detach().clone().contiguous()
            for i, layer in enumerate(self.layers)
            for name, tensor in layer.state_dict().items()
        }
        config = {
            "rank": RANK,
            "alpha": ALPHA,
            "num_state_heads": 1,
            "memory_write_granularity": "token",
            "state_update_mode": "standard",
            "couple_lambda": True,
            "rankwise_gates": True,
            "normalize_qk": True,
            "delta_heads": ["q", "o"],
            "target_layers": [],
            "target_modules": ["self_attn"],
            "beta_bias_init": self.beta_bias_init,
            "output_init": "random",
        }
        text = json.dumps(config, indent=2) + "\n"
        (folder / "delta_mem_config.json").write_text(text, encoding="utf-8")
        torch.save(tensors, folder / "delta_mem_adapter.pt")
        flat = folder / "delta_mem_adapter.safetensors"
        save_file(tensors, str(flat))
        flat.chmod(0o644)

    @classmethod
    def load(cls, folder: Path, size: Size) -> Memories:
        """Read ``delta_mem_adapter.safetensors``; strict about names and shapes."""
        memories = cls(size)
        tensors = load_file(str(Path(folder) / "delta_mem_adapter.safetensors"))
        prefix = "model.layers."
        memories.load_state_dict(
            {"layers." + k.removeprefix(prefix).replace("self_attn.", ""): t for k, t in tensors.items()}
        )
        return memories
