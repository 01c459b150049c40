"""From dialogues to training rows: windows laid end to end, exactly as a server feeds them.

A window is one request: the chat template over its messages, then the reply. The closing
``<|im_end|>`` of the window's last reply is predicted but never fed, as in a server.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from .data import Dialogue, Turn
from .tokenizer import END, START, build

Layout = Literal["chat", "turns", "grown"]

#: Loss weight of the first token of an answer, and of everything else a reply predicts.
ANSWER_WEIGHT, OTHER_WEIGHT = 1.0, 0.1

_TOKENIZER = build()
_START, _END, _LINE = (_TOKENIZER.get_vocab()[token] for token in (START, END, "\n"))


@lru_cache(maxsize=200_000)
def encode(text: str) -> tuple[int, ...]:
    """Token ids of one message's text."""
    return tuple(_TOKENIZER(text)["input_ids"])


@dataclass
class Row:
    """Token streams of one dialogue, all of one length."""

    ids: list[int]
    positions: list[int]
    windows: list[int]
    labels: list[int]
    weights: list[float]


@dataclass(frozen=True)
class Batch:
    """All [B, T]; padding has window −1 and label −100."""

    ids: Tensor
    positions: Tensor
    windows: Tensor
    labels: Tensor
    weights: Tensor


def _turn_tokens(turn: Turn) -> tuple[list[int], list[int], list[float]]:
    """ids, next-token labels and weights of one turn, up to the last reply token."""
    prompt = [_START, *encode("user\n"), *encode(turn.user), _END, _LINE, _START]
    prompt += encode("assistant\n")
    reply = list(encode(turn.reply))
    ids = prompt + reply
    labels = [-100] * (len(prompt) - 1) + reply + [_END]
    first = ANSWER_WEIGHT if turn.kind.startswith("ask") else OTHER_WEIGHT
    weights = [0.0] * (len(prompt) - 1) + [first] + [OTHER_WEIGHT] * len(reply)
    return ids, labels, weights


def lay_out(dialogue: Dialogue, layout: Layout) -> Row:
    """One row per dialogue.

    chat: one window with everything. turns: a window per turn, holding only that turn.
    grown: a window per turn, holding the dialogue up to and with it.
    """
    parts = [_turn_tokens(turn) for turn in dialogue.turns]
    if layout == "chat":
        groups = [parts]
    elif layout == "turns":
        groups = [[part] for part in parts]
    else:
        groups = [parts[: i + 1] for i in range(len(parts))]
    row = Row([], [], [], [], [])
    for number, group in enumerate(groups):
        start = len(row.ids)
        for i, (ids, labels, weights) in enumerate(group):
            closing = 2 if i + 1 < len(group) else 0
            row.ids += ids + [_END, _LINE][:closing]
            row.labels += labels + [-100] * closing
            row.weights += weights + [0.0] * closing
        count = len(row.ids) - start
        row.positions += range(count)
        row.windows += [number] * count
    return row


def collate(rows: Sequence[Row]) -> Batch:
    """Pad rows on the right."""
    length = max(len(row.ids) for row in rows)

    def padded(name: str, fill: float, dtype: torch.dtype) -> Tensor:
        values = [getattr(row, name) for row in rows]
        return torch.tensor([v + [fill] * (length - len(v)) for v in values], dtype=dtype)

    return Batch(
        ids=padded("ids", 0, torch.long),
        positions=padded("positions", 0, torch.long),
        windows=padded("windows", -1, torch.long),
        labels=padded("labels", -100, torch.long),
        weights=padded("weights", 0.0, torch.float32),
    )
