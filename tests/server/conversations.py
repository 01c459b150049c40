"""Whole conversations over HTTP with the recall model: how clients behave, and what each turn must leave behind.

A *habit* is what a client does before the request whose answer it keeps. Whatever the habits, clients that keep the
same texts must leave the same memory after every turn: the state, the count of tokens written, the number of windows.
"""

from __future__ import annotations

import json
import random
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deltamem_vllm.demo.server import ONE_WORKER, VllmServer
from deltamem_vllm.recall import ADAPTER_DIR, MODEL_DIR
from deltamem_vllm.recall.data import Shape, dialogues
from deltamem_vllm.recall.tokenizer import build
from deltamem_vllm.server.tenants import DEFAULT_TENANT
from deltamem_vllm.store.protocol import Record, SessionKey, StateStore
from deltamem_vllm.store.url import open_store
from tests.server.talk import Logprobs, Talk, chat, chunks, closing, memory_headers, new_session, ok, outcome

MAX_LEN = 1024
"""The model's own limit. The 30 turns below take some 560 tokens of it."""
FLAGS = (
    f"--dtype float32 --block-size 32 --max-model-len {MAX_LEN} --enforce-eager --served-model-name m "
    "--max-logprobs 20 --deltamem-queue-depth 8 --deltamem-queue-seconds 60"
).split()
FLAGS += ONE_WORKER
REPLY = 8
"""Tokens an answer may have, unless a habit says otherwise."""
ROOT = Path(__file__).parents[2]

Message = dict[str, str]
TOKENIZER = build()


class WrongMemory(AssertionError):
    """A conversation has left something else than it should."""


def users(count: int) -> list[str]:
    """The first short user messages of seeded dialogues, all different: facts, small talk and questions."""
    found: dict[str, None] = {}
    for dialogue in dialogues(7, Shape(facts=(3, 5), talk=(1, 3)), "heldout"):
        found.update(dict.fromkeys(t.user for t in dialogue.turns if len(TOKENIZER(t.user)["input_ids"]) <= 9))
        if len(found) >= count:
            return list(found)[:count]
    raise AssertionError("the dialogues have an end")


def prompt_ids(messages: Sequence[Message]) -> list[int]:
    """The prompt as the template and the tokenizer make it, here and not in the server."""
    rendered: Any = TOKENIZER.apply_chat_template(list(messages), add_generation_prompt=True)
    return list(rendered["input_ids"])


@dataclass(frozen=True)
class Answer:
    """Text, sampled ids, the 20 most likely tokens at each of them, the string that stopped it, the version."""

    text: str
    ids: list[int]
    tops: Logprobs
    stopped_by: str | int | None
    version: int


@dataclass(frozen=True)
class Left:
    """What one turn has left in the store, and the answer that the client kept."""

    answer: Answer
    record: Record


class Served:
    """A server with the recall model, and its store, read from here.

    Args:
        folder: for the store and the log.
        flags: further arguments of ``vllm serve``.
        path: folders that come first in the server's PYTHONPATH.
    """

    def __init__(self, folder: Path, *flags: str, path: Sequence[Path] = ()) -> None:
        url = f"sqlite:///{folder}/sessions.db"
        env = {"PYTHONPATH": ":".join(map(str, [*path, ROOT]))}
        self.server = VllmServer(MODEL_DIR, ADAPTER_DIR, url, *FLAGS, *flags, env=env, log=folder / "log")
        self._url = url

    @contextmanager
    def running(self) -> Iterator[Served]:
        """Start it, wait for it, end it."""
        with self.server:
            self.server.wait_ready()
            self._store: StateStore = open_store(self._url)
            try:
                with Talk(self.server.base_url) as self.talk:
                    yield self
            finally:
                self._store.close()

    def record(self, session: str) -> Record | None:
        """What is committed."""
        return self._store.get(SessionKey(DEFAULT_TENANT, session))

    def cache_hits(self) -> float:
        """Prompt tokens that came from the prefix cache."""
        lines = self.talk.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:prefix_cache_hits_total"))


@dataclass
class Client:
    """One client with one session.

    Attributes:
        resends: every request carries the whole conversation; else only the new message.
        streams: asks for streams.
        left: what each turn has left.
        vanished: requests that it really left before they were complete.
        stops: answers that a stop string ended.
    """

    served: Served
    session: str = field(default_factory=new_session)
    resends: bool = True
    streams: bool = False
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    history: list[Message] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    vanished: int = 0
    stops: int = 0

    def messages(self, user: str) -> list[Message]:
        """What a request says whose newest message is this."""
        return [*(self.history if self.resends else ()), {"role": "user", "content": user}]

    def ask(self, messages: Sequence[Message], mode: str | None = None, **body: Any) -> Answer:
        """A request and its whole answer; a writing one must be committed, any other must not."""
        n = body.pop("max_tokens", REPLY)
        ours = {"ignore_eos": False, "logprobs": True, "top_logprobs": 20, "return_tokens_as_token_ids": True}
        made = chat(list(messages), n, **{**ours, "stream": self.streams, **body})
        response = self.served.talk.post("/v1/chat/completions", json=made, headers=memory_headers(self.session, mode))
        if self.streams:
            assert response.status_code == 200, response.text[:500]
            said = closing(response.text)
            commit, version = said.get("x-deltamem-commit"), said.get("x-session-version")
            answer = _gathered(chunks(response.text), int(version or 0))
        else:
            choice = ok(response)["choices"][0]
            _, version, commit = outcome(response)
            answer = _answer(choice["message"]["content"], choice["logprobs"]["content"], choice, int(version or 0))
        expected = {"read": "unchanged", "off": None}.get(mode or "", "committed")
        if commit != expected:
            raise WrongMemory(f"{mode or 'readwrite'}: the commit is {commit}, not {expected}")
        self.stops += isinstance(answer.stopped_by, str)
        return answer

    def say(self, user: str, habit: Habit | None = None, **body: Any) -> Answer:
        """One turn: the habit, then the request whose answer stays."""
        if habit is not None:
            habit(self, user)
        answer = self.ask(self.messages(user), **body)
        self.history += [{"role": "user", "content": user}, {"role": "assistant", "content": answer.text}]
        self.left.append(Left(answer, self.record()))
        return answer

    def record(self) -> Record:
        """The session's; it must have one."""
        record = self.served.record(self.session)
        assert record is not None, f"session {self.session} has no record"
        return record

    def busy(self) -> bool:
        """Whether a request writes the session. The session must have a record."""
        return bool(ok(self.served.talk.get(f"/v1/sessions/{self.session}"))["busy"])

    @contextmanager
    def leaving(self) -> Iterator[None]:
        """A request that is left early in the block: it is complete, or it has changed nothing at all."""
        before = self.served.record(self.session)
        yield
        if before is None:  # nothing to ask about yet; the next request waits for this one
            return
        wait_until(lambda: not self.busy())
        after = self.record()
        if after.version == before.version:
            self.vanished += 1
        elif after.tokens < MAX_LEN - 2:
            raise WrongMemory(f"{after.tokens} tokens of a request are committed whose client had left")


Habit = Callable[[Client, str], None]


def wait_until(happened: Callable[[], bool], seconds: float = 60) -> None:
    """Wait for a condition."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


# --- habits -----------------------------------------------------------------------------------------------------------


def retry(client: Client, user: str) -> None:
    """The same request, word for word, once before."""
    client.ask(client.messages(user))


def regenerate(client: Client, user: str) -> None:
    """Another answer first, hot, which is thrown away."""
    client.ask(client.messages(user), temperature=1.5, seed=client.rng.randrange(1000))


def vanish(client: Client, user: str) -> None:
    """Gone after the first chunk of an answer that would fill the context."""
    body = chat(client.messages(user), MAX_LEN, ignore_eos=True, stream=True)
    del body["max_tokens"]
    headers = memory_headers(client.session, None)
    with (
        client.leaving(),
        client.served.talk.stream("POST", "/v1/chat/completions", json=body, headers=headers) as response,
    ):
        assert response.status_code == 200
        parts = response.iter_raw()  # kept, since it disconnects when it is collected
        next(parts)


def hang_up(client: Client, user: str) -> None:
    """Gone before the first byte of such an answer."""
    if client.served.record(client.session) is None:  # whether it has begun could not be seen
        return
    body = chat(client.messages(user), MAX_LEN, ignore_eos=True)
    del body["max_tokens"]
    data = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nX-Session-ID: {client.session}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    version = client.record().version
    with client.leaving(), socket.create_connection(("127.0.0.1", client.served.server.port)) as connection:
        connection.sendall(head.encode() + data)
        wait_until(lambda: client.busy() or client.record().version > version)


def edit_message(client: Client, user: str) -> None:
    """The newest message first said otherwise; not the very first one, which would be another conversation."""
    if client.history:
        client.ask(client.messages(f"hello, {user}"))


def edit_reply(client: Client, user: str) -> None:
    """The last reply edited by hand; the edit is taken back."""
    if client.history:
        edited = [*client.history[:-1], {"role": "assistant", "content": "you are welcome."}]
        client.ask([*edited, {"role": "user", "content": user}])


def rewrite_reply(client: Client, user: str) -> None:
    """The last reply edited by hand; the edit stays."""
    client.ask(client.messages(user))
    if client.history:
        client.history[-1] = {"role": "assistant", "content": "you are welcome."}


def overlap(client: Client, user: str) -> None:
    """The same request twice at once; both must get the same answer."""
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(client.ask, [client.messages(user)] * 2)
    if first.ids != second.ids:
        raise WrongMemory(f"the same request twice at once: {first.text!r} and {second.text!r}")


def overlap_others(client: Client, user: str) -> None:
    """Two other messages at once, both thrown away."""
    if not client.history:
        return
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(client.ask, [client.messages(f"{opener}, {user}") for opener in ("hello", "by the way")]))


def look(client: Client, user: str) -> None:
    """Read-only and memory-off requests: what comes next, and something else."""
    before = client.served.record(client.session)
    for mode in ("read", "off"):
        client.ask(client.messages(user), mode)
        client.ask([{"role": "user", "content": "who are you"}], mode)
    after = client.served.record(client.session)
    if (before and before.version) != (after and after.version):
        raise WrongMemory("a request that only reads has committed")


def length(client: Client, user: str) -> None:
    """An answer of one or two tokens first."""
    client.ask(client.messages(user), max_tokens=client.rng.randint(1, 2))


def stop(client: Client, user: str) -> None:
    """An answer cut by a stop string first."""
    client.ask(client.messages(user), stop=[client.rng.choice([" ", "."])])


RESENT = (retry, regenerate, vanish, hang_up, edit_message, edit_reply, overlap, overlap_others, look, length, stop)
"""Everything that a client may do which resends the conversation, if what it keeps is to stay the same."""
NEW_TURNS = (retry, regenerate, vanish, hang_up, overlap, look, length, stop)
"""The same for a client that sends new messages only: another message would be another turn."""


def mixed(habits: Sequence[Habit]) -> Habit:
    """None to two of them at each turn, drawn by the client's own seed."""

    def habit(client: Client, user: str) -> None:
        for one in client.rng.choices(habits, k=client.rng.randint(0, 2)):
            client.streams = client.rng.random() < 0.3
            one(client, user)
        client.streams = client.rng.random() < 0.3

    return habit


def every(turns: int, habit: Habit) -> Habit:
    """Only at every so many turns."""

    def sometimes(client: Client, user: str) -> None:
        if len(client.left) % turns == turns - 1:
            habit(client, user)

    return sometimes


def converse(client: Client, said: Sequence[str], habit: Habit | None = None) -> Client:
    """The whole conversation."""
    for user in said:
        client.say(user, habit)
    return client


# --- reading answers --------------------------------------------------------------------------------------------------


def _answer(text: str, content: list[dict[str, Any]], choice: dict[str, Any], version: int) -> Answer:
    tops = [{_number(top["token"]): top["logprob"] for top in each["top_logprobs"]} for each in content]
    return Answer(text, [_number(each["token"]) for each in content], tops, choice.get("stop_reason"), version)


def _gathered(stream: list[dict[str, Any]], version: int) -> Answer:
    choices = [chunk["choices"][0] for chunk in stream if chunk["choices"]]
    text = "".join(choice["delta"].get("content") or "" for choice in choices)
    content = [each for choice in choices for each in (choice.get("logprobs") or {}).get("content") or ()]
    return _answer(text, content, choices[-1], version)


def _number(token: str) -> int:
    return int(token.split(":")[1])
