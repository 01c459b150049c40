"""Strict loading: every tensor the config implies, of the right shape, finite, and nothing else.

The official loader keeps the initial value of a missing tensor without a word. Here a missing, extra,
misshaped or non-finite tensor is an `AdapterError` with its name. Shapes: D hidden size, Q = heads ·
head_dim, K = kv_heads · head_dim, R and G as in `deltamem_vllm.ops.layout`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from deltamem_vllm.adapter.config import HEADS, AdapterConfig, Head, check_servable, load_config
from deltamem_vllm.adapter.files import MAX_FILE_BYTES, find_tensor_file, read_tensors
from deltamem_vllm.errors import AdapterError
from deltamem_vllm.ops.layout import MemoryShape

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

#: <prefix>layers.<index>.<module>.<parameter>
_NAME = re.compile(r"(?P<prefix>(?:\w+\.)*)layers\.(?P<layer>0|[1-9]\d{0,5})\.(?P<module>\w+)\.(?P<parameter>\w+)")


@dataclass(frozen=True)
class BackboneShape:
    """What an adapter must fit.

    Args:
        num_layers: decoder layers of the model.
        hidden_size: D.
        q_size: Q, width of the q projection's output before any sharding.
        kv_size: K, width of the k and of the v projection's output.
        model_type: for messages only.
    """

    num_layers: int
    hidden_size: int
    q_size: int
    kv_size: int
    model_type: str = "unknown"

    def __str__(self) -> str:
        return (
            f"{self.num_layers} layers, hidden size {self.hidden_size}, "
            f"q width {self.q_size}, k and v width {self.kv_size}"
        )


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """One layer's weights, in the file's dtype unless said.

    Args:
        projection: [C, D], rows in the order q̃ | k̃ | v | β̃ | λ̃ of `MemoryShape.projected_columns`.
        bias: [bias_columns] fp32: β's, then λ's where it has its own gate.
        delta: the active corrections only: q [Q, R], k and v [K, R], o [D, R].
        scale: by active head, g: 1, or sigmoid(raw) · delta_scale_max. A correction is
            (reads · Bᵀ) · config.scaling · g, multiplied in that order.
        o_norm_weight: [D], RMSNorm of δo in fp32, or None.
        o_norm_eps: its epsilon.
    """

    projection: Tensor
    bias: Tensor
    delta: Mapping[Head, Tensor]
    scale: Mapping[Head, float]
    o_norm_weight: Tensor | None
    o_norm_eps: float


@dataclass(frozen=True, eq=False)
class Adapter:
    """A checked adapter.

    Args:
        source: the tensor file it came from.
        backbone: the model it fits, as its tensors show it.
        layers: by layer index, ascending; only wrapped layers.
        fingerprint: hex SHA-256 of what serving computes with: the effective config and the tensors in use.
            Equal for a .pt and its .safetensors.
        parameters: values in use (inactive heads not counted).
    """

    config: AdapterConfig
    source: Path
    backbone: BackboneShape
    layers: Mapping[int, LayerWeights]
    fingerprint: str
    parameters: int

    @property
    def shape(self) -> MemoryShape:
        """Of every layer."""
        return self.config.memory_shape

    @property
    def state_bytes(self) -> int:
        """Bytes of one session's committed state: every layer's S in fp32."""
        return 4 * self.shape.state_floats * len(self.layers)


def load_adapter(folder: str | Path, backbone: BackboneShape | None = None) -> Adapter:
    """Load and check an adapter folder.

    Args:
        folder: holds delta_mem_config.json and delta_mem_adapter.safetensors or .pt.
        backbone: the model that will be served. None: check the adapter against itself only, and do not ask
            whether it can be served (for `inspect`).

    Raises:
        AdapterError: says which file, tensor or key is wrong, what was expected and what was found.
    """
    folder = Path(folder)
    path = find_tensor_file(folder)
    config = load_config(folder)
    limit = MAX_FILE_BYTES
    if backbone is not None:
        check_servable(config, str(folder))
        limit = _largest_file(config, backbone)
    tensors = read_tensors(path, limit)
    by_layer, prefix = _group(tensors, config, path)
    found = _infer_backbone(by_layer, config, path)
    if backbone is not None:
        _check_same_model(config, found, backbone, path)
    wanted = config.target_layers or range((backbone or found).num_layers)
    expected = {layer: expected_shapes(config, found) for layer in wanted}
    _check_tensors(by_layer, expected, prefix, config, path)
    used = _used(by_layer, config)
    return Adapter(
        config=config,
        source=path,
        backbone=found if backbone is None else backbone,
        layers={layer: _assemble(by_layer[layer], config) for layer in wanted},
        fingerprint=_fingerprint(config, used),
        parameters=sum(tensor.numel() for tensor in used.values()),
    )


def expected_shapes(config: AdapterConfig, backbone: BackboneShape) -> dict[str, tuple[int, ...]]:
    """Parameter name → shape, of one wrapped layer. Inactive heads have tensors too (zeros, and ignored)."""
    shape = config.memory_shape
    d, r, g = backbone.hidden_size, shape.width, shape.gates
    shapes: dict[str, tuple[int, ...]] = {f"memory_{name}_proj": (r, d) for name in "qkv"}
    sizes = {"q": backbone.q_size, "k": backbone.kv_size, "v": backbone.kv_size, "o": d}
    shapes.update({f"delta_{head}_proj": (sizes[head], r) for head in HEADS})
    shapes.update({"beta_proj": (g, d), "beta_bias": (g,)})
    if not config.couple_lambda:
        shapes.update({"lambda_proj": (g, d), "lambda_bias": (g,)})
    if config.trainable_delta_scale:
        shapes["delta_scale_raw"] = (1,) if config.delta_scale_granularity == "layer" else (len(HEADS),)
    if config.delta_o_rmsnorm:
        shapes["delta_o_rmsnorm_weight"] = (d,)
    return shapes


def _largest_file(config: AdapterConfig, backbone: BackboneShape) -> int:
    """Generous upper bound in bytes: fp32, a kilobyte of names and padding for each tensor."""
    layers = len(config.target_layers) or backbone.num_layers
    shapes = expected_shapes(config, backbone).values()
    floats = sum(torch.Size(shape).numel() for shape in shapes)
    return layers * (4 * floats + 1024 * len(shapes)) + (1 << 20)


def _group(tensors: dict[str, Tensor], config: AdapterConfig, path: Path) -> tuple[dict[int, dict[str, Tensor]], str]:
    """Tensors by layer and parameter, and the prefix that all names share."""
    by_layer: dict[int, dict[str, Tensor]] = {}
    prefixes: dict[str, str] = {}
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None or match["module"] not in config.target_modules:
            modules = " or ".join(config.target_modules) or "no module"
            raise AdapterError(f"{path}: unexpected tensor {name!r}: expected …layers.N.{modules}.NAME")
        prefixes.setdefault(f"{match['prefix']}layers.{{}}.{match['module']}.", name)
        by_layer.setdefault(int(match["layer"]), {})[match["parameter"]] = tensor
    if len(prefixes) > 1:
        first, second = list(prefixes.values())[:2]
        raise AdapterError(f"{path}: tensors of two module paths: {first!r} and {second!r}")
    return dict(sorted(by_layer.items())), next(iter(prefixes))


def _infer_backbone(by_layer: dict[int, dict[str, Tensor]], config: AdapterConfig, path: Path) -> BackboneShape:
    """The model that most of the tensors were made for."""

    def size(parameter: str, dim: int) -> int:
        matrices = [layer[parameter] for layer in by_layer.values() if parameter in layer]
        sizes = Counter(matrix.shape[dim] for matrix in matrices if matrix.dim() == 2)
        if not sizes:
            raise AdapterError(f"{path}: missing tensor {parameter!r} (a matrix) in every layer")
        return sizes.most_common(1)[0][0]

    layers = max([*by_layer, *config.target_layers]) + 1
    return BackboneShape(layers, size("memory_q_proj", 1), size("delta_q_proj", 0), size("delta_k_proj", 0))


def _check_same_model(config: AdapterConfig, found: BackboneShape, backbone: BackboneShape, path: Path) -> None:
    widths = [(b.hidden_size, b.q_size, b.kv_size) for b in (found, backbone)]
    few = found.num_layers < backbone.num_layers and not config.target_layers
    if widths[0] != widths[1] or few or found.num_layers > backbone.num_layers:
        raise AdapterError(
            f"{path}: made for a model with {found}; this model ({backbone.model_type}) has {backbone}: "
            "use the adapter trained for this model"
        )


def _check_tensors(
    by_layer: dict[int, dict[str, Tensor]],
    expected: dict[int, dict[str, tuple[int, ...]]],
    prefix: str,
    config: AdapterConfig,
    path: Path,
) -> None:
    for layer, parameters in by_layer.items():
        for parameter in parameters:
            if parameter not in expected.get(layer, {}):
                why = _why_unexpected(parameter, layer, config)
                raise AdapterError(f"{path}: unexpected tensor {prefix.format(layer) + parameter!r}: {why}")
    for layer, shapes in expected.items():
        for parameter, shape in shapes.items():
            name = prefix.format(layer) + parameter
            tensor = by_layer.get(layer, {}).get(parameter)
            if tensor is None:
                raise AdapterError(f"{path}: missing tensor {name!r}, expected shape {list(shape)}")
            if tuple(tensor.shape) != shape:
                raise AdapterError(f"{path}: tensor {name!r} has shape {list(tensor.shape)}, expected {list(shape)}")
            if tensor.dtype not in DTYPES:
                raise AdapterError(f"{path}: tensor {name!r} is {tensor.dtype}, expected float32, bfloat16 or float16")
            if not bool(torch.isfinite(tensor).all()):
                raise AdapterError(f"{path}: tensor {name!r} holds NaN or infinity: the training diverged")


def _why_unexpected(parameter: str, layer: int, config: AdapterConfig) -> str:
    if config.target_layers and layer not in config.target_layers:
        return f"target_layers are {list(config.target_layers)}"
    switches = {
        "lambda_": f"couple_lambda is {config.couple_lambda}",
        "delta_scale_": f"trainable_delta_scale is {config.trainable_delta_scale}",
        "delta_o_rms": f"delta_o_rmsnorm is {config.delta_o_rmsnorm}",
    }
    for start, why in switches.items():
        if parameter.startswith(start):
            return why
    return "no δ-mem parameter has that name"


def _used(by_layer: dict[int, dict[str, Tensor]], config: AdapterConfig) -> dict[str, Tensor]:
    """Every tensor that serving computes with, by "<layer>.<parameter>"; inactive heads and unused gates
    left out.
    """
    idle = {f"delta_{head}_proj" for head in HEADS if head not in config.delta_heads}
    if not config.memory_shape.has_lambda:
        idle |= {"lambda_proj", "lambda_bias"}
    if "o" not in config.delta_heads:
        idle.add("delta_o_rmsnorm_weight")
    return {
        f"{layer}.{parameter}": tensor
        for layer, parameters in by_layer.items()
        for parameter, tensor in sorted(parameters.items())
        if parameter not in idle
    }


def _assemble(tensors: dict[str, Tensor], config: AdapterConfig) -> LayerWeights:
    names = ["memory_q_proj", "memory_k_proj", "memory_v_proj", "beta_proj"]
    biases = ["beta_bias"]
    if config.memory_shape.has_lambda:
        names.append("lambda_proj")
        biases.append("lambda_bias")
    scale: dict[Head, float] = dict.fromkeys(config.delta_heads, 1.0)
    if config.trainable_delta_scale:
        factors = torch.sigmoid(tensors["delta_scale_raw"].double()) * config.delta_scale_max
        for head in config.delta_heads:
            scale[head] = float(factors[HEADS.index(head) if len(factors) > 1 else 0])
    normed = config.delta_o_rmsnorm and "o" in config.delta_heads
    return LayerWeights(
        projection=torch.cat([tensors[name] for name in names]),
        bias=torch.cat([tensors[name].float() for name in biases]),
        delta={head: tensors[f"delta_{head}_proj"].contiguous() for head in config.delta_heads},
        scale=scale,
        o_norm_weight=tensors["delta_o_rmsnorm_weight"].contiguous() if normed else None,
        o_norm_eps=config.delta_o_rmsnorm_eps,
    )


#: Config fields that are not visible in the tensors' shapes and names but change what is computed.
_EFFECTIVE = (
    "rank",
    "alpha",
    "num_state_heads",
    "memory_write_granularity",
    "state_update_mode",
    "couple_lambda",
    "rankwise_gates",
    "normalize_qk",
    "delta_heads",
    "trainable_delta_scale",
    "delta_scale_max",
    "delta_scale_granularity",
    "delta_o_rmsnorm",
    "delta_o_rmsnorm_eps",
)


def _fingerprint(config: AdapterConfig, used: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(config.model_dump(include=set(_EFFECTIVE)), sort_keys=True).encode())
    for name, tensor in sorted(used.items()):
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
