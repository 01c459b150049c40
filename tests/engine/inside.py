"""What is asked inside a worker's process."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any


def compiled_graphs(worker: Any) -> int:
    """Graphs that torch.compile has traced."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def launches(worker: Any) -> dict[str, int]:
    """Calls in the code that Inductor wrote for the model, by name; its own kernels together as ``kernels``."""
    from torch._inductor.codecache import PyCodeCache

    call = re.compile(
        r"^ +(?:(cpp_fused)\w*|extern_kernels\.(\w+)|torch\.ops\.([\w.]+?)(?:\.default)?|(deltamem_[\w.]+))\(",
        re.MULTILINE,
    )
    sources = [Path(module.__file__).read_text() for module in PyCodeCache.modules]
    counted: Counter[str] = Counter()
    for kernel, extern, op, ours in (match for source in sources for match in call.findall(source)):
        counted["kernels" if kernel else extern or op or ours] += 1
    return dict(counted)


def pool_states(worker: Any) -> list[bytes]:
    """Per slot of the session pool, what lies in it."""
    return [state.numpy().tobytes() for state in _pool(worker).states.cpu()]


def wrapped_layers(worker: Any) -> list[dict[str, dict[str, str]]]:
    """Per attention module with a memory: how its ``linears`` compute, and the dtypes of the memory's ``buffers``."""
    return [
        {
            "linears": {name: _method(child) for name, child in module.named_children() if name.endswith("_proj")},
            "buffers": {name: str(buffer.dtype) for name, buffer in module.deltamem.named_buffers()},
        }
        for module in worker.get_model().modules()
        if "deltamem" in dict(module.named_children())
    ]


def _method(linear: Any) -> str:
    """Name of a linear's quantisation scheme, or of its method where that has none."""
    return type(getattr(linear, "scheme", None) or linear.quant_method).__name__


def plant(worker: Any, bug: str) -> None:
    """PLANTED BUGS in the session pool, until ``none`` removes them: a suite that does not see them shows nothing.

    ``neighbour``: requests are given the state of the slot beside theirs. ``no-zero``: freed slots keep their bytes.
    """
    pool = _pool(worker)
    kind = type(pool)
    vars(pool).pop("zero", None)
    vars(pool).pop("_seed", None)
    if bug == "no-zero":
        pool.zero = lambda places: None
    elif bug == "neighbour":

        def seed(seeds: Any) -> Any:
            pool.states = pool.states.roll(1, 0)
            try:
                return kind._seed(pool, seeds)
            finally:
                pool.states = pool.states.roll(-1, 0)

        pool._seed = seed


def _pool(worker: Any) -> Any:
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    group: Any = get_kv_transfer_group()
    return group._worker._pool
