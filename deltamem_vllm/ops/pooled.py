"""Copies between pages of all layers, the session pool and host staging memory: many requests, one launch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from deltamem_vllm.ops.layout import MemoryShape
from deltamem_vllm.ops.paged import PagedOps

#: The source of a seed that is the empty memory.
EMPTY = -1
#: The slot of a take that only goes to staging.
NO_SLOT = -1


def staged(row: int) -> int:
    """The source of a seed that is row ``row`` of the staging memory."""
    return -2 - row


@dataclass(frozen=True)
class Book:
    """The pages of every layer, as one value whose addresses never change.

    Attributes:
        layers: per layer its pages [blocks, ≥ content_floats] fp32; all of one shape and stride, on one device.
        addresses: [L] int64 on that device: where they begin.
        block_size: N, tokens per page.
    """

    layers: tuple[Tensor, ...]
    addresses: Tensor
    block_size: int

    @cached_property  # a step of the engine asks for it
    def parts(self) -> tuple[Tensor, int, int]:
        """What kernels are told of it: addresses, floats from one page to the next, pages."""
        return self.addresses, self.layers[0].stride(0), self.layers[0].shape[0]

    @cached_property
    def width(self) -> int:
        """Floats of a page."""
        return int(self.layers[0].shape[1])

    @staticmethod
    def of(layers: list[Tensor], block_size: int) -> Book:
        """The book of some layers.

        Raises:
            ValueError: there are none, or they differ in dtype, shape, stride or device.
        """
        alike = {(p.dtype, tuple(p.shape), p.stride(), p.device) for p in layers}
        if len(alike) != 1 or layers[0].dtype != torch.float32 or layers[0].dim() != 2 or layers[0].stride(1) != 1:
            raise ValueError(f"pages of all layers must be fp32 and alike, got {sorted(map(str, alike))}")
        addresses = torch.tensor([p.data_ptr() for p in layers], dtype=torch.int64, device=layers[0].device)
        return Book(tuple(layers), addresses, block_size)


@runtime_checkable
class PoolOps(Protocol):
    """What the session pool needs. Nothing is read from the host or waited for. Sizes: n orders, L layers, M staged
    rows.

    Where the kernels run on a GPU, staging may be pinned host memory; who reads it there waits for the stream first.
    An order that does not fit is not followed: a take gives NaN, a seed writes nothing. The caller, who made the
    orders on the host, has checked them there.
    """

    def take(
        self,
        shape: MemoryShape,
        book: Book,
        block_ids: Tensor,
        counts: Tensor,
        slots: Tensor,
        states: Tensor,
        staging: Tensor | None,
    ) -> None:
        """The states after the first ``counts[i]`` tokens of block ``block_ids[i]``, in every layer.

        Args:
            block_ids, counts, slots: [n] int32. No slot twice; `NO_SLOT`: only to staging.
            states: [slots, L, H, r, r] fp32, contiguous: the pool; the named slots are overwritten.
            staging: [≥ n, L, H, r, r] fp32, contiguous, overwritten; or None.
        """
        ...

    def seed(
        self,
        shape: MemoryShape,
        book: Book,
        block_ids: Tensor,
        sources: Tensor,
        states: Tensor,
        staging: Tensor | None,
    ) -> None:
        """Write the bases of blocks, in every layer.

        Args:
            block_ids: [n] int32. No block twice.
            sources: [n] int32: a slot of the pool, `EMPTY`, or `staged` (row).
            states: [slots, L, H, r, r] fp32, contiguous: the pool.
            staging: [M, L, H, r, r] fp32, contiguous; or None.
        """
        ...


def check_pool(
    shape: MemoryShape, book: Book, orders: tuple[Tensor, ...], states: Tensor, staging: Tensor | None
) -> None:
    """Shapes and dtypes of both functions; raises ValueError naming the tensor."""
    side = (len(book.layers), shape.heads, shape.rank, shape.rank)
    for name, tensor in (("states", states), ("staging", staging)):
        if tensor is not None and (
            tensor.dtype != torch.float32 or tuple(tensor.shape[1:]) != side or not tensor.is_contiguous()
        ):
            raise ValueError(f"{name}: expected contiguous float32 [any, {side}], got {tensor.dtype} {[*tensor.shape]}")
    for tensor in orders:
        if tensor.dtype != torch.int32 or tensor.shape != orders[0].shape or tensor.dim() != 1:
            raise ValueError(f"orders: expected int32 [{len(orders[0])}], got {tensor.dtype} {[*tensor.shape]}")
    if book.layers[0].shape[1] < shape.content_floats(book.block_size):
        raise ValueError(
            f"pages: {shape} needs {shape.content_floats(book.block_size)} floats, got {book.layers[0].shape[1]}"
        )


def check_take(
    shape: MemoryShape, book: Book, orders: tuple[Tensor, ...], states: Tensor, staging: Tensor | None
) -> None:
    """`check_pool`, and that staging has a row for each order."""
    check_pool(shape, book, orders, states, staging)
    if staging is not None and len(staging) < len(orders[0]):
        raise ValueError(f"staging has {len(staging)} rows for {len(orders[0])} orders")


class LayerByLayer:
    """`PoolOps` from any `PagedOps`, one call per layer, orders walked on the host."""

    def __init__(self, ops: PagedOps) -> None:
        self._ops = ops

    def take(
        self,
        shape: MemoryShape,
        book: Book,
        block_ids: Tensor,
        counts: Tensor,
        slots: Tensor,
        states: Tensor,
        staging: Tensor | None,
    ) -> None:
        """See `PoolOps.take`."""
        check_take(shape, book, (block_ids, counts, slots), states, staging)
        taken = states.new_empty((len(book.layers), len(block_ids), *states.shape[2:]))
        for layer, pages in enumerate(book.layers):
            self._ops.page_state(shape, pages, block_ids, counts, book.block_size, taken[layer])
        pooled = [(row, slot) for row, slot in enumerate(slots.tolist()) if slot != NO_SLOT]
        if pooled:
            states[[slot for _, slot in pooled]] = taken[:, [row for row, _ in pooled]].transpose(0, 1)
        if staging is not None:
            staging[: len(block_ids)] = taken.transpose(0, 1).to(staging.device)

    def seed(
        self,
        shape: MemoryShape,
        book: Book,
        block_ids: Tensor,
        sources: Tensor,
        states: Tensor,
        staging: Tensor | None,
    ) -> None:
        """See `PoolOps.seed`."""
        check_pool(shape, book, (block_ids, sources), states, staging)
        given = sources.tolist()
        pooled = [row for row, source in enumerate(given) if source >= 0]
        filled = [row for row, source in enumerate(given) if source < EMPTY]
        bases = states.new_zeros((len(given), *states.shape[1:]))
        if pooled:
            bases[pooled] = states[[given[row] for row in pooled]]
        if filled:
            if staging is None:
                raise ValueError(f"seed: source {given[filled[0]]} is a staged row, but nothing is staged")
            bases[filled] = staging[[-2 - given[row] for row in filled]].to(states.device)
        blocks = block_ids.tolist()
        for layer, pages in enumerate(book.layers):
            pages[blocks, : shape.state_floats] = bases[:, layer].flatten(1)


def pool_ops(ops: PagedOps) -> PoolOps:
    """Seeds and takes of an implementation: its own where it has them, else layer by layer."""
    return ops if isinstance(ops, PoolOps) else LayerByLayer(ops)
