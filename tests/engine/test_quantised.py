"""A quantised backbone with a memory that is not: its answers and memories against the plain model of its weights, at
prompts where rounding leaves no doubt what is right."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.engine import steady
from tests.engine.asking import Ask, Reply
from tests.engine.engine import ASK_INSIDE, Engine, Setup
from tests.engine.measured import note
from tests.engine.official import WrongAnswer, case
from tests.engine.plain_model import PlainModel, States
from tests.engine.quantised_model import FORMATS, FOUR_BIT, QuantisedPlain, write_quantised
from tests.tolerances import QUANTISED_LOGPROB, QUANTISED_STATE

ROOT = Path(__file__).parents[2]
CASE = case("qwen3_tsw_r8")


@dataclass(frozen=True)
class Served:
    """What an engine answered: two requests of one session, the second's prompt in another one, and the first's without
    memory."""

    engine: Engine
    format: str
    prompts: tuple[tuple[int, ...], tuple[int, ...]]
    replies: tuple[Reply, Reply]
    states: tuple[np.ndarray, np.ndarray]
    fresh: Reply
    off: Reply

    def plain(self, adapter: Path | None) -> PlainModel:
        """The plain model of what is served, with this adapter."""
        return plain_of(self.format, adapter)


def plain_of(name: str, adapter: Path | None) -> PlainModel:
    return QuantisedPlain(CASE.model, adapter, FORMATS[name])


def prompts_of(name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Prompts that are steady in all that is asked of them below."""
    with_memory, bare = plain_of(name, CASE.adapter), plain_of(name, None)
    first = steady.steady_prompt([(with_memory, None), (bare, None)])
    _, after = with_memory.run([*first, *steady.reply(with_memory, first, None)[:-1]])
    return first, steady.steady_prompt([(with_memory, after), (with_memory, None)], avoid=first)


@pytest.fixture(
    scope="module", params=["int8", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("fp8", "int4"))]
)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    form = FORMATS[request.param]
    folder = tmp_path_factory.mktemp("quantised") / "model"
    model = write_quantised(CASE.model, folder, form.stored, form.config)
    # Comparisons in float32, on any CPU.
    env = {**ASK_INSIDE, "PYTHONPATH": f"{ROOT / 'tests' / 'engine' / 'without_amx'}{os.pathsep}{ROOT}"}
    with Engine(Setup(model, CASE.adapter, env=env), f"quantised {request.param}") as engine:
        replies, states, prompts = [], [], prompts_of(request.param)
        for prompt in prompts:
            replies.append(engine.one(Ask(prompt, "one", n=steady.REPLY, prompt_logprobs=True)))
            states.append(engine.state("one").copy())
        fresh = engine.one(Ask(prompts[1], "two", n=steady.REPLY, prompt_logprobs=True))
        off = engine.one(Ask(prompts[0], None, "off", n=steady.REPLY, prompt_logprobs=True))
        yield Served(engine, request.param, prompts, (replies[0], replies[1]), (states[0], states[1]), fresh, off)


def compare(plain: PlainModel, prompt: tuple[int, ...], reply: Reply, start: States | None = None) -> States:
    """Feed the plain model the request's tokens; returns what the memory must now be.

    Raises:
        WrongAnswer: log-probabilities beyond the tolerance.
    """
    logprobs, states = plain.run([*prompt, *reply.tokens[:-1]], start)
    got = [top for top in [*reply.prompt[1:], *reply.logprobs] if top is not None]
    assert len(got) == len(logprobs), "not every token has log-probabilities"
    apart = [
        max(abs(value - float(row[token])) for token, value in top.items())
        for top, row in zip(got, logprobs, strict=True)
    ]
    if not (worst := max(apart)) <= QUANTISED_LOGPROB:
        raise WrongAnswer(f"log-probabilities are up to {worst:.1e} away")
    note("worst", worst)
    return states


def check_memory(state: np.ndarray, expected: States) -> None:
    """A committed memory is the plain model's."""
    apart = float(np.abs(state - torch.stack([expected[layer] for layer in sorted(expected)]).numpy()).max())
    if not apart <= QUANTISED_STATE:
        raise WrongAnswer(f"the state is {apart:.1e} away")
    note("state", apart)


def as_start(state: np.ndarray) -> States:
    return dict(enumerate(torch.from_numpy(state.copy())))


def test_answers_and_memories_are_those_of_the_quantised_weights(served: Served) -> None:
    plain = served.plain(CASE.adapter)
    check_memory(served.states[0], compare(plain, served.prompts[0], served.replies[0]))
    check_memory(served.states[1], compare(plain, served.prompts[1], served.replies[1], as_start(served.states[0])))
    compare(plain, served.prompts[1], served.fresh)
    compare(served.plain(None), served.prompts[0], served.off)
    assert [reply.outcome["version"] for reply in served.replies] == [1, 2]


def test_the_comparison_sees_another_alpha(served: Served, tmp_path: Path) -> None:
    """Planted in the plain model: alpha one percent larger."""
    adapter = Path(shutil.copytree(CASE.adapter, tmp_path / "adapter"))
    path = adapter / "delta_mem_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "alpha": config["alpha"] * 1.01}))
    plain = served.plain(adapter)
    for prompt, reply, start in (
        (served.prompts[0], served.replies[0], None),
        (served.prompts[1], served.replies[1], served.states[0]),
    ):
        with pytest.raises(WrongAnswer):
            compare(plain, prompt, reply, None if start is None else as_start(start))
    _, states = plain.run([*served.prompts[0], *served.replies[0].tokens[:-1]])
    with pytest.raises(WrongAnswer):
        check_memory(served.states[0], states)


def test_the_comparison_sees_a_memory_that_does_nothing(served: Served) -> None:
    plain = served.plain(CASE.adapter)
    with pytest.raises(WrongAnswer):
        compare(plain, served.prompts[0], served.off)  # off is not on
    with pytest.raises(WrongAnswer):
        compare(plain, served.prompts[1], served.replies[1])  # the second request did not start from nothing
    with pytest.raises(WrongAnswer):
        compare(plain, served.prompts[1], served.fresh, as_start(served.states[0]))  # and a new session did


def test_the_comparison_sees_weights_that_are_not_quantised(served: Served) -> None:
    with pytest.raises(WrongAnswer):
        compare(PlainModel(CASE.model, CASE.adapter), served.prompts[0], served.replies[0])


def test_the_backbone_is_quantised_and_the_memory_is_not(served: Served) -> None:
    schemes = {
        "int8": "CompressedTensorsW8A8Int8",
        "fp8": "CompressedTensorsW8A8Fp8",
        "int4": "CompressedTensorsW4A8Int",
    }
    check_layers(served.engine, schemes[served.format], "torch.float32")


@pytest.mark.nightly
@pytest.mark.parametrize(("name", "method"), [("awq", "AutoAWQMarlinLinearMethod"), ("gptq", "AutoGPTQLinearMethod")])
def test_memories_are_attached_to_four_bit_linears(name: str, method: str, tmp_path: Path) -> None:
    """As far as this goes on every CPU: vLLM's kernel for their product needs AVX-512, and runs first in a request."""
    model = write_quantised(CASE.model, tmp_path / "model", *FOUR_BIT[name])
    with Engine(Setup(model, CASE.adapter, {"dtype": "float16"}, env=ASK_INSIDE), name) as engine:
        check_layers(engine, method, "torch.float16")


def check_layers(engine: Engine, method: str, dtype: str) -> None:
    """Every layer has its memory, in the model's dtype (gates in fp32), beside linears of that method."""
    layers = engine.wrapped_layers()
    assert len(layers) == 3
    for layer in layers:
        assert layer["linears"] == {"qkv_proj": method, "o_proj": method}
        assert layer["buffers"].pop("bias") == "torch.float32"
        for_o = "in_residual" if dtype == "torch.float32" else "matrix_o"
        assert set(layer["buffers"]) >= {"projection", "in_rows", for_o}
        assert set(layer["buffers"].values()) == {dtype}
