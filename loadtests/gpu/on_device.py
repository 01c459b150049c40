"""Lets the tests' worlds, which lie in host memory, run on kernels that want theirs on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deltamem_vllm.ops.layout import MemoryShape
from deltamem_vllm.ops.paged import Batch
from deltamem_vllm.ops.pooled import Book, pool_ops


class OnDevice:
    """`PagedOps` and `PoolOps` that copy their tensors to a device, call there, and copy everything back: also what the
    call must not have touched."""

    def __init__(self, ops: Any, device: torch.device) -> None:
        self._ops, self._device = ops, device
        self._pool = pool_ops(ops)
        self.name, self.description, self.graph_safe = ops.name, ops.description, ops.graph_safe

    def _there(self, tensor: Tensor) -> Tensor:
        """The same bytes, strides included, on the device."""
        flat = torch.as_strided(tensor, (tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)
        return flat.to(self._device).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def _back(self, there: Tensor, here: Tensor) -> None:
        size = here.untyped_storage().nbytes() // here.element_size()
        torch.as_strided(here, (size,), (1,), 0).copy_(torch.as_strided(there, (size,), (1,), 0))

    def page_scan(
        self, shape: MemoryShape, projected: Tensor, bias: Tensor, pages: Tensor, batch: Batch, reads: Tensor
    ) -> None:
        """See `PagedOps.page_scan`."""
        there = Batch._make(self._there(x) if isinstance(x, Tensor) else x for x in batch)
        own_pages, own_reads = self._there(pages), self._there(reads)
        self._ops.page_scan(shape, self._there(projected), self._there(bias), own_pages, there, own_reads)
        self._back(own_pages, pages)
        self._back(own_reads, reads)

    def page_state(
        self, shape: MemoryShape, pages: Tensor, block_ids: Tensor, counts: Tensor, block_size: int, out: Tensor
    ) -> None:
        """See `PagedOps.page_state`."""
        own = self._there(out)
        orders = self._there(block_ids), self._there(counts)
        self._ops.page_state(shape, self._there(pages), *orders, block_size, own)
        self._back(own, out)

    def take(
        self, shape: MemoryShape, book: Book, block_ids: Tensor, counts: Tensor, slots: Tensor, states: Tensor,
        staging: Tensor | None,
    ) -> None:  # fmt: skip
        """See `PoolOps.take`; staging in pinned memory, as it is served."""
        own_book = self._book(book)
        own = self._there(states)
        pinned = None if staging is None else self._pin(staging)
        ids, own_counts, own_slots = (self._there(x) for x in (block_ids, counts, slots))
        self._pool.take(shape, own_book, ids, own_counts, own_slots, own, pinned)
        self._wait()
        self._back(own, states)
        if staging is not None and pinned is not None:
            staging.copy_(pinned)

    def seed(
        self, shape: MemoryShape, book: Book, block_ids: Tensor, sources: Tensor, states: Tensor,
        staging: Tensor | None,
    ) -> None:  # fmt: skip
        """See `PoolOps.seed`; staging in pinned memory, as it is served."""
        own_book = self._book(book)
        own = self._there(states)
        pinned = None if staging is None else self._pin(staging)
        self._pool.seed(shape, own_book, self._there(block_ids), self._there(sources), own, pinned)
        self._wait()
        self._back(own, states)
        for there, here in zip(own_book.layers, book.layers, strict=True):
            self._back(there, here)

    def _pin(self, tensor: Tensor) -> Tensor:
        return tensor.clone().pin_memory() if self._device.type == "cuda" else tensor.clone()

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def _book(self, book: Book) -> Book:
        return Book.of([self._there(pages) for pages in book.layers], book.block_size)
