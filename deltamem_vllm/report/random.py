"""Random weights: a Qwen3 of any size, a δ-mem adapter and a LoRA adapter for it, as folders.

Speed does not depend on what the weights say, so sizes can be measured for which there is no checkpoint here. vLLM
makes the model's own weights itself (``load_format="dummy"``); nothing of it is written but its configuration.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from deltamem_vllm.adapter.config import AdapterConfig
from deltamem_vllm.adapter.weights import BackboneShape, expected_shapes


@dataclass(frozen=True)
class Size:
    """A Qwen3's sizes."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocabulary: int

    @property
    def backbone(self) -> BackboneShape:
        """As an adapter sees it."""
        return BackboneShape(
            self.layers, self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim, "qwen3"
        )

    def share(self, layers: int) -> Size:
        """Fewer of these layers, and as large a share of the vocabulary, whose projection takes time like layers."""
        return replace(self, layers=layers, vocabulary=self.vocabulary * layers // self.layers)


QWEN3_0_6B = Size(28, 1024, 16, 8, 128, 3072, 151_936)
TINY = Size(2, 128, 2, 1, 64, 256, 256)


def write_model(folder: Path, size: Size, positions: int = 40_960) -> Path:
    """A model folder with a configuration and nothing else; returns it."""
    config = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": size.hidden,
        "num_hidden_layers": size.layers, "num_attention_heads": size.heads, "num_key_value_heads": size.kv_heads,
        "head_dim": size.head_dim, "intermediate_size": size.inner, "vocab_size": size.vocabulary,
        "max_position_embeddings": positions, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "tie_word_embeddings": True, "attention_bias": False, "torch_dtype": "bfloat16", "bos_token_id": 1,
        "eos_token_id": 2,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def write_adapter(folder: Path, backbone: BackboneShape, **changes: Any) -> Path:
    """A δ-mem adapter with the official scripts' settings (rank 8, corrections on q and o) unless changed."""
    settings = {"rank": 8, "alpha": 16.0, "delta_heads": ["q", "o"], **changes}
    config = AdapterConfig(**settings)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"model.layers.{layer}.self_attn.{name}": _random(name, shape, generator)
        for layer in config.target_layers or range(backbone.num_layers)
        for name, shape in expected_shapes(config, backbone).items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "delta_mem_config.json").write_text(json.dumps(settings), encoding="utf-8")
    save_file(tensors, folder / "delta_mem_adapter.safetensors")
    return folder


def write_lora(folder: Path, backbone: BackboneShape, rank: int = 8) -> Path:
    """A LoRA adapter on the q and o projections, the modules that a memory corrects."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(backbone.num_layers):
        for name, inputs, outputs in (
            ("q_proj", backbone.hidden_size, backbone.q_size),
            ("o_proj", backbone.q_size, backbone.hidden_size),
        ):
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{prefix}.lora_A.weight"] = 0.02 * torch.randn(rank, inputs, generator=generator)
            tensors[f"{prefix}.lora_B.weight"] = 0.02 * torch.randn(outputs, rank, generator=generator)
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": ["q_proj", "o_proj"],
        "bias": "none",
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    scale = -2.5 if name == "beta_bias" else shape[-1] ** -0.5
    values = torch.randn(*shape, generator=generator)
    return values * 0.1 + scale if name == "beta_bias" else values * scale
