from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.engine.measured import report

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: Iterable[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == HERE:
            item.add_marker(pytest.mark.timeout(900))  # the first test of a module starts its engines


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if lines := report():
        terminalreporter.section("engines: worst deviations")
        for line in lines:
            terminalreporter.line(line)
