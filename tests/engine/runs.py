"""The official session's runs, replayed on an engine and compared: log-probabilities, tokens, committed memory.

Each run takes sessions of its own, so that any number of them can share an engine. An engine does not feed the last
token it samples; to compare with the official state after a whole turn, the turn is resent and one token asked for.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

from tests.engine.asking import Ask, Reply
from tests.engine.engine import Engine
from tests.engine.official import Case, check_prompt, check_reply, check_state

_numbers = itertools.count(1)


def fresh(name: str) -> str:
    """A session id that nobody has used."""
    return f"{name}-{next(_numbers)}"


def with_first_turn(engine: Engine, case: Case, name: str) -> str:
    """A new session that holds the first turn as a whole."""
    session = fresh(name)
    assert engine.one(Ask(case.full("first_turn"), session, n=1)).status == "committed"
    return session


def answer(
    engine: Engine, case: Case, run: str, session: str | None, mode: str = "readwrite", *, prompt: bool
) -> Reply:
    """One run's request, its answer compared."""
    reply = engine.one(Ask(case.prompt(run), session, mode, prompt_logprobs=prompt))  # type: ignore[arg-type]
    check_reply(case, run, reply)
    if prompt and run != "base":
        check_prompt(case, run, reply)
    return reply


def check_turn_state(engine: Engine, case: Case, run: str, session: str) -> None:
    """Resend the whole turn; the committed memory is the official one."""
    assert engine.one(Ask(case.full(run), session, n=1)).status == "committed"
    check_state(f"{case.name} {run}", engine.state(session), case.state_after_turn(run))


def first_turn(engine: Engine, case: Case, *, prompt: bool) -> None:
    """A turn from the empty memory."""
    session = fresh("first")
    assert answer(engine, case, "first_turn", session, prompt=prompt).outcome["version"] == 1
    check_state(f"{case.name} first reply", engine.state(session), case.state_after_first_reply())
    check_turn_state(engine, case, "first_turn", session)


def same_window(engine: Engine, case: Case, *, prompt: bool) -> None:
    """The next turn of the same conversation, everything before it resent."""
    session = fresh("same")
    engine.one(Ask(case.prompt("first_turn"), session))
    assert answer(engine, case, "same_window", session, prompt=prompt).status == "committed"
    check_turn_state(engine, case, "same_window", session)


def new_window(engine: Engine, case: Case, *, prompt: bool) -> None:
    """A fresh prompt; only the memory carries over."""
    session = with_first_turn(engine, case, "new")
    assert answer(engine, case, "new_window", session, prompt=prompt).status == "committed"
    check_turn_state(engine, case, "new_window", session)


def read_only(engine: Engine, case: Case, *, prompt: bool) -> None:
    """The same without writing: not a byte of the record changes."""
    session = with_first_turn(engine, case, "read")
    before = engine.record_bytes(session)
    assert answer(engine, case, "read_only", session, "read", prompt=prompt).status == "unchanged"
    assert engine.record_bytes(session) == before


def base(engine: Engine, case: Case, *, prompt: bool) -> None:
    """The bare model, with and without a session's name."""
    session = with_first_turn(engine, case, "off")
    before = engine.record_bytes(session)
    answer(engine, case, "base", session, "off", prompt=prompt)
    answer(engine, case, "base", None, "off", prompt=prompt)
    assert engine.record_bytes(session) == before


def mixed_batch(engine: Engine, case: Case, *, prompt: bool) -> None:
    """Sessions, readers, requests without memory and without session side by side."""
    empty, other, grown = fresh("mixed"), fresh("mixed"), with_first_turn(engine, case, "mixed")
    read = with_first_turn(engine, case, "mixed")
    before = engine.record_bytes(read)
    asked = [
        ("first_turn", empty, "readwrite"),
        ("base", None, "off"),
        ("read_only", read, "read"),
        ("new_window", grown, "readwrite"),
        ("base", read, "off"),
        ("first_turn", None, "readwrite"),
        ("new_window_zero_state", None, "readwrite"),
        ("read_only", read, "read"),
        ("first_turn", other, "readwrite"),
    ]
    replies = engine.run(*(Ask(case.prompt(run), session, mode) for run, session, mode in asked))  # type: ignore[arg-type]
    for (run, _, _), reply in zip(asked, replies, strict=True):
        check_reply(case, run, reply)
    for session in (empty, other):
        check_state(f"{case.name} first reply", engine.state(session), case.state_after_first_reply())
    assert engine.record_bytes(read) == before
    check_turn_state(engine, case, "new_window", grown)


RUNS: dict[str, Callable[..., None]] = {
    run.__name__: run for run in (first_turn, same_window, new_window, read_only, base, mixed_batch)
}
