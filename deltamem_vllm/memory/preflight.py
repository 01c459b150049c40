"""What must be true before any process starts: refusals with the name, the value and the remedy."""

import hashlib
import json
from pathlib import Path
from typing import Any

from deltamem_vllm import compat
from deltamem_vllm.adapter.weights import BackboneShape, load_adapter
from deltamem_vllm.config import PLUGIN, settings_of
from deltamem_vllm.errors import ConfigError
from deltamem_vllm.store.url import open_store

SUPPORTED = ("Qwen3ForCausalLM", "SmolLM3ForCausalLM")
"""Architectures whose answers are tested against the official implementation."""

_VOLATILE = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")


def check(vllm_config: Any) -> None:
    """Refuse what cannot be served and name the adapter in the compile-cache key. A no-op without δ-mem.

    Raises:
        ConfigError: a setting of vLLM's that δ-mem does not support.
        AdapterError: the adapter is not for this model, or of a kind that is not served yet.
    """
    settings = settings_of(vllm_config)
    if settings is None:
        return
    compat.require_hooks()
    _refuse(vllm_config)
    open_store(settings.store).close()  # a store that cannot be opened is said now, not at the first request
    adapter = load_adapter(settings.adapter, backbone_shape(vllm_config))
    # A compiled graph depends on the adapter's shapes and on who wrote it; paths and sizes stay out of the key.
    vllm_config.additional_config = {
        **(vllm_config.additional_config or {}),
        PLUGIN: {"adapter": adapter.fingerprint, "code": code_fingerprint()},
    }


def code_fingerprint(package: Path = Path(__file__).parents[1]) -> str:
    """Hex digest of the code that decides what a compiled graph calls, and how: vLLM keeps graphs on disk, and what
    another version of the plugin has compiled must not be found by this one."""
    found = hashlib.blake2b(digest_size=16)
    for file in sorted([package / "compat.py", *(package / "memory").glob("*.py"), *(package / "ops").glob("*.py")]):
        found.update(f"{file.relative_to(package)}\0".encode() + file.read_bytes() + b"\0")
    return found.hexdigest()


def backbone_shape(vllm_config: Any) -> BackboneShape:
    """The sizes of the served model that an adapter must fit."""
    config = vllm_config.model_config.hf_text_config
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return BackboneShape(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        q_size=heads * head_dim,
        kv_size=kv_heads * head_dim,
        model_type=config.model_type,
    )


def model_fingerprint(vllm_config: Any) -> str:
    """Hex digest of the backbone's configuration; a record made with another model is refused by it."""
    config = vllm_config.model_config.hf_text_config.to_dict()
    for key in _VOLATILE:
        config.pop(key, None)
    return hashlib.blake2b(json.dumps(config, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def _refuse(vllm_config: Any) -> None:
    model, parallel, cache = vllm_config.model_config, vllm_config.parallel_config, vllm_config.cache_config
    architectures = list(model.hf_config.architectures or [])
    if not set(architectures) & set(SUPPORTED):
        raise ConfigError(
            f"model {model.model!r} is a {', '.join(architectures) or 'model of no named architecture'}; "
            f"δ-mem serves {', '.join(SUPPORTED)}"
        )
    text = model.hf_text_config
    if "sliding_attention" in (getattr(text, "layer_types", None) or []) or getattr(text, "use_sliding_window", False):
        raise ConfigError(f"model {model.model!r} uses sliding-window attention, which δ-mem does not support yet")
    problems = {
        "--enable-lora": vllm_config.lora_config is not None,
        "--decode-context-parallel-size > 1": getattr(parallel, "decode_context_parallel_size", 1) > 1,
        "--prefill-context-parallel-size > 1": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "--enable-dbo": bool(getattr(parallel, "enable_dbo", False)),
        "a pooling runner": model.runner_type != "generate",
    }
    for what, present in problems.items():
        if present:
            raise ConfigError(f"{what} cannot be combined with --plugin deltamem: leave one of the two out")
    if cache.block_size is not None and cache.block_size % 16:
        raise ConfigError(f"--block-size {cache.block_size}: δ-mem needs a multiple of 16")
