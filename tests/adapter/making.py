"""Small adapters, as the official code saves them: all tensors the config implies, idle heads as zeros."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from deltamem_vllm.adapter.config import parse_config
from deltamem_vllm.adapter.weights import BackboneShape, expected_shapes

BACKBONE = BackboneShape(num_layers=3, hidden_size=24, q_size=32, kv_size=16, model_type="qwen3")
OFFICIAL = Path(__file__).parents[1] / "fixtures" / "qwen3_tsw_r8" / "adapter"


def make_tensors(
    config: dict[str, Any], backbone: BackboneShape = BACKBONE, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    parsed = parse_config(config, "test")
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for layer in parsed.target_layers or range(backbone.num_layers):
        for name, shape in expected_shapes(parsed, backbone).items():
            tensor = torch.randn(shape, generator=generator).to(dtype)
            if name in {f"delta_{head}_proj" for head in "qkvo" if head not in parsed.delta_heads}:
                tensor.zero_()
            tensors[f"model.layers.{layer}.self_attn.{name}"] = tensor
    return tensors


def write_folder(
    folder: Path, config: dict[str, Any], tensors: dict[str, Tensor] | None = None, kind: str = "pt"
) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "delta_mem_config.json").write_text(json.dumps(config))
    tensors = make_tensors(config) if tensors is None else tensors
    if kind == "pt":
        torch.save(tensors, folder / "delta_mem_adapter.pt")
    else:
        save_file(tensors, folder / "delta_mem_adapter.safetensors")
    return folder
