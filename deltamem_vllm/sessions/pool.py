"""The session pool: states in device memory, and the copies between them and pages.

All orders of one step go together. Per step and kind of order that costs a handful of tensor operations, however many
requests and layers there are (plain torch: one small one per layer); per request only a few lines of Python. Takes also
wait for one copy to the host.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch

from deltamem_vllm.memory.pages import StatePages
from deltamem_vllm.ops.paged import PagedOps
from deltamem_vllm.ops.pooled import EMPTY, NO_SLOT, Book, pool_ops, staged
from deltamem_vllm.sessions.slots import Place
from deltamem_vllm.sessions.steps import Commit, Mark, Seed

_O = TypeVar("_O")
_R = TypeVar("_R")


class StaleOrder(RuntimeError):
    """An order names a slot whose content has changed since, or is not there yet: following it could show one session
    another's memory."""


class SessionPool:
    """States of this worker's layers.

    Args:
        layers: this worker's pages, in layer order.
        positions: where each of them lies on axis 0 of a whole session state.
        slots: size of the pool.
        kernels: paged operators.

    Attributes:
        states: [slots, local layers, H, r, r] fp32 on the device.
        generations: per slot, of the order that last changed it.
    """

    def __init__(self, layers: list[StatePages], positions: list[int], slots: int, kernels: PagedOps) -> None:
        self.layers, self.positions, self.kernels = layers, positions, pool_ops(kernels)
        self.shape = layers[0].shape
        self.book = Book.of([layer.pages for layer in layers if layer.pages is not None], layers[0].tokens)
        assert len(self.book.layers) == len(layers)
        self.device = self.book.layers[0].device
        side = (self.shape.heads, self.shape.rank, self.shape.rank)
        self.states = torch.zeros((slots, len(layers), *side), dtype=torch.float32, device=self.device)
        self.generations = [0] * slots

    def kernel_block(self, manager_block: int) -> int:
        """First kernel block of a block manager's block.

        Raises:
            ValueError: there is no such block.
        """
        block = manager_block * self.layers[0].blocks_per_manager_block
        if not 0 <= block < self.layers[0].masks.blocks:
            raise ValueError(f"block {manager_block} is none of the {self.layers[0].masks.blocks} pages")
        return block

    def take(self, commits: Sequence[Commit]) -> list[bytes | Exception]:
        """The states that commits ask for: into their slots, and as bytes of [local layers, H, r, r].

        Never raises: an order that cannot be followed gets its exception in place of bytes, and its slot is not read
        by anybody.
        """
        return _together(self._take, commits)

    def zero(self, places: Sequence[Place]) -> None:
        """Leave nothing of the states behind. A slot that has been given out anew since is left alone."""
        old = [place for place in places if place.generation > self.generations[place.slot]]
        if old:
            self.states[[place.slot for place in old]] = 0.0
        for place in old:
            self.generations[place.slot] = max(place.generation, self.generations[place.slot])

    def seed(self, seeds: Sequence[Seed]) -> list[Exception | None]:
        """Give requests what lies before their first token: write limits, and bases where they are to be written.

        Never raises: see `take`. A request whose order was refused keeps its page as it was, so the caller must switch
        its memory off.
        """
        return _together(self._seed, seeds)

    def mark(self, marks: Sequence[Mark]) -> list[Exception | None]:
        """Say which tokens of blocks are not written.

        Never raises: see `take`. A request whose order was refused must not commit.
        """
        return _together(self._mark, marks)

    def set_limit(self, block: int, limit: int) -> None:
        """From which position on the request that starts at a block only reads."""
        self.layers[0].masks.limit([self.kernel_block(block)], [limit])

    def _take(self, commits: Sequence[Commit]) -> list[bytes]:
        tokens = self.layers[0].tokens
        blocks, counts = [], []
        newest: dict[int, tuple[int, int]] = {}  # slot → row, generation: orders of one slot follow each other
        for row, commit in enumerate(commits):
            self._check_new(commit.place, newest)
            newest[commit.place.slot] = row, commit.place.generation
            blocks.append(self.kernel_block(commit.block) + (commit.count - 1) // tokens)
            counts.append((commit.count - 1) % tokens + 1)
        taken = self.states.new_empty((len(commits), *self.states.shape[1:]))
        unslotted = [NO_SLOT] * len(commits)
        self.kernels.take(
            self.shape,
            self.book,
            self._orders(blocks),
            self._orders(counts),
            self._orders(unslotted),
            self.states,
            taken,
        )
        host = taken.cpu().numpy()
        self._put(newest, taken)
        return [state.tobytes() for state in host]

    def _seed(self, seeds: Sequence[Seed]) -> list[None]:
        fills: list[torch.Tensor] = []
        newest: dict[int, tuple[int, int]] = {}
        blocks, limits = [], []
        based: list[int] = []  # blocks whose base is written
        sources: list[int] = []  # of those
        for seed in seeds:
            blocks.append(self.kernel_block(seed.block))
            limits.append(seed.limit)
            if seed.place is not None and seed.fill is not None:
                self._check_new(seed.place, newest)
                newest[seed.place.slot] = len(fills), seed.place.generation
                fills.append(self._local(seed.fill))
            if not seed.write_base:
                continue
            if seed.place is None:
                sources.append(EMPTY)
            elif seed.place.slot in newest:
                self._check_same(seed.place, newest[seed.place.slot][1])
                sources.append(staged(newest[seed.place.slot][0]))
            else:
                self._check_same(seed.place, self._generation(seed.place))
                sources.append(seed.place.slot)
            based.append(blocks[-1])
        filled = torch.stack(fills).to(self.device) if fills else self.states[:0]
        if based:  # from the slots as they are before this step's fills
            self.kernels.seed(
                self.shape,
                self.book,
                self._orders(based),
                self._orders(sources),
                self.states,
                filled if fills else None,
            )
        self._put(newest, filled)
        if blocks:
            self.layers[0].masks.limit(blocks, limits)
        return [None] * len(seeds)

    def _mark(self, marks: Sequence[Mark]) -> list[None]:
        parts, table = self.layers[0].blocks_per_manager_block, self.layers[0].masks.unwritten
        firsts = [self.kernel_block(mark.block) for mark in marks]
        bits = np.zeros((len(marks), parts, table.shape[1] * 32), dtype=np.uint8)
        tokens = self.layers[0].tokens
        for row, mark in enumerate(marks):
            if mark.bits is not None:
                whole = np.unpackbits(np.frombuffer(mark.bits, np.uint8), bitorder="little", count=parts * tokens)
                bits[row, :, :tokens] = whole.reshape(parts, tokens)
        words = np.packbits(bits, axis=-1, bitorder="little").view("<i4").reshape(len(marks) * parts, -1)
        rows = [first + part for first in firsts for part in range(parts)]
        table[rows] = torch.from_numpy(words.astype(np.int32)).to(table.device)
        return [None] * len(marks)

    def _orders(self, values: list[int]) -> torch.Tensor:
        return torch.from_numpy(np.array(values, np.int32)).to(self.device)

    def _local(self, payload: bytes) -> torch.Tensor:
        """This worker's layers of a whole session state, bytes of [all layers, H, r, r] fp32."""
        whole = torch.from_numpy(np.frombuffer(payload, dtype=np.float32).copy())
        return whole.view(-1, *self.states.shape[2:])[self.positions]

    def _put(self, newest: dict[int, tuple[int, int]], states: torch.Tensor) -> None:
        """Write rows of ``states`` to slots; only then do the slots count as changed."""
        if newest:
            self.states[list(newest)] = states[[row for row, _ in newest.values()]]
        for slot, (_, generation) in newest.items():
            self.generations[slot] = generation

    def _generation(self, place: Place) -> int:
        if not 0 <= place.slot < len(self.generations):
            raise ValueError(f"slot {place.slot} is none of the pool's {len(self.generations)}")
        return self.generations[place.slot]

    def _check_new(self, place: Place, newest: dict[int, tuple[int, int]]) -> None:
        have = newest[place.slot][1] if place.slot in newest else self._generation(place)
        if place.generation <= have:
            raise StaleOrder(f"slot {place.slot} is of generation {have}, the order to write it of {place.generation}")

    @staticmethod
    def _check_same(place: Place, have: int) -> None:
        if place.generation != have:
            raise StaleOrder(f"slot {place.slot} is of generation {have}, the order to read it of {place.generation}")


def _together(follow: Callable[[Sequence[_O]], list[_R]], orders: Sequence[_O]) -> list[_R | Exception]:
    """Follow orders in one go; where their checks, which come before any change, refuse that, each alone."""
    if not orders:
        return []
    try:
        return [*follow(orders)]
    except Exception as e:
        if len(orders) == 1:
            return [e]
    return [result for order in orders for result in _together(follow, [order])]
