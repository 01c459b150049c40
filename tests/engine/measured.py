"""The worst deviations of a test session, printed at its end: how close to the tolerances we are."""

from __future__ import annotations

import os

WORST: dict[str, float] = {}
SECONDS: list[tuple[str, float]] = []


def note(what: str, value: float) -> None:
    """Remember the largest value of its kind, under the name of the running test's module and configuration."""
    test = os.environ.get("PYTEST_CURRENT_TEST", "").split("::")[-1].split(" ")[0]
    name = f"{test or 'set-up'}: {what}"
    WORST[name] = max(value, WORST.get(name, 0.0))


def note_start(what: str, seconds: float) -> None:
    """Remember how long an engine took to start."""
    SECONDS.append((what, seconds))
