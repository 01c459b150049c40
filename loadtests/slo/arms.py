"""The two servers: vLLM alone, whose users resend everything, and vLLM with a memory, whose users need not."""

import asyncio
import contextlib
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from deltamem_vllm.demo.server import ONE_WORKER, SMALL, VllmServer
from deltamem_vllm.recall import ADAPTER_DIR, MODEL_DIR
from loadtests.slo.replay import Answer, Sending, messages, replay, send
from loadtests.slo.trace import Arrival, Exchange, Trace

VANILLA, MEMORY = "vLLM alone", "with memory"
TOKENS = 16
"""Of every answer, whatever they are: both servers do the same work after the prompt."""
FLAGS = (*SMALL, *ONE_WORKER, "--max-model-len", "1024", "--max-num-seqs", "32", "--served-model-name", "m")


@dataclass
class Arm:
    """A server.

    Attributes:
        cold: seconds from the start of the process to a first token, by what was asked.
    """

    name: str
    server: VllmServer
    http: aiohttp.ClientSession
    cold: dict[str, float] = field(default_factory=dict)

    async def start(self, what: str, session: str | None = None) -> None:
        """Start the server; its first request is timed as ``what``."""
        begun = time.perf_counter()
        self.server.start()
        await asyncio.to_thread(self.server.wait_ready)
        first = Arrival(0.0, "long idle" if session else "no session", session, (), "What is my name?")
        answer = await send(self.http, self.server.base_url, self.sending(first))
        if answer.ttft is None:
            raise RuntimeError(f"{self.name}: the first request was answered {answer.outcome}")
        self.cold[what] = answer.begun + answer.ttft - begun

    def sending(self, arrival: Arrival) -> Sending:
        """What the users of this server send for an arrival."""
        whole = self.name == VANILLA or arrival.pattern in ("full resend", "elided")
        body: dict[str, Any] = {"model": "m", "messages": messages(arrival, whole), "max_tokens": TOKENS}
        body |= {"temperature": 0, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
        headers = {}
        if self.name == MEMORY and arrival.session is not None:
            headers["X-Session-ID"] = arrival.session
            if arrival.pattern == "read only":
                headers["X-DeltaMem-Mode"] = "read"
            if arrival.pattern == "elided":
                headers["X-DeltaMem-History"] = "elide"
        return Sending(arrival.at, arrival.pattern, body, headers)

    async def tell(self, sessions: dict[str, tuple[Exchange, ...]]) -> None:
        """Send each session's history, so that the memory, or the prefix cache, has it."""
        for session, history in sessions.items():
            last = Arrival(0.0, "full resend", session, history[:-1], history[-1][0])
            answer = await send(self.http, self.server.base_url, self.sending(last))
            if answer.outcome != "ok":
                raise RuntimeError(f"{self.name}: session {session} was not told its history: {answer.outcome}")

    async def take(self, trace: Trace) -> list[Answer]:
        """Replay a trace."""
        return await replay(self.http, self.server.base_url, [self.sending(each) for each in trace.arrivals])


@contextlib.asynccontextmanager
async def serving(traces: list[Trace]) -> AsyncIterator[list[Arm]]:
    """Both servers, started cold; the sessions that are to have idled for long are in the store, and nowhere else."""
    with tempfile.TemporaryDirectory(prefix="deltamem-slo-") as folder:
        store = f"sqlite:///{folder}/sessions.db"
        servers = {
            VANILLA: VllmServer(MODEL_DIR, None, "", *FLAGS, log=Path(folder) / "vanilla.log"),
            MEMORY: VllmServer(MODEL_DIR, ADAPTER_DIR, store, *FLAGS, log=Path(folder) / "memory.log"),
        }
        connector = aiohttp.TCPConnector(limit=0)
        try:
            async with aiohttp.ClientSession(connector=connector) as http:
                arms = [Arm(name, server, http) for name, server in servers.items()]
                vanilla, memory = arms
                await memory.start("no session")
                kept = {"slo-cold": traces[0].regular[next(iter(traces[0].regular))]}
                for sessions in (kept, *(trace.idle for trace in traces)):
                    await memory.tell(sessions)
                await asyncio.to_thread(memory.server.stop)
                await memory.start("a session that only the store has", "slo-cold")
                await vanilla.start("no session")
                yield arms
        finally:
            for server in servers.values():
                server.kill()


async def rounds(arms: list[Arm], traces: list[Trace]) -> dict[str, list[list[Answer]]]:
    """Every trace on both arms, which take turns in going first; answers by arm and round."""
    answers: dict[str, list[list[Answer]]] = {arm.name: [] for arm in arms}
    for number, trace in enumerate(traces):
        for arm in arms if number % 2 == 0 else reversed(arms):
            await arm.tell(trace.regular)
            answers[arm.name].append(await arm.take(trace))
            await asyncio.sleep(1.0)
    return answers
