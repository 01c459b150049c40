"""The one place where every endpoint's request passes on its way to the engine.

vLLM resolves the effective session id (body before header before ``vllm_xargs``) and calls
``engine_client.generate``; wrapping that call serves chat, completions, responses, messages and batches alike.
"""

import asyncio
import contextlib
import copy
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, Literal

import numpy as np
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind

from deltamem_vllm.compat import is_beam
from deltamem_vllm.errors import CapacityError, DeltaMemError, SessionError
from deltamem_vllm.names import Names
from deltamem_vllm.policy import ALL, Policy
from deltamem_vllm.redaction import redact
from deltamem_vllm.server.ahead import read_ahead
from deltamem_vllm.server.chat import HISTORY, MASK, WRITES
from deltamem_vllm.server.offering import OFFERED, PINS
from deltamem_vllm.server.roles import mask_of
from deltamem_vllm.server.scope import Scope, current, effective_id, no_key
from deltamem_vllm.server.spans import RequestSpans, attributes_of
from deltamem_vllm.server.tenants import DEFAULT_TENANT
from deltamem_vllm.sessions.chain import reply_digests
from deltamem_vllm.sessions.control import ControlClient
from deltamem_vllm.sessions.grants import EXTRA, WRITTEN, fed_tokens
from deltamem_vllm.sessions.masks import Spans, unwritten_before
from deltamem_vllm.store.protocol import SessionKey

OUTCOME_TIMEOUT = 30.0
ADMIT_MARGIN = 10.0


class Gateway:
    """Admits requests to sessions and waits for their outcomes.

    Args:
        clients: control clients of the engines, by data-parallel rank.
        queue_seconds: how long an admission may take.
        names: makes what the engine calls a session, and salts.
        wake: makes idle engines carry out what waits for a step; None where nothing does.
        policy: roles that are written where a request does not say otherwise.
        spans: hears of requests of sessions, for tracing.
    """

    def __init__(
        self,
        clients: Sequence[ControlClient],
        queue_seconds: float,
        names: Names,
        wake: Callable[[], Coroutine[Any, Any, None]] | None = None,
        policy: Policy = ALL,
        spans: RequestSpans | None = None,
    ) -> None:
        self._spans = spans if spans is not None else RequestSpans()
        self.clients = clients
        self.policy = policy
        self.queue_seconds = queue_seconds
        self.names = names
        self._wake = wake

    async def wake(self) -> None:
        """Let the engines take a step: it zeroes what was deleted on the device."""
        if self._wake is not None:
            with contextlib.suppress(Exception):  # a dead engine has no memory to erase
                await self._wake()

    async def ask(self, key: SessionKey, do: str, **question: Any) -> Any:
        """Ask the engine that serves a session about it."""
        return await self.client_of(key).ask(
            do,
            timeout=self.queue_seconds + ADMIT_MARGIN,
            tenant=key.tenant,
            session=key.session,
            limits=_limits(current.get()),
            **question,
        )

    async def recall(self, key: SessionKey, query: str = "", chars: int = 0) -> dict[str, Any]:
        """What a session says of a prompt of it: see `deltamem_vllm.sessions.histories.recall`."""
        return dict(await self.ask(key, "recall", query=query, chars=chars))

    def rank_of(self, key: SessionKey) -> int:
        """The engine that serves a session: always the same one, so that its memory has one owner."""
        return self.names.spread(key.tenant, key.session, len(self.clients))

    def client_of(self, key: SessionKey) -> ControlClient:
        """The control client of that engine."""
        return self.clients[self.rank_of(key)]

    def wrap(self, generate: Any) -> Any:
        """``engine_client.generate`` with sessions."""

        def with_sessions(prompt: Any, sampling_params: Any, request_id: str, **kwargs: Any) -> AsyncIterator[Any]:
            scope = current.get() or Scope(tenant=None)
            try:
                return self._start(generate, scope, prompt, sampling_params, request_id, kwargs)
            except SessionError as e:
                raise _refusal(scope, e) from None

        return with_sessions

    def _start(
        self, generate: Any, scope: Scope, prompt: Any, params: Any, request_id: str, kwargs: dict[str, Any]
    ) -> AsyncIterator[Any]:
        prompt, marks = _take_marks(prompt)
        params = copy.copy(params)  # several prompts of one HTTP request share one object
        extra = dict(params.extra_args or {})
        extra.pop(EXTRA, None)  # never trust a client's
        # From here on the engine knows a session by its keyed name only: it logs, and tells of it in KV events.
        extra_id, resolved = extra.pop("session_id", None), kwargs.pop("session_id", None)
        scope.ids.update(each for each in (extra_id, resolved) if isinstance(each, str) and each)
        session = effective_id(resolved, scope.header_id, extra_id)
        tenant = scope.tenant.name if scope.tenant is not None else ""
        scope.admitted = scope.mode == "off" or not session
        if scope.mode == "off":
            params.extra_args = {**extra, EXTRA: {"mode": "off"}}
            return generate(self._salted(prompt, "off", tenant), params, request_id, **kwargs)  # type: ignore[no-any-return]
        if not session:
            params.extra_args = extra or None
            return generate(self._salted(prompt, "none", tenant), params, request_id, **kwargs)  # type: ignore[no-any-return]
        if not tenant:
            raise no_key("a session needs the API key")
        key = SessionKey(tenant, session)
        kwargs["session_id"] = self.names.session(tenant, session)
        tokens = _token_ids(prompt)
        if scope.mode == "readwrite":
            scope.engine_calls += 1
            if params.n > 1 or scope.engine_calls > 1 or is_beam(request_id):
                raise SessionError(
                    f"session {session!r}: n > 1, beam search and several prompts in one request leave open which of "
                    "the answers the session is to remember: ask for one, or send X-DeltaMem-Mode: read",
                    status=400,
                    parameter="n",
                )
        if len(self.clients) > 1:
            kwargs["data_parallel_rank"] = self.rank_of(key)
        params.extra_args = {**extra, EXTRA: {}}
        return self._run(generate, scope, key, tokens, prompt, marks, params, request_id, kwargs)

    async def _run(
        self,
        generate: Any,
        scope: Scope,
        key: SessionKey,
        tokens: np.ndarray,
        prompt: Any,
        marks: dict[str, Any],
        params: Any,
        request_id: str,
        kwargs: dict[str, Any],
    ) -> AsyncIterator[Any]:
        history = marks.get(HISTORY)
        client, ticket = self.client_of(key), secrets.token_hex(16)
        settled, text = False, ""
        grant: dict[str, Any] = {}
        self._spans.expect(request_id)
        try:
            try:
                await self.spend(scope)
                spans = mask_of(marks.get(MASK), len(tokens), await self._policy(scope, key, marks))
                params.extra_args[EXTRA]["unwritten"] = spans
                scope.elided_tokens = _elided(marks, spans, len(tokens))
                grant = await self._admit(client, ticket, scope, key, tokens, prompt, marks, params)
            except DeltaMemError as e:
                raise _refusal(scope, e) from None
            scope.admitted = True
            params.extra_args[EXTRA]["ticket"] = ticket
            prompt = {**prompt, "cache_salt": grant["salt"]}
            outputs = generate(prompt, params, request_id, **kwargs)
            if params.stop and scope.mode == "readwrite":  # a client that reads slowly shall not keep its end from us
                outputs = read_ahead(self._telling_the_end(outputs, client, ticket, len(tokens), params))
            async with contextlib.aclosing(outputs):
                async for output in outputs:
                    if history is not None and output.outputs:
                        new = output.outputs[0].text
                        text = text + new if params.output_kind == RequestOutputKind.DELTA else new
                    if output.finished:
                        settled = True
                        scope.outcome = await self._outcome(client, ticket, key.session)
                        if history is not None and scope.outcome["status"] in WRITTEN:
                            await self._note_reply(client, key, scope.outcome["version"], text)
                    yield output
        finally:
            if not settled:  # refused, left by its client, or failed: nothing of this is remembered
                with contextlib.suppress(Exception):
                    await asyncio.shield(client.ask("verdict", ticket=ticket, tokens=None, timeout=5.0))
            self._spans.finish(request_id, attributes_of(scope, grant))

    async def _policy(self, scope: Scope, key: SessionKey, marks: dict[str, Any]) -> Policy:
        """Roles that are written; of a raw prompt's session they are asked for here."""
        if WRITES in marks:
            return frozenset(marks[WRITES])
        if scope.writes is not None:
            return scope.writes
        return scope.policy((await self.recall(key))["write"], self.policy)

    async def spend(self, scope: Scope) -> None:
        """Take a write out of the tenant's quota. The first engine counts for all, so that there is one count."""
        tenant = scope.tenant
        if scope.mode == "readwrite" and tenant is not None and tenant.commits_per_minute is not None:
            await self.clients[0].ask("spend", tenant=tenant.name, per_minute=tenant.commits_per_minute)

    async def _admit(
        self,
        client: ControlClient,
        ticket: str,
        scope: Scope,
        key: SessionKey,
        tokens: np.ndarray,
        prompt: Any,
        marks: dict[str, Any],
        params: Any,
    ) -> dict[str, Any]:
        return dict(
            await client.ask(
                "admit",
                timeout=self.queue_seconds + ADMIT_MARGIN,
                ticket=ticket,
                tenant=key.tenant,
                session=key.session,
                mode=scope.mode,
                tokens=tokens.tobytes(),
                salt=prompt.get("cache_salt"),
                held=bool(params.stop),
                unwritten=params.extra_args[EXTRA]["unwritten"],
                offered=marks.get(OFFERED, ()),
                pins=marks.get(PINS, ()) if scope.mode == "readwrite" else (),
                history=marks.get(HISTORY),
                if_match=scope.if_match,
                elided=scope.elided_tokens,
                limits=_limits(scope),
            )
        )

    @staticmethod
    async def _note_reply(client: ControlClient, key: SessionKey, version: int, text: str) -> None:
        """So that an edited reply is noticed; without it any is accepted."""
        with contextlib.suppress(DeltaMemError):
            await client.ask(
                "reply", tenant=key.tenant, session=key.session, version=version, digests=reply_digests(text)
            )

    def _salted(self, prompt: Any, kind: Literal["off", "none"], tenant: str) -> Any:
        """A prompt without a session whose cached blocks are its kind's and its tenant's own.

        No client's salt can equal one of ours. Only where all requests are one tenant's, and with no salt of theirs,
        is a prompt without a session left as vLLM made it.
        """
        if not isinstance(prompt, dict):
            return prompt
        theirs = prompt.get("cache_salt")
        if kind == "none" and theirs is None and tenant == DEFAULT_TENANT:
            return prompt
        return {**prompt, "cache_salt": self.names.salt(kind, tenant, theirs or "")}

    @staticmethod
    async def _telling_the_end(
        outputs: AsyncGenerator[Any, None], client: ControlClient, ticket: str, prompt_tokens: int, params: Any
    ) -> AsyncGenerator[Any, None]:
        """Outputs of a request with stop strings. They are looked for here, in the text: the engine waits to hear where
        the answer ended. If it cannot be told it commits nothing, and the outcome says so.
        """
        sampled = 0
        async with contextlib.aclosing(outputs):
            async for output in outputs:
                choice = output.outputs[0] if output.outputs else None
                if choice is not None:
                    new = len(choice.token_ids)
                    sampled = sampled + new if params.output_kind == RequestOutputKind.DELTA else new
                if output.finished:
                    fed = fed_tokens(prompt_tokens, sampled, None if choice is None else choice.finish_reason)
                    with contextlib.suppress(DeltaMemError):
                        await client.ask("verdict", ticket=ticket, tokens=fed)
                yield output

    @staticmethod
    async def _outcome(client: ControlClient, ticket: str, session: str) -> dict[str, Any]:
        """The last byte of the answer leaves after this: durable, or reported."""
        try:
            return dict(await client.ask("outcome", timeout=OUTCOME_TIMEOUT, ticket=ticket))
        except (CapacityError, SessionError) as e:
            return {"status": "unknown", "session": session, "error": str(e)}


def _refusal(scope: Scope, error: DeltaMemError) -> VLLMValidationError:
    """What vLLM is told of a refusal. It may log it, so it has no id in it; the response is made from ``failure``."""
    scope.failure = error
    return VLLMValidationError(redact(str(error), ids=scope.ids), parameter=getattr(error, "parameter", None))


def _limits(scope: Scope | None) -> tuple[int | None, int | None] | None:
    """What the request's tenant may keep: sessions and bytes; None: no limits of its own."""
    tenant = scope.tenant if scope is not None else None
    if tenant is None or tenant.max_sessions is tenant.max_bytes is None:
        return None
    return tenant.max_sessions, tenant.max_bytes


def _token_ids(prompt: Any) -> np.ndarray:
    """The prompt's token ids as int32.

    Raises:
        SessionError: 400; embeddings and streamed inputs have no token ids to plan a window with.
    """
    ids = prompt.get("prompt_token_ids") if isinstance(prompt, dict) else None
    if not ids or prompt.get("prompt_embeds") is not None:
        raise SessionError(
            "a session needs a prompt of tokens: prompt embeddings and streamed inputs cannot be used with one",
            status=400,
            parameter="session_id",
        )
    return np.asarray(ids, dtype=np.int32)


def _take_marks(prompt: Any) -> tuple[Any, dict[str, Any]]:
    """A prompt as vLLM made it, and what was found out about the conversation that it was rendered from."""
    if not isinstance(prompt, dict):
        return prompt, {}
    marks = {key: prompt[key] for key in (MASK, WRITES, HISTORY, OFFERED, PINS) if key in prompt}
    return {key: value for key, value in prompt.items() if key not in marks}, marks


def _elided(marks: dict[str, Any], spans: Spans, prompt_tokens: int) -> int:
    """Tokens of a resent history that are not in the prompt."""
    history = marks.get(HISTORY)
    if history is None or history["cut"] is None:
        return 0
    context = unwritten_before(spans, prompt_tokens) - unwritten_before(marks.get(OFFERED, ()), prompt_tokens)
    return max(0, int(history["cut"][1]) - context)
