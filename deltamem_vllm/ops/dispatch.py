"""Which implementation of the paged delta rule runs, and a line in the log that says why."""

from __future__ import annotations

import functools
import logging
from typing import Literal

import torch

from deltamem_vllm.errors import ConfigError
from deltamem_vllm.ops.native import LIBRARY, NativeOps, find_library
from deltamem_vllm.ops.paged import PagedOps
from deltamem_vllm.ops.paged_torch import TorchOps

Preference = Literal["auto", "native", "torch"]

BUILD = "build it (C++17 compiler) with `pip install --no-build-isolation --no-deps .` in the source folder"

logger = logging.getLogger(__name__)


@functools.cache
def select(device: torch.device | str, prefer: Preference = "auto") -> PagedOps:
    """The implementation for tensors on ``device``; logged once per (device, preference).

    Args:
        prefer: ``auto``: native where it loads, else torch with a warning that names the reason and the
            remedy; ``native``: native or an error; ``torch``: torch, on request and without a warning.

    Raises:
        ConfigError: ``native`` was asked for and cannot run here, or the preference is unknown.
    """
    if prefer not in ("auto", "native", "torch"):
        raise ConfigError(f"delta rule: unknown implementation {prefer!r}; choose auto, native or torch")
    kind = torch.device(device).type
    if prefer == "torch":
        logger.info("delta rule: torch, because it was asked for")
        return TorchOps()
    native = _load_native(kind)
    if isinstance(native, NativeOps):
        because = f"device={kind}" if prefer == "auto" else "it was asked for"
        logger.info("delta rule: %s, because %s", native.description, because)
        return native
    if prefer == "native":
        raise ConfigError(f"delta rule: native was asked for, but {native}")
    logger.warning("delta rule: torch (slow), because %s", native)
    return TorchOps()


def _load_native(kind: str) -> NativeOps | str:
    """The native implementation, or why there is none, remedy included."""
    if kind != "cpu":
        return f"there is no native kernel for device={kind}"
    library = find_library()
    if library is None:
        return f"{LIBRARY} has not been built: {BUILD}"
    try:
        return NativeOps(library)
    except (OSError, RuntimeError, AttributeError) as error:
        return f"{LIBRARY} does not load ({error}): {BUILD}"
