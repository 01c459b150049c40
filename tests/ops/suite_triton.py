"""The paged operators' tests over Triton, in its interpreter, in sizes that fit its speed (3 ms per token and head).

Not collected by name: `test_triton.py` runs it in a process of its own, because Triton must be imported with
``TRITON_INTERPRET=1`` and must not be seen by other tests.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from deltamem_vllm.ops import triton_ops
from deltamem_vllm.ops.layout import UPDATE_MODES, MemoryShape
from deltamem_vllm.ops.paged import PagedOps
from deltamem_vllm.ops.pooled import PoolOps
from deltamem_vllm.ops.triton_ops import TritonOps
from loadtests.gpu.triton_in_chunks import TritonInChunks
from tests.conftest import NIGHTLY
from tests.ops import test_paged as paged
from tests.ops import test_pooled as pooled
from tests.ops import test_refusals as refusals
from tests.ops import test_sharing as sharing
from tests.ops.paging import FEW_SHAPES, UNTOUCHED, World, check_strided, make_shape, name_of, random_inputs, truth
from tests.ops.test_paged import (  # noqa: F401
    test_one_bad_session_does_not_reach_another,
    test_rows_of_no_request_read_zero,
    test_unwritten_tokens_leave_no_trace_of_bad_numbers,
)
from tests.ops.test_pooled import test_refusals_of_the_pool  # noqa: F401
from tests.ops.test_schedules import test_infinite_gates_and_keys  # noqa: F401
from tests.tolerances import KERNEL_READS, KERNEL_STATE

#: modes × gates × λ at one size, then every rank and head count, then the unnormalised rule.
SHAPES = [
    make_shape(4, 1, rankwise_gates=rankwise, couple_lambda=couple, update_mode=mode)
    for rankwise, couple, mode in itertools.product((True, False), (True, False), UPDATE_MODES)
] + [make_shape(rank, heads) for rank, heads in ((1, 4), (5, 2), (8, 1), (8, 4), (16, 1))]
SHAPES += [make_shape(8, 2, normalize_qk=False)]
plain_and_odd = pytest.mark.parametrize("shape", [FEW_SHAPES[0], FEW_SHAPES[3]], ids=name_of)
PLAIN = FEW_SHAPES[0]


@pytest.fixture
def ops() -> PagedOps:
    return TritonOps()


@pytest.fixture
def in_chunks() -> PagedOps:
    return TritonInChunks()


def any_block(shape: MemoryShape) -> int:
    return 4 if shape.rankwise_gates else 3


@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_scan_is_the_reference(ops: PagedOps, shape: MemoryShape) -> None:
    check_scan(ops, shape, any_block(shape))


def check_scan(ops: PagedOps, shape: MemoryShape, block_size: int) -> None:
    projected, bias, state = random_inputs(shape, 10)
    blocks = [5, 2, 7, 3, 1]
    world = World(shape, block_size=block_size, num_blocks=8)
    world.seed(5, state)
    world.mask(blocks, [2, 7])
    reads = world.scan(ops, bias, [(projected, 0, blocks)], extra_rows=2)
    expected, final = truth(shape, projected, bias, state, masked=(2, 7))
    torch.testing.assert_close(reads[:10].double(), expected, rtol=0, atol=KERNEL_READS)
    assert (reads[10:] == 0).all()
    torch.testing.assert_close(world.state_after(ops, blocks, 10).double(), final, rtol=0, atol=KERNEL_STATE)
    assert (world.whole[[0, 4, 6]] == UNTOUCHED).all()
    assert (world.whole[:, shape.content_floats(block_size) :] == UNTOUCHED).all()


#: one of each kind
CHUNKED = [PLAIN, make_shape(4, 2, couple_lambda=False), FEW_SHAPES[3], make_shape(4, update_mode="no_lambda")]


@pytest.mark.parametrize("block_size", [2, 3])
@pytest.mark.parametrize("shape", CHUNKED, ids=name_of)
def test_scan_in_chunks_is_the_reference(in_chunks: PagedOps, shape: MemoryShape, block_size: int) -> None:
    check_scan(in_chunks, shape, block_size)


@pytest.mark.parametrize(("seed", "shape"), [(0, PLAIN), (1, CHUNKED[1]), (2, PLAIN), (5, PLAIN)])
def test_any_forest_in_chunks(in_chunks: PagedOps, shape: MemoryShape, seed: int) -> None:
    sharing.test_any_forest_of_requests_that_share_pages(in_chunks, shape, seed)


def test_other_steps_in_chunks(in_chunks: PagedOps) -> None:
    paged.test_memory_off_touches_no_page(in_chunks, PLAIN)
    paged.test_a_mixed_batch_of_decodes_and_prefills(in_chunks)
    paged.test_nothing_else_is_touched(in_chunks, PLAIN)


def test_long_prefills_are_cut_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is served: chunks of its own choice, a short request beside it."""
    monkeypatch.setattr(triton_ops, "WORTH_CHUNKS", 20)
    monkeypatch.setattr(triton_ops, "SHORTEST_CHUNK", 8)
    projected, bias, state = random_inputs(PLAIN, 21)
    world = World(PLAIN, block_size=4)
    world.seed(0, state)
    world.seed(9, state)
    reads = world.scan(TritonOps(), bias, [(projected, 0, [0, 1, 2, 3, 4, 5]), (projected[:3], 0, [9])], extra_rows=2)
    expected = truth(PLAIN, projected, bias, state)[0]
    torch.testing.assert_close(reads[:24].double(), torch.cat([expected, expected[:3]]), rtol=0, atol=KERNEL_READS)
    assert (reads[24:] == 0).all()


@plain_and_odd
def test_half_precision_is_widened_exactly(ops: PagedOps, shape: MemoryShape) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        projected, bias, state = random_inputs(shape, 4)
        projected[0, :3] = torch.tensor([1e-7, 6e-5, -3e-8])
        reads = []
        for tokens in (projected.to(dtype), projected.to(dtype).float()):
            world = World(shape)
            world.seed(5, state)
            reads.append(world.scan(ops, bias, [(tokens, 0, [5])]))
        assert torch.equal(*reads)


@plain_and_odd
def test_the_projection_may_be_columns_of_a_wider_one(ops: PagedOps, in_chunks: PagedOps, shape: MemoryShape) -> None:
    check_strided(ops, shape, torch.bfloat16)
    check_strided(in_chunks, shape, torch.float32)


@pytest.mark.parametrize("scale", [1e-9, 1e-5, 1e-2, 0.3, 30.0, 1e4])
def test_activations_hold_at_every_scale(ops: PagedOps, scale: float) -> None:
    projected, bias, state = random_inputs(PLAIN, 6)
    values = projected[:, 16:24].clone()
    projected *= scale
    projected[:, 16:24] = values
    world = World(PLAIN)
    world.seed(3, state)
    reads = world.scan(ops, bias, [(projected, 0, [3])])
    torch.testing.assert_close(reads.double(), truth(PLAIN, projected, bias, state)[0], rtol=0, atol=KERNEL_READS)


@plain_and_odd
def test_split_window_is_the_whole_window(ops: PagedOps, shape: MemoryShape) -> None:
    projected, bias, state = random_inputs(shape, 12)
    whole, split = World(shape, block_size=4), World(shape, block_size=4)
    for world in (whole, split):
        world.seed(5, state)
    expected = whole.scan(ops, bias, [(projected, 0, [5, 2, 7])])
    reads, done = [], 0
    for count in (1, 3, 5, 1, 2):
        reads.append(split.scan(ops, bias, [(projected[done : done + count], done, [5, 2, 7])]))
        done += count
    assert torch.equal(torch.cat(reads), expected)
    assert torch.equal(split.pages, whole.pages)


def test_permuted_batch_gives_the_same_bits(ops: PagedOps) -> None:
    paged.test_permuted_batch_gives_the_same_bits(ops, PLAIN)


def test_nothing_else_is_touched(ops: PagedOps) -> None:
    paged.test_nothing_else_is_touched(ops, FEW_SHAPES[3])


def test_memory_off_touches_no_page(ops: PagedOps) -> None:
    paged.test_memory_off_touches_no_page(ops, PLAIN)


def test_a_mixed_batch_of_decodes_and_prefills(ops: PagedOps) -> None:
    paged.test_a_mixed_batch_of_decodes_and_prefills(ops)


@pytest.mark.parametrize("limit", [0, 3, 5, 8])
def test_write_limit_freezes_the_state(ops: PagedOps, limit: int) -> None:
    projected, bias, state = random_inputs(PLAIN, 8)
    world = World(PLAIN, block_size=4)
    world.seed(5, state, limit)
    reads = world.scan(ops, bias, [(projected, 0, [5, 2])])
    expected, final = truth(PLAIN, projected, bias, state, limit)
    torch.testing.assert_close(reads.double(), expected, rtol=0, atol=KERNEL_READS)
    torch.testing.assert_close(world.state_after(ops, [5, 2], 8).double(), final, rtol=0, atol=KERNEL_STATE)


def test_rejected_drafts_are_overwritten(ops: PagedOps) -> None:
    paged.test_rejected_drafts_are_overwritten(ops, PLAIN, 15)


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0]])
def test_pages_filled_and_hit_in_the_same_step(ops: PagedOps, order: list[int]) -> None:
    paged.test_pages_filled_and_hit_in_the_same_step(ops, PLAIN, order)


#: Two forests by day, two more, of which one takes as long as a dozen other tests, at night.
FORESTS = [(1, PLAIN), (2, PLAIN), *([(0, PLAIN), (3, FEW_SHAPES[3])] if NIGHTLY else [])]


@pytest.mark.parametrize(("seed", "shape"), FORESTS)
def test_any_forest_of_requests_that_share_pages(ops: PagedOps, shape: MemoryShape, seed: int) -> None:
    sharing.test_any_forest_of_requests_that_share_pages(ops, shape, seed)


@plain_and_odd
@pytest.mark.parametrize("first", [True, False])
def test_a_decode_fills_the_page_that_a_new_request_hits(ops: PagedOps, shape: MemoryShape, first: bool) -> None:
    sharing.test_a_decode_fills_the_page_that_a_new_request_hits(ops, shape, first)


def test_duplicates_of_a_prefix_are_mixed(ops: PagedOps) -> None:
    sharing.test_duplicates_of_a_prefix_are_mixed(ops, (2, 0, 1))


@plain_and_odd
def test_seeds(pool: PoolOps, shape: MemoryShape) -> None:
    pooled.test_seeds_go_where_they_should_and_nowhere_else(pool, shape)


@plain_and_odd
def test_takes(ops: PagedOps, pool: PoolOps, shape: MemoryShape) -> None:
    pooled.test_takes(ops, pool, shape, shape.rank == 8)


@pytest.mark.parametrize("case", [case for case in refusals.REFUSED if case not in refusals.ON_THE_HOST])
def test_tensors_that_do_not_fit_are_refused(ops: PagedOps, case: str) -> None:
    refusals.test_scan_refuses_and_changes_nothing(ops, case)


@pytest.mark.parametrize("case", sorted(refusals.ON_THE_HOST))
def test_indices_that_do_not_fit_are_not_followed(ops: PagedOps, case: str) -> None:
    refusals.check_that_indices_are_not_followed(ops, case)
