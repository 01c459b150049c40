"""The plain model is right: it agrees with the official code wherever that has left a fixture."""

from __future__ import annotations

import pytest
import torch

from tests.engine.official import CASES, case, worst
from tests.engine.plain_model import PlainModel, States
from tests.tolerances import PLAIN_LOGPROB, PLAIN_STATE


@pytest.mark.parametrize("run", ["first_turn", "same_window", "new_window", "base"])
@pytest.mark.parametrize("name", CASES)
def test_plain_model_is_the_official_code(name: str, run: str) -> None:
    expected = case(name)
    plain = PlainModel(expected.model, None if run == "base" else expected.adapter)
    start: States | None = None
    if run == "new_window":
        start = dict(enumerate(torch.from_numpy(expected.state_after_turn("first_turn"))))
    ids = list(expected.prompt(run)) + expected.reply(run)
    full = ids if run == "base" else list(expected.full(run))
    logprobs, states = plain.run(full, start)
    rows = [dict(enumerate(row.tolist())) for row in logprobs]
    first = len(expected.prompt(run)) - 1
    worst(run, rows[first : first + 32], expected.reply_logprobs(run), PLAIN_LOGPROB)
    if run != "base":
        worst(run, rows[: first + 1], expected.prompt_logprobs(run), PLAIN_LOGPROB)
        official = torch.from_numpy(expected.state_after_turn(run))
        mine = torch.stack([states[layer] for layer in sorted(states)]).view(official.shape)
        torch.testing.assert_close(mine, official, rtol=0, atol=PLAIN_STATE)
