"""Random adapters of every kind for the tiny Qwen3, as folders that the package loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

HIDDEN, Q_WIDTH, KV_WIDTH, LAYERS = 64, 128, 64, 3

VARIANTS: dict[str, dict[str, Any]] = {
    "all heads, own lambda outside, scalar gates, layer scale": {
        "delta_heads": ["q", "k", "v", "o"],
        "couple_lambda": False,
        "state_update_mode": "lambda_outside",
        "rankwise_gates": False,
        "trainable_delta_scale": True,
        "delta_scale_granularity": "layer",
        "num_state_heads": 2,
    },
    "o and k, no lambda, head scale, normed o, one layer, rank 4": {
        "delta_heads": ["o", "k"],
        "state_update_mode": "no_lambda",
        "trainable_delta_scale": True,
        "delta_scale_granularity": "head",
        "delta_o_rmsnorm": True,
        "target_layers": [1],
        "rank": 4,
        "num_state_heads": 2,
    },
    "q and v, own lambda, raw q and k, rank 16": {
        "delta_heads": ["q", "v"],
        "couple_lambda": False,
        "normalize_qk": False,
        "rank": 16,
    },
}


def write_adapter(folder: Path, changes: dict[str, Any], seed: int = 0) -> Path:
    """Save a random adapter with these settings; returns the folder."""
    config = {"rank": 8, "alpha": 16.0, "num_state_heads": 1, "rankwise_gates": True, "target_layers": [], **changes}
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * scale

    width = config["rank"] * config["num_state_heads"]
    gates = width if config["rankwise_gates"] else config["num_state_heads"]
    # Without normalisation the write diverges by design unless keys are short.
    keys = 1.0 if config.get("normalize_qk", True) else 0.2
    tensors: dict[str, torch.Tensor] = {}
    for layer in config["target_layers"] or range(LAYERS):
        own = {
            "memory_q_proj": normal(width, HIDDEN, scale=0.12 * keys),
            "memory_k_proj": normal(width, HIDDEN, scale=0.12 * keys),
            "memory_v_proj": normal(width, HIDDEN, scale=0.12),
            "delta_q_proj": normal(Q_WIDTH, width, scale=0.2),
            "delta_k_proj": normal(KV_WIDTH, width, scale=0.2),
            "delta_v_proj": normal(KV_WIDTH, width, scale=0.2),
            "delta_o_proj": normal(HIDDEN, width, scale=0.2),
            "beta_proj": normal(gates, HIDDEN, scale=0.1),
            "beta_bias": normal(gates, scale=0.5) - 2.0,
        }
        if not config.get("couple_lambda", True):
            own |= {"lambda_proj": normal(gates, HIDDEN, scale=0.1), "lambda_bias": normal(gates, scale=0.5) + 2.0}
        if config.get("trainable_delta_scale"):
            own["delta_scale_raw"] = normal(4 if config["delta_scale_granularity"] == "head" else 1, scale=1.0)
        if config.get("delta_o_rmsnorm"):
            own["delta_o_rmsnorm_weight"] = normal(HIDDEN, scale=0.3)
        tensors |= {f"model.layers.{layer}.self_attn.{name}": t for name, t in own.items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "delta_mem_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "delta_mem_adapter.safetensors")
    return folder
