"""Where a layer's memory lives: pages inside attention's own KV-cache blocks.

`StatePages` is an attention-like layer in vLLM's eyes. It asks for a KV cache of its own content size, lands in the
same KV-cache group as attention, and so shares its block table, allocator and prefix cache. What one page holds is
defined in `deltamem_vllm.ops.layout`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

from deltamem_vllm import compat
from deltamem_vllm.errors import ConfigError
from deltamem_vllm.memory.chain import Chain
from deltamem_vllm.ops.layout import SMALLEST_KERNEL_BLOCK, MemoryShape
from deltamem_vllm.ops.native import LayerConstants
from deltamem_vllm.ops.paged import WRITE_ALL, Batch, PagedOps, mask_words

SUFFIX = "deltamem"


class PageMetadataBuilder(AttentionMetadataBuilder[Batch]):
    """Takes from vLLM's common metadata what the delta rule needs, once per step for all layers."""

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: Any) -> AttentionCGSupport:
        """Whole steps of decodes, drafts included, where the chosen kernels read nothing but device tensors whose
        addresses stay; none where they walk the batch on the host."""
        layers = vllm_config.compilation_config.static_forward_context.values()
        pages = [layer for layer in layers if isinstance(layer, StatePages)]
        if pages and all(layer.kernels.graph_safe for layer in pages):
            return AttentionCGSupport.UNIFORM_BATCH
        return AttentionCGSupport.NEVER

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        # All layers of a group have pages of one size and the worker's one pair of masks.
        self._pages: StatePages = vllm_config.compilation_config.static_forward_context[layer_names[0]]
        if self._pages.chain is not None:
            self._pages.chain.check_group(layer_names)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Batch:
        m, masks = common_attn_metadata, self._pages.masks
        return Batch(
            m.block_table_tensor, m.query_start_loc, m.seq_lens, masks.limits, masks.unwritten, self._pages.tokens,
            m.num_reqs, m.max_query_len,
        )  # fmt: skip


class PageBackend(AttentionBackend):
    """The backend that vLLM asks about pages; it computes no attention."""

    @staticmethod
    def get_name() -> str:
        return "DELTAMEM"

    @staticmethod
    def get_impl_cls() -> Any:
        raise NotImplementedError("state pages are read and written by deltamem::scan, not by an attention impl")

    @staticmethod
    def get_builder_cls() -> type[PageMetadataBuilder]:
        return PageMetadataBuilder

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """A page must be one contiguous run of bytes."""
        return tuple(layout for layout in KVCacheLayout if layout.is_block_compact)


class WriteMasks:
    """Which tokens are only read. One pair of tables for all layers of a worker.

    A request's limit is looked up at its first block. That is sound because it is part of the prefix-cache salt:
    requests that share a first block have the same limit. What is not written before the limit is said per block,
    and is part of the block's hash: requests that share a block agree on it.

    Attributes:
        limits: [kernel blocks] int32; -1 memory off, `WRITE_ALL` no limit.
        unwritten: [kernel blocks, mask_words] int32, see `deltamem_vllm.ops.paged.Batch`.
        blocks: how many kernel blocks there are.
    """

    def __init__(self) -> None:
        self.limits = torch.empty(0, dtype=torch.int32)
        self.unwritten = torch.empty((0, 0), dtype=torch.int32)
        self.blocks = 0
        self._on_host: NDArray[np.int32] | None = self.limits.numpy()

    def resize(self, blocks: int, tokens: int, device: torch.device) -> None:
        """Make room for ``blocks`` kernel blocks of ``tokens``, all written until somebody says otherwise."""
        if self.limits.shape[0] < blocks or self.limits.device != device:
            self.limits = torch.full((blocks,), WRITE_ALL, dtype=torch.int32, device=device)
            self.unwritten = torch.zeros((blocks, mask_words(tokens)), dtype=torch.int32, device=device)
            self.blocks = blocks
            self._on_host = self.limits.numpy() if device.type == "cpu" else None

    def limit(self, blocks: Sequence[int], limits: Sequence[int]) -> None:
        """Set where requests end to write, by the kernel blocks where they start."""
        if self._on_host is not None:  # on the way of every request: less of it than torch's indexing
            self._on_host[blocks] = limits
        else:
            self.limits[blocks] = torch.tensor(limits, dtype=self.limits.dtype, device=self.limits.device)


class StatePages(nn.Module, AttentionLayerBase):
    """One layer's pages.

    Args:
        prefix: unique layer name, ending in ``.deltamem``.
        index: the backbone's layer.
        shape: the adapter's memory shape.
        kernels: the paged operators that run on these pages.
        masks: the worker's shared write masks.
        vllm_config: the engine's configuration, in whose forward context the layer registers.
        chain: the worker's layers, which this one joins; None where the kernels run each layer by itself.

    Attributes:
        pages: [kernel blocks, page_floats] fp32, a view of the KV cache; None until vLLM binds it.
        tokens: tokens per page (N).
        blocks_per_manager_block: kernel blocks that one block of vLLM's block manager is split into.
        place: among the chain's layers; 0 without one.
        constants: of the layer, for the chain; None until the layer's `MemoryLayer` has told them.
        attention: the module whose memory this is (`deltamem_vllm.memory.watching.Attention`).
    """

    attention: Any = None
    constants: LayerConstants | None = None

    def __init__(
        self,
        prefix: str,
        index: int,
        shape: MemoryShape,
        kernels: PagedOps,
        masks: WriteMasks,
        vllm_config: VllmConfig,
        chain: Chain | None = None,
    ) -> None:
        super().__init__()
        self.prefix, self.index, self.shape = prefix, index, shape
        self.chain, self.place = chain, chain.join(self) if chain is not None else 0
        self.kernels, self.masks = kernels, masks
        self.kv_cache = torch.tensor([])
        self.pages: torch.Tensor | None = None
        self.tokens = 0
        self.blocks_per_manager_block = 1
        self._manager_block = vllm_config.cache_config.block_size
        layers = vllm_config.compilation_config.static_forward_context
        if prefix in layers:
            raise ConfigError(f"layer {prefix} is already registered: the model was wrapped twice")
        layers[prefix] = self

    @property
    def follows(self) -> bool:
        """Whether the layer goes on from another one of its chain."""
        return self.place > 0

    def _floats_per_token(self, block_size: int) -> int:
        return self.shape.floats_per_token(min(block_size, SMALLEST_KERNEL_BLOCK))

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> FullAttentionSpec:
        block_size = vllm_config.cache_config.block_size
        self._manager_block = block_size
        return FullAttentionSpec(
            block_size=block_size,
            num_kv_heads=1,
            max_tp_shards=1,
            num_head_slots=1,
            head_size=self.shape.rank,
            dtype=compat.cache_dtype(vllm_config),
            kv_quant_mode=compat.cache_quant_mode(vllm_config),
            state_content_bytes=4 * self._floats_per_token(block_size),
        )

    def get_attn_backend(self) -> type[AttentionBackend]:
        return PageBackend

    def bind_kv_cache(self, kv_cache: torch.Tensor) -> None:
        """Take the cache vLLM allocated, ``[B, 1, N, bytes per token]``, as fp32 pages."""
        self.kv_cache = kv_cache
        if self.chain is not None:
            self.chain.rebind()
        view = kv_cache.view(torch.float32)
        blocks, one, tokens, floats = view.shape
        if one != 1 or view.stride(3) != 1 or view.stride(2) != floats:
            raise ConfigError(
                f"{self.prefix}: vLLM bound a KV cache {tuple(view.shape)} strided {view.stride()}; "
                "a page must be one contiguous run of floats"
            )
        if tokens * floats < self.shape.content_floats(tokens) or self._manager_block % tokens:
            raise ConfigError(
                f"{self.prefix}: a page of {tokens} tokens and {floats} floats each cannot hold "
                f"{self.shape}; use a --block-size that is a multiple of {SMALLEST_KERNEL_BLOCK}"
            )
        self.tokens = tokens
        self.blocks_per_manager_block = self._manager_block // tokens
        self.pages = view.as_strided((blocks, tokens * floats), (view.stride(0), 1), view.storage_offset())
        self.masks.resize(blocks, tokens, view.device)

    def know(self, constants: LayerConstants) -> None:
        """Take the layer's constants, for the chain."""
        self.constants = constants
        if self.chain is not None:
            self.chain.rebind()

    def base_of(self, kernel_block: int) -> torch.Tensor:
        """[H, r, r] view: the state before the first token of a kernel block."""
        assert self.pages is not None
        shape = self.shape
        return self.pages[kernel_block, : shape.state_floats].view(shape.heads, shape.rank, shape.rank)
