"""What an engine remembers of sessions does not grow with how many it has ever seen.

Counted in the containers of our own objects, on the scheduler's side and in the session service: a process's size says
little of a leak of a few bytes per session, and nothing of where it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deltamem_vllm.sessions import slots
from deltamem_vllm.sessions.directory import Directory
from deltamem_vllm.sessions.tickets import Tickets
from deltamem_vllm.store import verify
from loadtests.hooks import SHAPE, Engine

SESSIONS, HELLOS = 50, 2
HOST_BYTES = 8 * 24 * 1024
"""Room for some eight sessions: full long before the first count."""


def entries(roots: list[Any]) -> dict[str, int]:
    """By attribute, how many entries the containers have that objects of ours hold, directly or through each other."""
    found: dict[str, int] = {}
    seen: set[int] = set()
    todo = [(type(root).__name__, root) for root in roots]
    while todo:
        name, thing = todo.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        inside = list(elements(thing))
        if inside or isinstance(thing, (Mapping, Set, list, tuple)) or hasattr(thing, "maxlen"):
            found[name] = found.get(name, 0) + len(inside)
            todo += [(name, each) for each in inside]
        elif type(thing).__module__.startswith("deltamem_vllm"):
            todo += [(f"{type(thing).__name__}.{field}", value) for field, value in fields(thing)]
    return found


def elements(thing: Any) -> Iterator[Any]:
    if isinstance(thing, Mapping):
        for key, value in list(thing.items()):
            yield from (key, value)
    elif isinstance(thing, (Set, list, tuple)) or hasattr(thing, "maxlen"):
        yield from list(thing)


def fields(thing: Any) -> Iterator[tuple[str, Any]]:
    yield from vars(thing).items() if hasattr(thing, "__dict__") else ()
    for each in type(thing).__mro__:
        for name in getattr(each, "__slots__", ()):
            if hasattr(thing, name):
                yield name, getattr(thing, name)


def use(engine: Engine, first: int) -> None:
    """New sessions, each of which begins with one of a few greetings and has a turn of its own, and is asked about."""
    rng = np.random.default_rng(first)
    hellos = np.random.default_rng(0).normal(size=(HELLOS, *SHAPE)).astype(np.float32)
    for number in range(first, first + SESSIONS):
        engine.end(engine.begin(number), hellos[number % HELLOS])
        engine.end(engine.begin(number), rng.normal(size=SHAPE).astype(np.float32))
        engine.client.ask("info", tenant="t", session=f"s{number}")
        if number % 3 == 0:
            engine.client.ask("delete", tenant="t", session=f"s{number - first // 2}")


def grown(folder: Path) -> dict[str, int]:
    """Entries that are there after three times as many sessions, and were not before, by where they are."""
    engine = Engine(str(folder), store_url=f"sqlite:///{folder}/sessions.db", host_bytes=HOST_BYTES, slots=16)
    counts = []
    try:
        for number in range(3):
            use(engine, number * SESSIONS)
            counts.append(entries([engine.side, engine.service]))
    finally:
        engine.client.close()
        engine.service.close()
    first, _, last = counts
    return {name: count - first.get(name, 0) for name, count in last.items() if count > first.get(name, 0) + 16}


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept of the latest sessions is little, so that the first count has all of it."""
    monkeypatch.setattr(slots, "MAX_OWNERS", 8)
    monkeypatch.setattr(verify, "MAX_FLOORS", 32)


def test_nothing_piles_up(tmp_path: Path) -> None:
    assert grown(tmp_path) == {}


def settle_and_keep(tickets: Tickets, ticket: str, result: dict[str, Any]) -> None:
    SETTLE(tickets, ticket, result)
    tickets._outcomes[ticket] = result


SETTLE = Tickets.settle
LEAKS: dict[str, tuple[Any, str, Any]] = {
    "SlotTable._names": (slots, "MAX_OWNERS", 1 << 60),
    "Verifier._floors": (verify, "MAX_FLOORS", 1 << 60),
    "Tickets._outcomes": (Tickets, "settle", settle_and_keep),
    "Directory._sessions": (Directory, "_make_room", lambda *_: None),
}
"""Where it leaks, and what is planted for that."""


@pytest.mark.parametrize("where", LEAKS)
def test_catches_what_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    monkeypatch.setattr(*LEAKS[where])
    assert where in grown(tmp_path)
