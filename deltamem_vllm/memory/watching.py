"""What a worker can tell of the memory's work without touching a model's step: gates from pages, the size of a layer's
own output from its weights."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from deltamem_vllm.memory.appended import product_alone
from deltamem_vllm.memory.pages import StatePages
from deltamem_vllm.sessions.quality import Gates

logger = logging.getLogger("vllm.deltamem")

PROBES = 32
"""Random inputs from which the size of a layer's output is estimated."""


@dataclass(frozen=True)
class Attention:
    """A wrapped attention module, to be asked about its own weights once they are loaded.

    Attributes:
        module: has ``o_proj`` and ``qkv_proj`` or ``v_proj``.
        norm: what normalises its input; None where that is not known: then its weight counts as 1.
        sizes: local output widths of q and of k (= v).
        head_size: of one attention head.
        hidden_size: D.
    """

    module: Any
    norm: Any
    sizes: tuple[int, int]
    head_size: int
    hidden_size: int

    @torch.inference_mode()
    def typical_output(self) -> float:
        """Root mean square of |o| where attention looks at one token whose normalised hidden state is random.

        All tensor-parallel ranks must ask at the same time: the output projection adds up their parts. Calls the
        projections past what the memory does with them.
        """
        memory = self.module.deltamem
        random = torch.Generator().manual_seed(0)  # the same on all ranks
        hidden = torch.randn((PROBES, self.hidden_size), generator=random)
        hidden *= torch.rsqrt(hidden.square().mean(-1, keepdim=True))
        hidden = hidden.to(memory.bias.device, memory.dtype)
        if (weight := getattr(self.norm, "weight", None)) is not None:
            hidden = hidden * weight.to(hidden.dtype)
        q_size, kv_size = self.sizes
        if hasattr(self.module, "qkv_proj"):
            values = _value(product_alone(self.module.qkv_proj, hidden))[..., q_size + kv_size : q_size + 2 * kv_size]
        else:
            values = _value(self.module.v_proj.forward(hidden))
        heads = values.reshape(PROBES, -1, self.head_size).repeat_interleave(q_size // kv_size, dim=1)
        output = _value(self.module.o_proj.forward(heads.reshape(PROBES, q_size).contiguous()))
        return float(output.float().square().sum(-1).mean().sqrt())


def _value(output: Any) -> torch.Tensor:
    """vLLM's linears return (output, bias), the Transformers backend's just the output."""
    found: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return found


def typical_outputs(layers: Sequence[StatePages]) -> list[float]:
    """Of each layer; empty where one of them cannot be asked, which is said once."""
    try:
        return [layer.attention.typical_output() for layer in layers]
    except Exception as e:  # a figure less must not keep a server from starting
        logger.warning("how large corrections are beside attention's output is not known for this model: %s", e)
        return []


def gate_means(layers: Sequence[StatePages], block: int, count: int) -> list[Gates]:
    """Per layer the means of β and λ over the written ones of a kernel block's first ``count`` tokens; empty where
    there are none. Waits for the device."""
    shape = layers[0].shape
    start, columns = shape.state_floats, shape.log_columns
    logs = [layer.pages[block, start : start + count * columns] for layer in layers if layer.pages is not None]
    rows = torch.stack(logs).view(len(logs), count, columns).cpu()
    gates = rows[..., 2 * shape.width :].view(len(logs), count, -1, shape.gates)  # β, then λ
    written = (gates[:, :, 0] != 0).flatten(2).any(-1).any(0)  # a token that was not written has β = 0
    if not written.any():
        return []
    means = gates[:, written].mean(dim=(1, 3))
    return [(mean[0], mean[1] if len(mean) > 1 else None) for mean in means.tolist()]
