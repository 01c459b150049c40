"""Quantised copies of a tiny model, written by hand, and the plain model that computes as they do.

A format says how a projection's weight is stored, what it is worth when read back, and how its inputs are rounded.
The checkpoint is what vLLM loads; the plain model is given the restored weights and rounds its inputs, and is fp32
otherwise, so that what is left between the two is little more than the order of sums. Shapes: weights [out, in];
groups along ``in``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.engine.plain_model import PlainModel

GROUP = 32
"""Inputs that share a scale in the four-bit formats."""
FP8_LARGEST = 448.0


@dataclass(frozen=True)
class Format:
    """One way to quantise the projections of a model.

    Attributes:
        stored: weight → the checkpoint's tensors, by suffix.
        restored: weight → what they stand for, fp32.
        rounded: inputs [T, in] → as the linear sees them.
        config: the ``quantization_config`` of the checkpoint.
    """

    stored: Callable[[Tensor], dict[str, Tensor]]
    restored: Callable[[Tensor], Tensor]
    rounded: Callable[[Tensor], Tensor]
    config: Mapping[str, Any]


def write_quantised(
    source: Path, folder: Path, stored: Callable[[Tensor], dict[str, Tensor]], scheme: Mapping[str, Any]
) -> Path:
    """Copy a model folder with its projections ``stored`` by a ``quantization_config``; returns the copy."""
    shutil.copytree(source, folder)
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if is_projection(name):
            stem = name.removesuffix("weight")
            tensors |= {stem + suffix: part.contiguous() for suffix, part in stored(tensor.float()).items()}
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": dict(scheme)}))
    return folder


class QuantisedPlain(PlainModel):
    """The plain model of a quantised copy of ``model``; the memory is in full precision."""

    def __init__(self, model: Path, adapter: Path | None, form: Format) -> None:
        super().__init__(model, adapter)
        self._form = form
        for name, tensor in self.weights.items():
            if is_projection(name):
                self.weights[name] = form.restored(tensor.float())

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        return super().linear(self._form.rounded(x), weight)


def is_projection(name: str) -> bool:
    """Whether a tensor is the weight of one of a layer's linears."""
    return name.endswith("_proj.weight")


def _int8(weight: Tensor) -> dict[str, Tensor]:
    # Seven bits of the eight: a CPU without VNNI adds two products in 16 bits, and oneDNN lets larger ones saturate.
    scale = weight.abs().amax(1, keepdim=True) / 63
    return {"weight": (weight / scale).round().to(torch.int8), "weight_scale": scale}


def _fp8(weight: Tensor) -> dict[str, Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / FP8_LARGEST
    return {"weight": (weight / scale).to(torch.float8_e4m3fn), "weight_scale": scale}


def _int4(weight: Tensor) -> dict[str, Tensor]:
    groups = weight.view(len(weight), -1, GROUP)
    # The kernel keeps its scales in bf16.
    scale = (groups.abs().amax(2, keepdim=True) / 7).bfloat16().float()
    return {
        "weight": (groups / scale).round().clamp(-8, 7).to(torch.int8).view_as(weight),
        "weight_scale": scale[..., 0],
    }


def _awq(weight: Tensor) -> dict[str, Tensor]:
    groups = weight.view(len(weight), -1, GROUP)
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    scale = ((high - low) / 15).half()
    zero = (-low / scale).round().clamp(0, 15)
    values = ((groups / scale).round() + zero).clamp(0, 15).view_as(weight)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {
        "qweight": _packed(values.T, 1, order),
        "qzeros": _packed(zero[..., 0].T, 1, order),
        "scales": scale[..., 0].T,
    }


def _gptq(weight: Tensor) -> dict[str, Tensor]:
    groups = weight.view(len(weight), -1, GROUP)
    scale = (groups.abs().amax(2, keepdim=True) / 7).half()
    values = ((groups / scale).round() + 8).clamp(0, 15).view_as(weight)
    return {
        "qweight": _packed(values.T, 0, range(8)),
        "qzeros": _packed(torch.full((groups.shape[1], len(weight)), 7), 1, range(8)),  # the format counts from one
        "scales": scale[..., 0].T,
        "g_idx": (torch.arange(weight.shape[1]) // GROUP).int(),
    }


def _packed(values: Tensor, dim: int, order: Sequence[int]) -> Tensor:
    """Four-bit values, eight along ``dim`` to an int32; the lowest bits are those of the ``order[0]``-th."""
    eights = values.to(torch.int64).movedim(dim, -1).unflatten(-1, (-1, 8))
    words = sum(eights[..., place] << 4 * i for i, place in enumerate(order))
    return torch.as_tensor(words).to(torch.int32).movedim(-1, dim)


def _restored(stored: Callable[[Tensor], dict[str, Tensor]]) -> Callable[[Tensor], Tensor]:
    def restored(weight: Tensor) -> Tensor:
        parts = stored(weight)
        values, scale = parts["weight"].float(), parts["weight_scale"]
        return (values.view(len(values), scale.shape[1], -1) * scale[..., None]).view_as(values)

    return restored


def _rounded_int8(x: Tensor) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale).round() * scale


def _rounded_fp8(x: Tensor) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True) / FP8_LARGEST
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


def _rounded_asymmetric(x: Tensor) -> Tensor:
    """Eight bits with a zero point, halves away from zero."""
    low, high = x.amin(-1, keepdim=True).clamp_max(0), x.amax(-1, keepdim=True).clamp_min(0)
    per_unit = 255 / (high - low)
    low, high = low * per_unit, high * per_unit
    zero = torch.where((low - 128) + (high + 127) > 0, -128 - low, 127 - high).clamp(-128, 127).round()
    scaled = x * per_unit
    steps = (scaled.sign() * (scaled.abs() + 0.5).floor() + zero).clamp(-128, 127)
    return (steps - zero) / per_unit


def _compressed(layout: str, weights: dict[str, Any], kind: str) -> dict[str, Any]:
    """A compressed-tensors configuration; inputs are quantised per token, to eight bits."""
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"type": kind, "symmetric": True, "dynamic": False, **weights},
                "input_activations": {
                    "type": kind,
                    "num_bits": 8,
                    "strategy": "token",
                    "symmetric": True,
                    "dynamic": True,
                },
            }
        },
    }


_CHANNELS = {"num_bits": 8, "strategy": "channel"}

FORMATS: dict[str, Format] = {
    "int8": Format(_int8, _restored(_int8), _rounded_int8, _compressed("int-quantized", _CHANNELS, "int")),
    "fp8": Format(_fp8, _restored(_fp8), _rounded_fp8, _compressed("float-quantized", _CHANNELS, "float")),
    "int4": Format(
        _int4,
        _restored(_int4),
        _rounded_asymmetric,
        _compressed("int-quantized", {"num_bits": 4, "strategy": "group", "group_size": GROUP}, "int"),
    ),
}
"""What vLLM runs on every x86 CPU."""

FOUR_BIT: dict[str, tuple[Callable[[Tensor], dict[str, Tensor]], dict[str, Any]]] = {
    "awq": (_awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}),
    "gptq": (_gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}),
}
"""What it only loads on a CPU without AVX-512: how weights are stored, and the ``quantization_config``."""
