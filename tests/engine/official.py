"""The official code's outputs for one tiny model and adapter, and the comparison of an engine's answers with them."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from tests.engine.asking import Reply, Top
from tests.engine.measured import note
from tests.tolerances import ENGINE_LOGPROB, ENGINE_STATE

FIXTURES = Path(__file__).parents[1] / "fixtures"
STANDING = "qwen3_tsw_r8"
"""What the `standing` engine serves."""
CASES = (STANDING, "qwen3_msw_r8h4", "smollm3_tsw_r8")
FEWEST = 15
"""Of the 20 reported tokens per position, so many must be in the fixture's 20: the last ones may be ties."""


class WrongAnswer(AssertionError):
    """An engine answered other tokens or log-probabilities than it should."""


class Case:
    """One folder of `tests/fixtures`.

    Attributes:
        model, adapter: folders.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        folder = FIXTURES / name
        self.model, self.adapter = folder / "model", folder / "adapter"
        about = json.loads((folder / "expected.json").read_text())
        self._runs: dict[str, Any] = about["runs"]
        self._steps: list[int] = about["decode_state_steps"]
        self._tensors = load_file(folder / "expected.safetensors")

    def prompt(self, run: str) -> tuple[int, ...]:
        """All tokens of the window before the reply; ``same_window`` resends the first turn."""
        if run == "base":
            run = "first_turn"
        before = self.full("first_turn") if run == "same_window" else ()
        return (*before, *self._runs[run]["prefill"]["input_ids"])

    def reply(self, run: str) -> list[int]:
        """The 32 greedy tokens."""
        made = self._runs[run]
        ids: list[int] = (made if run == "base" else made["decode"])["generated_ids"]
        return ids

    def full(self, run: str) -> tuple[int, ...]:
        """Prompt, reply and the template's closing tokens."""
        return (*self.prompt(run), *self.reply(run), *self._runs[run]["closing"]["input_ids"])

    def reply_logprobs(self, run: str) -> list[Top]:
        """Per generated token, over the whole vocabulary."""
        return _dense(self._tensors[f"{run}/decode.logits"][:-1])

    def prompt_logprobs(self, run: str) -> list[Top]:
        """Per position of `prompt`: the distribution of the token *after* it."""
        get = self._tensors
        before = []
        if run == "same_window":
            before = self.prompt_logprobs("first_turn")
            before += _dense(get["first_turn/decode.logits"][1:]) + _dense(get["first_turn/closing.logits"])
        rows = zip(get[f"{run}/prefill.top_ids"].tolist(), get[f"{run}/prefill.top_logprobs"].tolist(), strict=True)
        return before + [dict(zip(ids, values, strict=True)) for ids, values in rows]

    def state_after_turn(self, run: str) -> np.ndarray:
        """[layers, (H,) r, r] with the closing tokens fed, too."""
        return self._tensors[f"{run}/state_after_turn"]

    def state_after_first_reply(self) -> np.ndarray:
        """What an engine commits after ``first_turn``: all but the last generated token were fed."""
        states: np.ndarray = self._tensors["first_turn/decode.states"]
        return np.asarray(states[self._steps.index(30)])


@functools.cache
def case(name: str) -> Case:
    """A case, read once."""
    return Case(name)


def check_reply(expected: Case, run: str, reply: Reply) -> None:
    """Tokens equal; every reported log-probability within the tolerance."""
    if reply.tokens != expected.reply(run):
        raise WrongAnswer(f"{run}: {reply.tokens}, expected {expected.reply(run)}")
    note("reply", worst(f"{run} reply", reply.logprobs, expected.reply_logprobs(run)))


def check_prompt(expected: Case, run: str, reply: Reply) -> None:
    """Every prompt log-probability within the tolerance."""
    got = [top for top in reply.prompt[1:] if top is not None]
    assert len(got) == len(reply.prompt) - 1, f"{run}: no prompt log-probabilities"
    note("prompt", worst(f"{run} prompt", got, expected.prompt_logprobs(run)[:-1]))


def check_state(name: str, state: np.ndarray, expected: np.ndarray) -> None:
    """A committed memory within the tolerance."""
    apart = float(np.abs(state.reshape(expected.shape) - expected).max())
    assert apart <= ENGINE_STATE, f"{name}: the state is {apart:.1e} away"
    note("state", apart)


def worst(what: str, got: Sequence[Top], expected: Sequence[Top], tolerance: float = ENGINE_LOGPROB) -> float:
    """The largest difference of a log-probability; fails beyond the tolerance."""
    assert len(got) == len(expected), f"{what}: {len(got)} positions, expected {len(expected)}"
    largest = 0.0
    for position, (mine, theirs) in enumerate(zip(got, expected, strict=True)):
        both = mine.keys() & theirs.keys()
        assert len(both) >= min(FEWEST, len(theirs)), f"{what} {position}: only {len(both)} tokens in common"
        apart = max(abs(mine[token] - theirs[token]) for token in both)
        if not apart <= tolerance:
            raise WrongAnswer(f"{what} {position}: a log-probability is {apart:.1e} away")
        largest = max(largest, apart)
    return largest


def _dense(logits: np.ndarray) -> list[Top]:
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(-1, keepdims=True))
    return [dict(enumerate(row)) for row in wide.tolist()]
