"""Weights that vLLM has packed, and the KV cache, give up their place and get another; they are found there."""

from __future__ import annotations

import ctypes
import gc
import mmap
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import _custom_ops as ops

from deltamem_vllm.report.placement import LARGE_PAGE, PackedWeights, give_back, take, use_large_pages

COLUMNS, INPUTS = 192, 64


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> PackedWeights:
    """What is packed in the test."""
    monkeypatch.setattr(ops, "create_onednn_mm", ops.create_onednn_mm)  # put back afterwards
    made = PackedWeights()
    made.watch(ops)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_finds_its_weight_in_the_new_place(watched: PackedWeights, dtype: torch.dtype) -> None:
    hidden = torch.randn(3, INPUTS).to(dtype)
    packed = [ops.create_onednn_mm(torch.zeros(COLUMNS, INPUTS, dtype=dtype).t(), 32) for _ in range(3)]
    assert not any(bool(ops.onednn_mm(each, hidden, None).any()) for each in packed)
    watched.drop()
    assert not any(each.handler_tensor.item() for each in packed)
    assert watched.pack() == 3
    for each in packed:
        made: Any = ops.onednn_mm(each, hidden, None)
        assert made.shape == (3, COLUMNS)
        assert bool(made.isfinite().all())
        assert bool(made.any()), "the product is still that of the old weight"


def test_what_is_gone_is_not_packed(watched: PackedWeights) -> None:
    kept, gone = (ops.create_onednn_mm(torch.zeros(COLUMNS, INPUTS).t(), 32) for _ in range(2))
    del gone
    gc.collect()
    watched.drop()
    assert watched.pack() == 1
    assert kept.handler_tensor.item()


def test_what_is_dropped_does_not_stay_in_the_heap(watched: PackedWeights) -> None:
    """Weights that once were given back share a heap with what lives on, in which glibc keeps what is freed."""
    packed, between = [], []
    for _ in range(8):
        packed.append(ops.create_onednn_mm(torch.zeros(3072, 1024).t(), 32))
        between.append(torch.zeros(64))
    size = sum(each.n * each.k * 4 for each in packed)
    for _ in range(3):
        held = resident()
        watched.drop()
        assert held - resident() > 0.9 * size, "it was kept"
        assert watched.pack() == len(packed)
    assert not any(bool(each.any()) for each in between), "what lives on between them was written to"


def test_memory_that_was_given_back_is_zero() -> None:
    """Also where tensors share it, and do not fill whole pages."""
    whole, apart = torch.full((3 << 20,), 7.0), torch.full((1 << 20,), 7.0)
    parts = [whole[: 1 << 20], whole[5:].view(-1), apart]
    where, held = whole.data_ptr(), resident()
    give_back(parts)
    assert held - resident() > (14 << 20), "it was kept"
    assert take(parts) == 16 << 20
    assert whole.data_ptr() == where
    assert (whole == 0).all()
    assert (apart == 0).all()
    whole += 1
    assert whole.sum() == 3 << 20


def test_what_lay_in_small_pages_lies_in_large_ones() -> None:
    held = mmap.mmap(-1, 5 * LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    where = ctypes.addressof(ctypes.c_char.from_buffer(held))
    written = bytes(range(256)) * (len(held) // 256)
    for at in range(0, len(held), mmap.PAGESIZE):  # page after page, as a heap grows
        held[at : at + mmap.PAGESIZE] = written[at : at + mmap.PAGESIZE]
    assert use_large_pages() >= 4 * LARGE_PAGE
    assert in_large_pages(where) >= 4 * LARGE_PAGE
    assert held[:] == written


def in_large_pages(where: int) -> int:
    """Bytes in large pages of the mapping that has this address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            start, stop = (int(each, 16) for each in first.split("-"))
            inside = start <= where < stop
        elif inside and first == "AnonHugePages:":
            return int(rest[0]) * 1024
    return 0


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
