"""The worst deviations of a test session, printed at its end: how close to the tolerances we are."""

from __future__ import annotations

WORST: dict[tuple[str, str], float] = {}
SECONDS: list[tuple[str, float]] = []


def note(kind: str, value: float) -> None:
    """Remember the largest value of its kind on the engine that started last."""
    key = (SECONDS[-1][0] if SECONDS else "", kind)
    WORST[key] = max(value, WORST.get(key, 0.0))


def note_start(engine: str, seconds: float) -> None:
    """Remember how long an engine took to start."""
    SECONDS.append((engine, seconds))


def report() -> list[str]:
    """Lines for the end of the session."""
    lines = []
    for engine, seconds in SECONDS:
        worst = ", ".join(f"{kind} {value:.1e}" for (name, kind), value in sorted(WORST.items()) if name == engine)
        lines.append(f"{engine:32s} start {seconds:4.0f} s  {worst}")
    return lines
