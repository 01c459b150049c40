"""A served model gives the official code's answers and leaves its memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.engine.engine import Engine, Setup
from tests.engine.official import CASES, STANDING, Case, case
from tests.engine.runs import RUNS


@pytest.fixture(scope="module", params=CASES)
def official(request: pytest.FixtureRequest) -> Iterator[tuple[Engine, Case]]:
    expected = case(request.param)
    if request.param == STANDING:
        yield request.getfixturevalue("standing"), expected
        return
    with Engine(Setup(expected.model, expected.adapter), request.param) as engine:
        yield engine, expected


@pytest.mark.parametrize("run", RUNS)
def test_answers_and_memory_are_the_official_codes(official: tuple[Engine, Case], run: str) -> None:
    engine, expected = official
    RUNS[run](engine, expected, prompt=True)
