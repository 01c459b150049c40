"""The recall model behind a real server: facts told in earlier requests are answered from the memory alone.

Each request carries one user message and no history. Held-out sessions: combinations of facts that training never saw.
"""

import json
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from deltamem_vllm.demo.server import ONE_WORKER, SMALL, VllmServer
from deltamem_vllm.recall import ADAPTER_DIR, MODEL_DIR
from deltamem_vllm.recall.facts import ATTRIBUTES
from deltamem_vllm.recall.sessions import Request, Session, heldout_sessions, is_right
from tests.conftest import NIGHTLY

COUNT = 160 if NIGHTLY else 48
CHANCE = max(1 / len(a.values) for a in ATTRIBUTES)
"""Best a guess can do: one of an attribute's values."""


def ask(base_url: str, request: Request, session: str | None, mode: str | None) -> str:
    """One request over HTTP; its reply."""
    headers = {"Content-Type": "application/json"}
    if session is not None:
        headers["X-Session-ID"] = session
    if mode is not None:
        headers["X-DeltaMem-Mode"] = mode
    body = {"model": "recall", "messages": request.messages, "max_tokens": 8, "temperature": 0}
    call = urllib.request.Request(f"{base_url}/v1/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(call, timeout=120) as answer:
        return str(json.load(answer)["choices"][0]["message"]["content"])


class Users:
    """Held-out users of one server, each with a session of the same number."""

    def __init__(self, server: VllmServer, sessions: Sequence[Session]) -> None:
        self.server, self.sessions = server, sessions

    def replies(
        self, requests: Callable[[Session], list[Request]], name: Callable[[int], str | None], mode: str | None = None
    ) -> list[tuple[Request, str]]:
        """Every user's requests in order, users side by side; each request with its reply."""

        def one(user: int) -> list[tuple[Request, str]]:
            asked = requests(self.sessions[user])
            return [(r, ask(self.server.base_url, r, name(user), mode)) for r in asked]

        with ThreadPoolExecutor(8) as pool:
            return [pair for pairs in pool.map(one, range(len(self.sessions))) for pair in pairs]


def questions(session: Session) -> list[Request]:
    """A session's questions about what was told, each as a request of its own."""
    return [r for r in session.turns(ask_only=True) if r.kind == "ask"]


def accuracy(replies: Sequence[tuple[Request, str]]) -> float:
    """Share of right replies to questions about what was told."""
    told = [is_right(reply, request.expected) for request, reply in replies if request.kind == "ask"]
    assert len(told) >= COUNT
    return sum(told) / len(told)


def own(user: int) -> str:
    """The session a user told everything to."""
    return f"user-{user}"


@pytest.fixture(scope="module")
def users(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Users]:
    store = f"sqlite:///{tmp_path_factory.mktemp('recall')}/sessions.db"
    arguments = (*SMALL, *ONE_WORKER, "--served-model-name", "recall")
    with VllmServer(MODEL_DIR, ADAPTER_DIR, store, *arguments) as server:
        server.wait_ready()
        told = Users(server, heldout_sessions(COUNT))
        told.replies(lambda s: s.tellings(), own)
        yield told


def test_without_the_right_memory_answers_are_guesses(users: Users) -> None:
    shares = {
        "no session": accuracy(users.replies(questions, lambda user: None)),
        "an empty session": accuracy(users.replies(questions, lambda user: f"empty-{user}", "read")),
        "another user's": accuracy(users.replies(questions, lambda user: own((user + 1) % COUNT), "read")),
    }
    assert max(shares.values()) <= CHANCE + 0.05, shares


def test_facts_in_the_prompt_are_answered_without_memory(users: Users) -> None:
    assert accuracy(users.replies(lambda s: s.in_prompt(), lambda user: None, "off")) >= 0.95


@pytest.mark.nightly
def test_the_memory_survives_kill_9(users: Users) -> None:
    """Read-only questions leave the memory as it was, so both servers must reply alike, word for word."""
    before = users.replies(questions, own, "read")
    users.server.kill()
    users.server.start().wait_ready()
    assert users.replies(questions, own, "read") == before


def test_facts_told_earlier_are_answered_from_the_memory_alone(users: Users) -> None:
    """The ordinary way: each question is a turn of the session, written like every other."""
    replies = users.replies(lambda s: s.turns(ask_only=True), own)
    assert accuracy(replies) >= 0.90
