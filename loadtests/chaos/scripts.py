"""What is said in a session of a campaign.

Every request is made of tokens that its script and turn determine, and its answer is forced to one token. So the memory
after each turn is the same in every session of a script, and one session that nobody disturbed tells what it is.
"""

import random
from dataclasses import dataclass
from typing import Any

TOKENS = range(20, 120)
"""Those that prompts and answers are made of: in every small model's vocabulary, and no special ones."""
NEW, ANSWER = 12, 2
"""Tokens that a turn adds, and that its answer has."""


@dataclass(frozen=True)
class Script:
    """One conversation; those with odd numbers resend their history, the others send only what is new."""

    number: int

    @property
    def resends(self) -> bool:
        """Whether the client resends the conversation with every turn."""
        return self.number % 2 == 1

    def new(self, turn: int) -> list[int]:
        """What the client adds in a turn, counted from 1."""
        rng = random.Random(1000 * self.number + turn)
        return [rng.choice(TOKENS) for _ in range(NEW)]

    def answer(self, turn: int) -> int:
        """The token that the answer of a turn consists of."""
        return random.Random(1000 * self.number + turn + 500).choice(TOKENS)

    def prompt(self, turn: int) -> list[int]:
        """The request's tokens."""
        if not self.resends:
            return self.new(turn)
        before = [token for t in range(1, turn) for token in [*self.new(t), *[self.answer(t)] * ANSWER]]
        return before + self.new(turn)

    def body(self, turn: int, model: str) -> dict[str, Any]:
        """The request's body, for ``/v1/completions``."""
        ours = {"model": model, "prompt": self.prompt(turn), "max_tokens": ANSWER, "temperature": 0}
        return {**ours, "ignore_eos": True, "allowed_token_ids": [self.answer(turn)]}
