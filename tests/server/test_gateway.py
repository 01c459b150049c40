"""The gateway between a real session service (over its socket) and a scripted engine."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind

from deltamem_vllm.names import Names
from deltamem_vllm.server import gateway as gateway_module
from deltamem_vllm.server.gateway import Gateway
from deltamem_vllm.server.scope import Scope, current
from deltamem_vllm.sessions.control import ControlClient
from deltamem_vllm.sessions.grants import EXTRA
from deltamem_vllm.sessions.service import SessionService
from deltamem_vllm.store.protocol import SessionKey
from tests.sessions.harness import SECRET, TENANT, make_service, memory, serving


@dataclass
class Engine:
    """What stands for vLLM's engine: claims, samples ``reply`` token by token, commits.

    Attributes:
        stop: the answer ends by a stop string, which only the API process can see.
        reason: why the answer ends.
        silent: it never tells how a request ended.
        calls: what it was called with.
    """

    service: SessionService
    reply: list[int] = field(default_factory=lambda: [7, 8, 9])
    stop: bool = False
    reason: str = "stop"
    silent: bool = False
    pause: float = 0.0
    calls: list[tuple[Any, Any, str, dict[str, Any]]] = field(default_factory=list)

    async def generate(self, prompt: Any, params: Any, request_id: str, **kwargs: Any) -> AsyncIterator[Any]:
        self.calls.append((prompt, params, request_id, kwargs))
        extra = (params.extra_args or {}).get(EXTRA, {})
        grant = self.service.claim(extra["ticket"]) if "ticket" in extra else None
        done = False
        try:
            for i in range(len(self.reply)):
                await asyncio.sleep(self.pause)
                done = i == len(self.reply) - 1
                if done:
                    self.finish(grant, prompt["prompt_token_ids"])
                tokens = self.reply[i if params.output_kind == RequestOutputKind.DELTA else 0 : i + 1]
                choice = SimpleNamespace(token_ids=tokens, finish_reason=self.reason if done else None)
                yield SimpleNamespace(outputs=[choice], finished=done)
        finally:
            if not done and grant is not None:
                self.service.end(grant.ticket, "aborted")

    def finish(self, grant: Any, prompt: list[int]) -> None:
        """The scheduler's end of a request."""
        if grant is None or self.silent:
            return
        if not grant.commits:
            self.service.end(grant.ticket, "unchanged")
            return
        assert grant.held_for_verdict or not self.stop, "to the scheduler an abort; it must wait to hear more"
        if grant.held_for_verdict:  # the scheduler waits to hear more
            self.hearing = asyncio.create_task(self.hear(grant, prompt))
        else:
            fed = [*prompt, *self.reply[:-1]]
            self.service.commit(grant.ticket, fed, memory(grant.base, fed))

    async def hear(self, grant: Any, prompt: list[int]) -> None:
        while not self.service.verdict(grant.ticket)[0]:
            await asyncio.sleep(0.001)
        _, count = self.service.verdict(grant.ticket)
        if count is None:
            self.service.end(grant.ticket, "aborted")
            return
        fed = [*prompt, *self.reply, *([99, 98] if self.stop else [])][:count]  # the engine had run further
        self.service.commit(grant.ticket, fed, memory(grant.base, fed))


NAMES = Names(SECRET)
Scenario = Callable[[Gateway, Engine], Awaitable[None]]


def play(folder: Path, scenario: Scenario, **options: Any) -> None:
    service = make_service(**options)

    async def whole(address: str) -> None:
        client = ControlClient(address)
        try:
            await asyncio.wait_for(scenario(Gateway([client], service.queue_seconds, NAMES), Engine(service)), 30)
        finally:
            client.close()

    with serving(service, folder) as address:
        asyncio.run(whole(address))


PROMPT = {"type": "token", "prompt_token_ids": [1, 2, 3]}


async def send(
    gateway: Gateway,
    engine: Engine,
    session: str | None = "s",
    scope: Scope | None = None,
    prompt: Any = None,
    request_id: str = "cmpl-1",
    **params: Any,
) -> Scope:
    """One engine call of an HTTP request; returns the request's scope."""
    scope = scope if scope is not None else Scope()
    current.set(scope)
    sampling = SamplingParams(max_tokens=3, **params)
    generate = gateway.wrap(engine.generate)
    async for _ in generate(dict(prompt or PROMPT), sampling, request_id, session_id=session):
        pass
    return scope


async def version(gateway: Gateway, session: str = "s") -> int:
    found = await gateway.clients[0].ask("info", tenant=TENANT, session=session)
    return int(found["version"]) if found else 0


async def busy(gateway: Gateway, session: str) -> bool:
    found = await gateway.clients[0].ask("info", tenant=TENANT, session=session)
    return bool(found and found["busy"])


@pytest.mark.parametrize("kind", [RequestOutputKind.DELTA, RequestOutputKind.CUMULATIVE, RequestOutputKind.FINAL_ONLY])
def test_a_request_is_admitted_run_and_answered_after_its_commit(tmp_path: Path, kind: RequestOutputKind) -> None:
    async def scenario(gateway: Gateway, engine: Engine) -> None:
        scope = await send(gateway, engine, output_kind=kind)
        assert scope.outcome == {"status": "committed", "version": 1, "error": "", "session": "s"}
        prompt, params, _, _ = engine.calls[0]
        assert set(params.extra_args) == {EXTRA}
        assert prompt["cache_salt"].startswith("deltamem-")
        assert PROMPT == {"type": "token", "prompt_token_ids": [1, 2, 3]}, "the caller's prompt was changed"

    play(tmp_path, scenario)


def test_what_a_client_puts_in_our_place_is_dropped(tmp_path: Path) -> None:
    async def scenario(gateway: Gateway, engine: Engine) -> None:
        for session, mode in (("s", "readwrite"), (None, "readwrite"), ("s", "off"), ("s", "read")):
            forged = {EXTRA: {"ticket": "forged", "mode": "off"}, "other": 1}
            await send(gateway, engine, session, Scope(mode=mode), extra_args=forged)  # type: ignore[arg-type]
            extra = engine.calls[-1][1].extra_args
            assert extra["other"] == 1
            assert extra.get(EXTRA, {}).get("ticket") != "forged"
            assert (extra.get(EXTRA) == {"mode": "off"}) is (mode == "off")

    play(tmp_path, scenario)


def test_kinds_of_requests_never_share_cached_blocks(tmp_path: Path) -> None:
    async def scenario(gateway: Gateway, engine: Engine) -> None:
        salts = set()
        for session, mode in (("s", "read"), ("t", "read"), ("s", "off"), (None, "off"), (None, "read")):
            await send(gateway, engine, session, Scope(mode=mode))  # type: ignore[arg-type]
            salts.add(engine.calls[-1][0].get("cache_salt"))
        assert len(salts) == 4, "off is off with a session or without, the rest differ"
        theirs: dict[str, Any] = {"type": "token", "prompt_token_ids": [1]}
        for salt in [s for s in salts if s]:
            await send(gateway, engine, None, prompt={**theirs, "cache_salt": salt})
            assert engine.calls[-1][0]["cache_salt"] not in salts, "a client named one of our salts"

    play(tmp_path, scenario)


@pytest.mark.parametrize("bad", ["a b", "a\n", "ü", "x" * 129, "a/b", 7])
def test_the_effective_id_is_checked_wherever_it_came_from(tmp_path: Path, bad: Any) -> None:
    async def scenario(gateway: Gateway, engine: Engine) -> None:
        for mode in ("readwrite", "read", "off"):
            scope = Scope(mode=mode)  # type: ignore[arg-type]
            with pytest.raises(VLLMValidationError, match="invalid session id"):
                await send(gateway, engine, bad, scope)
            assert getattr(scope.failure, "status", None) == 400
        assert not engine.calls

    play(tmp_path, scenario)


def test_a_stranger_reaches_no_session(tmp_path: Path) -> None:
    async def scenario(gateway: Gateway, engine: Engine) -> None:
        for mode in ("readwrite", "read"):
            scope = Scope(mode=mode, tenant=None)  # type: ignore[arg-type]
            with pytest.raises(VLLMValidationError, match="needs the API key"):
                await send(gateway, engine, scope=scope)
            assert getattr(scope.failure, "status", None) == 401
        await send(gateway, engine, session=None, scope=Scope(tenant=None))

    play(tmp_path, scenario)


# --- which answer is the memory? --------------------------------------------------------------------------------------


def test_several_answers_or_prompts_are_refused_unless_they_only_read(tmp_path: Path) -> None:
    async def scenario(gateway: Gateway, engine: Engine) -> None:
        with pytest.raises(VLLMValidationError, match="send X-DeltaMem-Mode: read"):
            await send(gateway, engine, n=2)
        await send(gateway, engine, scope=Scope(mode="read"), n=2)
        assert await version(gateway) == 0

        current.set(scope := Scope())
        generate = gateway.wrap(engine.generate)
        params = SamplingParams(max_tokens=3)
        generate(dict(PROMPT), params, "cmpl-1-0", session_id="s")  # vLLM makes all generators before it starts one
        with pytest.raises(VLLMValidationError, match="several prompts"):
            generate(dict(PROMPT), params, "cmpl-1-1", session_id="s")
        assert getattr(scope.failure, "status", None) == 400
        assert await version(gateway) == 0

    play(tmp_path, scenario)


def test_the_first_step_of_a_beam_search_writes_nothing(tmp_path: Path) -> None:
    """vLLM searches by one engine call after another; the first alone looks like any request."""

    async def scenario(gateway: Gateway, engine: Engine) -> None:
        with pytest.raises(VLLMValidationError, match="beam search"):
            await send(gateway, engine, request_id="cmpl-1-0-0123456789abcdef-beam-0")
        assert not engine.calls
        assert await version(gateway) == 0
        await send(gateway, engine, scope=Scope(mode="read"), request_id="cmpl-1-0-0123456789abcdef-beam-0")
        await send(gateway, engine, request_id="cmpl-beam-me-up")
        assert await version(gateway) == 1

    play(tmp_path, scenario)


@pytest.mark.parametrize("prompt", [{"type": "embeds", "prompt_embeds": np.zeros((2, 4))}, "text", {"type": "token"}])
def test_a_session_needs_tokens(tmp_path: Path, prompt: Any) -> None:
    async def scenario(gateway: Gateway, engine: Engine) -> None:
        current.set(Scope())
        with pytest.raises(VLLMValidationError, match="a session needs a prompt of tokens"):
            gateway.wrap(engine.generate)(prompt, SamplingParams(), "cmpl-1", session_id="s")
        gateway.wrap(engine.generate)(prompt, SamplingParams(), "cmpl-1", session_id=None)

    play(tmp_path, scenario)


# --- ends -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [RequestOutputKind.DELTA, RequestOutputKind.CUMULATIVE])
def test_a_stop_string_commits_at_the_cut(tmp_path: Path, kind: RequestOutputKind) -> None:
    async def scenario(gateway: Gateway, engine: Engine) -> None:
        engine.stop = True
        scope = await send(gateway, engine, stop=["END"], output_kind=kind)
        assert scope.outcome["status"] == "committed"
        found = await gateway.clients[0].ask("info", tenant=TENANT, session="s")
        assert found["window_tokens"] == 3 + 2, "the last sampled token has not been fed"

    play(tmp_path, scenario)


@pytest.mark.parametrize(
    ("reason", "commit"), [("stop", "committed"), ("length", "committed"), ("abort", "aborted"), ("error", "aborted")]
)
def test_a_request_with_stop_strings_is_told_how_it_ended(tmp_path: Path, reason: str, commit: str) -> None:
    """Whether one of them ended it or not: the engine waits for it."""

    async def scenario(gateway: Gateway, engine: Engine) -> None:
        engine.reason = reason
        scope = await send(gateway, engine, stop=["END"])
        assert scope.outcome["status"] == commit

    play(tmp_path, scenario)


def test_an_answer_with_stop_strings_is_written_though_its_client_does_not_take_it(tmp_path: Path) -> None:
    """Where a stream waits for its reader, the engine hears of the end all the same."""

    async def scenario(gateway: Gateway, engine: Engine) -> None:
        scope = Scope()
        current.set(scope)
        sampling = SamplingParams(max_tokens=3, stop=["END"], output_kind=RequestOutputKind.DELTA)
        outputs = gateway.wrap(engine.generate)(dict(PROMPT), sampling, "cmpl-1", session_id="s")
        taken = [await anext(outputs)]
        while await version(gateway) != 1:
            await asyncio.sleep(0.001)
        assert not scope.outcome
        taken += [output async for output in outputs]
        assert [output.outputs[0].token_ids for output in taken] == [[7], [8], [9]]
        assert scope.outcome["status"] == "committed"

    play(tmp_path, scenario)


@pytest.mark.parametrize("stop", [None, ["END"]])
def test_a_client_that_leaves_commits_nothing_and_frees_the_session(tmp_path: Path, stop: list[str] | None) -> None:
    async def scenario(gateway: Gateway, engine: Engine) -> None:
        await send(gateway, engine)
        engine.pause = 0.01
        for _ in range(3):
            leaving = asyncio.create_task(send(gateway, engine, prompt={"prompt_token_ids": [5]}, stop=stop))
            while not await busy(gateway, "s"):
                await asyncio.sleep(0.001)
            leaving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await leaving
            assert await version(gateway) == 1
        outcome = (await asyncio.wait_for(send(gateway, engine, prompt={"prompt_token_ids": [6]}), 2)).outcome
        assert (outcome["status"], outcome["version"]) == ("committed", 2)

    play(tmp_path, scenario)


def test_a_client_that_leaves_the_line_does_not_hold_the_session(tmp_path: Path) -> None:
    async def scenario(gateway: Gateway, engine: Engine) -> None:
        engine.pause = 0.05
        owner = asyncio.create_task(send(gateway, engine))
        await asyncio.sleep(0.02)
        waiting = [asyncio.create_task(send(gateway, engine)) for _ in range(3)]
        await asyncio.sleep(0.02)
        assert len(gateway.clients[0]._waiting) >= 3
        for each in waiting:
            each.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert (await owner).outcome["version"] == 1
        outcome = (await asyncio.wait_for(send(gateway, engine), 5)).outcome
        assert (outcome["status"], outcome["version"]) == ("committed", 2)

    play(tmp_path, scenario)


def test_an_engine_that_refuses_frees_the_session(tmp_path: Path) -> None:
    async def refuse(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        raise VLLMValidationError("no room")
        yield

    async def scenario(gateway: Gateway, engine: Engine) -> None:
        for _ in range(3):
            current.set(Scope())
            with pytest.raises(VLLMValidationError, match="no room"):
                async for _ in gateway.wrap(refuse)(dict(PROMPT), SamplingParams(), "cmpl-1", session_id="s"):
                    pass
        assert (await asyncio.wait_for(send(gateway, engine), 2)).outcome["version"] == 1

    play(tmp_path, scenario)


def test_a_busy_session_is_409_and_the_response_learns_it(tmp_path: Path) -> None:
    async def scenario(gateway: Gateway, engine: Engine) -> None:
        engine.pause = 0.1
        owner = asyncio.create_task(send(gateway, engine))
        await asyncio.sleep(0.05)
        scope = Scope()
        with pytest.raises(VLLMValidationError, match="0 requests wait"):
            await send(gateway, engine, scope=scope)
        assert getattr(scope.failure, "status", None) == 409
        assert (await owner).outcome["version"] == 1

    play(tmp_path, scenario, queue_depth=0)


def test_an_outcome_that_does_not_come_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway_module, "OUTCOME_TIMEOUT", 0.1)

    async def scenario(gateway: Gateway, engine: Engine) -> None:
        engine.silent = True
        scope = await send(gateway, engine)
        assert scope.outcome["status"] == "unknown"
        assert "did not answer" in scope.outcome["error"]

    play(tmp_path, scenario)


def test_a_session_always_goes_to_the_same_engine() -> None:
    class Clients(list[Any]):
        pass

    gateway = Gateway(Clients([SimpleNamespace(rank=i) for i in range(4)]), 1.0, NAMES)
    ranks = {key: gateway.rank_of(key) for key in (SessionKey(TENANT, f"s{i}") for i in range(200))}
    assert set(ranks.values()) == {0, 1, 2, 3}
    for session, rank in ranks.items():
        assert gateway.rank_of(session) == rank
        assert gateway.client_of(session).rank == rank  # type: ignore[attr-defined]
