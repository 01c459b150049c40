"""The held-out sessions, as requests a client would send; no torch, so an HTTP test can use them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .data import Shape, Turn, dialogues, turn_messages

Messages = list[dict[str, str]]

#: What a held-out session looks like unless a caller says otherwise.
SESSION_SHAPE = Shape(facts=(3, 5), talk=(1, 4), unknown=(1, 2))
SESSION_SEED = 20_000


@dataclass(frozen=True)
class Request:
    """One window: the messages to send, the right reply and what kind of turn it is."""

    messages: Messages
    expected: str
    kind: str


@dataclass(frozen=True)
class Session:
    """``told`` comes first (facts and small talk), then ``asked`` (questions only)."""

    told: tuple[Turn, ...]
    asked: tuple[Turn, ...]

    def turns(self, *, ask_only: bool = False) -> list[Request]:
        """New turns only: each request carries one user message; the memory carries the rest."""
        turns = self.asked if ask_only else self.told + self.asked
        return [Request(turn_messages(t)[:1], t.reply, t.kind) for t in turns]

    def tellings(self) -> list[Request]:
        """The requests before the first question."""
        return self.turns()[: len(self.told)]

    def in_prompt(self) -> list[Request]:
        """Each question by itself, behind everything told, in one prompt (for memory off)."""
        history = [m for t in self.told for m in turn_messages(t)]
        return [Request(history + turn_messages(t)[:1], t.reply, t.kind) for t in self.asked]

    def resent(self) -> list[Request]:
        """Like ``turns``, but each request repeats the conversation so far."""
        out: list[Request] = []
        history: Messages = []
        for t in self.told + self.asked:
            out.append(Request(history + turn_messages(t)[:1], t.reply, t.kind))
            history = history + turn_messages(t)
        return out


def heldout_sessions(count: int, *, shape: Shape = SESSION_SHAPE, seed: int = SESSION_SEED) -> list[Session]:
    """The first ``count`` held-out sessions of a seed."""
    stream = dialogues(seed, shape, "heldout")
    sessions = []
    for _ in range(count):
        turns = next(stream).turns
        told = tuple(t for t in turns if not t.kind.startswith("ask"))
        sessions.append(Session(told, tuple(t for t in turns if t.kind.startswith("ask"))))
    return sessions


def normalize(text: str) -> str:
    """Lower case, words only: what two replies are compared by."""
    return " ".join(re.findall(r"\w+", text.lower()))


def is_right(reply: str, expected: str) -> bool:
    """Whether a reply says what was expected."""
    return normalize(reply) == normalize(expected)
