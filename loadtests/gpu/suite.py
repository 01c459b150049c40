"""The tests of ``tests/ops`` on the device, for each kernel; run by ``check.py``, not collected by name."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from deltamem_vllm.ops.cuda import CUDA_LIBRARY, CudaOps
from deltamem_vllm.ops.layout import UPDATE_MODES
from deltamem_vllm.ops.paged import PagedOps
from deltamem_vllm.ops.paged_torch import TorchOps
from loadtests.gpu.on_device import OnDevice
from tests.ops import test_paged as paged
from tests.ops import test_refusals as refusals
from tests.ops.paging import FEW_SHAPES, World, check_strided, make_shape, name_of, random_inputs, truth
from tests.ops.test_paged import *  # noqa: F403
from tests.ops.test_pooled import *  # noqa: F403
from tests.ops.test_schedules import *  # noqa: F403
from tests.ops.test_sharing import *  # noqa: F403
from tests.tolerances import KERNEL_READS, KERNEL_STATE

TINY = bool(os.environ.get("DELTAMEM_GPU_TINY"))


class InChunks(CudaOps):
    """Every step of a tuned rank is cut into chunks of two blocks."""

    def page_scan(self, shape: Any, projected: Any, bias: Any, pages: Any, batch: Any, reads: Any) -> None:
        self._chunk = 2 * batch.block_size if shape.rank in (4, 8, 16) else 0
        super().page_scan(shape, projected, bias, pages, batch, reads)


def _make(name: str) -> OnDevice:
    if TINY:
        return OnDevice(TorchOps(), torch.device("cpu"))
    device, library = torch.device("cuda"), Path(os.environ["DELTAMEM_GPU_OUT"]) / CUDA_LIBRARY
    if name == "triton":
        from deltamem_vllm.ops.triton_ops import TritonOps

        return OnDevice(TritonOps(), device)
    if name == "triton in chunks":
        from loadtests.gpu.triton_in_chunks import TritonInChunks

        return OnDevice(TritonInChunks(), device)
    return OnDevice((InChunks if name == "cuda in chunks" else CudaOps)(library), device)


@pytest.fixture(params=["torch"] if TINY else ["cuda", "cuda in chunks", "triton", "triton in chunks"])
def ops(request: pytest.FixtureRequest) -> PagedOps:
    return _make(request.param)


@pytest.fixture
def pool(ops: PagedOps) -> PagedOps:
    return ops


#: Triton compiles for 3 s per shape, so it gets one of each kind; the interpreter has seen the others.
SHAPES = [
    make_shape(8, 1, rankwise_gates=rankwise, couple_lambda=couple, update_mode=mode)
    for rankwise, couple, mode in itertools.product((True, False), (True, False), UPDATE_MODES)
] + [make_shape(rank, heads) for rank, heads in ((1, 4), (4, 3), (5, 2), (8, 4), (16, 1), (33, 1))]
PAIRS = [("torch", FEW_SHAPES[0])] if TINY else [(name, x) for name in ("cuda", "cuda in chunks") for x in SHAPES]
PAIRS += [] if TINY else [(name, shape) for name in ("triton", "triton in chunks") for shape in FEW_SHAPES]


@pytest.mark.parametrize(  # type: ignore[no-redef]
    ("ops", "shape"), PAIRS, indirect=["ops"], ids=lambda x: x if isinstance(x, str) else name_of(x)
)
def test_scan_is_the_reference(ops: PagedOps, shape: Any) -> None:
    paged.test_scan_is_the_reference(ops, shape)


@pytest.mark.parametrize("shape", FEW_SHAPES[:2], ids=name_of)
def test_the_projection_may_be_columns_of_a_wider_one(ops: PagedOps, shape: Any) -> None:
    check_strided(ops, shape, torch.bfloat16)


def test_write_limit_freezes_the_state(ops: PagedOps) -> None:  # type: ignore[no-redef]
    """Nearly: chunks pass a frozen state on by a product."""
    shape = FEW_SHAPES[0]
    projected, bias, state = random_inputs(shape, 40)
    for limit in (0, 1, 16, 21, 39, 40):
        world = World(shape)
        world.seed(5, state, limit)
        reads = world.scan(ops, bias, [(projected, 0, [5, 2, 7])])
        expected, final = truth(shape, projected, bias, state, limit)
        torch.testing.assert_close(reads.double(), expected, rtol=0, atol=KERNEL_READS)
        end = world.state_after(ops, [5, 2, 7], 40)
        torch.testing.assert_close(end.double(), final, rtol=0, atol=KERNEL_STATE)


@pytest.mark.parametrize("case", sorted(refusals.ON_THE_HOST))
def test_indices_that_do_not_fit_are_not_followed(ops: PagedOps, case: str) -> None:
    if TINY:
        refusals.test_scan_refuses_and_changes_nothing(ops, case)
    else:
        refusals.check_that_indices_are_not_followed(ops, case)


@pytest.mark.parametrize("shape", [make_shape(8), make_shape(16, 2)], ids=name_of)
def test_a_long_prefill(ops: PagedOps, shape: Any) -> None:
    tokens = 100 if TINY else 3000
    projected, bias, state = random_inputs(shape, tokens)
    world = World(shape, num_blocks=tokens // 16 + 2)
    world.seed(0, state)
    reads = world.scan(ops, bias, [(projected, 0, list(range(tokens // 16 + 1)))])
    torch.testing.assert_close(reads.double(), truth(shape, projected, bias, state)[0], rtol=0, atol=KERNEL_READS)
