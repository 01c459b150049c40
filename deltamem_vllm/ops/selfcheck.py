"""A first call on a device: does a kernel start there at all, and does it answer like torch?"""

from __future__ import annotations

import torch

from deltamem_vllm.ops.layout import MemoryShape
from deltamem_vllm.ops.paged import WRITE_ALL, Batch, PagedOps, mask_words
from deltamem_vllm.ops.paged_torch import TorchOps

TOLERANCE = 1e-5
_SHAPE = MemoryShape(
    rank=8, heads=1, rankwise_gates=True, couple_lambda=True, update_mode="standard", normalize_qk=True
)
_N = 4


def why_not(ops: PagedOps, device: torch.device) -> str | None:
    """What speaks against an implementation on a device, or None.

    Two requests, of 6 and 3 tokens on pages of 4; the second starts behind the page that the first one fills.
    """
    generator = torch.Generator("cpu").manual_seed(0)

    def random(*sizes: int) -> torch.Tensor:  # models are built under other defaults of dtype and device
        return torch.randn(sizes, generator=generator, dtype=torch.float32, device="cpu")

    projected, bias = random(9, _SHAPE.projected_columns), random(_SHAPE.bias_columns)
    pages = random(5, _SHAPE.page_floats(_N))
    try:
        reads, after = _run(TorchOps(), torch.device("cpu"), projected, bias, pages)
        got, got_after = _run(ops, device, projected, bias, pages)
    except Exception as error:  # noqa: BLE001  whatever a driver or a compiler throws: another implementation serves
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
    worst = max(
        float((got - reads).abs().nan_to_num(1e9).max()), float((got_after - after).abs().nan_to_num(1e9).max())
    )
    return None if worst <= TOLERANCE else f"its answer is off by {worst:.1e}"


def _run(
    ops: PagedOps, device: torch.device, projected: torch.Tensor, bias: torch.Tensor, pages: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    def int32(values: list[int] | list[list[int]]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    own = pages.clone().to(device)
    batch = Batch(
        block_table=int32([[1, 2], [1, 3]]),
        query_start_loc=int32([0, 6, 9]),
        seq_lens=int32([6, 7]),
        write_limit=torch.full((5,), WRITE_ALL, dtype=torch.int32, device=device),
        unwritten=torch.zeros((5, mask_words(_N)), dtype=torch.int32, device=device),
        block_size=_N,
        num_reqs=2,
    )
    reads = torch.full((9, _SHAPE.width), float("nan"), dtype=torch.float32, device=device)
    ops.page_scan(_SHAPE, projected.to(device), bias.to(device), own, batch, reads)
    return reads.cpu(), own.cpu()
