"""Pages of the CPU's kernels and a session pool over them, without an engine."""

import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from deltamem_vllm.memory.pages import StatePages, WriteMasks
from deltamem_vllm.ops.dispatch import select
from deltamem_vllm.ops.layout import RELEASED
from deltamem_vllm.ops.paged import WRITE_ALL
from deltamem_vllm.sessions.pool import SessionPool
from deltamem_vllm.sessions.slots import Place
from deltamem_vllm.sessions.steps import Seed

BLOCK = 32


def make_pool(shape: tuple[int, ...], slots: int, blocks: int) -> SessionPool:
    """A pool for states [layers, H, r, r], over ``blocks`` pages."""
    layers, heads, rank, _ = shape
    memory = replace(RELEASED, rank=rank, heads=heads)
    masks, kernels = WriteMasks(), select("cpu", "native")
    config: Any = SimpleNamespace(
        cache_config=SimpleNamespace(block_size=BLOCK), compilation_config=SimpleNamespace(static_forward_context={})
    )
    made = []
    for index in range(layers):
        layer = StatePages(f"{index}.deltamem", index, memory, kernels, masks, config)
        layer.bind_kv_cache(torch.zeros((blocks, 1, BLOCK, memory.floats_per_token(BLOCK))))
        made.append(layer)
    return SessionPool(made, list(range(layers)), slots, kernels)


def seed_seconds(shape: tuple[int, ...], times: int) -> list[float]:
    """What it takes to bring one session's states from their slot into the first page of a request.

    Raises:
        SystemExit: a page got other states.
    """
    pool = make_pool(shape, slots=64, blocks=64)
    took = []
    with torch.inference_mode():
        for slot in range(64):
            state = torch.full(shape, float(slot + 1)).numpy().tobytes()
            errors = pool.seed([Seed(f"f{slot}", slot, WRITE_ALL, True, Place(slot, 1), state)])
            if errors != [None]:
                raise SystemExit(f"a slot was not filled, nothing is reported: {errors}")
        for turn in range(times):
            slot, block = turn % 64, turn * 7 % 64
            start = time.perf_counter()
            pool.seed([Seed(f"r{turn}", block, WRITE_ALL, True, Place(slot, 1))])
            took.append(time.perf_counter() - start)
            if not all(bool((layer.base_of(block) == slot + 1).all()) for layer in pool.layers):
                raise SystemExit("a page got other states: nothing is reported")
    return took
