"""Held-out accuracy in plain torch, greedy: ``python -m deltamem_vllm.recall.evaluate``."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import ADAPTER_DIR, MODEL_DIR
from .backbone import Backbone
from .data import Shape
from .memory import RANK, Memories
from .sessions import SESSION_SHAPE, Request, Session, heldout_sessions, is_right
from .tokenizer import END, PAD, build

MAX_REPLY = 8

Score = Counter[tuple[str, bool]]
"""Replies by kind of turn and whether they were right."""


class Runner:
    """Answers windows for a batch of users, carrying each user's states."""

    def __init__(self, model: Backbone, memories: Memories | None) -> None:
        self.model, self.memories = model, memories
        self.tokenizer = build()
        self.end, self.pad = (self.tokenizer.get_vocab()[token] for token in (END, PAD))

    def empty(self, users: int) -> Tensor:
        """Zero states [L, B, R, R]."""
        return torch.zeros(self.model.size.layers, users, RANK, RANK)

    def _prompt(self, request: Request) -> list[int]:
        rendered: Any = self.tokenizer.apply_chat_template(request.messages, add_generation_prompt=True)
        ids: list[int] = rendered["input_ids"]
        return ids

    @torch.no_grad()
    def reply(self, requests: Sequence[Request | None], states: Tensor) -> tuple[list[str], Tensor]:
        """One window per user (None: sits this one out) → replies and the states after them.

        The reply's tokens are fed and written, its closing ``<|im_end|>`` is not.
        """
        streams = [[] if r is None else self._prompt(r) for r in requests]
        replies: list[list[int]] = [[] for _ in requests]
        open_rows = {i for i, stream in enumerate(streams) if stream}
        while True:
            fed = [s + r for s, r in zip(streams, replies, strict=True)]
            length = max(1, max(map(len, fed)))
            ids = torch.tensor([f + [self.pad] * (length - len(f)) for f in fed])
            steps = torch.arange(length).expand(len(fed), -1)
            windows = torch.where(steps < torch.tensor([len(f) for f in fed])[:, None], 0, -1)
            hidden, after = self.model(ids, steps, windows, self.memories, states)
            last = torch.tensor([max(0, len(f) - 1) for f in fed])
            picked = self.model.logits(hidden[torch.arange(len(fed)), last]).argmax(-1).tolist()
            for i in list(open_rows):
                if picked[i] == self.end or len(replies[i]) == MAX_REPLY:
                    open_rows.discard(i)
                else:
                    replies[i].append(picked[i])
            if not open_rows:
                texts = [str(self.tokenizer.decode(r, skip_special_tokens=True)) for r in replies]
                return texts, states if after is None else after

    def run(self, scripts: Sequence[list[Request]], states: Tensor, score: Score | None) -> Tensor:
        """Each user's requests one after another; counts right replies per kind into ``score``."""
        for turn in range(max(map(len, scripts))):
            requests = [s[turn] if turn < len(s) else None for s in scripts]
            texts, states = self.reply(requests, states)
            for request, text in zip(requests, texts, strict=True):
                if score is not None and request is not None:
                    score[request.kind, is_right(text, request.expected)] += 1
        return states


def _shares(score: Score) -> dict[str, float]:
    kinds = sorted({kind for kind, _ in score})
    return {k: round(score[k, True] / (score[k, True] + score[k, False]), 4) for k in kinds}


def evaluate(
    model: Backbone, memories: Memories, sessions: Sequence[Session], *, resent: int = 16
) -> dict[str, dict[str, float]]:
    """Shares of right replies by kind of turn, for the memory and its controls.

    right: new turns only, own memory. empty: questions from zero states. other: questions with
    the states of the next user. in_prompt: memory off, everything told in the prompt.
    resent: own memory and the whole conversation in each prompt (first ``resent`` sessions).
    """
    runner, users = Runner(model, memories), len(sessions)
    scores: dict[str, Score] = {name: Counter() for name in ("right", "empty", "other", "in_prompt", "resent")}
    runner.run([s.turns() for s in sessions], runner.empty(users), scores["right"])
    asked = [s.turns(ask_only=True) for s in sessions]
    questions = [[r] for requests in asked for r in requests]
    runner.run(questions, runner.empty(len(questions)), scores["empty"])
    states = runner.run([s.tellings() for s in sessions], runner.empty(users), None)
    runner.run(asked, states.roll(1, dims=1), scores["other"])
    if resent:
        few = [s.resent() for s in sessions[:resent]]
        runner.run(few, runner.empty(len(few)), scores["resent"])
    bare = Runner(model, None)
    prompts = [[r] for s in sessions for r in s.in_prompt()]
    for at in range(0, len(prompts), 64):
        part = prompts[at : at + 64]
        bare.run(part, bare.empty(len(part)), scores["in_prompt"])
    return {name: _shares(score) for name, score in scores.items() if score}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    parser.add_argument("--adapter", type=Path, default=ADAPTER_DIR)
    parser.add_argument("--sessions", type=int, default=128)
    parser.add_argument("--facts", type=int, nargs="*", help="facts per session; several are run in turn")
    parser.add_argument("--resent", type=int, default=16, help="sessions also run with full prompts")
    parser.add_argument("--reference", action="store_true", help="use the plain torch scan")
    args = parser.parse_args()
    model = Backbone.load(args.model)
    memories = Memories.load(args.adapter, model.size).use_reference(args.reference)
    shapes: list[tuple[int | str, Shape]] = [(n, Shape(facts=(n, n), talk=(1, 4))) for n in args.facts or ()]
    for facts, shape in shapes or [("mixed", SESSION_SHAPE)]:
        result = evaluate(model, memories, heldout_sessions(args.sessions, shape=shape), resent=args.resent)
        print(json.dumps({"facts": facts, "sessions": args.sessions, **result}), flush=True)


if __name__ == "__main__":
    main()
