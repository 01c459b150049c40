"""A history resent, left out, or not sent: time to the first token against the length of the conversation, and recall.

    python -m loadtests.elision [--turns 200] [--sessions 32]

A real server on the CPU with the bundled recall model. Speed: one generated conversation, resent whole with every turn
by two clients side by side, one of which lets its history be left out, while a third sends only what is new; their
requests alternate, and prefix caching is off: as for a client that comes back when its blocks are gone. Recall:
held-out sessions, resent whole with 0, 2 and 8 messages of context, are asked about facts told in earlier turns; the
control sends the same context without a memory.
"""

import argparse
import contextlib
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import httpx
from rich.table import Table

from deltamem_vllm.demo.server import VllmServer
from deltamem_vllm.recall import ADAPTER_DIR, MODEL_DIR
from deltamem_vllm.recall.data import Shape, dialogues, turn_messages
from deltamem_vllm.recall.sessions import Session, heldout_sessions, is_right
from loadtests.table import console

Messages = list[dict[str, str]]
KEPT = (0, 2, 8)
PAUSE = 0.2
"""Seconds before each request, so that none pays for what the one before it leaves to be done."""
LAST = 10
"""Turns whose median stands for a place in the conversation."""


def talk() -> Iterator[tuple[str, str]]:
    """User messages and replies without end."""
    for dialogue in dialogues(11, Shape(facts=(3, 5), talk=(2, 4)), "heldout"):
        for turn in dialogue.turns:
            user, reply = turn_messages(turn)
            yield user["content"], reply["content"]


class Answer(NamedTuple):
    """A streamed answer.

    Attributes:
        seconds: to its first token.
        usage: what it says of its tokens.
    """

    seconds: float
    text: str
    usage: dict[str, Any]


class Server:
    """Asks the server."""

    def __init__(self, url: str) -> None:
        self.http = httpx.Client(base_url=url, timeout=300)

    def first_token(self, messages: Messages, session: str, history: str) -> Answer:
        """A streamed answer, timed."""
        body = {"model": "recall", "messages": messages, "max_tokens": 8, "temperature": 0, "stream": True}
        body["stream_options"] = {"include_usage": True}
        headers = {"X-Session-ID": session, "X-DeltaMem-History": history, "X-DeltaMem-Write": "all"}
        begun, first, text, usage = time.perf_counter(), 0.0, "", dict[str, Any]()
        with self.http.stream("POST", "/v1/chat/completions", json=body, headers=headers) as response:
            response.raise_for_status()
            for line in response.iter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line[6:])
                usage = chunk.get("usage") or usage
                said = "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
                if said:
                    first = first or time.perf_counter() - begun
                    text += said
        return Answer(first or time.perf_counter() - begun, text, usage)

    def count(self, messages: Messages, answered: bool = False) -> int:
        """Tokens of a conversation's prompt; ``answered``: of the conversation, with no answer begun."""
        body = {"model": "recall", "messages": messages, "add_generation_prompt": not answered}
        response = self.http.post("/tokenize", json=body)
        response.raise_for_status()
        return int(response.json()["count"])

    def version(self, session: str) -> int:
        """A session's."""
        response = self.http.get(f"/v1/sessions/{session}")
        response.raise_for_status()
        return int(response.json()["version"])

    def answer(self, messages: Messages, **headers: str) -> str:
        """A whole answer."""
        body = {"model": "recall", "messages": messages, "max_tokens": 8, "temperature": 0}
        response = self.http.post("/v1/chat/completions", json=body, headers=headers)
        response.raise_for_status()
        return str(response.json()["choices"][0]["message"]["content"])


def speed(server: Server, turns: int) -> dict[str, list[float]]:
    """Seconds to the first token of each turn, by arm."""
    seconds: dict[str, list[float]] = {"full": [], "elide": [], "new turn only": []}
    histories: dict[str, Messages] = {arm: [] for arm in seconds}
    for number, (user, _) in enumerate(itertools.islice(talk(), turns)):
        arms = list(seconds)
        for arm in arms if number % 2 else reversed(arms):
            history = histories[arm]
            if arm == "new turn only":
                history.clear()
            history.append({"role": "user", "content": user})
            time.sleep(PAUSE)
            policy = "elide" if arm == "elide" else "full"
            answer = server.first_token(history, f"speed-{arm.replace(' ', '-')}", policy)
            history.append({"role": "assistant", "content": answer.text})
            seconds[arm].append(answer.seconds)
    return seconds


def growth(seconds: list[float], early: int, late: int) -> tuple[float, float, float]:
    """Medians around two turns, and the ratio of the later to the earlier."""
    a, b = (statistics.median(seconds[turn - LAST : turn]) for turn in (early, late))
    return a, b, b / a


def recall(server: Server, sessions: list[Session], keep: int, memory: bool) -> float:
    """Share of questions answered right, each asked when all else was told."""

    def one(index: int) -> list[bool]:
        history: Messages = []
        headers = {"X-Session-ID": f"recall-{keep}-{index}", "X-DeltaMem-History": f"elide; keep={keep}"}
        for request in sessions[index].tellings() if memory else ():
            history.append(request.messages[-1])
            said = server.answer(history, **headers)
            history.append({"role": "assistant", "content": said})
        if not memory:
            history = [m for turn in sessions[index].told for m in turn_messages(turn)]
        right = []
        for request in sessions[index].turns(ask_only=True):
            if request.kind != "ask":
                continue
            if memory:
                said = server.answer([*history, request.messages[-1]], **headers, **{"X-DeltaMem-Mode": "read"})
            else:
                said = server.answer([*history[len(history) - keep :], request.messages[-1]])
            right.append(is_right(said, request.expected))
        return right

    with ThreadPoolExecutor(4) as pool:
        answers = [right for some in pool.map(one, range(len(sessions))) for right in some]
    return sum(answers) / len(answers)


@contextlib.contextmanager
def serving(tokens: int) -> Iterator[Server]:
    """The recall model with room for so many tokens. Beyond its own 1,024 its answers are worth nothing; with
    positions for them, their time is."""
    positions = json.dumps({"max_position_embeddings": max(tokens, 1024)})
    arguments = ["--dtype", "float32", "--block-size", "32", "--enforce-eager", "--no-enable-prefix-caching"]
    arguments += ["--served-model-name", "recall", "--max-model-len", str(tokens), "--hf-overrides", positions]
    with tempfile.TemporaryDirectory() as folder:
        store = f"sqlite:///{folder}/sessions.db"
        with VllmServer(MODEL_DIR, ADAPTER_DIR, store, *arguments) as running:
            running.wait_ready()
            yield Server(running.base_url)


def room(turns: int) -> int:
    """Tokens that so many turns come to, at most."""
    return 64 + 32 * turns


def by_length(turns: int = 100, places: int = 5) -> list[dict[str, Any]]:
    """Milliseconds to the first token at some places of a conversation, by arm: medians of `LAST` turns before them."""
    with serving(room(turns)) as server:
        seconds = speed(server, turns)
    rows = []
    for place in range(1, places + 1):
        turn = max(LAST, turns * place // places)
        medians = {f"{arm} ms": 1e3 * statistics.median(took[turn - LAST : turn]) for arm, took in seconds.items()}
        rows.append({"turn": turn, **medians})
    return rows


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=200)
    parser.add_argument("--sessions", type=int, default=32)
    given = parser.parse_args()
    screen = console()
    with serving(room(given.turns)) as server:
        early = max(LAST, given.turns // 10)
        table = Table(title=f"time to the first token, median of {LAST} turns, ms")
        for column in ("history", f"turn {early}", f"turn {given.turns}", "ratio"):
            table.add_column(column)
        for arm, seconds in speed(server, given.turns).items():
            begun, ended, ratio = growth(seconds, early, given.turns)
            table.add_row(arm, f"{1e3 * begun:.1f}", f"{1e3 * ended:.1f}", f"{ratio:.2f}")
        screen.print(table)
        table = Table(title=f"right answers about what was told earlier, {given.sessions} held-out sessions")
        for column in ("context messages", "memory", "no memory"):
            table.add_column(column)
        sessions = heldout_sessions(given.sessions)
        for keep in KEPT:
            shares = [recall(server, sessions, keep, memory) for memory in (True, False)]
            table.add_row(str(keep), *(f"{100 * share:.1f} %" for share in shares))
        screen.print(table)


if __name__ == "__main__":
    main()
