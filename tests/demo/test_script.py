"""The demo must fail where something that it shows is not true. Each way of being wrong is tried."""

from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from deltamem_vllm.demo.client import Client, Reply
from deltamem_vllm.demo.script import ASKED, TOLD, CheckFailed, ask_forgotten, take_turn

QUESTION = ASKED[0]


@dataclass
class Server:
    """Answers as a right server would, but for one bug."""

    bug: str = ""
    version: int = 0
    calls: list[tuple[str, str | None, str | None]] = field(default_factory=list)

    def chat(self, message: str, session: str | None = None, mode: str | None = None) -> Reply:
        self.calls.append((message, session, mode))
        if session is None:
            text = "Tea." if self.bug == "knows without" else "i do not know."
            return Reply(text, 12, 1 if self.bug == "version without session" else None, None)
        if mode == "read":
            if self.bug == "read makes a session":
                self.version = 1
            return Reply("tea." if self.bug == "remembers the deleted" else "i do not know.", 12, 0, "unchanged")
        self.version += {"no commit": 0, "two commits": 2}.get(self.bug, 1)
        commit = "failed" if self.bug == "commit failed" else "committed"
        text = "coffee." if self.bug == "wrong answer" else "tea."
        return Reply(text, 13 if self.bug == "longer prompt" else 12, self.version, commit)

    def session(self, session: str) -> dict[str, Any] | None:
        if self.version == 0 or self.bug == "no such session":
            return None
        return {"version": self.version, "state_bytes": 512 * (self.version if self.bug == "memory grows" else 1)}


def converse(server: Server) -> None:
    """Two statements and a question."""
    client = cast(Client, server)
    for text in TOLD[:2]:
        take_turn(client, text, None)
    take_turn(client, QUESTION.text, QUESTION.answer)


def test_a_right_server_passes() -> None:
    converse(Server())
    ask_forgotten(cast(Client, Server()), QUESTION)


@pytest.mark.parametrize(
    ("bug", "said"),
    [
        ("knows without", "without memory"),
        ("version without session", "came back with version 1"),
        ("no commit", "does not exist|should have made version"),
        ("two commits", "should have made version 1"),
        ("commit failed", "not committed: failed"),
        ("wrong answer", "was answered 'coffee.', not 'tea'"),
        ("longer prompt", "13 prompt tokens with memory, 12 without"),
        ("no such session", "does not exist"),
        ("memory grows", "size changed"),
    ],
)
def test_a_wrong_server_fails(bug: str, said: str) -> None:
    with pytest.raises(CheckFailed, match=said):
        converse(Server(bug))


@pytest.mark.parametrize(
    ("bug", "said"), [("remembers the deleted", "after the deletion"), ("read makes a session", "made the deleted")]
)
def test_a_deleted_session_that_is_not_gone_fails(bug: str, said: str) -> None:
    with pytest.raises(CheckFailed, match=said):
        ask_forgotten(cast(Client, Server(bug)), QUESTION)


def test_every_message_is_sent_alone_and_asking_after_a_deletion_is_read_only() -> None:
    server = Server()
    converse(server)
    ask_forgotten(cast(Client, Server()), QUESTION)
    assert [call[1] for call in server.calls] == [None, "demo"] * 3
