"""What a correction costs in a compiled graph: no kernel. Counted in the code that Inductor writes for a layer."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor import metrics

from deltamem_vllm.memory.correct import LARGEST_UNROLLED, correct
from tests.memory.inductor import code_of

HIDDEN, Q, KV, HEAD = 64, 128, 32, 32


@pytest.fixture(scope="module", autouse=True)
def opaque() -> Iterator[None]:
    """A scan and an attention of which the compiler sees only the signature, as in a served model."""
    library = torch.library.Library("deltamem_test", "FRAGMENT")
    library.define("scan(Tensor projected, Tensor(a!) reads) -> ()")
    library.define("attention(Tensor q, Tensor v, Tensor(a!) out) -> ()")
    for name in ("scan", "attention"):
        library.impl(name, lambda *_: None, "Meta")
    yield
    library._destroy()


def layer(x: Tensor, residual: Tensor, cos: Tensor, w: dict[str, Tensor], memory: bool) -> Tensor:
    """From the input of qkv_proj to the norm before the MLP; the memory's rows are the last of qkv_proj's weight."""
    q, v, projected = F.linear(x, w["qkv"]).split([Q, KV, w["qkv"].shape[0] - Q - KV], dim=-1)
    reads = x.new_empty((x.shape[0], w["for_q"].shape[0]), dtype=torch.float32)
    if memory:
        torch.ops.deltamem_test.scan(projected, reads)
        q = correct(q, reads, w["for_q"])
    q = F.rms_norm(q.view(-1, Q // HEAD, HEAD).float(), (HEAD,)).to(x.dtype) * w["head_norm"]
    a, b = q.chunk(2, -1)  # rotary embedding
    q = torch.cat([a * cos - b * cos, b * cos + a * cos], -1)
    attended = torch.empty((x.shape[0], Q), dtype=x.dtype)
    torch.ops.deltamem_test.attention(q.view(-1, Q), v, attended)
    out = F.linear(attended, w["o"])
    if memory:
        out = correct(out, reads, w["for_o"])
    residual += out
    return F.rms_norm(residual.float(), (HIDDEN,)).to(x.dtype) * w["norm"]


def written(rank: int, memory: bool) -> tuple[int, int]:
    """Kernels that Inductor writes, and launches: those, matrix products and custom operators. Nothing is run."""

    def weight(*sizes: int) -> Tensor:
        return torch.empty(sizes, dtype=torch.bfloat16)

    w = {"qkv": weight(Q + KV + 4 * rank, HIDDEN), "o": weight(HIDDEN, Q), "head_norm": weight(HEAD)}
    w |= {"norm": weight(HIDDEN), "for_q": weight(rank, Q), "for_o": weight(rank, HIDDEN)}
    inputs: list[Any] = [weight(4, HIDDEN), weight(4, HIDDEN), weight(4, 1, HEAD // 2)]
    metrics.reset()
    code = code_of(layer, (*inputs, w, memory), inputs, 1)
    call = r"^ +(?:cpp_fused\w*|extern_kernels\.\w+|torch\.ops\.[\w.]+)\("
    return metrics.generated_kernel_count, len(re.findall(call, code, re.MULTILINE))


@pytest.fixture(scope="module")
def without() -> tuple[int, int]:
    """Kernels and launches of the layer without memory."""
    return written(8, memory=False)


@pytest.mark.parametrize("rank", [8, 16])
def test_the_scan_is_the_only_further_launch(without: tuple[int, int], rank: int) -> None:
    kernels, launches = without
    assert written(rank, memory=True) == (kernels, launches + 1)


def test_the_count_sees_corrections_that_are_launches(without: tuple[int, int]) -> None:
    """Beyond the ranks that are written out, a correction is a matrix product of its own."""
    assert written(LARGEST_UNROLLED + 1, memory=True)[1] > without[1] + 1


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_corrections_are_the_product(dtype: torch.dtype, compiling: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounded once where it is written out; a 16-bit product rounds the reads too."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    random = torch.Generator().manual_seed(0)
    wide, reads, matrix = (torch.randn(5, n, generator=random) for n in (40, 8, 24 * 8))
    out, matrix = wide.to(dtype)[:, 3:27], matrix[0].view(8, 24).to(dtype)
    before = wide.to(dtype)
    got = correct(out, reads, matrix)
    assert got.dtype == dtype
    assert torch.equal(out, before[:, 3:27]), "the linear's output is left as it was"
    exact = out.double() + reads.double() @ matrix.double()
    if dtype == torch.float32:
        torch.testing.assert_close(got.double(), exact, rtol=0, atol=5e-6)
    elif compiling:
        assert (got == exact.to(dtype)).float().mean() > 0.95, "more than one rounding"
    else:
        torch.testing.assert_close(got.double(), exact, rtol=2**-7, atol=2**-6)
