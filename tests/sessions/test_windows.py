"""Windows: single rules by example, and whole histories against what the client meant."""

import hashlib
import random
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from deltamem_vllm.errors import CorruptRecord
from deltamem_vllm.sessions import windows
from deltamem_vllm.sessions.windows import (
    Boundary,
    Mode,
    Plan,
    Window,
    advance,
    pack,
    plan,
    unpack,
    write_limit,
)
from tests.conftest import NIGHTLY

HISTORIES = settings(
    max_examples=100_000 if NIGHTLY else 5000,
    deadline=None,
    derandomize=not NIGHTLY,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
EXAMPLES = settings(HISTORIES, max_examples=5000 if NIGHTLY else 300)
QUICK = settings(HISTORIES, max_examples=300, derandomize=True, phases=[Phase.generate])


def window_of(tokens: list[int], *counts: int) -> Window:
    return Window(tuple(Boundary(n, windows.prefix_digests(tokens, [n])[0]) for n in counts))


# --- single rules -------------------------------------------------------------------------------------------


def test_digest_is_the_documented_hash() -> None:
    expected = hashlib.blake2b(struct.pack("<3i", 5, 70000, 1), digest_size=16, person=b"deltamem-win").digest()
    assert windows.prefix_digests([5, 70000, 1, 9], [3]) == [expected]


def test_no_window_is_new() -> None:
    assert plan(None, [1, 2, 3]) == Plan("new", (), 0)


@pytest.mark.parametrize(
    ("prompt", "kind", "matched"),
    [
        ([1, 2, 3, 4, 5, 6], "extend", 5),  # the next turn
        ([1, 2, 3, 4, 5], "extend", 5),  # exactly what was fed
        ([1, 2, 3, 9], "replace", 3),  # an edited reply
        ([1, 2, 3], "replace", 3),  # regenerate
        ([1, 2, 9, 4, 5], "new", 0),  # an edited first message
        ([1, 2], "new", 0),
        ([], "new", 0),
    ],
)
def test_plan_picks_the_largest_true_boundary(prompt: list[int], kind: str, matched: int) -> None:
    window = window_of([1, 2, 3, 4, 5], 3, 5)
    made = plan(window, prompt)
    assert (made.kind, made.matched) == (kind, matched)
    assert made.keep == tuple(b for b in window.boundaries if b.count <= matched)


def test_advance_marks_prompt_and_end_once() -> None:
    fed = [1, 2, 3, 4, 5]
    assert advance(windows.NEW, fed, 3) == window_of(fed, 3, 5)
    assert advance(windows.NEW, fed, 5) == window_of(fed, 5)
    assert advance(windows.NEW, fed, 6) == window_of(fed, 5)
    assert advance(plan(window_of(fed, 3, 5), fed), fed, 5) == window_of(fed, 3, 5)


def test_advance_refuses_the_plan_of_another_request() -> None:
    with pytest.raises(ValueError, match="do not begin with the 3 tokens"):
        advance(plan(window_of([1, 2, 3], 3), [1, 2, 3, 4]), [7, 8, 9, 4], 4)
    with pytest.raises(ValueError, match="no token was fed"):
        advance(windows.NEW, [], 0)


def test_window_keeps_the_newest_512_boundaries() -> None:
    window = None
    tokens: list[int] = []
    for turn in range(400):
        tokens += [turn, turn + 1, turn + 2]
        window = advance(plan(window, tokens[:-1]), tokens, len(tokens) - 1)
    assert window is not None
    assert len(window.boundaries) == 512
    assert window.end.count == len(tokens)
    assert plan(window, tokens).kind == "extend"
    assert len(pack(window)) == windows.MAX_PACKED_BYTES


def test_write_limit() -> None:
    made = plan(window_of([1, 2, 3], 3), [1, 2, 3, 4])
    assert write_limit(made, "readwrite", 4) == windows.WRITE_ALL == 2**31 - 1
    assert write_limit(made, "read", 4) == 3
    assert write_limit(windows.NEW, "read", 4) == 0
    assert write_limit(made, "off", 4) == -1
    bad: Any = "write"
    with pytest.raises(ValueError, match="'write' is none of"):
        write_limit(made, bad, 4)


@pytest.mark.parametrize("counts", [(), (0,), (3, 3), (5, 4), (2**31,)])
def test_window_refuses_bad_boundaries(counts: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="boundar"):
        Window(tuple(Boundary(n, bytes(16)) for n in counts))


# --- packing ------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 2**31 - 1), min_size=1, max_size=30, unique=True), st.randoms())
@EXAMPLES
def test_pack_is_reversible(counts: list[int], rng: random.Random) -> None:
    window = Window(tuple(Boundary(n, rng.randbytes(16)) for n in sorted(counts)))
    assert unpack(pack(window)) == window


@given(st.binary(max_size=80))
@EXAMPLES
def test_unpack_takes_any_bytes(data: bytes) -> None:
    try:
        window = unpack(data)
    except CorruptRecord:
        return
    assert pack(window) == data


def test_unpack_refuses_damage() -> None:
    assert unpack(pack(None)) is None
    good = pack(window_of([1, 2, 3], 1, 3))
    swapped = good[:4] + good[8:12] + good[4:8] + good[12:]
    for bad in (
        good[:-1],
        good + b"\0",
        b"\2" + good[1:],
        b"\1\1" + good[2:],
        swapped,
        good[:4],
        b"\1",
        bytes(99999),
    ):
        with pytest.raises(CorruptRecord):
            unpack(bad)


# --- plan against a plain-list twin, with an alphabet small enough for prefixes to collide ------------------

small = st.lists(st.integers(0, 2), max_size=12)


@given(small.filter(bool), st.sets(st.integers(1, 12), max_size=4), small)
@EXAMPLES
def test_plan_equals_comparing_the_tokens(fed: list[int], cuts: set[int], prompt: list[int]) -> None:
    counts = sorted({n for n in cuts if n <= len(fed)} | {len(fed)})
    matched = max((n for n in counts if prompt[:n] == fed[:n]), default=0)
    made = plan(window_of(fed, *counts), prompt)
    assert made.matched == matched
    assert made.kind == ("new" if not matched else "extend" if matched == len(fed) else "replace")
    assert [b.count for b in made.keep] == [n for n in counts if n <= matched]


# --- whole histories ----------------------------------------------------------------------------------------
# The memory is modelled as the tuple of tokens written to it, in order. The server below is the code under
# test with the smallest possible engine around it. The client knows what it *meant*: which tokens of which
# turn survive. It never looks at a boundary or a digest, so that the two can only agree when every
# surviving token has been written exactly once.

Planner = Callable[[Window | None, list[int]], Plan]


@dataclass(frozen=True)
class Turn:
    """One message and its answer.

    Attributes:
        sampled: the answer up to its end token, its last permitted one, or the last one of its stop string.
        shown: how later prompts show it. A template closes it, a stop string is cut off, thinking is dropped.
        overrun: what the engine had sampled past a stop string when it was seen.
    """

    user: list[int]
    sampled: list[int]
    shown: list[int]
    overrun: list[int]


@dataclass
class Server:
    """A session and an engine whose state is the tuple of tokens written; the flags are planted bugs."""

    plan: Planner = plan
    commits_aborted: bool = False
    commits_reads: bool = False
    commits_overrun: bool = False
    base: tuple[int, ...] = ()
    end: tuple[int, ...] = ()
    window: Window | None = None

    def run(self, prompt: list[int], turn: Turn, mode: Mode, left_after: int | None = None) -> tuple[int, ...]:
        """Serve one request, or as many tokens of its answer as its client waited for.

        Returns the memory that the first new token of the prompt was read from.
        """
        made = self.plan(self.window, prompt)
        base = self.end if made.kind == "new" else self.base
        sampled = turn.sampled + (turn.overrun if self.commits_overrun else [])
        fed = prompt + sampled[:left_after][:-1]
        state = base + tuple(fed[: max(0, write_limit(made, mode, len(prompt)))])
        complete = left_after is None or self.commits_aborted
        if complete and (mode == "readwrite" or (mode == "read" and self.commits_reads)):
            self.base, self.end, self.window = base, state, advance(made, fed, len(prompt))
        return base + tuple(prompt[: made.matched])


@dataclass
class Client:
    """What was meant. ``past`` are the tokens of closed windows, ``turns`` those of the open one."""

    rng: random.Random
    server: Server
    thinks: bool = False  # the model thinks, and the template drops that from every earlier answer
    fresh: Any = field(default_factory=lambda: count(1))
    past: tuple[int, ...] = ()
    turns: list[Turn] = field(default_factory=list)

    def message(self, least: int = 1) -> list[int]:
        return [next(self.fresh) for _ in range(self.rng.randint(least, 5))]

    def turn(self, user: list[int] | None = None) -> Turn:
        """A new answer, to a new message unless one is given, which ends in any of the possible ways."""
        user, sampled, overrun = user or self.message(), self.message(), []
        match self.rng.choice(["end token", "length", "stop string"]):
            case "end token":  # sampled, and said again by the template
                shown = sampled + self.message(0)
            case "length":
                shown = sampled + self.message()
            case _:
                shown = sampled[: self.rng.randrange(len(sampled))] + self.message()
                overrun = self.message(0)
        if self.thinks:
            shown = shown[self.rng.randint(1, len(shown)) :]
        return Turn(user, sampled, shown, overrun)

    def fed(self) -> tuple[int, ...]:
        """The open window's surviving tokens: all but the last sampled one, which nobody has fed."""
        if not self.turns:
            return ()
        return tuple(self.prompt(self.turns) + self.turns[-1].sampled[:-1])

    @staticmethod
    def prompt(turns: list[Turn]) -> list[int]:
        """The newest message behind everything before it."""
        return [token for turn in turns[:-1] for token in turn.user + turn.shown] + turns[-1].user

    def ask(self, turns: list[Turn], *, new: bool, mode: Mode = "readwrite", left: bool = False) -> None:
        """Send the last of ``turns`` with the others as history, and check the memory that is left."""
        left_after = self.rng.randint(1, len(turns[-1].sampled)) if left else None
        seen = self.server.run(self.prompt(turns), turns[-1], mode, left_after)
        past = self.past + self.fed() if new else self.past
        assert len(set(seen)) == len(seen), f"a token was written twice: {seen}"
        assert seen[: len(past)] == past, f"read from {seen}, which does not continue {past}"
        if mode == "readwrite" and not left:
            self.past, self.turns = past, turns
        assert self.server.base == self.past, f"base {self.server.base}, meant {self.past}"
        assert self.server.end == self.past + self.fed(), f"end {self.server.end}, meant {self.past + self.fed()}"

    def step(self, action: str) -> None:
        mode: Mode = self.rng.choice(["read", "off"]) if action == "look" else "readwrite"
        left = action == "abort"
        if left or action == "look":
            action = self.rng.choice(["turn", "only", "regenerate", "edit", "reply"])
        new = action == "only" or not self.turns
        if new:
            turns = [self.turn()]
        elif action == "turn":
            turns = [*self.turns, self.turn()]
        elif action == "regenerate":
            turns = [*self.turns[:-1], self.turn(self.turns[-1].user)]
        elif action == "retry":
            turns = list(self.turns)
        else:
            at = self.rng.randrange(len(self.turns))
            turns = self.turns[:at]
            if action == "reply":  # an earlier reply edited by hand
                turns.append(replace(self.turns[at], shown=self.message(0) + self.turns[at].shown[1:]))
            else:  # an earlier message edited; the first one cannot be told from a new conversation
                new = at == 0
            turns.append(self.turn())
        self.ask(turns, new=new, mode=mode, left=left)


ACTIONS = ["turn", "turn", "only", "regenerate", "edit", "reply", "retry", "abort", "look"]


def check_histories(make: Callable[[], Server], profile: settings = HISTORIES) -> None:
    """Run the property against a server; raises AssertionError with the first history that goes wrong."""

    @given(st.integers(0, 2**32), st.booleans(), st.lists(st.sampled_from(ACTIONS), min_size=1, max_size=30))
    @profile
    def histories(seed: int, thinks: bool, actions: list[str]) -> None:
        client = Client(random.Random(seed), make(), thinks)
        for action in actions:
            client.step(action)

    histories()


def test_every_surviving_token_is_written_once() -> None:
    check_histories(Server)


def test_the_histories_hold_everything_that_clients_do() -> None:
    """A property over histories that lack a case says nothing about it."""
    kinds: Counter[str] = Counter()

    class Watched(Server):
        def run(self, prompt: list[int], turn: Turn, mode: Mode, left_after: int | None = None) -> tuple[int, ...]:
            made = plan(self.window, prompt)
            kinds.update([made.kind, mode, "left" if left_after else "complete"])
            if mode == "readwrite" and not left_after:
                kinds["overrun"] += bool(turn.overrun)
            if self.window is not None and made.kind == "replace" and len(prompt) > self.window.end.count:
                kinds["drift"] += 1  # a later turn whose history is not what was fed
            return super().run(prompt, turn, mode, left_after)

    check_histories(Watched, QUICK)
    wanted = ("extend", "replace", "new", "readwrite", "read", "off", "left", "complete", "overrun", "drift")
    assert min(kinds[kind] for kind in wanted) >= 50, kinds


# --- the property catches planted bugs ----------------------------------------------------------------------


def plan_without_digests(window: Window | None, tokens: list[int]) -> Plan:
    """PLANTED BUG: a boundary matches by its count alone."""
    keep = tuple(b for b in window.boundaries if b.count <= len(tokens)) if window else ()
    if window is None or not keep:
        return windows.NEW
    return Plan("extend" if keep[-1] is window.end else "replace", keep, keep[-1].count)


def plan_by_the_end(window: Window | None, tokens: list[int]) -> Plan:
    """PLANTED BUG: only the last boundary is looked at."""
    made = plan(window, tokens)
    return made if made.kind == "extend" else windows.NEW


def test_catches_a_dropped_digest_check(monkeypatch: pytest.MonkeyPatch) -> None:
    # the second line of defence, advance()'s own check, would stop this bug too: take it away
    monkeypatch.setattr(windows, "prefix_digests", lambda tokens, counts: [bytes(16) for _ in counts])
    with pytest.raises(AssertionError, match=r"meant|continue|twice"):
        check_histories(lambda: Server(plan=plan_without_digests), QUICK)


@pytest.mark.parametrize("planted", [lambda *_: windows.NEW, plan_by_the_end], ids=["always new", "only the end"])
def test_catches_dropped_boundaries(planted: Planner) -> None:
    with pytest.raises(AssertionError, match=r"meant|continue|twice"):
        check_histories(lambda: Server(plan=planted), QUICK)


@pytest.mark.parametrize("bug", ["commits_aborted", "commits_reads", "commits_overrun"])
def test_catches_a_commit_that_must_not_be(bug: str) -> None:
    """After an abort, of a request that only reads, past a stop string."""
    with pytest.raises(AssertionError, match="meant"):
        check_histories(lambda: Server(**{bug: True}), QUICK)
