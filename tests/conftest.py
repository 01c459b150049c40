"""What holds for all tests."""

from __future__ import annotations

import os
from collections.abc import Iterable

import pytest

NIGHTLY = os.environ.get("DELTAMEM_NIGHTLY") == "1"


def pytest_collection_modifyitems(items: Iterable[pytest.Item]) -> None:
    for item in items:
        if "nightly" in item.keywords and not NIGHTLY:
            item.add_marker(pytest.mark.skip(reason="DELTAMEM_NIGHTLY=1 runs it"))
