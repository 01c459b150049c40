"""A first call on a device: does a kernel start there at all, and does it answer like torch?"""

from __future__ import annotations

import torch

from deltamem_vllm.ops.layout import RELEASED, MemoryShape
from deltamem_vllm.ops.paged import WRITE_ALL, Batch, PagedOps, mask_words
from deltamem_vllm.ops.paged_torch import TorchOps

#: Of the largest value, or of 1 where all are smaller.
TOLERANCE = 1e-5
#: Tokens of the first request: one launch, and a prefill long enough that it is cut into chunks.
LENGTHS = (6, 200)
_N = 4


def why_not(ops: PagedOps, device: torch.device, shape: MemoryShape = RELEASED) -> str | None:
    """What speaks against an implementation on a device, or None.

    Two requests on pages of 4 tokens: a short or a long one, and one of 3 tokens that starts behind the page which the
    first one fills. The projection is a part of a wider one's columns, as it is served.
    """
    for length in LENGTHS:
        if problem := _why_not(ops, device, shape, length):
            return problem
    return None


def _why_not(ops: PagedOps, device: torch.device, shape: MemoryShape, length: int) -> str | None:
    generator = torch.Generator("cpu").manual_seed(0)

    def random(*sizes: int) -> torch.Tensor:  # models are built under other defaults of dtype and device
        return torch.randn(sizes, generator=generator, dtype=torch.float32, device="cpu")

    # Keys that are not normalised must be short, or the state grows from token to token.
    scale = 1.0 if shape.normalize_qk else 0.5 * shape.rank**-0.5
    wide, bias = random(length + 3, shape.projected_columns + 8) * scale, random(shape.bias_columns)
    pages = random(length // _N + 4, shape.page_floats(_N))
    try:
        expected = _run(TorchOps(), torch.device("cpu"), shape, wide, bias, pages)
        got = _run(ops, device, shape, wide, bias, pages)
    except Exception as error:  # noqa: BLE001  whatever a driver or a compiler throws: another implementation serves
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
    worst = max(
        float((a - b).abs().nan_to_num(1e9).max() / b.abs().max().clamp(min=1))
        for a, b in zip(got, expected, strict=True)
    )
    return None if worst <= TOLERANCE else f"its answer is off by {worst:.1e} of its largest value"


def _run(
    ops: PagedOps,
    device: torch.device,
    shape: MemoryShape,
    wide: torch.Tensor,
    bias: torch.Tensor,
    pages: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    def int32(values: list[int] | list[list[int]]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    tokens, own = len(wide), pages.clone().to(device)
    first, blocks = list(range(1, len(pages) - 1)), len(pages)  # block 0 is nobody's
    batch = Batch(
        block_table=int32([first, [1, blocks - 1, *first[2:]]]),
        query_start_loc=int32([0, tokens - 3, tokens]),
        seq_lens=int32([tokens - 3, _N + 3]),
        write_limit=torch.full((blocks,), WRITE_ALL, dtype=torch.int32, device=device),
        unwritten=torch.zeros((blocks, mask_words(_N)), dtype=torch.int32, device=device),
        block_size=_N,
        num_reqs=2,
    )
    reads = torch.full((tokens, shape.width), float("nan"), dtype=torch.float32, device=device)
    projected = wide.to(device)[:, 8:]
    ops.page_scan(shape, projected, bias.to(device), own, batch, reads)
    return reads.cpu(), own.cpu()
