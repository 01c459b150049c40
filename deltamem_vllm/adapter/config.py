"""`delta_mem_config.json`: the file every δ-mem adapter carries, as the official code writes it.

A missing key takes the official default, an unknown key is an error, strings are lower-cased and stripped.
Keys whose only legal value is fixed ("archived") are checked and dropped, and so are keys without any effect.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from deltamem_vllm.errors import AdapterError
from deltamem_vllm.ops.layout import MemoryShape, UpdateMode

CONFIG_FILE = "delta_mem_config.json"
MAX_CONFIG_BYTES = 1 << 20

Head = Literal["q", "k", "v", "o"]
#: also the order of a per-head delta_scale_raw
HEADS: tuple[Head, ...] = ("q", "k", "v", "o")

#: Designs that the official code has given up: it rejects any other value, and so do we.
ARCHIVED: dict[str, object] = {
    "num_memory_partitions": 1,
    "num_global_memory_partitions": 0,
    "memory_partition_routing": "soft",
    "memory_partition_basis": "shared",
    "tie_memory_partition_read_write": False,
    "memory_partition_read_mode": "softmax",
    "slot_read_top_k": 0,
    "global_memory_mode": "shared_rw",
    "global_memory_read_top_k": 0,
    "global_memory_merge_mode": "gated_residual",
    "memory_reader_layers": [],
    "memory_readout_mode": "delta",
    "memory_write_source": "learned_hidden",
    "memory_write_proposals_per_message": 2,
    "synthetic_memory_slots": 1,
    "latent_memory_layers": [],
    "delta_scale_parameterization": "alpha_over_rank",
}

#: In every saved file, read by nothing.
WITHOUT_EFFECT = frozenset(
    {
        "memory_partition_sigmoid_gate_bias_init",
        "global_memory_gate_bias_init",
        "global_memory_read_logit_bias",
        "memory_reader_hidden_size",
        "memory_reader_residual_scale",
        "memory_reader_read_only",
        "latent_memory_hidden_size",
        "latent_memory_residual_scale",
        "latent_memory_slots",
        "latent_memory_init_std",
        "latent_gate_init",
    }
)


class AdapterConfig(BaseModel):
    """The fields that change the computation, then those that only matter when training starts."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    rank: int = Field(default=8, ge=1)
    alpha: float = 16.0
    num_state_heads: int = Field(default=1, ge=1)
    memory_write_granularity: Literal["token", "message_mean", "sentence_mean"] = "token"
    state_update_mode: UpdateMode = "standard"
    couple_lambda: bool = True
    rankwise_gates: bool = True
    normalize_qk: bool = True
    delta_heads: tuple[Head, ...] = HEADS
    trainable_delta_scale: bool = False
    delta_scale_max: float = Field(default=2.0, gt=0)
    delta_scale_granularity: Literal["layer", "head"] = "layer"
    delta_o_rmsnorm: bool = False
    delta_o_rmsnorm_eps: float = Field(default=1e-6, gt=0)
    target_layers: tuple[int, ...] = ()
    target_modules: tuple[str, ...] = ("self_attn",)

    beta_bias_init: float = -1.5
    output_init: Literal["zero", "random", "base_slice", "base_slice_fixed"] = "zero"
    base_slice_ref_width: int = Field(default=8, ge=1)
    online_gain: float = 0.05
    delta_scale_init: float = Field(default=1.0, gt=0)

    @field_validator(
        "memory_write_granularity",
        "state_update_mode",
        "delta_scale_granularity",
        "output_init",
        mode="before",
    )
    @classmethod
    def _plain_word(cls, value: object) -> object:
        return _plain(value)

    @field_validator("delta_heads", mode="before")
    @classmethod
    def _head_list(cls, value: object) -> object:
        """A list or a comma string; "none" is no head at all. The order is always q, k, v, o."""
        if isinstance(value, str):
            value = [] if _plain(value) in ("none", "") else value.split(",")
        if not isinstance(value, list | tuple):
            return value
        words = [_plain(word) for word in value]
        if unknown := [word for word in words if word not in HEADS]:
            raise ValueError(f"unknown head {unknown[0]!r}; choose from q, k, v, o")
        return tuple(head for head in HEADS if head in words)

    @field_validator("target_layers", mode="before")
    @classmethod
    def _layer_list(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("target_layers")
    @classmethod
    def _distinct_layers(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(layer < 0 for layer in value) or len(set(value)) != len(value):
            raise ValueError(f"layer indices must be distinct and not negative, got {list(value)}")
        return tuple(sorted(value))

    @field_validator("target_modules", mode="before")
    @classmethod
    def _module_list(cls, value: object) -> object:
        return tuple(_plain(word) for word in value) if isinstance(value, list | tuple) else value

    @model_validator(mode="after")
    def _scale_range(self) -> AdapterConfig:
        if self.trainable_delta_scale and self.delta_scale_max <= self.delta_scale_init:
            raise ValueError(
                f"delta_scale_max {self.delta_scale_max} must exceed delta_scale_init {self.delta_scale_init}"
            )
        return self

    @property
    def scaling(self) -> float:
        """alpha / rank: the factor of every correction (the rank of one head, also with several heads)."""
        return self.alpha / self.rank

    @property
    def memory_shape(self) -> MemoryShape:
        """What the delta rule computes with this adapter."""
        return MemoryShape(
            rank=self.rank,
            heads=self.num_state_heads,
            rankwise_gates=self.rankwise_gates,
            couple_lambda=self.couple_lambda,
            update_mode=self.state_update_mode,
            normalize_qk=self.normalize_qk,
        )

    @property
    def variant(self) -> str:
        """The paper's name: TSW, SSW or MSW; heads and granularity spelled out where it has none."""
        names = {("token", False): "TSW", ("message_mean", False): "SSW", ("token", True): "MSW"}
        key = (self.memory_write_granularity, self.num_state_heads > 1)
        return names.get(key, f"{self.num_state_heads} heads, {self.memory_write_granularity}")


def parse_config(values: object, source: str) -> AdapterConfig:
    """Check a decoded config.

    Args:
        values: the decoded JSON.
        source: where it came from, for the error.

    Raises:
        AdapterError: not an object, an unknown key, an archived value, or a value out of range; names the
            key.
    """
    if not isinstance(values, dict):
        raise AdapterError(f"{source}: expected a JSON object, got {type(values).__name__}")
    kept: dict[str, Any] = {}
    for key, value in values.items():
        if key in ARCHIVED:
            _check_archived(key, value, source)
        elif key in AdapterConfig.model_fields:
            kept[key] = value
        elif key not in WITHOUT_EFFECT:
            raise AdapterError(
                f"{source}: unknown key {key!r}: remove it, or use a version of this package that knows it"
            )
    try:
        return AdapterConfig.model_validate(kept)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "config"
        got = f", got {first['input']!r}" if first["loc"] else ""
        raise AdapterError(f"{source}: {where}: {first['msg']}{got}") from error


def load_config(folder: Path) -> AdapterConfig:
    """Read and check ``folder``'s config.

    Raises:
        AdapterError: the file is missing, too large, not JSON, or refused by `parse_config`.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise AdapterError(f"{folder}: there is no {CONFIG_FILE}; is this a δ-mem adapter folder?")
    if (size := path.stat().st_size) > MAX_CONFIG_BYTES:
        raise AdapterError(f"{path}: {size} bytes is no adapter config (at most {MAX_CONFIG_BYTES})")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path}: not readable as JSON: {error}") from error
    return parse_config(values, str(path))


def check_servable(config: AdapterConfig, source: str) -> None:
    """A valid adapter need not be one that this version can serve.

    Raises:
        AdapterError: says what is not served.
    """
    if config.memory_write_granularity != "token":
        raise AdapterError(
            f"{source}: memory_write_granularity {config.memory_write_granularity!r} ({config.variant}) is "
            "not served yet; token granularity only (TSW, MSW)"
        )
    if config.target_modules != ("self_attn",):
        raise AdapterError(f"{source}: target_modules {list(config.target_modules)} are not served; ['self_attn'] only")


def _plain(value: object) -> object:
    return value.strip().lower() if isinstance(value, str) else value


def _check_archived(key: str, value: object, source: str) -> None:
    only = ARCHIVED[key]
    plain = list(value) if isinstance(value, tuple) else _plain(value)
    if plain != only or isinstance(plain, bool) != isinstance(only, bool):
        raise AdapterError(
            f"{source}: {key} is {value!r}, but only {only!r} is possible: the official code has archived that design"
        )
