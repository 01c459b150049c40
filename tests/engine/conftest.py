from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from tests.engine.engine import Engine, Setup
from tests.engine.measured import report
from tests.engine.official import STANDING, case

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def standing() -> Iterator[Engine]:
    """The engine of all tests that ask for nothing special, each in sessions of its own: its start is most of them."""
    expected = case(STANDING)
    with Engine(Setup(expected.model, expected.adapter), "standing") as engine:
        yield engine


def pytest_collection_modifyitems(items: Iterable[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == HERE:
            item.add_marker(pytest.mark.timeout(900))  # the first test of a module starts its engines


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if lines := report():
        terminalreporter.section("engines: worst deviations")
        for line in lines:
            terminalreporter.line(line)
