"""Prompts at which a quantised model's answer does not hang on a hair.

Rounded inputs make a model jump: one that lies on the edge between two steps falls to either side by the last bit of a
sum, and every later token is off by as much, in the plain model as in the served one. Of two implementations that are
both right one cannot say more than that, unless no input is near an edge: so prompts are looked for until the plain
model says the same with its inputs moved, many times and by more than the order of sums can.
"""

from __future__ import annotations

from itertools import count

import torch
from torch import Tensor

from tests.engine.plain_model import PlainModel, States

MOVED = 5e-7
"""By how much of itself every input of a projection is moved, at random."""
TIMES = 6
SAME = 1e-3
"""What the log-probabilities of a steady prompt may move by: without a jump."""
LENGTH, REPLY = 12, 6
"""Tokens of a prompt and of its reply. With more of them hardly a prompt is steady."""

Turn = tuple[PlainModel, States | None]
"""The model and the memory that a prompt is to be steady with."""


def steady_prompt(turns: list[Turn], avoid: tuple[int, ...] = ()) -> tuple[int, ...]:
    """The first of a fixed sequence of random prompts that is steady in every turn, and is not ``avoid``."""
    for seed in count():
        dice = torch.Generator().manual_seed(seed)
        prompt = tuple(int(token) for token in torch.randint(3, 200, (LENGTH,), generator=dice))
        if prompt != avoid and all(is_steady(model, prompt, start) for model, start in turns):
            return prompt
    raise AssertionError


def is_steady(model: PlainModel, prompt: tuple[int, ...], start: States | None) -> bool:
    """Whether the model says the same of a prompt and its reply when its inputs are moved."""
    fed = [*prompt, *reply(model, prompt, start)[:-1]]
    said = model.run(fed, start)[0]
    plain = model.linear
    try:
        for seed in range(TIMES):
            dice = torch.Generator().manual_seed(seed)

            def moved(x: Tensor, weight: Tensor, dice: torch.Generator = dice) -> Tensor:
                return plain(x * (1 + MOVED * torch.randn(x.shape, generator=dice)), weight)

            model.linear = moved  # type: ignore[method-assign]
            if float((model.run(fed, start)[0] - said).abs().max()) > SAME:
                return False
    finally:
        del model.linear
    return True


def reply(model: PlainModel, prompt: tuple[int, ...], start: States | None) -> list[int]:
    """The model's greedy reply, ``REPLY`` tokens."""
    fed = list(prompt)
    for _ in range(REPLY):
        fed.append(int(model.run(fed, start)[0][-1].argmax()))
    return fed[len(prompt) :]
