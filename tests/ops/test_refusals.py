"""A step that does not fit is refused before anything changes, with the name and the value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from deltamem_vllm.ops.paged import WRITE_ALL, Batch, PagedOps
from tests.ops.paging import int32, make_shape

SHAPE = make_shape(4)
N = 8


def good() -> dict[str, Any]:
    """Arguments of a page_scan of two requests, 3 and 2 tokens."""
    return {
        "projected": torch.zeros(5, SHAPE.projected_columns),
        "bias": torch.zeros(SHAPE.bias_columns),
        "pages": torch.full((4, SHAPE.page_floats(N)), 7.0),
        "reads": torch.full((5, SHAPE.width), 9.0),
        "block_table": int32([[1, 0], [2, 0]]),
        "query_start_loc": int32([0, 3, 5]),
        "seq_lens": int32([3, 2]),
        "write_limit": torch.full((4,), WRITE_ALL, dtype=torch.int32),
        "unwritten": torch.zeros((4, 1), dtype=torch.int32),
        "block_size": N,
        "num_reqs": 2,
        "longest": 0,
    }


Change = Callable[[dict[str, Any]], dict[str, Any]]
REFUSED: dict[str, tuple[Change, str]] = {
    "columns": (lambda a: {"projected": torch.zeros(5, 3)}, "projected"),
    "columns apart": (lambda a: {"projected": torch.zeros(SHAPE.projected_columns, 5).T}, "projected"),
    "double": (lambda a: {"projected": a["projected"].double()}, "projected"),
    "transposed projection": (lambda a: {"projected": torch.zeros(SHAPE.projected_columns, 5).T}, "projected"),
    "overlapping rows": (
        lambda a: {"projected": torch.zeros(500).as_strided((5, SHAPE.projected_columns), (2, 1))},
        "projected",
    ),
    "bias": (lambda a: {"bias": torch.zeros(1)}, "bias"),
    "bias dtype": (lambda a: {"bias": a["bias"].bfloat16()}, "bias"),
    "narrow pages": (lambda a: {"pages": a["pages"][:, :10]}, "pages"),
    "transposed pages": (lambda a: {"pages": torch.zeros(SHAPE.page_floats(N), 4).T}, "pages"),
    "int64 table": (lambda a: {"block_table": a["block_table"].long()}, "block_table"),
    "limits of other pages": (lambda a: {"write_limit": a["write_limit"][:3]}, "write_limit"),
    "masks of other pages": (lambda a: {"unwritten": a["unwritten"][:3]}, "unwritten"),
    "masks of other blocks": (lambda a: {"unwritten": torch.zeros((4, 2), dtype=torch.int32)}, "unwritten"),
    "few reads": (lambda a: {"reads": a["reads"][:4]}, "reads"),
    "too many requests": (lambda a: {"num_reqs": 3}, "3 requests"),
    "rows beyond the tokens": (lambda a: {"query_start_loc": int32([0, 3, 6])}, "request 1"),
    "shorter than its tokens": (lambda a: {"seq_lens": int32([3, 1])}, "request 1"),
    "beyond the table": (lambda a: {"seq_lens": int32([3, 17])}, "request 1"),
    "garbage block": (lambda a: {"block_table": int32([[1, 0], [-1, 0]])}, "request 1 uses block -1"),
    "unknown later block": (
        lambda a: {"block_table": int32([[1, 0], [2, 4]]), "seq_lens": int32([3, 9])},
        "request 1 uses block 4",
    ),
    "no block size": (lambda a: {"block_size": 0}, "block_size|pages|unwritten"),
}

#: what only a look at the contents of device tensors could refuse
ON_THE_HOST = {
    "rows beyond the tokens",
    "shorter than its tokens",
    "beyond the table",
    "garbage block",
    "unknown later block",
}


def check_that_indices_are_not_followed(ops: PagedOps, case: str) -> None:
    """Kernels on a GPU do not fetch indices: request 1 does not fit, reads zero and touches no other page."""
    arguments = good()
    arguments["projected"] = torch.randn(5, SHAPE.projected_columns, generator=torch.Generator().manual_seed(0))
    arguments.update(REFUSED[case][0](arguments))
    pages, reads = arguments["pages"], arguments["reads"]
    batch = Batch(**{name: arguments.pop(name) for name in Batch._fields})
    ops.page_scan(SHAPE, batch=batch, **arguments)
    assert reads[:3].isfinite().all()
    assert (reads[:3] != 9.0).all(), "request 0 is served"
    if case == "unknown later block":  # its first block is known; what it reads there may be anything
        assert (pages[[0, 3]] == 7.0).all()
    else:
        assert (reads[3:] == 0).all()
        assert (pages[[0, 2, 3]] == 7.0).all()


@pytest.mark.parametrize("case", REFUSED)
def test_scan_refuses_and_changes_nothing(ops: PagedOps, case: str) -> None:
    change, match = REFUSED[case]
    arguments = good()
    arguments.update(change(arguments))
    pages, reads = arguments["pages"].clone(), arguments["reads"].clone()
    batch = Batch(**{name: arguments.pop(name) for name in Batch._fields})
    with pytest.raises((ValueError, RuntimeError), match=match):
        ops.page_scan(SHAPE, batch=batch, **arguments)
    assert torch.equal(arguments["pages"], pages)
    assert torch.equal(arguments["reads"], reads)


@pytest.mark.parametrize(("block_ids", "counts"), [([4], [0]), ([-1], [0]), ([0], [9]), ([0], [-1]), ([0, 1], [1])])
def test_state_refuses(ops: PagedOps, block_ids: list[int], counts: list[int]) -> None:
    out = torch.full((len(block_ids), 1, 4, 4), 9.0)
    with pytest.raises((ValueError, RuntimeError), match=r"page_state|counts"):
        ops.page_state(SHAPE, good()["pages"], int32(block_ids), int32(counts), N, out)
    assert (out == 9.0).all()
