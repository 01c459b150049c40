"""Adapters of every kind, for which the official code has left no fixture, against the plain model; and bf16."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from tests.engine.asking import Ask, Reply
from tests.engine.engine import Engine, Setup
from tests.engine.measured import note
from tests.engine.official import Case, WrongAnswer, case, check_state, worst
from tests.engine.plain_model import PlainModel, States
from tests.engine.random_adapter import VARIANTS, write_adapter
from tests.engine.runs import fresh
from tests.tolerances import BF16_LOGPROB, BF16_STATE, ENGINE_LOGPROB

Variant = tuple[Engine, PlainModel, Case]


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Variant]:
    expected = case("qwen3_tsw_r8")
    adapter = write_adapter(tmp_path_factory.mktemp("adapter"), VARIANTS[request.param])
    with Engine(Setup(expected.model, adapter), request.param) as engine:
        yield engine, PlainModel(expected.model, adapter), expected


def agree(plain: PlainModel, prompt: tuple[int, ...], reply: Reply, start: States | None) -> States:
    """Compare a request with the plain model fed the same tokens; returns what the memory must now be."""
    fed = [*prompt, *reply.tokens[:-1]]
    logprobs, states = plain.run(fed, start)
    rows = [dict(enumerate(row.tolist())) for row in logprobs]
    asked = [top for top in reply.prompt[1:] if top is not None]
    apart = worst("plain model", [*asked, *reply.logprobs], rows)
    note("plain model", apart)
    for token, row in zip(reply.tokens, rows[len(prompt) - 1 :], strict=True):
        assert row[token] >= max(row.values()) - ENGINE_LOGPROB, "not the most likely token"
    return states


def stacked(states: States) -> np.ndarray:
    return torch.stack([states[layer] for layer in sorted(states)]).numpy()


def far(first: Reply, second: Reply) -> bool:
    """Whether two answers to one prompt differ far beyond the tolerance."""
    pairs = zip(first.logprobs[0].items(), second.logprobs[:1] * 20, strict=False)
    return any(abs(value - other.get(token, value)) > 20 * ENGINE_LOGPROB for (token, value), other in pairs)


def test_every_kind_of_adapter_answers_like_the_plain_model(variant: Variant) -> None:
    engine, plain, expected = variant
    session = fresh("variant")
    first, second = expected.prompt("first_turn"), expected.prompt("new_window")
    reply = engine.one(Ask(first, session, prompt_logprobs=True))
    states = agree(plain, first, reply, None)
    check_state("first", engine.state(session), stacked(states))
    assert far(reply, engine.one(Ask(first, None, "off"))), "this adapter does nothing: the test shows nothing"

    # the next window starts from the record, so the comparison does, too
    start = dict(zip(sorted(states), torch.from_numpy(engine.state(session).copy()), strict=True))
    again = engine.one(Ask(second, session, prompt_logprobs=True))
    states = agree(plain, second, again, start)
    check_state("second", engine.state(session), stacked(states))
    assert far(again, engine.one(Ask(second))), "the memory does nothing: the test shows nothing"


@pytest.fixture(scope="module")
def bf16() -> Iterator[tuple[Engine, Case]]:
    expected = case("qwen3_tsw_r8")
    with Engine(Setup(expected.model, expected.adapter, {"dtype": "bfloat16"}), "bf16") as engine:
        yield engine, expected


def test_bf16_stays_near_the_fp32_answers(bf16: tuple[Engine, Case]) -> None:
    """The official tokens are fed, because bf16 takes another fork sooner or later."""
    engine, expected = bf16
    session = fresh("bf16")
    for run in ("first_turn", "new_window"):
        prompt, full = expected.prompt(run), expected.full(run)
        reply = engine.one(Ask(full, session, n=1, prompt_logprobs=True))
        got = [top for top in reply.prompt[len(prompt) : len(prompt) + 32] if top is not None]
        note("reply", worst(run, got, expected.reply_logprobs(run), BF16_LOGPROB))
        official = expected.state_after_turn(run)
        apart = float(np.abs(engine.state(session).reshape(official.shape) - official).max())
        assert apart <= BF16_STATE
        note("state", apart)
    bare = engine.one(Ask(expected.full("new_window"), None, "off", n=1, prompt_logprobs=True))
    got = [top for top in bare.prompt[len(prompt) : len(prompt) + 32] if top is not None]
    with pytest.raises(WrongAnswer):  # so near that the bare model is seen to be another
        worst("off", got, expected.reply_logprobs("new_window"), BF16_LOGPROB)
