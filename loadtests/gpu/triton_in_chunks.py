"""Triton's operators, every step cut into chunks: for checks. Imported only where Triton is."""

from __future__ import annotations

from deltamem_vllm.ops.layout import MemoryShape
from deltamem_vllm.ops.paged import Batch
from deltamem_vllm.ops.triton_ops import TritonOps


class TritonInChunks(TritonOps):
    """Chunks of two blocks."""

    def _chunk_of(self, shape: MemoryShape, tokens: int, batch: Batch) -> int:
        return 2 * batch.block_size
