"""Attaching memories to a freshly built model: which modules, with which part of the adapter."""

import dataclasses
import logging
import re
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

from deltamem_vllm.adapter.config import Head
from deltamem_vllm.adapter.weights import Adapter, LayerWeights, load_adapter
from deltamem_vllm.config import Settings, settings_of
from deltamem_vllm.errors import ConfigError
from deltamem_vllm.memory.chain import Chain
from deltamem_vllm.memory.hooks import attach, attach_to_residual
from deltamem_vllm.memory.layer import MemoryLayer
from deltamem_vllm.memory.pages import SUFFIX, StatePages, WriteMasks
from deltamem_vllm.memory.preflight import backbone_shape
from deltamem_vllm.memory.scan import kernels_for
from deltamem_vllm.memory.watching import Attention
from deltamem_vllm.ops.native import NativeOps

logger = logging.getLogger("vllm.deltamem")

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.([A-Za-z0-9_]+)$")


def attach_memory(model: nn.Module, vllm_config: VllmConfig) -> None:
    """Give every attention module that the adapter names its memory. Does nothing where δ-mem is not switched on.

    Raises:
        ConfigError: no module fits, or one lacks the projections that the corrections need.
        AdapterError: the adapter is not for this model.
    """
    settings = settings_of(vllm_config)
    if settings is None:
        return
    adapter = load_adapter(settings.adapter, backbone_shape(vllm_config))
    wrapped, appended = _wrap_layers(model, vllm_config, settings, adapter)
    if not wrapped:
        raise ConfigError(
            f"{type(model).__name__} has no module named like layers.N.{'|'.join(adapter.config.target_modules)} "
            f"for the adapter's layers {sorted(adapter.layers)}: this backbone is not supported"
        )
    logger.info(
        "δ-mem: %d attention layers wrapped (%d projected by qkv_proj), rank %d, %d state head(s), corrections %s, "
        "adapter %s",
        wrapped,
        appended,
        adapter.config.rank,
        adapter.config.num_state_heads,
        ",".join(adapter.config.delta_heads) or "none",
        adapter.fingerprint[:12],
    )


def _wrap_layers(model: nn.Module, vllm_config: VllmConfig, settings: Settings, adapter: Adapter) -> tuple[int, int]:
    """How many layers got a memory, and in how many of them qkv_proj computes its projection too."""
    device = torch.device(str(vllm_config.device_config.device))
    dtype: Any = vllm_config.model_config.dtype
    kernels = kernels_for(device, settings.kernel, adapter.shape)
    masks, chain = WriteMasks(), Chain(kernels) if isinstance(kernels, NativeOps) else None
    wrapped = appended = 0
    modules = dict(model.named_modules())
    for name, module in modules.items():
        found = _LAYER.search(name)
        if not found or found[2] not in adapter.config.target_modules or int(found[1]) not in adapter.layers:
            continue
        layer, sizes = _shard(name, module, adapter, adapter.layers[int(found[1])])
        pages = StatePages(f"{name}.{SUFFIX}", int(found[1]), adapter.shape, kernels, masks, vllm_config, chain)
        memory = MemoryLayer(layer, pages, adapter.config.scaling, dtype, device)
        appended += attach(module, memory, sizes)
        decoder = name.rpartition(".")[0]
        attach_to_residual(modules[decoder], memory)
        norm = modules.get(f"{decoder}.input_layernorm")
        head_size = vllm_config.model_config.get_head_size()
        pages.attention = Attention(module, norm, sizes, head_size, adapter.backbone.hidden_size)
        wrapped += 1
    return wrapped, appended


def _shard(name: str, module: Any, adapter: Adapter, weights: LayerWeights) -> tuple[LayerWeights, tuple[int, int]]:
    """This rank's part of a layer's weights, and the local widths of q and k.

    q, k and v rows are cut like the projections whose outputs they correct; the memory itself, its gates and δo are
    the same on every rank (δo is added after o_proj's all-reduce).
    """
    if not hasattr(module, "o_proj") or not (hasattr(module, "qkv_proj") or hasattr(module, "q_proj")):
        raise ConfigError(f"{name} ({type(module).__name__}) has no o_proj and qkv_proj or q_proj: not supported")
    full_q, full_kv = adapter.backbone.q_size, adapter.backbone.kv_size
    if hasattr(module, "qkv_proj"):
        fused = module.qkv_proj
        q_local, kv_local = fused.num_heads * fused.head_size, fused.num_kv_heads * fused.head_size
        rank, world = fused.tp_rank, fused.tp_size
    else:
        rank, world = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        q_local, kv_local = (
            getattr(p, "output_size_per_partition", p.output_size) for p in (module.q_proj, module.k_proj)
        )
    cut = {"q": (q_local, full_q), "k": (kv_local, full_kv), "v": (kv_local, full_kv)}
    delta: dict[Head, torch.Tensor] = {}
    for head, matrix in weights.delta.items():
        if head in cut:
            matrix = _rows(name, head, matrix, rank, world, *cut[head])
        delta[head] = matrix
    return dataclasses.replace(weights, delta=delta), (q_local, kv_local)


def _rows(name: str, head: str, matrix: torch.Tensor, rank: int, world: int, local: int, full: int) -> torch.Tensor:
    shards = full // local if local else 0
    if shards * local != full or world % max(shards, 1):
        raise ConfigError(
            f"{name}: {head}_proj puts out {local} of {full} values on each of {world} tensor-parallel ranks; "
            "that split is not supported"
        )
    shard = rank * shards // world  # ranks beyond the number of KV heads hold replicas
    return matrix[shard * local : (shard + 1) * local]
