"""Which implementation of the paged delta rule runs, and a line in the log that says why."""

from __future__ import annotations

import functools
import logging
from typing import Literal, get_args

import torch

from deltamem_vllm.errors import ConfigError
from deltamem_vllm.ops.cuda import CUDA_LIBRARY, CudaOps
from deltamem_vllm.ops.layout import RELEASED, MemoryShape
from deltamem_vllm.ops.native import LIBRARY, NativeOps, find_library
from deltamem_vllm.ops.paged import PagedOps
from deltamem_vllm.ops.paged_torch import TorchOps
from deltamem_vllm.ops.selfcheck import why_not

Preference = Literal["auto", "native", "triton", "torch"]

BUILD = "build it (C++17 compiler) with `pip install --no-build-isolation --no-deps .` in the source folder"
BUILD_CUDA = (
    "build it (nvcc, and torch with CUDA) with `pip install --no-build-isolation --no-deps .` in the source folder"
)

logger = logging.getLogger(__name__)


@functools.cache
def select(device: torch.device | str, prefer: Preference = "auto", shape: MemoryShape = RELEASED) -> PagedOps:
    """The implementation for tensors on ``device``; logged once per (device, preference, shape).

    What runs on a GPU is first tried on it, against torch: what does not start there, does not serve the shape, or
    answers wrongly, is not chosen.

    Args:
        prefer: ``auto``: native where it loads, on a GPU else Triton's, else torch with a warning that names the
            reasons and the remedy; ``native`` and ``triton``: that one or an error; ``torch``: torch, on request and
            without a warning.
        shape: of the adapter that is to be served.

    Raises:
        ConfigError: ``native`` or ``triton`` was asked for and cannot run here, or the preference is unknown.
    """
    if prefer not in get_args(Preference):
        raise ConfigError(f"delta rule: unknown implementation {prefer!r}; choose {', '.join(get_args(Preference))}")
    device = torch.device(device)
    if prefer == "torch":
        logger.info("delta rule: torch, because it was asked for")
        return TorchOps()
    reasons = []
    for name in ("native", "triton"):
        if prefer not in ("auto", name) or (prefer == "auto" and name == "triton" and device.type == "cpu"):
            continue
        found = _load_native(device, shape) if name == "native" else _load_triton(device, shape)
        if isinstance(found, str):
            reasons.append(found)
            continue
        because = [f"device={device.type}", *reasons] if prefer == "auto" else ["it was asked for"]
        logger.info("delta rule: %s, because %s", found.description, "; ".join(because))
        return found
    if prefer != "auto":
        raise ConfigError(f"delta rule: {prefer} was asked for, but {reasons[0]}")
    logger.warning("delta rule: torch (slow), because %s", "; ".join(reasons))
    return TorchOps()


def _load_native(device: torch.device, shape: MemoryShape) -> PagedOps | str:
    """The compiled implementation, or why there is none, remedy included."""
    if device.type not in ("cpu", "cuda"):
        return f"there is no native kernel for device={device.type}"
    on_cpu = device.type == "cpu"
    name, remedy = (LIBRARY, BUILD) if on_cpu else (CUDA_LIBRARY, BUILD_CUDA)
    library = find_library(name)
    if library is None:
        return f"{name} for device={device.type} has not been built: {remedy}"
    try:
        ops: PagedOps = NativeOps(library) if on_cpu else CudaOps(library)
    except (OSError, RuntimeError, AttributeError) as error:
        return f"{name} does not load ({error}): {remedy}"
    if not on_cpu and (problem := why_not(ops, device, shape)):
        return f"{name} does not work here for this adapter ({problem}); if it was built for another GPU, {remedy}"
    return ops


def _load_triton(device: torch.device, shape: MemoryShape) -> PagedOps | str:
    """Triton's implementation, or why there is none, remedy included."""
    if device.type != "cuda":
        return f"there is no Triton kernel for device={device.type}"
    try:
        from deltamem_vllm.ops.triton_ops import TritonOps
    except ImportError as error:
        return f"Triton cannot be imported ({error}): install it, pip install 'deltamem-vllm[gpu]'"
    ops = TritonOps()
    if problem := why_not(ops, device, shape):
        return f"Triton's kernels do not work here for this adapter ({problem})"
    return ops
