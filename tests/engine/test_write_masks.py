"""Write masks on real vLLM: tokens that are read and not written, in prompts and replies, chunked, cached, resent."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from deltamem_vllm.sessions.masks import OPEN
from tests.engine.asking import Ask, Reply
from tests.engine.engine import Engine, Setup
from tests.engine.official import Case, WrongAnswer, case, check_state, worst
from tests.engine.plain_model import PlainModel, States
from tests.engine.runs import fresh

Spans = tuple[tuple[int, int], ...]
REPLY = 8
FEW_BLOCKS = 48
CHUNK = {
    "max_num_batched_tokens": 48,  # a block and a half
    "enable_chunked_prefill": True,
    "num_gpu_blocks_override": FEW_BLOCKS,
}


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Engine, Case, PlainModel]]:
    expected = case("qwen3_tsw_r8")
    with Engine(Setup(expected.model, expected.adapter, CHUNK), "write masks") as engine:
        yield engine, expected, PlainModel(expected.model, expected.adapter)


def positions(spans: Spans, count: int) -> set[int]:
    return {p for start, stop in spans for p in range(start, min(stop, count))}


def check(plain: PlainModel, engine: Engine, session: str, ask: Ask, reply: Reply, before: States | None) -> States:
    """A request's log-probabilities and committed state are the plain model's under its mask; its states."""
    fed = [*ask.ids, *reply.tokens[:-1]]
    rows, states = plain.run(fed, before, positions(ask.unwritten, len(fed)))
    first = len(ask.ids) - 1
    worst("reply", reply.logprobs, [dict(enumerate(row.tolist())) for row in rows[first:]])
    assert reply.status == "committed"
    state = torch.stack([states[layer] for layer in sorted(states)])
    check_state("masked", engine.state(session), state.numpy())
    return states


def prompt_of(expected: Case) -> tuple[int, ...]:
    """About 150 tokens: five blocks."""
    return expected.prompt("same_window")


MASKS: dict[str, Spans] = {
    "beginning": ((0, 5),),
    "inside a block": ((35, 60),),
    "over blocks": ((20, 101),),
    "whole blocks": ((32, 96),),
    "several": ((1, 2), (31, 33), (64, 65), (80, 120)),
    "reply": ((10_000, OPEN),),  # replaced by the prompt's length
    "all": ((0, OPEN),),
}


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_in_any_place(served: tuple[Engine, Case, PlainModel], name: str) -> None:
    engine, expected, plain = served
    ids, session = prompt_of(expected), fresh("masked")
    spans = ((len(ids), OPEN),) if name == "reply" else MASKS[name]
    ask = Ask(ids, session, n=REPLY, unwritten=spans)
    check(plain, engine, session, ask, engine.one(ask), None)
    if name == "all":
        assert not engine.state(session).any(), "something was written"


def test_the_next_turn_hits_the_masked_blocks(served: tuple[Engine, Case, PlainModel]) -> None:
    """Resent with the same mask, the blocks are found, generated ones too; a further mask behind them changes nothing
    of that."""
    engine, expected, plain = served
    ids, session = prompt_of(expected), fresh("resent")
    first = Ask(ids, session, n=40, unwritten=((40, 70), (len(ids), OPEN)))
    reply = engine.one(first)
    check(plain, engine, session, first, reply, None)
    longer = (*ids, *reply.tokens, *expected.prompt("read_only"))
    end = len(ids) + len(reply.tokens)
    again = Ask(longer, session, n=REPLY, unwritten=((40, 70), (len(ids), end - 1), (end + 3, end + 20)))
    second = engine.one(again)
    check(plain, engine, session, again, second, None)
    assert second.cached == (end - 1) // 32 * 32, "blocks of the first turn were not found"
    assert second.outcome["version"] == 2


def other_masks_never_share_blocks(engine: Engine, expected: Case, plain: PlainModel) -> None:
    """A turn regenerated again and again, masked otherwise each time: one window, one base, one salt."""
    ids, session = prompt_of(expected), fresh("changes")
    engine.one(Ask(ids[:40], session, n=1))
    hits = 0
    for spans in ((), ((64, 96),), ((65, 96),), ((64, 95),), ((64, 96), (100, 101)), (), ((64, 96),)):
        ask = Ask(ids, session, n=REPLY, unwritten=spans)
        reply = engine.one(ask)
        hits += reply.cached
        try:
            check(plain, engine, session, ask, reply, None)
        except AssertionError as e:
            raise WrongAnswer(f"mask {spans}: {e}") from None
    assert hits > 0, "nothing was cached: the test shows nothing"


def test_other_masks_never_share_blocks(served: tuple[Engine, Case, PlainModel]) -> None:
    other_masks_never_share_blocks(*served)


def blocks_change_hands(engine: Engine, expected: Case, plain: PlainModel) -> None:
    """Blocks that held masked tokens are handed out again; who gets them writes everything."""
    ids = prompt_of(expected)
    for round_ in range(2 * FEW_BLOCKS // (len(ids) // 32 + 1)):
        engine.one(Ask(tuple((i + 7 * round_) % 97 for i in ids), fresh("turnover"), n=1, unwritten=((0, OPEN),)))
    session = fresh("clean")
    ask = Ask(ids, session, n=REPLY)
    check(plain, engine, session, ask, engine.one(ask), None)


def test_a_block_loses_its_mask_with_its_content(served: tuple[Engine, Case, PlainModel]) -> None:
    blocks_change_hands(*served)


def poisoned(engine: Engine, expected: Case, words: Sequence[int], unwritten: bool) -> tuple[str, bytes]:
    """A conversation whose tool says ``words``; neither that nor what the model makes of it is written."""
    session = fresh("tool")
    first = Ask(expected.full("first_turn"), session, n=1)
    assert engine.one(first).status == "committed"
    ids = (*expected.full("first_turn"), *words)
    start = len(expected.full("first_turn"))
    reply = engine.one(Ask(ids, session, n=REPLY, unwritten=((start, OPEN),) if unwritten else ()))
    assert reply.status == "committed"
    return session, engine.state(session).tobytes()


def test_a_hostile_tool_cannot_change_the_memory(served: tuple[Engine, Case, PlainModel]) -> None:
    """Whatever a masked tool output says, in a turn whose reply is not written either, the memory is the same, bit for
    bit; written, it is not."""
    engine, expected, _ = served
    harmless, hostile = list(range(40, 70)), [5, 9] * 15
    _, before = poisoned(engine, expected, harmless, unwritten=True)
    _, after = poisoned(engine, expected, hostile, unwritten=True)
    assert before == after
    assert (
        poisoned(engine, expected, harmless, unwritten=False)[1]
        != poisoned(engine, expected, hostile, unwritten=False)[1]
    )


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("bug", "caught"),
    [("unmasked-hashes", other_masks_never_share_blocks), ("sticky-marks", blocks_change_hands)],
    ids=["unmasked-hashes", "sticky-marks"],
)
def test_planted_bugs_are_caught(bug: str, caught: Callable[[Engine, Case, PlainModel], None]) -> None:
    """Blocks that are found whatever of them was written; blocks that keep their marks when they change hands."""
    expected = case("qwen3_tsw_r8")
    planted = Setup(
        expected.model,
        expected.adapter,
        CHUNK,
        env={"DELTAMEM_TEST_PLANT": bug},
        path=(str(Path(__file__).parent / "planted"),),
    )
    with Engine(planted, f"planted {bug}") as engine, pytest.raises(WrongAnswer, match="away"):
        caught(engine, expected, PlainModel(expected.model, expected.adapter))
