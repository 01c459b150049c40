"""What arrives when: a trace made from a seed, the same for every server that it is sent to.

Arrivals are Poisson. Each belongs to a pattern; some sessions exist from the beginning, with a history. The replies in
histories are the script's own and not what a server said, so that every server is sent the same bytes.
"""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, get_args

from deltamem_vllm.recall.data import Shape, dialogues, turn_messages

Pattern = Literal[
    "new", "new turn only", "full resend", "elided", "returning", "long idle", "burst", "read only", "no session"
]
PATTERNS: tuple[Pattern, ...] = get_args(Pattern)
SHARES: dict[Pattern, float] = {
    "new": 0.15,
    "new turn only": 0.2,
    "full resend": 0.2,
    "elided": 0.1,
    "returning": 0.1,
    "long idle": 0.05,
    "burst": 0.03,
    "read only": 0.1,
    "no session": 0.07,
}
"""Of arrivals; a burst is one arrival of several requests."""
BURST = (3, 12)
"""Requests of a burst. A session's queue holds 8 beside the one that runs: the rest is told 409."""
IDLE = 5.0
"""Seconds without a request after which a session counts as returning."""
SEEDED, LONGEST = 10, 24
"""Turns of a session that exists from the beginning; turns after which it is used no more: the model holds so many."""
Exchange = tuple[str, str]
"""What the user says, and the reply."""


@dataclass(frozen=True)
class Arrival:
    """One request.

    Attributes:
        at: seconds since the beginning.
        session: None without one.
        history: what was said before, all of it; whether it is sent depends on pattern and server.
        user: what is new.
    """

    at: float
    pattern: Pattern
    session: str | None
    history: tuple[Exchange, ...]
    user: str


@dataclass
class Trace:
    """Arrivals in their order.

    Attributes:
        regular: sessions that exist, and were used just before. idle: those that only the store has.
    """

    arrivals: list[Arrival] = field(default_factory=list)
    regular: dict[str, tuple[Exchange, ...]] = field(default_factory=dict)
    idle: dict[str, tuple[Exchange, ...]] = field(default_factory=dict)


@dataclass
class _Session:
    name: str
    history: tuple[Exchange, ...] = ()
    used: float = 0.0


def exchanges(seed: int) -> Iterator[Exchange]:
    """Messages and replies without end, in the bundled model's words."""
    for dialogue in dialogues(seed, Shape(facts=(3, 5), talk=(2, 4)), "heldout"):
        for turn in dialogue.turns:
            user, reply = turn_messages(turn)
            yield user["content"], reply["content"]


def make(seed: int, seconds: float, rate: float, regular: int = 8) -> Trace:
    """A trace of some length.

    Args:
        rate: arrivals per second.
        regular: sessions that exist and are in use.
    """
    rng, talk, trace, names = random.Random(seed), exchanges(seed), Trace(), itertools.count()

    def session(history: int) -> _Session:
        return _Session(f"slo-{seed}-{next(names)}", tuple(itertools.islice(talk, history)))

    def arrive(at: float, pattern: Pattern, who: _Session | None, history: tuple[Exchange, ...]) -> None:
        said = next(talk)
        trace.arrivals.append(Arrival(at, pattern, who.name if who else None, history, said[0]))
        if who and pattern != "read only":
            who.history, who.used = (*who.history, said), at

    live = [session(SEEDED) for _ in range(regular)]
    trace.regular = {each.name: each.history for each in live}
    at = rng.expovariate(rate)
    while at < seconds:
        live = [each for each in live if len(each.history) < LONGEST]
        pattern = rng.choices(PATTERNS, [SHARES[each] for each in PATTERNS])[0]
        rested = [each for each in live if each.used <= at - IDLE]
        if pattern == "new" or not live or (pattern == "returning" and not rested):
            live.append(session(0))
            arrive(at, "new", live[-1], ())
        elif pattern == "no session":
            arrive(at, pattern, None, ())
        elif pattern == "long idle":
            live.append(session(SEEDED))
            trace.idle[live[-1].name] = live[-1].history
            arrive(at, pattern, live[-1], live[-1].history)
        elif pattern == "burst":
            who = rng.choice(live)
            before = who.history
            for _ in range(rng.randint(*BURST)):
                arrive(at, pattern, who, before)
        else:
            who = rng.choice(rested if pattern == "returning" else live)
            arrive(at, pattern, who, who.history)
        at += rng.expovariate(rate)
    return trace
