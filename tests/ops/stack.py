"""Layers that are run as one step, one after the other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deltamem_vllm.ops.layout import MemoryShape
from deltamem_vllm.ops.native import LayerConstants, LayerRows, LayerTable, NativeOps, tiled
from deltamem_vllm.ops.paged import Batch
from deltamem_vllm.ops.pooled import Book
from tests.ops.paging import World, int32, random_inputs

LAYERS, N = 3, 16
HIDDEN = 40
"""Columns of a residual, which a layer may be given."""
TURN = "it is the turn of layer"
"""Of what a layer out of its turn is told."""


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two fp32 tensors are equal, NaN included."""
    return torch.equal(one.view(torch.int32), other.view(torch.int32))


@dataclass
class Stack:
    """Layers with pages and inputs of their own, and one step for all of them: a prefill and a decode."""

    shape: MemoryShape
    room: bool = True

    def __post_init__(self) -> None:
        self.worlds = [World(self.shape, block_size=N, room=self.room) for _ in range(LAYERS)]
        self.inputs = [random_inputs(self.shape, 20, seed=layer) for layer in range(LAYERS)]
        for world, (_, _, state) in zip(self.worlds, self.inputs, strict=True):
            world.seed(5, state)
            world.seed(9, state * 2)
        self.book = Book.of([world.pages for world in self.worlds], N)
        self.for_o = torch.randn(self.shape.width, HIDDEN, generator=torch.Generator().manual_seed(3))
        constants = [LayerConstants(bias, in_residual=tiled(self.for_o)) for _, bias, _ in self.inputs]
        self.table = LayerTable.of(self.shape, constants)

    def step(self, length: int, rows: int) -> Batch:
        """Request 0 brings ``length - 1`` new tokens, request 1 one more behind its ``rows`` before."""
        world = self.worlds[0]
        return Batch(
            int32([[5, 2], [9, 7]]), int32([0, length - 1, length]), int32([length - 1, rows + 1]), world.write_limit,
            world.unwritten, N, 2,
        )  # fmt: skip

    def rows(self, layer: int, length: int) -> LayerRows:
        reads = torch.full((length, self.shape.width), float("nan"))
        return LayerRows(self.inputs[layer][0][:length], None, reads)

    def residual(self, layer: int, length: int) -> Tensor:
        return torch.randn(length, HIDDEN, generator=torch.Generator().manual_seed(20 + layer))

    def begin(self, native: NativeOps, length: int, batch: Batch) -> LayerRows:
        """Run the first layer."""
        own = self.rows(0, length)
        native.scan_first(self.shape, own, self.table, self.book, batch)
        return own
