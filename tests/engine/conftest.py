from __future__ import annotations

import os
from collections.abc import Iterable

import pytest

from tests.engine.measured import SECONDS, WORST

NIGHTLY = os.environ.get("DELTAMEM_NIGHTLY") == "1"


def pytest_collection_modifyitems(items: Iterable[pytest.Item]) -> None:
    for item in items:
        if "nightly" in item.keywords and not NIGHTLY:
            item.add_marker(pytest.mark.skip(reason="DELTAMEM_NIGHTLY=1 runs it"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not WORST and not SECONDS:
        return
    terminalreporter.section("engines: worst deviations")
    for name, value in sorted(WORST.items(), key=lambda item: -item[1]):
        terminalreporter.line(f"{value:.1e}  {name}")
    for name, seconds in SECONDS:
        terminalreporter.line(f"start {seconds:5.1f} s  {name}")
