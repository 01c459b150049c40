"""A tiny Qwen3 or SmolLM3 with δ-mem, written down plainly: one sequence, fp32, no cache, loops over tokens.

It shares no code with the package. It answers where the official code has left no fixture: adapters of every kind.
Shapes: T tokens, D hidden, H state heads of rank r; S [H, r, r] is S[value, key].
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

States = dict[int, Tensor]
Weights = dict[str, Tensor]

DEFAULTS: dict[str, Any] = {
    "rank": 8,
    "alpha": 16.0,
    "num_state_heads": 1,
    "state_update_mode": "standard",
    "couple_lambda": True,
    "rankwise_gates": True,
    "normalize_qk": True,
    "delta_heads": ["q", "k", "v", "o"],
    "trainable_delta_scale": False,
    "delta_scale_max": 2.0,
    "delta_scale_granularity": "layer",
    "delta_o_rmsnorm": False,
    "delta_o_rmsnorm_eps": 1e-6,
    "target_layers": [],
}


class PlainModel:
    """A model folder and an adapter folder; no adapter is the bare model."""

    def __init__(self, model: Path, adapter: Path | None) -> None:
        self.config: dict[str, Any] = json.loads((model / "config.json").read_text())
        self.weights = load_file(model / "model.safetensors")
        self.memory: dict[int, Memory] = {}
        if adapter is None:
            return
        config = {**DEFAULTS, **json.loads((adapter / "delta_mem_config.json").read_text())}
        tensors = _adapter_tensors(adapter)
        for layer in config["target_layers"] or range(self.config["num_hidden_layers"]):
            prefix = f"model.layers.{layer}.self_attn."
            own = {name[len(prefix) :]: t.float() for name, t in tensors.items() if name.startswith(prefix)}
            self.memory[layer] = Memory(config, own)

    def run(
        self, ids: list[int], states: States | None = None, unwritten: Collection[int] = ()
    ) -> tuple[Tensor, States]:
        """Log-probabilities [T, V] of the token after each, and each wrapped layer's S after the last token.

        The tokens at the positions in ``unwritten`` only read.
        """
        weights, eps = self.weights, self.config["rms_norm_eps"]
        hidden = weights["model.embed_tokens.weight"][torch.tensor(ids)]
        after: States = {}
        for layer in range(self.config["num_hidden_layers"]):
            own = {k.split(f"layers.{layer}.")[1]: v for k, v in weights.items() if f".layers.{layer}." in k}
            h = _rms(hidden, own["input_layernorm.weight"], eps)
            reads = None
            if (memory := self.memory.get(layer)) is not None:
                reads, after[layer] = memory.scan(h, (states or {}).get(layer), unwritten)
            hidden = hidden + self._attention(layer, own, h, reads)
            h = _rms(hidden, own["post_attention_layernorm.weight"], eps)
            gate, up = (self.linear(h, own[f"mlp.{name}_proj.weight"]) for name in ("gate", "up"))
            hidden = hidden + self.linear(F.silu(gate) * up, own["mlp.down_proj.weight"])
        hidden = _rms(hidden, weights["model.norm.weight"], eps)
        head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
        return torch.log_softmax((hidden @ head.T).double(), -1), after

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """One of a layer's projections, ``x [T, in]`` · ``weight [out, in]``ᵀ."""
        return x @ weight.T

    def _attention(self, layer: int, own: Weights, h: Tensor, reads: Tensor | None) -> Tensor:
        config, memory, length = self.config, self.memory.get(layer), len(h)
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        size = config.get("head_dim") or config["hidden_size"] // heads
        parts = {}
        for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            x = self.linear(h, own[f"self_attn.{name}_proj.weight"])
            if memory is not None and reads is not None:
                x = x + memory.correction(name, reads, x.shape[-1])
            x = x.view(length, count, size)
            if f"self_attn.{name}_norm.weight" in own:
                x = _rms(x, own[f"self_attn.{name}_norm.weight"], config["rms_norm_eps"])
            parts[name] = x
        rotates = (config.get("no_rope_layers") or [1] * (layer + 1))[layer]
        if rotates:
            theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
            parts["q"], parts["k"] = _rotate(parts["q"], theta), _rotate(parts["k"], theta)
        q, k, v = (parts[name].transpose(0, 1) for name in "qkv")
        k, v = (x.repeat_interleave(heads // kv_heads, 0) for x in (k, v))
        scores = q @ k.transpose(1, 2) / size**0.5
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        out = torch.softmax(scores.masked_fill(later, float("-inf")), -1) @ v
        out = self.linear(out.transpose(0, 1).reshape(length, -1), own["self_attn.o_proj.weight"])
        if memory is not None and reads is not None:
            out = out + memory.correction("o", reads, out.shape[-1])
        return out


class Memory:
    """One layer's δ-mem: config as in the adapter's JSON, tensors by their official names."""

    def __init__(self, config: dict[str, Any], tensors: Weights) -> None:
        self.config, self.tensors = config, tensors
        self.heads, self.rank = config["num_state_heads"], config["rank"]

    def scan(self, h: Tensor, state: Tensor | None, unwritten: Collection[int] = ()) -> tuple[Tensor, Tensor]:
        """Every token reads, then, unless it is not to be written, writes: reads [T, H·r] and the last S [H, r, r]."""
        q, k, v = (self._project(h, name) for name in "qkv")
        beta = self._gate(h, "beta")
        mode = self.config["state_update_mode"]
        if mode == "no_lambda":
            lam = torch.ones_like(beta)
        elif self.config["couple_lambda"]:
            lam = 1 - beta
        else:
            lam = self._gate(h, "lambda")
        shape = (self.heads, self.rank, self.rank)
        state = torch.zeros(shape) if state is None else state.reshape(shape)
        reads = []
        for t in range(len(h)):
            reads.append((state @ q[t, :, :, None]).flatten())
            if t in unwritten:
                continue
            keep, write = lam[t], beta[t]
            erase = lam[t] * beta[t] if mode == "lambda_outside" else beta[t]
            p = state @ k[t, :, :, None]  # [H, r, 1]
            key = k[t, :, None, :]
            state = keep * state - erase * p * key + write * v[t, :, :, None] * key
        return torch.stack(reads), state

    def correction(self, name: str, reads: Tensor, width: int) -> Tensor:
        """δ of one projection, [T, width]; zero where the adapter does not correct it."""
        config = self.config
        if name not in config["delta_heads"]:
            return reads.new_zeros(len(reads), width)
        delta: Tensor = reads @ self.tensors[f"delta_{name}_proj"].T * (config["alpha"] / config["rank"])
        if config["trainable_delta_scale"]:
            raw = self.tensors["delta_scale_raw"]
            one = raw["qkvo".index(name)] if config["delta_scale_granularity"] == "head" else raw[0]
            delta = delta * (torch.sigmoid(one) * config["delta_scale_max"])
        if name == "o" and config["delta_o_rmsnorm"]:
            delta = _rms(delta, self.tensors["delta_o_rmsnorm_weight"], config["delta_o_rmsnorm_eps"])
        return delta

    def _project(self, h: Tensor, name: str) -> Tensor:
        x = (h @ self.tensors[f"memory_{name}_proj"].T).view(len(h), self.heads, self.rank)
        if name == "v" or not self.config["normalize_qk"]:
            return x
        x = torch.tanh(x)
        length: Tensor = x.norm(dim=-1, keepdim=True)
        return x / length.clamp_min(1e-6)

    def _gate(self, h: Tensor, name: str) -> Tensor:
        """[T, H, r, 1]: one value per row of S, or [T, H, 1, 1]."""
        gate = torch.sigmoid(h @ self.tensors[f"{name}_proj"].T + self.tensors[f"{name}_bias"])
        rows: int = self.rank if self.config["rankwise_gates"] else 1
        return gate.view(len(h), self.heads, rows, 1)


def _adapter_tensors(folder: Path) -> Weights:
    safe = folder / "delta_mem_adapter.safetensors"
    if safe.exists():
        return load_file(safe)
    loaded: Weights = torch.load(folder / "delta_mem_adapter.pt", weights_only=True)
    return loaded


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def _rotate(x: Tensor, theta: float) -> Tensor:
    """Rotary embedding of [T, heads, size], positions from 0."""
    half = x.shape[-1] // 2
    angles = torch.arange(len(x))[:, None] / theta ** (torch.arange(half) / half)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
