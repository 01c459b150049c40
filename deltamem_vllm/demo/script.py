"""What is said in the demo, and what must be true of the answers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from deltamem_vllm.demo.client import Client, Reply

SESSION = "demo"


class CheckFailed(Exception):
    """Something that the demo claims did not happen."""


@dataclass(frozen=True)
class Question:
    """Something to ask, and the word that a right answer contains."""

    text: str
    answer: str


#: With the bundled model: four facts that never met in a training dialogue (`deltamem_vllm.recall.data`).
TOLD = (
    "My name is Clara.",
    "I live in Rome.",
    "I have a turtle.",
    "My favorite drink is tea.",
)
ASKED = (
    Question("What is my favorite drink?", "tea"),
    Question("What is my name?", "clara"),
    Question("What is my pet?", "turtle"),
    Question("Where do I live?", "rome"),
)


@dataclass(frozen=True)
class Row:
    """One message, sent twice: without a session and with it.

    Attributes:
        sent: the message.
        expected: the word of the right answer; None where nothing was asked.
        without, remembering: the two answers; ``without`` is None where it was not sent.
        info: the session after the turn, from ``GET /v1/sessions/{id}``; None if there is none.
    """

    sent: str
    expected: str | None
    without: Reply | None
    remembering: Reply
    info: dict[str, Any] | None


def says(reply: Reply, word: str) -> bool:
    """Whether an answer contains a word."""
    return word in re.findall(r"\w+", reply.text.lower())


def require(true: bool, otherwise: str) -> None:
    """Raise `CheckFailed` unless it is true."""
    if not true:
        raise CheckFailed(otherwise)


def take_turn(client: Client, sent: str, expected: str | None) -> Row:
    """Send a message without and with the session, and hold both to what is claimed of them."""
    before = client.session(SESSION)
    without = client.chat(sent)
    remembering = client.chat(sent, session=SESSION)
    info = client.session(SESSION)
    require(without.version is None, f"{sent!r} without a session came back with version {without.version}")
    require(remembering.commit == "committed", f"{sent!r} was answered but not committed: {remembering.commit}")
    require(info is not None, f"session {SESSION!r} does not exist after {sent!r}")
    assert info is not None
    expected_version = (before["version"] if before else 0) + 1
    require(
        remembering.version == info["version"] == expected_version,
        f"{sent!r} should have made version {expected_version}: header {remembering.version}, GET {info['version']}",
    )
    require(
        remembering.prompt_tokens == without.prompt_tokens,
        f"{sent!r} took {remembering.prompt_tokens} prompt tokens with memory, {without.prompt_tokens} without",
    )
    require(before is None or info["state_bytes"] == before["state_bytes"] > 0, f"the memory's size changed: {info}")
    if expected is not None:
        _require_answers(sent, expected, without, remembering)
    return Row(sent, expected, without, remembering, info)


def ask_forgotten(client: Client, question: Question) -> Row:
    """Ask a session that was deleted; read only, so that asking does not make a new one."""
    reply = client.chat(question.text, session=SESSION, mode="read")
    require(not says(reply, question.answer), f"{question.text!r} was still answered {reply.text!r} after the deletion")
    require(client.session(SESSION) is None, "a read-only request made the deleted session again")
    return Row(question.text, question.answer, None, reply, None)


def _require_answers(sent: str, expected: str, without: Reply, remembering: Reply) -> None:
    require(says(remembering, expected), f"with memory, {sent!r} was answered {remembering.text!r}, not {expected!r}")
    require(
        not says(without, expected), f"without memory, {sent!r} was answered {without.text!r}: it knew {expected!r}"
    )
