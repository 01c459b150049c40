"""Seeded dialogues: people state facts, chat, and later ask.

The split is over combinations. Every single (attribute, value) fact occurs in training, but a fixed
fifth of all *pairs* of facts never share a training dialogue; in a held-out dialogue every fact
shares such a pair with another one (one-fact dialogues have no pairs and exist in training only).
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from .facts import ATTRIBUTES, BY_NAME, NOTED, OPENERS, SMALL_TALK, UNKNOWN

Fact = tuple[str, str]
Split = Literal["train", "heldout"]
HELDOUT_SHARE = 5


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One user message and its right reply; ``kind`` is tell, talk, ask (told) or ask_unknown."""

    user: str
    reply: str
    kind: str
    facts: tuple[Fact, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How a dialogue is made. Ranges are inclusive; shares are probabilities.

    ``kin`` is the share of attributes drawn among those that share their values with one already
    drawn, told and unknown ones alike: the dialogues in which the kind of a value says little.
    """

    facts: tuple[int, int] = (4, 4)
    talk: tuple[int, int] = (0, 2)
    unknown: tuple[int, int] = (1, 2)
    joined: float = 0.2
    early_ask: float = 0.0
    kin: float = 0.0
    corrected: float = 0.0


@dataclass(frozen=True)
class Dialogue:
    """Turns in order; ``messages`` is the whole conversation as a client would send it."""

    turns: tuple[Turn, ...] = field()

    def messages(self) -> list[dict[str, str]]:
        """The conversation as OpenAI-style messages, right replies included."""
        return [m for turn in self.turns for m in turn_messages(turn)]

    def facts(self) -> tuple[Fact, ...]:
        """Every fact told, in order."""
        return tuple(f for turn in self.turns if turn.kind == "tell" for f in turn.facts)


def turn_messages(turn: Turn) -> list[dict[str, str]]:
    """The user message and the right reply of one turn."""
    return [
        {"role": "user", "content": turn.user},
        {"role": "assistant", "content": turn.reply},
    ]


def is_heldout_pair(a: Fact, b: Fact) -> bool:
    """Whether two facts never meet in a training dialogue; symmetric, the same on every machine."""
    if a[0] == b[0]:
        return False
    key = "|".join(f"{name}={value}" for name, value in sorted((a, b)))
    return zlib.crc32(key.encode()) % HELDOUT_SHARE == 0


def sample_names(rng: random.Random, count: int, kin: float, drawn: list[str]) -> list[str]:
    """``count`` attributes besides those in ``drawn``."""
    names: list[str] = []
    while len(names) < count:
        rest = [a for a in ATTRIBUTES if a.name not in drawn + names]
        values = {BY_NAME[n].values for n in drawn + names}
        related = [a for a in rest if a.values in values]
        pool = related if related and rng.random() < kin else rest
        names.append(rng.choice(pool).name)
    return names


def sample_facts(rng: random.Random, count: int, split: Split, kin: float = 0.0) -> list[Fact]:
    """``count`` facts of different attributes that belong to ``split``, in random order."""
    while True:
        names = sample_names(rng, count, kin, [])
        rng.shuffle(names)
        facts = [(name, rng.choice(BY_NAME[name].values)) for name in names]
        facts = [_fitting(rng, facts, i, split) for i in range(len(facts))]
        if belongs_to(facts, split):
            return facts


def _fitting(rng: random.Random, facts: list[Fact], i: int, split: Split) -> Fact:
    """Fact ``i`` with its value redrawn (a few times) until it suits those before it."""
    for _ in range(20):
        met = any(is_heldout_pair(facts[i], other) for other in facts[:i])
        if i == 0 or met == (split == "heldout"):
            break
        facts[i] = (facts[i][0], rng.choice(BY_NAME[facts[i][0]].values))
    return facts[i]


def belongs_to(facts: list[Fact], split: Split) -> bool:
    """Train: no held-out pair. Held-out: every fact is in one."""
    if split == "train":
        return not any(is_heldout_pair(a, b) for a in facts for b in facts)
    return all(any(is_heldout_pair(a, b) for b in facts) for a in facts)


def state_text(rng: random.Random, fact: Fact) -> str:
    """One way of telling a fact, without the full stop."""
    text = rng.choice(BY_NAME[fact[0]].statements).format(v=fact[1])
    if rng.random() < 0.1:
        text = f"{rng.choice(OPENERS)} {text}"
    return text


def tell(rng: random.Random, facts: list[Fact]) -> Turn:
    """A user message with one or several facts."""
    joint = rng.choice([" and ", ". ", ", "])
    text = joint.join(state_text(rng, f) for f in facts)
    return Turn(user=_stop(rng, text, "."), reply=NOTED, kind="tell", facts=tuple(facts))


def ask(rng: random.Random, name: str, known: dict[str, str]) -> Turn:
    """A question about one attribute; the reply follows from what is known by then."""
    text = _stop(rng, rng.choice(BY_NAME[name].questions), "?")
    if name not in known:
        return Turn(user=text, reply=UNKNOWN, kind="ask_unknown", facts=((name, ""),))
    return Turn(user=text, reply=f"{known[name]}.", kind="ask", facts=((name, known[name]),))


def _stop(rng: random.Random, text: str, mark: str) -> str:
    return text if rng.random() < 0.15 else text + mark


def make_dialogue(rng: random.Random, shape: Shape, split: Split = "train") -> Dialogue:
    """Facts and small talk in random order, then a question for each fact and some unknown ones."""
    facts = sample_facts(rng, rng.randint(*shape.facts), split, shape.kin)
    if facts and rng.random() < shape.corrected:
        facts = _with_correction(rng, facts, split)
    plan: list[Turn | str] = []
    rest = list(facts)
    while rest:
        size = rng.choice((2, 2, 3)) if rng.random() < shape.joined else 1
        group, rest = rest[:size], rest[size:]
        if len({name for name, _ in group}) < len(group):
            group, rest = group[:1], group[1:] + rest
        plan.append(tell(rng, group))
    asked = list(dict.fromkeys(name for name, _ in facts))
    asked += sample_names(rng, rng.randint(*shape.unknown), shape.kin, asked)
    rng.shuffle(asked)
    for _ in range(rng.randint(*shape.talk)):
        user, reply = rng.choice(SMALL_TALK)
        talk = Turn(user=_stop(rng, user, "."), reply=reply, kind="talk")
        plan.insert(rng.randint(0, len(plan)), talk)
    for name in asked:
        early = rng.random() < shape.early_ask
        plan.insert(rng.randint(0, len(plan)) if early else len(plan), name)
    known: dict[str, str] = {}
    turns: list[Turn] = []
    for step in plan:
        if isinstance(step, str):
            turns.append(ask(rng, step, known))
            continue
        if step.kind == "tell":
            known.update(step.facts)
        turns.append(step)
    return Dialogue(tuple(turns))


def _with_correction(rng: random.Random, facts: list[Fact], split: Split) -> list[Fact]:
    """Tell one attribute again, with another value, somewhere after its first telling."""
    at = rng.randrange(len(facts))
    name, old = facts[at]
    for value in rng.sample(BY_NAME[name].values, len(BY_NAME[name].values)):
        longer = list(facts)
        longer.insert(rng.randint(at + 1, len(facts)), (name, value))
        if value != old and belongs_to(longer, split):
            return longer
    return facts


def dialogues(seed: int, shape: Shape, split: Split) -> Iterator[Dialogue]:
    """An endless stream of dialogues; the same seed gives the same stream."""
    rng = random.Random(f"{split}-{seed}")
    while True:
        yield make_dialogue(rng, shape, split)
