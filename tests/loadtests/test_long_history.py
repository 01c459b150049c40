"""Turns behind a long history are reported only where a server did with every one of them what it should."""

from __future__ import annotations

from typing import Any

import pytest

from deltamem_vllm.server.elision import KEEP
from deltamem_vllm.server.usage import FIELD
from loadtests.elision import Answer, Messages, Server
from loadtests.long_history import ELIDE, FULL, NEW, Talker, conversation, turns_of

CLOSING = 2
"""Tokens that stand behind a reply in the conversation and were not generated."""


class Pretended(Server):
    """Counts characters for tokens, answers "yes", and does one thing wrong."""

    def __init__(self, wrong: str = "") -> None:
        self.wrong = wrong
        self.versions: dict[str, int] = {}

    def count(self, messages: Messages, answered: bool = False) -> int:
        replies = sum(message["role"] == "assistant" for message in messages)
        return sum(len(message["content"]) for message in messages) + CLOSING * replies

    def version(self, session: str) -> int:
        return self.versions[session] - (self.wrong == "a turn wrote nothing" and self.versions[session] == 3)

    def first_token(self, messages: Messages, session: str, history: str) -> Answer:
        turn = self.versions[session] = self.versions.get(session, 0) + 1
        whole = self.count(messages)
        if self.wrong == "a message is lost" and turn == 2:
            whole -= len(messages[-1]["content"])
        usage: dict[str, Any] = {"prompt_tokens": whole, "completion_tokens": len("yes") + 1}
        elide = turn > 1 and (history == "elide" or self.wrong == "left out unasked")
        if elide and self.wrong != "nothing is left out":
            prompt = self.count(messages[-KEEP - 1 :])
            unfed = CLOSING * (turn - 1)
            lost = self.wrong == "a token is in neither" and turn == 3
            usage |= {"prompt_tokens": prompt, FIELD: whole - unfed - prompt - lost}
        return Answer(0.1, "yes", usage)


def test_what_is_as_it_should_be_is_reported() -> None:
    answers = turns_of(Pretended(), 500, 4)
    assert {arm: len(of) for arm, of in answers.items()} == {FULL: 4, ELIDE: 4, NEW: 4}
    assert all(FIELD not in answer.usage for arm in (FULL, NEW) for answer in answers[arm])
    assert min(answer.usage["prompt_tokens"] for answer in answers[FULL]) > 500
    assert max(answer.usage["prompt_tokens"] for arm in (ELIDE, NEW) for answer in answers[arm]) < 250


@pytest.mark.parametrize(
    ("wrong", "arm"),
    [
        ("a turn wrote nothing", FULL),
        ("a message is lost", NEW),
        ("left out unasked", FULL),
        ("nothing is left out", ELIDE),
        ("a token is in neither", ELIDE),
    ],
)
def test_what_is_not_is_not_reported(wrong: str, arm: str) -> None:
    talker = Talker(Pretended(wrong), arm, "s", conversation(Pretended(), 300))
    with pytest.raises(SystemExit, match="nothing is reported"):
        list(map(talker.say, ["what is it?"] * 3))


def test_the_history_is_the_shortest_that_is_long_enough() -> None:
    server = Pretended()
    made = conversation(server, 1000)
    assert server.count(made, answered=True) >= 1000 > server.count(made[:-2], answered=True)
    assert made[-1]["role"] == "assistant"
