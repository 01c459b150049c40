"""Where nobody asks for memory, vLLM answers as if δ-mem were not installed: the same tokens, the same numbers."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from tests.engine.asking import Ask, Reply
from tests.engine.engine import Engine, Setup
from tests.engine.official import case
from tests.engine.runs import fresh

NAME = "qwen3_tsw_r8"


def asks(session: str | None = None) -> list[Ask]:
    """Prompts of several lengths with memory switched off."""
    expected = case(NAME)
    prompts = [expected.prompt(run) for run in ("first_turn", "same_window", "new_window")]
    return [
        Ask(ids, session, "off", n=48, prompt_logprobs=with_prompt)
        for ids in (*prompts, prompts[0][:1])
        for with_prompt in (False, True)
    ]


@pytest.fixture(scope="module")
def answers() -> Mapping[str, list[Reply]]:
    """The same batch on vLLM alone, with δ-mem installed but not activated, and activated but switched off."""
    expected = case(NAME)
    found: dict[str, list[Reply]] = {}
    alone = {"absent": {"VLLM_PLUGINS": ""}, "inactive": {}}
    for name, env in alone.items():
        with Engine(Setup(expected.model, None, env=env), name) as engine:
            assert engine.imported("deltamem_vllm.plugin") == (name == "inactive")
            found[name] = engine.run(*asks())
    with Engine(Setup(expected.model, expected.adapter), "switched off") as engine:
        found["off"] = engine.run(*asks())
        session = fresh("off")
        engine.one(Ask(expected.full("first_turn"), session, n=1))
        found["off on a session"] = engine.run(*asks(session))
    return found


@pytest.mark.parametrize("name", ["inactive", "off", "off on a session"])
def test_same_tokens_and_numbers_as_vllm_alone(answers: Mapping[str, list[Reply]], name: str) -> None:
    for mine, alone in zip(answers[name], answers["absent"], strict=True):
        assert mine.tokens == alone.tokens
        assert mine.logprobs == alone.logprobs
        assert mine.prompt == alone.prompt
