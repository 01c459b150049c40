"""What a test asks of an engine, and what it gets: plain values, the same on both sides of the pipe."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Top = dict[int, float]
"""Token id → log-probability, of the most likely tokens at one position."""


@dataclass(frozen=True)
class Ask:
    """A greedy request.

    Attributes:
        ids: the prompt.
        session: None for no session.
        n: tokens to generate.
        unwritten: spans of tokens that are read and not written.
        stop: stop strings.
        prompt_logprobs: ask for the prompt's log-probabilities too (vLLM then skips the prefix cache).
    """

    ids: tuple[int, ...]
    session: str | None = None
    mode: Literal["readwrite", "read", "off"] = "readwrite"
    n: int = 32
    prompt_logprobs: bool = False
    unwritten: tuple[tuple[int, int], ...] = ()
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reply:
    """What came of it.

    Attributes:
        tokens: generated ids.
        logprobs: per generated token.
        prompt: per position of the prompt, the first is None; empty if not asked for.
        text: what the tokens say; empty without stop strings.
        cached: prompt tokens that came from the prefix cache.
        outcome: what the session made of it; empty without a session.
    """

    tokens: list[int]
    logprobs: list[Top]
    prompt: list[Top | None]
    cached: int
    text: str
    outcome: dict[str, Any] = field(default_factory=dict)

    @property
    def status(self) -> str | None:
        """``committed``, ``unchanged``, …"""
        return self.outcome.get("status")


def stop_in(text: str) -> str:
    """A stop string that cuts an answer short which would say ``text``: two characters not found before the sixth."""
    assert text.isprintable(), repr(text)
    return next(text[i : i + 2] for i in range(5, 30) if text.index(text[i : i + 2]) == i)
