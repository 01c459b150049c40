from __future__ import annotations

import dataclasses

import pytest

from tests.ops.paging import make_shape


def test_released_adapter() -> None:
    """Rank 8, one head: the sizes design documents quote."""
    shape = make_shape(8)
    assert (shape.width, shape.gates, shape.bias_columns) == (8, 8, 8)
    assert shape.projected_columns == 32
    assert shape.log_columns == 24
    assert shape.state_floats == 64
    assert shape.floats_per_token(16) == 28
    assert shape.page_floats(16) == 448 == shape.content_floats(16)


@pytest.mark.parametrize(
    ("changes", "gates", "bias", "columns", "log"),
    [
        ({}, 12, 12, 48, 36),
        ({"couple_lambda": False}, 12, 24, 60, 48),
        ({"couple_lambda": False, "update_mode": "no_lambda"}, 12, 12, 48, 36),
        ({"rankwise_gates": False}, 3, 3, 39, 27),
        ({"rankwise_gates": False, "couple_lambda": False}, 3, 6, 42, 30),
    ],
)
def test_columns(changes: dict[str, object], gates: int, bias: int, columns: int, log: int) -> None:
    shape = make_shape(4, 3, **changes)
    assert (shape.gates, shape.bias_columns, shape.projected_columns, shape.log_columns) == (
        gates,
        bias,
        columns,
        log,
    )
    assert shape.page_floats(7) >= shape.content_floats(7) == 48 + 7 * log
    assert shape.page_floats(7) % 7 == 0


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"heads": 0}, {"update_mode": "Standard"}])
def test_impossible_shapes(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=str(next(iter(wrong)))):
        dataclasses.replace(make_shape(4), **wrong)
