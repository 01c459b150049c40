"""Sending a trace: each request at its time, whether or not those before it have been answered."""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from loadtests.slo.trace import Arrival, Pattern

TIMEOUT = aiohttp.ClientTimeout(total=120)


@dataclass(frozen=True)
class Sending:
    """A request as one server is sent it: seconds since the beginning, and its parts."""

    at: float
    pattern: Pattern
    body: dict[str, Any]
    headers: dict[str, str]


@dataclass(frozen=True)
class Answer:
    """What was measured of one request, in seconds.

    Attributes:
        outcome: ``ok``; ``409`` (the session's queue was full: a right answer, with Retry-After); else what went wrong.
        ttft: from when the request was due to its first token: a client that is late counts against the server.
        tpot: per token after the first, without the last one.
        commit: by how much the last token and the end of the answer, which says that the turn is durable, took longer
            than a token; None: not committed. The last token leaves the server with the outcome.
        status: what became of the turn.
        prompt, tokens: of the prompt, and of the answer.
        begun, ended: on the clock of `time.perf_counter`.
    """

    pattern: Pattern
    outcome: str
    ttft: float | None = None
    tpot: float | None = None
    commit: float | None = None
    status: str | None = None
    prompt: int = 0
    tokens: int = 0
    begun: float = 0.0
    ended: float = 0.0


async def replay(http: aiohttp.ClientSession, url: str, sendings: Sequence[Sending]) -> list[Answer]:
    """Send everything at its time; returns when all is answered."""
    begun = time.perf_counter() + 0.1

    async def one(sending: Sending) -> Answer:
        due = begun + sending.at
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        try:
            return await send(http, url, sending, due)
        except (aiohttp.ClientError, TimeoutError) as error:
            return Answer(sending.pattern, type(error).__name__)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(sending)) for sending in sendings]
    return [task.result() for task in tasks]


async def send(http: aiohttp.ClientSession, url: str, sending: Sending, due: float | None = None) -> Answer:
    """Send one request now, and read its stream."""
    due = time.perf_counter() if due is None else due
    first = before = last = 0.0
    usage: dict[str, Any] = {}
    told: dict[str, str] = {}
    path = f"{url}/v1/chat/completions"
    async with http.post(path, json=sending.body, headers=sending.headers, timeout=TIMEOUT) as response:
        if response.status != 200:
            text = await response.text()
            right = response.status == 409 and "Retry-After" in response.headers
            return Answer(sending.pattern, "409" if right else f"{response.status} {text[:80]}", begun=due)
        async for raw in response.content:
            line = raw.decode().rstrip()
            if line.startswith(": "):
                name, _, value = line[2:].partition(": ")
                told[name] = value
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            usage = event.get("usage") or usage
            if "error" in event:
                return Answer(sending.pattern, f"error in the stream: {str(event['error'])[:80]}", begun=due)
            if any(choice["delta"].get("content") for choice in event["choices"]):
                before, last = last, time.perf_counter()
                first = first or last
    ended, status = time.perf_counter(), told.get("x-deltamem-commit")
    tokens = int(usage.get("completion_tokens", 0))
    if not first:
        return Answer(sending.pattern, "no token", begun=due)
    tpot = (before - first) / (tokens - 2) if tokens > 2 and before > first else None
    return Answer(
        sending.pattern,
        "ok" if status in (None, "committed", "unchanged") else str(status),
        ttft=first - due,
        tpot=tpot,
        commit=max(0.0, ended - before - tpot) if status == "committed" and tpot is not None else None,
        status=status,
        prompt=int(usage.get("prompt_tokens", 0)),
        tokens=tokens,
        begun=due,
        ended=ended,
    )


def messages(arrival: Arrival, whole: bool) -> list[dict[str, str]]:
    """A request's messages, with all that was said before or only what is new."""
    before = arrival.history if whole else ()
    found = [m for user, reply in before for m in (_said("user", user), _said("assistant", reply))]
    return [*found, _said("user", arrival.user)]


def _said(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}
