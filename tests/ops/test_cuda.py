"""The CUDA kernels: their source, emulated on a CPU, against the reference; and that a CUDA compiler takes them.

Emulation runs blocks one after another in an order that differs from launch to launch, with shared memory full of NaN,
and ends the process at a barrier that threads reach at different lines. Once in one launch, once cut into chunks.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deltamem_vllm.ops import dispatch
from deltamem_vllm.ops.cuda import CudaOps
from deltamem_vllm.ops.layout import UPDATE_MODES, MemoryShape
from deltamem_vllm.ops.paged import PagedOps
from deltamem_vllm.ops.selfcheck import why_not
from tests.conftest import NIGHTLY
from tests.ops import cuda_emulated
from tests.ops import test_paged as paged
from tests.ops import test_pooled as pooled
from tests.ops import test_refusals as refusals
from tests.ops import test_schedules as schedules
from tests.ops import test_sharing as sharing
from tests.ops.paging import FEW_SHAPES, check_strided, make_shape, name_of
from tests.ops.test_paged import (  # noqa: F401
    test_a_mixed_batch_of_decodes_and_prefills,
    test_memory_off_touches_no_page,
    test_nothing_else_is_touched,
    test_one_bad_session_does_not_reach_another,
    test_page_state_of_many,
    test_permuted_batch_gives_the_same_bits,
    test_rejected_drafts_are_overwritten,
    test_rows_of_no_request_read_zero,
    test_unwritten_tokens_leave_no_trace_of_bad_numbers,
)
from tests.ops.test_pooled import test_refusals_of_the_pool  # noqa: F401
from tests.ops.test_schedules import test_infinite_gates_and_keys  # noqa: F401

SHAPES = [
    make_shape(8, 1, rankwise_gates=rankwise, couple_lambda=couple, update_mode=mode)
    for rankwise, couple, mode in itertools.product((True, False), (True, False), UPDATE_MODES)
] + [make_shape(rank, heads) for rank, heads in ((1, 4), (4, 3), (5, 2), (8, 4), (16, 1), (33, 1))]
SHAPES += [make_shape(8, 2, normalize_qk=False)]
few = pytest.mark.parametrize("shape", FEW_SHAPES, ids=name_of)


class InChunks(CudaOps):
    """Every step of a tuned rank is cut into chunks of two blocks, however short it is."""

    def page_scan(self, shape: MemoryShape, projected, bias, pages, batch, reads) -> None:  # type: ignore[no-untyped-def]
        self._chunk = 2 * batch.block_size if shape.rank in (4, 8, 16) else 0
        super().page_scan(shape, projected, bias, pages, batch, reads)


@pytest.fixture(params=["one launch", "in chunks"])
def ops(request: pytest.FixtureRequest) -> PagedOps:
    return (InChunks if request.param == "in chunks" else CudaOps)(cuda_emulated.library())


@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_scan_is_the_reference(ops: PagedOps, shape: MemoryShape) -> None:
    paged.test_scan_is_the_reference(ops, shape)


@few
@pytest.mark.parametrize("block_size", [1, 3, 32])
def test_any_block_size(ops: PagedOps, shape: MemoryShape, block_size: int) -> None:
    paged.test_any_block_size(ops, shape, block_size)


@few
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened_exactly(ops: PagedOps, shape: MemoryShape, dtype: torch.dtype) -> None:
    paged.test_half_precision_is_widened_exactly(ops, shape, dtype)


@few
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_projection_may_be_columns_of_a_wider_one(ops: PagedOps, shape: MemoryShape, dtype: torch.dtype) -> None:
    check_strided(ops, shape, dtype)


@few
@pytest.mark.parametrize("chunks", [[1] * 50, [7] * 7 + [1], [15, 1, 1, 33]], ids=len)
def test_split_window_is_the_whole_window(ops: PagedOps, shape: MemoryShape, chunks: list[int]) -> None:
    paged.test_split_window_is_the_whole_window(ops, shape, chunks)


@few
@pytest.mark.parametrize("block_size", [16, 64])
def test_masked_tokens_read_and_are_not_written(ops: PagedOps, shape: MemoryShape, block_size: int) -> None:
    paged.test_masked_tokens_read_and_are_not_written(ops, shape, block_size)


@few
def test_write_limit_freezes_the_state(shape: MemoryShape) -> None:
    """Exactly; between chunks only nearly, see the schedules."""
    paged.test_write_limit_freezes_the_state(CudaOps(cuda_emulated.library(), chunk=0), shape)


@few
@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 2, 0]])
def test_pages_filled_and_hit_in_the_same_step(ops: PagedOps, shape: MemoryShape, order: list[int]) -> None:
    paged.test_pages_filled_and_hit_in_the_same_step(ops, shape, order)


@few
@pytest.mark.parametrize("seed", range(8))
def test_any_forest_of_requests_that_share_pages(ops: PagedOps, shape: MemoryShape, seed: int) -> None:
    sharing.test_any_forest_of_requests_that_share_pages(ops, shape, seed)


@few
@pytest.mark.parametrize("first", [True, False])
def test_a_decode_fills_the_page_that_a_new_request_hits(ops: PagedOps, shape: MemoryShape, first: bool) -> None:
    sharing.test_a_decode_fills_the_page_that_a_new_request_hits(ops, shape, first)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (2, 0, 1)])
def test_duplicates_of_a_prefix_are_mixed(ops: PagedOps, order: tuple[int, ...]) -> None:
    sharing.test_duplicates_of_a_prefix_are_mixed(ops, order)


@few
@pytest.mark.parametrize("seed", range(4))
def test_any_schedule_gives_the_reads_of_one_whole_scan(ops: PagedOps, shape: MemoryShape, seed: int) -> None:
    schedules.test_any_schedule_gives_the_reads_of_one_whole_scan(ops, shape, False, seed)


@pytest.mark.parametrize("scale", [1e-9, 1e-5, 1e-2, 1.0, 30.0, 1e4])
@pytest.mark.parametrize("shape", FEW_SHAPES[:3], ids=name_of)
def test_activations_hold_at_every_scale(ops: PagedOps, shape: MemoryShape, scale: float) -> None:
    schedules.test_activations_hold_at_every_scale(ops, shape, scale)


@few
def test_seeds(pool: pooled.PoolOps, shape: MemoryShape) -> None:
    pooled.test_seeds_go_where_they_should_and_nowhere_else(pool, shape)


@few
@pytest.mark.parametrize("with_staging", [True, False])
def test_takes(ops: PagedOps, pool: pooled.PoolOps, shape: MemoryShape, with_staging: bool) -> None:
    pooled.test_takes(ops, pool, shape, with_staging)


@pytest.mark.parametrize("case", [case for case in refusals.REFUSED if case not in refusals.ON_THE_HOST])
def test_tensors_that_do_not_fit_are_refused(ops: PagedOps, case: str) -> None:
    refusals.test_scan_refuses_and_changes_nothing(ops, case)


@pytest.mark.parametrize("case", sorted(refusals.ON_THE_HOST))
def test_indices_that_do_not_fit_are_not_followed(ops: PagedOps, case: str) -> None:
    refusals.check_that_indices_are_not_followed(ops, case)


def test_long_prefills_are_cut_by_themselves() -> None:
    """700 tokens: what is served, with chunk boundaries of its own choice, and a short request beside it."""
    shape = make_shape(8)
    ops = CudaOps(cuda_emulated.library())
    projected, bias, state = paged.random_inputs(shape, 700)
    world = paged.World(shape, num_blocks=64)
    world.seed(0, state)
    world.seed(60, state)
    reads = world.scan(ops, bias, [(projected, 0, list(range(44))), (projected[:5], 0, [60])], extra_rows=2)
    expected, final = paged.truth(shape, projected, bias, state)
    paged.close(reads[:700], expected, paged.KERNEL_READS)
    paged.close(reads[700:705], expected[:5], paged.KERNEL_READS)
    assert (reads[705:] == 0).all()
    paged.close(world.state_after(ops, list(range(44)), 700), final, paged.KERNEL_STATE)


PLANTED = """
import torch
from deltamem_vllm.ops.cuda import CudaOps
from tests.ops import cuda_emulated, test_sharing
from tests.ops.paging import FEW_SHAPES
ops = CudaOps(cuda_emulated.library(("return found;", "return -1;")), chunk={chunk})
wrong = 0
for seed in range(4):
    try:
        test_sharing.test_any_forest_of_requests_that_share_pages(ops, FEW_SHAPES[0], seed)
    except AssertionError:
        wrong += 1
print("wrong", wrong)
"""


@pytest.mark.parametrize("chunk", [0, 8])
def test_the_tests_notice_kernels_that_read_what_their_launch_writes(chunk: int) -> None:
    """The same kernels without the search for sources: right or wrong as the blocks happen to run."""
    run = subprocess.run(
        [sys.executable, "-c", PLANTED.format(chunk=chunk)], cwd=cuda_emulated.ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(cuda_emulated.ROOT)}, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert int(run.stdout.split()[-1]) > 0


def test_a_rank_without_a_kernel_is_refused_with_the_remedy() -> None:
    shape = make_shape(65)
    world = paged.World(shape, num_blocks=2)
    with pytest.raises(RuntimeError, match="--deltamem-kernel triton"):
        world.scan(CudaOps(cuda_emulated.library()), torch.zeros(65), [(torch.zeros(1, 260), 0, [1])])


@pytest.mark.parametrize("shape", [*FEW_SHAPES, make_shape(64), make_shape(8, 2, normalize_qk=False)], ids=name_of)
def test_the_trial_at_start_takes_every_shape_that_is_served(shape: MemoryShape) -> None:
    assert why_not(CudaOps(cuda_emulated.library()), torch.device("cpu"), shape) is None


def test_a_rank_without_a_kernel_is_found_at_start(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The trial itself runs on the CPU here, where the emulated kernels are."""
    monkeypatch.setattr(dispatch, "find_library", lambda name: cuda_emulated.library())
    monkeypatch.setattr(dispatch, "why_not", lambda ops, device, shape: why_not(ops, torch.device("cpu"), shape))
    dispatch.select.cache_clear()
    assert isinstance(dispatch.select("cuda", shape=make_shape(64)), CudaOps)
    assert not isinstance(dispatch.select("cuda", shape=make_shape(65)), CudaOps)
    dispatch.select.cache_clear()
    assert "the CUDA kernels serve ranks from 1 to 64, got rank 65" in caplog.text
    assert "use --deltamem-kernel triton" in caplog.text


#: One architecture each day, all that wheels are built for at night: a compilation takes about 15 s.
ARCHITECTURES = ("80", "90", "100") if NIGHTLY else ("90",)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_cuda_compiler_takes_the_kernels(architecture: str, tmp_path: Path) -> None:
    """Where there is a CUDA compiler. Where there is none (nvcc not on PATH), the emulation above has compiled the same
    source, and there is nothing more that this machine could do."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        assert cuda_emulated.library().is_file()
        return
    target = f"arch=compute_{architecture},code=sm_{architecture}"
    command = [nvcc, "-c", "-std=c++17", "-O3", "-Werror=all-warnings", "-Xptxas=-v", "-gencode", target]
    kernels = str(cuda_emulated.CSRC / "cuda" / "kernels.cu")
    run = subprocess.run(
        [*command, "-o", str(tmp_path / "kernels.o"), kernels], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill stores", run.stderr)]
    assert len(spills) == 4 * 2 + 3 * 3 + 1, "every kernel: step and take for four ranks, three phases for three, seed"
    assert not any(spills)


def test_the_bindings_compile_against_cuda(tmp_path: Path) -> None:
    """Where there are CUDA's headers; elsewhere the emulation has compiled all but the stream and the device guard."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        assert cuda_emulated.library().is_file()
        return
    run = subprocess.run(
        [
            nvcc, "-c", "-std=c++17", "-Xcompiler", "-Wall,-Wextra,-Werror", "-isystem",
            str(Path(torch.__file__).parent / "include"), "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DUSE_CUDA",
            str(cuda_emulated.CSRC / "bindings" / "cuda_ops.cpp"), "-o", str(tmp_path / "bindings.o"),
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
