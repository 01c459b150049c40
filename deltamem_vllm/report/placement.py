"""Where in memory the weights lie that vLLM has packed for a CPU's matrix products.

A product takes percents more or less time with where its weight happens to lie, and an engine's weights lie where they
lie for as long as it lives: two engines of one and the same model differ by more than what is to be measured between
two. So in a comparison all engines give back the memory of their weights, again and again, and take it anew in another
order, so that each gets what another had; figures are averages over the places.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch

PATTERN = 1 << 20
"""So many random numbers make up the weights, one block of them after the other: how long a product takes does not
depend on them, and what is left out is the time to draw them."""
SPREAD = 1e-3
"""Of the random numbers, as of those that vLLM makes up (``load_format="dummy"``)."""


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


def _random(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Numbers for weights, in one dimension."""
    pattern = torch.empty(min(PATTERN, count)).uniform_(-SPREAD, SPREAD).to(dtype)
    return pattern.repeat(-(-count // len(pattern)))
