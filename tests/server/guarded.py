"""A real server with a key file, that logs all it can and publishes its KV events, and what tries to see through it."""

import itertools
import json
import os
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import zmq

from deltamem_vllm.demo.server import ONE_WORKER, VllmServer
from deltamem_vllm.server.tenants import digest_of
from tests.server.conftest import HERE, MODEL, ROOT
from tests.server.talk import Talk, chat, completion, distance, logprobs, ok
from tests.tolerances import SAME_MEMORY

MARK = "cAnArY"
"""Part of every session id and every key here; whatever shows it has leaked."""
SECRET = bytes(range(100, 148))
FLAGS = [
    *("--dtype", "float32", "--block-size", "32", "--max-model-len", "1024", "--enforce-eager"),
    *("--served-model-name", "m", "--max-logprobs", "20", "--enable-prompt-tokens-details"),
    *("--enable-log-requests", "--enable-log-outputs", "--log-error-stack"),
    *ONE_WORKER,
]
FACT = list(range(64, 96))
_numbers = itertools.count(1)


def new_id() -> str:
    """A session id that was not used yet; all are as long as any other."""
    return f"{MARK}.{next(_numbers):06d}"


class Guarded:
    """The server and its tenants.

    Attributes:
        keys: one API key of each tenant: ``a``, ``b``, ``slow``, which may write 3 times a minute, and ``small``, which
            may have 2 sessions.
    """

    def __init__(self, server: VllmServer, folder: Path) -> None:
        self.server, self.folder = server, folder
        self.keys = {name: f"dm-{MARK}-{name}" for name in ("a", "b", "slow", "small")}
        self.write_keys()

    def write_keys(self, **more: Any) -> None:
        """Put a key file in place."""
        tenants: dict[str, Any] = {name: {"keys": [digest_of(key)]} for name, key in self.keys.items()}
        tenants["slow"]["commits_per_minute"] = 3
        tenants["small"]["max_sessions"] = 2
        self.replace_keys(json.dumps({"tenants": {**tenants, **more}}))

    def replace_keys(self, text: str) -> None:
        """Put any text in the key file's place, in one step."""
        beside = self.folder / "keys.new"
        beside.write_text(text)
        beside.chmod(0o600)
        beside.replace(self.folder / "keys.json")

    def talk(self, tenant: str | None) -> Talk:
        """A client with a tenant's key; None: without one."""
        return Talk(self.server.base_url, self.keys[tenant] if tenant else None)

    def log(self) -> str:
        """All that the server's processes have written so far."""
        return self.server.log.read_text(errors="replace")

    def kv_events(self) -> bytes:
        """All KV events so far, as they were published."""
        context = zmq.Context()
        socket = context.socket(zmq.DEALER)
        socket.linger = 0
        found = []
        try:
            socket.connect(f"ipc://{self.folder}/replay")
            socket.send_multipart([b"", bytes(8)])
            while socket.poll(30_000):
                frames = socket.recv_multipart()
                if (-1).to_bytes(8, "big", signed=True) in frames:
                    return b"".join(found)
                found.append(frames[-1])
            raise AssertionError("the KV events did not end")
        finally:
            socket.close()
            context.term()


@contextmanager
def guarded(adapter: Path, folder: Path, plant: str = "", api_servers: int = 1) -> Iterator[Guarded]:
    """A server that is ready; ``plant``: with bugs of `tests.server.planted`."""
    (folder / "secret").write_bytes(SECRET)
    (folder / "secret").chmod(0o600)
    events = {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": f"ipc://{folder}/events",
        "replay_endpoint": f"ipc://{folder}/replay",
        "buffer_steps": 1_000_000,
    }
    flags = [*FLAGS, "--kv-events-config", json.dumps(events), "--deltamem-key-file", str(folder / "keys.json")]
    flags += ["--deltamem-secret-file", str(folder / "secret"), "--api-server-count", str(api_servers)]
    env = {**HERE, "VLLM_LOGGING_LEVEL": "DEBUG"}
    if plant:
        env["PYTHONPATH"] = f"{ROOT / 'tests' / 'server' / 'planted'}{os.pathsep}{HERE['PYTHONPATH']}"
        env["DELTAMEM_TEST_PLANT"] = plant
    server = VllmServer(MODEL, adapter, f"sqlite:///{folder}/sessions.db", *flags, env=env, log=folder / "log")
    made = Guarded(server, folder)
    with server:
        server.wait_ready(500)
        yield made


# --- probes -----------------------------------------------------------------------------------------------------------


def send(talk: Talk, how: str, session: str) -> httpx.Response:
    """A request that names a session and leaves nothing."""
    header, read = {"X-Session-ID": session}, {"X-DeltaMem-Mode": "read"}
    prompt = list(range(40, 60))
    messages: dict[str, Any] = {
        "model": "m",
        "max_tokens": 3,
        "temperature": 0,
        "messages": [{"role": "user", "content": "Who is Bo?"}],
    }
    match how:
        case "completions":
            return talk.complete(prompt, session, "read", 3)
        case "stream":
            return talk.complete(prompt, session, "read", 3, stream=True, logprobs=None)
        case "body":
            return talk.post("/v1/completions", json=completion(prompt, 3, session_id=session), headers=read)
        case "xargs":
            body = completion(prompt, 3, vllm_xargs={"session_id": session})
            return talk.post("/v1/completions", json=body, headers=read)
        case "invocations":
            return talk.post("/invocations", json=completion(prompt, 3), headers={**header, **read})
        case "chat":
            return talk.post("/v1/chat/completions", json=chat("Who is Bo?", 3), headers={**header, **read})
        case "messages":
            return talk.post("/v1/messages", json=messages, headers={**header, **read})
        case "responses":
            body = {
                "model": "m",
                "input": "Who is Bo?",
                "max_output_tokens": 3,
                "temperature": 0,
                "session_id": session,
            }
            return talk.post("/v1/responses", json=body, headers=read)
        case "batch":
            body = {**messages, "messages": [messages["messages"]] * 2}
            return talk.post("/v1/chat/completions/batch", json=body, headers={**header, **read})
        case _:
            method, path = how.split(" ", 1)
            body = next((body for end, body in BODIES.items() if path.endswith(end)), None)
            path = path.replace("{session_id}", session).replace("{fact_id}", "fact-0a1b2c3d4e5f6071")
            return talk.request(method, path, json=body if method in ("POST", "PATCH") else None)


GENERATING = ("completions", "stream", "body", "xargs", "invocations", "chat", "messages", "responses", "batch")
AROUND = ("/v1/sessions/{session_id}", "/v1/sessions/{session_id}/", "/v1/sessions/{session_id}/export", "/v1/sessions")


BODIES: dict[str, dict[str, Any]] = {
    "/fork": {},
    "/rollback": {"version": 1},
    "/facts": {"text": "Bo is a cat."},
    "/{session_id}": {"metadata": {"probed": "yes"}},
}
"""By the ends of their paths, what routes must be sent to be asked in earnest."""
MAKING = ("POST /v1/sessions", "POST /v1/sessions/import")
"""Routes that make sessions: what they leave would be met by other probes."""


def routes(talk: Talk) -> list[str]:
    """``METHOD path`` of everything that may tell of a session: the routes there are, and some that there are not."""
    documented = ok(talk.get("/openapi.json"))["paths"]
    paths = dict.fromkeys([*AROUND, *(path for path in documented if path.startswith("/v1/sessions"))])
    found = [f"{method} {path}" for path in paths for method in ("GET", "DELETE", "POST", "PUT", "PATCH", "HEAD")]
    return [how for how in found if how not in MAKING]


def seen(how: str, response: httpx.Response, session: str) -> Any:
    """Everything of a response that could tell sessions apart, but not the numbers that are made for each response."""
    headers = {k: v.replace(session, "ID") for k, v in response.headers.items() if k not in ("date", "content-length")}
    text = response.text.replace(session, "ID")
    if how not in GENERATING or response.status_code != 200 or how == "stream":
        if how == "stream":
            text = "".join(line for line in text.splitlines() if line.startswith(":") or '"text"' not in line)
        return response.status_code, headers, text
    body = response.json()
    kept = {k: v for k, v in body.items() if k not in ("id", "created", "created_at", "output", "choices", "metrics")}
    return response.status_code, headers, json.dumps(kept, sort_keys=True)


def probe(g: Guarded, count: int, seed: int) -> list[str]:
    """Tenant ``b`` tries ``count`` requests on sessions of ``a`` and on ones that nobody has; returns what differed."""
    victims = [new_id() for _ in range(5)]
    with g.talk("a") as owner:
        for i, session in enumerate(victims):
            ok(owner.complete([*FACT, i], session))
        before = [owner.probe(session) for session in victims]
    talk = g.talk("b")
    whats = routes(talk)

    def one(number: int) -> str | None:
        rng = random.Random(seed * 1_000_003 + number)
        how = rng.choice(GENERATING) if number % 4 == 0 else rng.choice(whats)
        victim, nobodys = rng.choice(victims), new_id()
        asked = [victim, nobodys]
        rng.shuffle(asked)
        found = {session: send(talk, how, session) for session in asked}
        ours, theirs = (seen(how, found[session], session) for session in (nobodys, victim))
        if ours != theirs:
            return f"{how}: {theirs} where nobody's gives {ours}"
        if how in ("completions", "body", "xargs", "invocations"):
            far = distance(logprobs(found[victim]), logprobs(found[nobodys]))
            return f"{how}: the answer differs by {far}" if far > SAME_MEMORY else None
        return None

    with ThreadPoolExecutor(4) as pool:
        leaks = [leak for leak in pool.map(one, range(count)) if leak]
    talk.close()
    with g.talk("a") as owner:
        for session, memory in zip(victims, before, strict=True):
            if owner.version(session) != 1 or distance(owner.probe(session), memory) > SAME_MEMORY:
                leaks.append("a session of another tenant was changed")
    return leaks


# --- shared cached tokens ---------------------------------------------------------------------------------------------

Who = tuple[str, str | None, str | None, str | None]
"""Tenant, which session (None: none), mode, the client's own salt."""
PAIRS: Sequence[tuple[Who, Who]] = (
    (("a", "1", "read", None), ("a", "2", "read", None)),
    (("a", "1", "read", None), ("b", "1", "read", None)),
    (("a", "1", "read", "mine"), ("b", "1", "read", "mine")),
    (("a", "1", None, None), ("b", "1", None, None)),
    (("a", "1", None, None), ("a", "2", None, None)),
    (("a", None, None, None), ("b", None, None, None)),
    (("a", None, None, "mine"), ("b", None, None, "mine")),
    (("a", None, "off", None), ("b", None, "off", None)),
    (("a", None, "off", "mine"), ("b", None, "off", "mine")),
    (("a", "1", "read", None), ("a", None, None, None)),
    (("a", None, None, None), ("b", "1", "read", None)),
    (("a", None, "off", None), ("a", None, None, None)),
    (("a", None, None, "mine"), ("a", None, None, None)),
)


def cached_tokens(response: httpx.Response) -> int:
    """How many tokens of its prompt a response found in the prefix cache."""
    return int((ok(response)["usage"].get("prompt_tokens_details") or {}).get("cached_tokens") or 0)


def share(g: Guarded, count: int, seed: int) -> tuple[list[str], int]:
    """Send ``count`` prompts twice, each by two parties that must not share.

    Returns:
        pairs that shared cached tokens, and how many prompts found none when their own party sent them again.
    """
    shared, missed = [], 0
    talks = {tenant: g.talk(tenant) for tenant in ("a", "b")}
    for number in range(count):
        rng = random.Random(seed * 1_000_003 + number)
        names = {which: new_id() for which in ("1", "2")}
        prompt = [rng.randrange(5, 250) for _ in range(rng.randrange(70, 130))]

        def ask(who: Who, names: dict[str, str] = names, prompt: list[int] = prompt) -> int:
            tenant, which, mode, salt = who
            body = {} if salt is None else {"cache_salt": salt}
            session = None if which is None else names[which]
            return cached_tokens(talks[tenant].complete(prompt, session, mode, 1, logprobs=None, **body))

        one, other = PAIRS[number % len(PAIRS)]
        ask(one)
        if (found := ask(other)) > 0:
            shared.append(f"{other} found {found} tokens of {one}")
        missed += ask(other) == 0
    for talk in talks.values():
        talk.close()
    return shared, missed


# --- traces -----------------------------------------------------------------------------------------------------------


def traces(g: Guarded) -> dict[str, list[str]]:
    """Where the mark shows: lines of the log, of ``/metrics``, and KV events."""
    with httpx.Client(base_url=g.server.base_url) as scraper:
        metrics = scraper.get("/metrics").text
    events = g.kv_events()
    return {
        "log": [line for line in g.log().splitlines() if MARK in line],
        "metrics": [line for line in metrics.splitlines() if MARK in line],
        "KV events": [MARK] * events.count(MARK.encode()),
    }
