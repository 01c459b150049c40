"""A KV cache far too small: requests are preempted, and start again from the memory they started from."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.engine.asking import Ask
from tests.engine.engine import Engine, Setup
from tests.engine.official import Case, case, check_reply, check_state
from tests.engine.runs import check_turn_state, fresh, with_first_turn

BLOCKS = 9


@pytest.fixture(scope="module", params=["cached", pytest.param("uncached", marks=pytest.mark.nightly)])
def crowded(request: pytest.FixtureRequest) -> Iterator[tuple[Engine, Case]]:
    expected = case("qwen3_tsw_r8")
    options = {
        "num_gpu_blocks_override": BLOCKS,
        "max_model_len": 192,
        "enable_prefix_caching": request.param == "cached",
    }
    # two slots: a request that starts again finds its memory no longer on the device
    with Engine(Setup(expected.model, expected.adapter, options, slots=2), f"preempted {request.param}") as engine:
        yield engine, expected


def test_preempted_owners_answer_and_commit_as_if_alone(crowded: tuple[Engine, Case]) -> None:
    engine, expected = crowded
    before = engine.metric("vllm:num_preemptions")
    runs = ["first_turn", "new_window"] * 4
    sessions = [fresh("e") if run == "first_turn" else with_first_turn(engine, expected, "g") for run in runs]
    replies = engine.run(*(Ask(expected.prompt(run), session) for run, session in zip(runs, sessions, strict=True)))
    # Every request owns a session, so an owner was preempted.
    assert engine.metric("vllm:num_preemptions") > before
    for run, session, reply in zip(runs, sessions, replies, strict=True):
        check_reply(expected, run, reply)
        assert reply.status == "committed"
        if run == "first_turn":
            check_state("first reply", engine.state(session), expected.state_after_first_reply())
    for run, session in zip(runs, sessions, strict=True):
        check_turn_state(engine, expected, run, session)


def test_preempted_readers_and_requests_without_memory(crowded: tuple[Engine, Case]) -> None:
    engine, expected = crowded
    before = engine.metric("vllm:num_preemptions")
    session = with_first_turn(engine, expected, "r")
    stored = engine.record_bytes(session)
    asked = [("read_only", session, "read"), ("base", None, "off"), ("first_turn", None, "readwrite")] * 3
    replies = engine.run(*(Ask(expected.prompt(run), who, mode) for run, who, mode in asked))  # type: ignore[arg-type]
    assert engine.metric("vllm:num_preemptions") > before
    for (run, _, _), reply in zip(asked, replies, strict=True):
        check_reply(expected, run, reply)
    assert engine.record_bytes(session) == stored
