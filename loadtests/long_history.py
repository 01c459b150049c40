"""The next turn of a long conversation: time to its first token where all of it is resent, left out, or not sent.

A real server on the CPU with the bundled recall model, prefix caching off: as for a client that comes back when its
blocks are gone. One conversation of 8,192 or 32,768 tokens is told to three sessions in one request each. Then turns
follow: one client resends all of it, one resends all of it and lets the server leave out what the memory holds, one
sends only the turn; their requests alternate. Nothing is reported unless every turn made a version, and every token of
the conversation was in the prompt or in the memory.
"""

import bisect
import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from deltamem_vllm.server.elision import KEEP
from deltamem_vllm.server.usage import FIELD
from loadtests.elision import PAUSE, Answer, Messages, Server, serving, talk

HISTORIES = (8192, 32768)
"""Tokens of the conversation before the turns that are timed."""
FULL, ELIDE, NEW = ARMS = ("full", "elide", "new turn only")
TURN = 64
"""Tokens that a message and its answer come to, at most."""


@dataclass
class Talker:
    """One client and its session.

    Attributes:
        arm: what it does about its history.
        messages: the whole conversation.
        version: of the session, by the turns that were taken.
        unfed: tokens of earlier replies that no request brought to the model: the last one, and what closes a message.
    """

    server: Server
    arm: str
    session: str
    messages: Messages
    version: int = 0
    unfed: int = 0

    def say(self, text: str) -> Answer:
        """A turn, and the checks on it.

        Raises:
            SystemExit: it wrote no version, or its tokens are not what they should be.
        """
        going_on = self.version > 0
        self.messages.append({"role": "user", "content": text})
        sent = self.messages[-1:] if self.arm == NEW and going_on else self.messages
        answer = self.server.first_token(sent, self.session, "elide" if self.arm == ELIDE else "full")
        self.version += 1
        whole = self.server.count(sent)
        eliding = self.arm == ELIDE and going_on
        prompt = self.server.count(self.messages[-KEEP - 1 :]) if eliding else whole
        wanted = Told(self.version, prompt, whole - self.unfed - prompt if eliding else 0)
        told = Told(self.server.version(self.session), answer.usage["prompt_tokens"], answer.usage.get(FIELD, 0))
        if told != wanted:
            raise SystemExit(f"{self.session}: {told}, but it should be {wanted}: nothing is reported")
        self.messages.append({"role": "assistant", "content": answer.text})
        fed = whole + answer.usage["completion_tokens"] - 1
        self.unfed += self.server.count(self.messages, answered=True) - fed if self.arm == ELIDE else 0
        return answer


class Told(NamedTuple):
    """What a server says after a turn: the session's version; tokens of the prompt, and those that were left out."""

    version: int
    prompt: int
    elided: int


def conversation(server: Server, tokens: int) -> Messages:
    """The shortest beginning of `talk` that has so many tokens; it ends with a reply."""
    said = itertools.islice(talk(), tokens // 2)  # no message is empty
    messages = [
        {"role": role, "content": text} for turn in said for role, text in zip(("user", "assistant"), turn, strict=True)
    ]

    def count(turns: int) -> int:
        return server.count(messages[: 2 * turns], answered=True)

    turns = bisect.bisect_left(range(1, len(messages) // 2 + 1), tokens, key=count) + 1
    return messages[: 2 * turns]


def turns_of(server: Server, tokens: int, turns: int) -> dict[str, list[Answer]]:
    """Answers to the turns that follow a conversation of so many tokens, by arm."""
    history = conversation(server, tokens)
    talkers = [Talker(server, arm, f"long-{tokens}-{arm.replace(' ', '-')}", list(history)) for arm in ARMS]
    texts = itertools.islice(talk(), turns + 1)
    first, *rest = (user for user, _ in texts)
    for talker in talkers:
        talker.say(first)
    answers: dict[str, list[Answer]] = {arm: [] for arm in ARMS}
    for number, text in enumerate(rest):
        for talker in talkers if number % 2 else reversed(talkers):
            time.sleep(PAUSE)
            answers[talker.arm].append(talker.say(text))
    return answers


def measure(turns: int = 9, histories: Sequence[int] = HISTORIES) -> list[dict[str, Any]]:
    """By length of the history: median milliseconds to the first token of a turn, and the last turn's tokens."""
    rows = []
    with serving(max(histories) + TURN * (turns + 2)) as server:
        for tokens in histories:
            answers = turns_of(server, tokens, turns)
            ms = {arm: 1e3 * statistics.median(answer.seconds for answer in of) for arm, of in answers.items()}
            last = answers[ELIDE][-1].usage
            rows.append(
                {
                    "history": tokens,
                    "full prompt": answers[FULL][-1].usage["prompt_tokens"],
                    "elided prompt": last["prompt_tokens"],
                    "elided": last[FIELD],
                    **{f"{arm} ms": took for arm, took in ms.items()},
                    "elide / full": ms[ELIDE] / ms[FULL],
                }
            )
    return rows
