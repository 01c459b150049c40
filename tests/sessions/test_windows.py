"""Windows: single rules by example, and whole histories against what the client meant."""

import hashlib
import os
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
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

NIGHTLY = os.environ.get("DELTAMEM_NIGHTLY") == "1"
HISTORIES = settings(
    max_examples=5000 if NIGHTLY else 300,
    deadline=None,
    derandomize=not NIGHTLY,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)


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
@HISTORIES
def test_pack_is_reversible(counts: list[int], rng: random.Random) -> None:
    window = Window(tuple(Boundary(n, rng.randbytes(16)) for n in sorted(counts)))
    assert unpack(pack(window)) == window


@given(st.binary(max_size=80))
@HISTORIES
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
@HISTORIES
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


@dataclass
class Server:
    """A session and an engine whose state is the tuple of tokens written."""

    plan: Callable[[Window | None, list[int]], Plan] = plan
    commits_aborted: bool = False
    base: tuple[int, ...] = ()
    end: tuple[int, ...] = ()
    window: Window | None = None

    def run(self, prompt: list[int], reply: list[int], mode: Mode, *, abort: bool = False) -> tuple[int, ...]:
        """Serve one request; returns the memory that the first new token of the prompt was read from."""
        made = self.plan(self.window, prompt)
        base = self.end if made.kind == "new" else self.base
        fed = prompt + reply[:-1]
        state = base + tuple(fed[: max(0, write_limit(made, mode, len(prompt)))])
        if mode == "readwrite" and (not abort or self.commits_aborted):
            self.base, self.end, self.window = base, state, advance(made, fed, len(prompt))
        return base + tuple(prompt[: made.matched])


@dataclass
class Client:
    """What was meant. ``past`` are the tokens of closed windows, ``turns`` the messages of the open one."""

    rng: random.Random
    server: Server
    fresh: Any = field(default_factory=lambda: count(1))
    past: tuple[int, ...] = ()
    turns: list[tuple[list[int], list[int]]] = field(default_factory=list)

    def message(self, least: int = 1) -> list[int]:
        return [next(self.fresh) for _ in range(self.rng.randint(least, 5))]

    def fed(self) -> tuple[int, ...]:
        """The open window's surviving tokens: all but the last sampled one, which nobody has fed."""
        return tuple(token for prompt, reply in self.turns for token in prompt + reply)[:-1] if self.turns else ()

    def ask(
        self,
        turns: list[tuple[list[int], list[int]]],
        *,
        new: bool,
        mode: Mode = "readwrite",
        abort: bool = False,
    ) -> None:
        """Send the last of ``turns`` with the others as history, and check the memory that is left."""
        prompt = [token for user, reply in turns[:-1] for token in user + reply] + turns[-1][0]
        seen = self.server.run(prompt, turns[-1][1], mode, abort=abort)
        past = self.past + self.fed() if new else self.past
        assert len(set(seen)) == len(seen), f"a token was written twice: {seen}"
        assert seen[: len(past)] == past, f"read from {seen}, which does not continue {past}"
        if mode == "readwrite" and not abort:
            self.past, self.turns = past, turns
        assert self.server.base == self.past, f"base {self.server.base}, meant {self.past}"
        assert self.server.end == self.past + self.fed(), f"end {self.server.end}, meant {self.past + self.fed()}"

    def step(self, action: str) -> None:
        mode: Mode = self.rng.choice(["read", "off"]) if action == "look" else "readwrite"
        abort = action == "abort"
        if abort or action == "look":
            action = self.rng.choice(["turn", "only", "regenerate", "edit", "reply"])
        new = action == "only" or not self.turns
        if new:
            turns = [(self.message(), self.message())]
        elif action == "turn":
            turns = [*self.turns, (self.message(), self.message())]
        elif action == "regenerate":
            turns = [*self.turns[:-1], (self.turns[-1][0], self.message())]
        elif action == "retry":
            turns = list(self.turns)
        elif action == "reply":  # an earlier reply changed: edited by hand, or its thinking stripped by the template
            at = self.rng.randrange(len(self.turns))
            user, reply = self.turns[at]
            turns = [*self.turns[:at], (user, self.message(0) + reply[1:]), (self.message(), self.message())]
        else:  # an earlier user message edited; the first one cannot be told from a new conversation
            at = self.rng.randrange(len(self.turns))
            turns = [*self.turns[:at], (self.message(), self.message())]
            new = at == 0
        self.ask(turns, new=new, mode=mode, abort=abort)


ACTIONS = ["turn", "turn", "only", "regenerate", "edit", "reply", "retry", "abort", "look"]


def check_histories(make: Callable[[], Server], profile: settings = HISTORIES) -> None:
    """Run the property against a server; raises AssertionError with the first history that goes wrong."""

    @given(st.integers(0, 2**32), st.lists(st.sampled_from(ACTIONS), min_size=1, max_size=30))
    @profile
    def histories(seed: int, actions: list[str]) -> None:
        client = Client(random.Random(seed), make())
        for action in actions:
            client.step(action)

    histories()


def test_every_surviving_token_is_written_once() -> None:
    check_histories(Server)


# --- the property catches planted bugs ----------------------------------------------------------------------

QUICK = settings(HISTORIES, max_examples=300, derandomize=True, phases=[Phase.generate])


def plan_without_digests(window: Window | None, tokens: list[int]) -> Plan:
    """PLANTED BUG: a boundary matches by its count alone."""
    keep = tuple(b for b in window.boundaries if b.count <= len(tokens)) if window else ()
    if window is None or not keep:
        return windows.NEW
    return Plan("extend" if keep[-1] is window.end else "replace", keep, keep[-1].count)


def test_catches_a_dropped_digest_check(monkeypatch: pytest.MonkeyPatch) -> None:
    # the second line of defence, advance()'s own check, would stop this bug too: take it away
    monkeypatch.setattr(windows, "prefix_digests", lambda tokens, counts: [bytes(16) for _ in counts])
    with pytest.raises(AssertionError, match=r"meant|continue|twice"):
        check_histories(lambda: Server(plan=plan_without_digests), QUICK)


def test_catches_a_commit_after_an_abort() -> None:
    with pytest.raises(AssertionError, match="meant"):
        check_histories(lambda: Server(commits_aborted=True), QUICK)
