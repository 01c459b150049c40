"""What an adapter folder holds, in words and numbers; also for adapters that cannot be served."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from deltamem_vllm.adapter.config import check_servable
from deltamem_vllm.adapter.weights import Adapter, load_adapter
from deltamem_vllm.errors import AdapterError

Description = dict[str, object]


def inspect_adapter(folder: str | Path) -> Description:
    """Load an adapter without a model and describe it.

    Returns:
        a JSON-ready dict; ``servable`` is True or the reason why not.

    Raises:
        AdapterError: it is not a valid adapter.
    """
    return describe(load_adapter(folder))


def describe(adapter: Adapter) -> Description:
    """See `inspect_adapter`."""
    config = adapter.config
    first = next(iter(adapter.layers.values()))
    servable: bool | str = True
    try:
        check_servable(config, str(adapter.source.parent))
    except AdapterError as error:
        servable = str(error)
    return {
        "file": str(adapter.source),
        "variant": config.variant,
        "rank": config.rank,
        "state_heads": config.num_state_heads,
        "write_granularity": config.memory_write_granularity,
        "update_mode": config.state_update_mode,
        "gates": "per row" if config.rankwise_gates else "per head",
        "lambda": "1 - beta" if config.couple_lambda else "own gate",
        "normalize_qk": config.normalize_qk,
        "corrections": list(config.delta_heads),
        "scaling": config.scaling,
        "trainable_scale": config.delta_scale_granularity if config.trainable_delta_scale else None,
        "delta_o_rmsnorm": config.delta_o_rmsnorm,
        "layers": list(adapter.layers),
        "backbone": {key: value for key, value in asdict(adapter.backbone).items() if key != "model_type"},
        "dtype": str(first.projection.dtype).removeprefix("torch."),
        "parameters": adapter.parameters,
        "state_bytes_per_session": adapter.state_bytes,
        "fingerprint": adapter.fingerprint,
        "servable": servable,
    }
