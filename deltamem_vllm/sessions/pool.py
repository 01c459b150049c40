"""The session pool: states in device memory, and the copies between them and pages."""

import numpy as np
import torch

from deltamem_vllm.memory.pages import StatePages
from deltamem_vllm.ops.paged import PagedOps


class SessionPool:
    """States of this worker's layers.

    Args:
        layers: this worker's pages, in layer order.
        positions: where each of them lies on axis 0 of a whole session state.
        slots: size of the pool.
        kernels: paged operators.

    Attributes:
        states: [slots, local layers, H, r, r] fp32 on the device.
    """

    def __init__(self, layers: list[StatePages], positions: list[int], slots: int, kernels: PagedOps) -> None:
        self.layers, self.positions, self.kernels = layers, positions, kernels
        self.shape = layers[0].shape
        pages = layers[0].pages
        assert pages is not None
        self.device = pages.device
        side = (self.shape.heads, self.shape.rank, self.shape.rank)
        self.states = torch.zeros((slots, len(layers), *side), dtype=torch.float32, device=self.device)

    def kernel_block(self, manager_block: int) -> int:
        """First kernel block of a block manager's block."""
        return manager_block * self.layers[0].blocks_per_manager_block

    def fill(self, slot: int, payload: bytes) -> None:
        """Put a session's state, bytes of [all layers, H, r, r] fp32, into a slot."""
        whole = torch.from_numpy(np.frombuffer(payload, dtype=np.float32).copy())
        whole = whole.view(-1, *self.states.shape[2:])
        self.states[slot].copy_(whole[self.positions])

    def seed(self, block: int, slot: int | None) -> None:
        """Make a slot's state (None: the empty memory) the base of a block, in every layer."""
        block = self.kernel_block(block)
        for i, layer in enumerate(self.layers):
            base = layer.base_of(block)
            if slot is None:
                base.zero_()
            else:
                base.copy_(self.states[slot, i])

    def set_limit(self, block: int, limit: int) -> None:
        """From which position on the request that starts at a block only reads."""
        self.layers[0].masks.limits[self.kernel_block(block)] = limit

    def take(self, block: int, count: int, slot: int) -> bytes:
        """The state after ``count`` tokens of a block: into a slot, and as bytes of [local layers, H, r, r]."""
        tokens = self.layers[0].tokens
        kernel_block = self.kernel_block(block) + (count - 1) // tokens
        ids = torch.tensor([kernel_block], dtype=torch.int32, device=self.device)
        counts = torch.tensor([(count - 1) % tokens + 1], dtype=torch.int32, device=self.device)
        out = self.states[slot]
        for i, layer in enumerate(self.layers):
            assert layer.pages is not None
            self.kernels.page_state(self.shape, layer.pages, ids, counts, tokens, out[i : i + 1])
        return out.cpu().numpy().tobytes()

    def zero(self, slot: int) -> None:
        """Leave nothing of a state behind."""
        self.states[slot].zero_()
