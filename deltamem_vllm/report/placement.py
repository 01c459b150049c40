"""Where in memory lies what most of a step's time goes into on a CPU: weights that vLLM has packed for matrix products,
and the KV cache.

A product takes percents more or less time with where its weight happens to lie, and it lies there for as long as an
engine lives: two engines of one and the same model differ by more than what is to be measured between two. So in a
comparison all engines give back that memory, again and again, and take it anew in another order, so that each gets what
another had; figures are averages over the places.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch

PATTERN = 1 << 20
"""So many random numbers make up the weights, one block of them after the other: how long a product takes does not
depend on them, and what is left out is the time to draw them."""
SPREAD = 1e-3
"""Of the random numbers, as of those that vLLM makes up (``load_format="dummy"``)."""
LARGE_PAGE = 2 << 20
MADV_COLLAPSE = 25
"""Of Linux; in Python's `mmap` from 3.13 on."""


class PackedWeights:
    """The packed weights of the engine that is started next in this process."""

    def __init__(self) -> None:
        self._packed: WeakKeyDictionary[Any, torch.dtype] = WeakKeyDictionary()

    def watch(self, ops: Any) -> None:
        """Have vLLM's module of operators tell of every weight that it packs from here on. Does nothing where this vLLM
        packs none."""
        pack = getattr(ops, "create_onednn_mm", None)
        if pack is None:
            return

        def packed(weight: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            made = pack(weight, *args, **kwargs)
            self._packed[made] = weight.dtype
            return made

        ops.create_onednn_mm = packed

    def drop(self) -> None:
        """Give back the memory of all; nothing may be computed until `pack`."""
        for packed in self._packed:
            packed.dtor(packed.handler_tensor.item())
            packed.handler_tensor.fill_(0)
        # glibc keeps what is freed in the middle of its heap, where all but the largest weights are: `pack` would find
        # the same places again.
        if (trim := getattr(_libc, "malloc_trim", None)) is not None:
            trim(0)

    def pack(self) -> int:
        """Put random weights in the place of all that `drop` has given back; how many there are.

        Compiled graphs find a packed weight by the address in a tensor, which is overwritten.
        """
        largest: dict[torch.dtype, int] = {}
        for packed, dtype in self._packed.items():
            largest[dtype] = max(largest.get(dtype, 0), packed.n * packed.k)
        numbers = {dtype: _random(count, dtype) for dtype, count in largest.items()}
        for packed, dtype in self._packed.items():
            weight = numbers[dtype][: packed.n * packed.k].view(packed.n, packed.k)
            packed.handler_tensor.fill_(torch.ops._C.create_onednn_mm_handler(weight.t(), 32))
        return len(self._packed)


def give_back(tensors: Iterable[torch.Tensor]) -> None:
    """Give back the memory behind tensors of a CPU, whose values are lost: `take` puts zeros in their place.

    Whole pages of memory that is this process's own, as allocators hand it out for what is large.

    Raises:
        OSError: it is memory of another kind.
    """
    for start, size in _memory(tensors):
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (start + size) // mmap.PAGESIZE * mmap.PAGESIZE - first
        if length > 0 and _libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), mmap.MADV_DONTNEED):
            raise OSError(ctypes.get_errno(), f"madvise of {length} bytes: {os.strerror(ctypes.get_errno())}")


def take(tensors: Iterable[torch.Tensor]) -> int:
    """Take memory for what `give_back` has given back; its bytes. It would be taken page by page else, where the time
    of steps is measured."""
    known = _memory(tensors)
    for start, size in known:
        ctypes.memset(start, 0, size)
    return sum(size for _, size in known)


def use_large_pages() -> int:
    """Have the memory that this process holds by itself lie in large pages where Linux can do that (6.1); bytes that it
    was done for. A heap has small ones wherever something small lives on between what is given back and taken again:
    engines would differ by what that is.
    """
    done = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, rights, _, _, inode, *name = line.split(maxsplit=5)
        first, stop = (int(each, 16) for each in span.split("-"))
        first, stop = -(-first // LARGE_PAGE) * LARGE_PAGE, stop // LARGE_PAGE * LARGE_PAGE
        if rights != "rw-p" or inode != "0" or name not in ([], ["[heap]"]):
            continue
        for at in range(first, stop, LARGE_PAGE):  # each by itself: one that holds nothing would end a longer call
            failed = _libc.madvise(ctypes.c_void_p(at), ctypes.c_size_t(LARGE_PAGE), MADV_COLLAPSE)
            done += 0 if failed else LARGE_PAGE
    return done


_libc = ctypes.CDLL(None, use_errno=True)


def _memory(tensors: Iterable[torch.Tensor]) -> list[tuple[int, int]]:
    """Where tensors' memory begins, and its bytes; memory that several share once."""
    storages = (each.untyped_storage() for each in tensors if each.device.type == "cpu")
    return list({each.data_ptr(): (each.data_ptr(), each.nbytes()) for each in storages}.values())


def _random(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Numbers for weights, in one dimension."""
    pattern = torch.empty(min(PATTERN, count)).uniform_(-SPREAD, SPREAD).to(dtype)
    return pattern.repeat(-(-count // len(pattern)))
