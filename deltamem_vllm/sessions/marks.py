"""Which blocks of the KV cache hold tokens that are not written, followed through the scheduler's hand-outs.

A block keeps its mark while it lies in the prefix cache: its hash says the mark, so whoever hits it means the same. A
block that is handed out for other content loses it.
"""

from dataclasses import dataclass

import numpy as np

from deltamem_vllm.sessions.masks import Spans, block_bits, marked_blocks
from deltamem_vllm.sessions.steps import Mark


@dataclass
class _Request:
    spans: Spans
    blocks: int = 0  # handed out so far


class Marks:
    """The marks of one engine.

    Args:
        block_size: tokens per block of the block manager.
    """

    def __init__(self, block_size: int) -> None:
        self._size = block_size
        self._requests: dict[str, _Request] = {}
        self._marked: set[int] = set()

    @property
    def any(self) -> bool:
        """Whether there is anything to follow."""
        return bool(self._requests or self._marked)

    def follow(self, request: str, spans: Spans) -> None:
        """A request arrived; its tokens in ``spans`` are not written."""
        if spans:
            self._requests[request] = _Request(spans)

    def leave(self, request: str) -> None:
        """A request ended; its blocks keep their marks until they are handed out again."""
        self._requests.pop(request, None)

    def given(self, request: str, blocks: list[int], *, anew: bool) -> list[Mark]:
        """The scheduler handed out blocks: the next ones of a request, or (``anew``) its first ones, cached ones among
        them."""
        if not self.any:
            return []
        orders = []
        stale = self._marked.intersection(blocks)
        if (masked := self._requests.get(request)) is not None:
            first = 0 if anew else masked.blocks
            masked.blocks = first + len(blocks)
            for index in marked_blocks(masked.spans, self._size, first, masked.blocks):
                bits = block_bits(masked.spans, index, self._size)
                orders.append(Mark(request, blocks[index - first], np.packbits(bits, bitorder="little").tobytes()))
                self._marked.add(blocks[index - first])
                stale.discard(blocks[index - first])
        orders += [Mark(request, block, None) for block in stale]
        self._marked -= stale
        return orders
