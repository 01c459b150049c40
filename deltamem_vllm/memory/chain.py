"""The layers of a worker as one row: a step begins with the first of them, and each of the others goes on from there.

What a step's layers share (its requests, their blocks, how the work is cut over threads) is then looked up and checked
once, in Python, and not once per layer: on a CPU that is most of what a layer of a decode step would cost. Only for
kernels that can go on so (`deltamem_vllm.ops.native.NativeOps`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from deltamem_vllm.errors import ConfigError
from deltamem_vllm.ops.native import LayerRows, LayerTable, NativeOps
from deltamem_vllm.ops.paged import Batch
from deltamem_vllm.ops.pooled import Book

if TYPE_CHECKING:
    from deltamem_vllm.memory.pages import StatePages


class Chain:
    """The layers of one worker.

    Args:
        kernels: run all of them.
    """

    def __init__(self, kernels: NativeOps) -> None:
        self._kernels = kernels
        self._layers: list[StatePages] = []
        self._told: tuple[LayerTable, Book] | None = None

    def join(self, layer: StatePages) -> int:
        """Add a layer behind the others; returns its place, from 0."""
        self._layers.append(layer)
        return len(self._layers) - 1

    def check_group(self, names: list[str]) -> None:
        """Refuse a group of layers that is not the whole chain: its layers share a step's batch.

        Raises:
            ConfigError: vLLM has put some of them elsewhere.
        """
        if apart := [layer.prefix for layer in self._layers if layer.prefix not in names]:
            raise ConfigError(
                f"{', '.join(apart)}: vLLM has put these layers into another KV-cache group than {names[0]}: serve "
                "with --deltamem-kernel torch, and report it"
            )

    def rebind(self) -> None:
        """A layer's pages lie elsewhere now, or its constants do."""
        self._told = None

    def begin(self, layer: LayerRows, batches: dict[str, Batch] | None) -> None:
        """Run the first layer of a step.

        Args:
            batches: by layer, the step's; None: there is no request, and no page to be touched.
        """
        if batches is None:
            self._kernels.scan_nothing(len(self._layers))
            if layer.kept is not None:
                layer.kept.zero_()
            return
        first = self._layers[0]
        if self._told is None:
            self._told = self._tell(first)
        self._kernels.scan_first(first.shape, layer, *self._told, batches[first.prefix])

    def _tell(self, first: StatePages) -> tuple[LayerTable, Book]:
        known = [each.constants for each in self._layers if each.constants is not None]
        bound = [each.pages for each in self._layers if each.pages is not None]
        return LayerTable.of(first.shape, known), Book.of(bound, first.tokens)
