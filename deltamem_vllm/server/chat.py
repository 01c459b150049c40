"""Between a conversation and its prompt: what of it is rendered, and which of the tokens are written.

vLLM renders every chat-like endpoint's messages (chat, responses, Anthropic messages, batches) with one method of one
renderer; wrapping it sees messages and tokens of the same request. What is found there travels to the gateway in the
prompt itself, under `MASK` and `HISTORY`.
"""

import dataclasses
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from vllm.exceptions import VLLMValidationError

from deltamem_vllm.errors import DeltaMemError
from deltamem_vllm.policy import Policy
from deltamem_vllm.server import elision
from deltamem_vllm.server.elision import Elided
from deltamem_vllm.server.roles import is_written, plain_messages, unwritten
from deltamem_vllm.server.scope import Scope, current
from deltamem_vllm.sessions import chain
from deltamem_vllm.sessions.attributes import Chain

MASK = "deltamem_unwritten"
"""Key of a rendered conversation with the spans of its tokens that are not written; raw prompts have none."""
HISTORY = "deltamem_history"
"""Key of a rendered conversation whose history may be left out: see `Elided.to_admission`."""

Recall = Callable[[Scope], Awaitable[dict[str, Any] | None]]


class ChatPrompts:
    """Renders conversations with their write masks, and without the history that the memory holds.

    Args:
        policy: roles that are written where a request does not say otherwise.
        history: what is done with a resent history where a request does not say otherwise.
        recall: asks what the request's session holds; None without a session.
    """

    def __init__(self, policy: Policy, history: elision.Policy | None = None, recall: Recall | None = None) -> None:
        self.policy, self.history = policy, history or elision.Policy()
        self._recall = recall

    def note_session(self, preprocess_chat: Any) -> Any:
        """``online_renderer.preprocess_chat``, which has the request: the session that its body names is noted."""

        async def noting(request: Any, *args: Any, **kwargs: Any) -> Any:
            scope = current.get()
            if scope is not None:
                extra = getattr(request, "vllm_xargs", None) or {}
                scope.body_id = getattr(request, "session_id", None) or extra.get("session_id")
            return await preprocess_chat(request, *args, **kwargs)

        return noting

    def wrap(self, render_chat: Any) -> Any:
        """``renderer.render_chat_async`` with masks."""

        async def with_masks(conversations: Any, chat_params: Any, tok_params: Any = None, **kwargs: Any) -> Any:
            scope = current.get()
            plain = [plain_messages(messages) for messages in conversations]
            if scope is None or scope.mode == "off":
                return await render_chat(plain, chat_params, tok_params, **kwargs)
            try:
                policy = self.policy if scope.writes is None else scope.writes
                written = [[is_written(message, policy) for message in messages] for messages in conversations]
                version, shown = await self._shown(scope, plain)
            except DeltaMemError as e:
                scope.failure = e
                raise VLLMValidationError("the conversation was refused") from None
            rendered = await render_chat([each.messages for each in shown], chat_params, tok_params, **kwargs)
            beginning = dataclasses.replace(
                chat_params,
                chat_template_kwargs={
                    **chat_params.chat_template_kwargs,
                    "add_generation_prompt": False,
                    "continue_final_message": False,
                },
            )

            async def render(messages: list[Any]) -> list[int]:
                _, (prompt,) = await render_chat([messages], beginning, tok_params, **kwargs)
                return list(prompt["prompt_token_ids"])

            for whole, roles, each, prompt in zip(plain, written, shown, rendered[1], strict=True):
                if not (tokens := prompt.get("prompt_token_ids")):
                    continue
                tail = roles[len(roles) - each.context.count(False) :]
                marks = [False] * each.context.count(True) + tail
                prompt[MASK] = () if all(marks) else await unwritten(each.messages, marks, tokens, render)
                if version is not None:
                    prompt[HISTORY] = each.to_admission(whole, version)
            return rendered

        return with_masks

    async def _shown(self, scope: Scope, conversations: list[list[Any]]) -> tuple[int | None, list[Elided]]:
        """What of each conversation is rendered; and the session's version, where that was asked for."""
        policy = self.history if scope.history is None else elision.requested(scope.history, self.history)
        found = None
        if policy.elide and len(conversations) == 1 and self._recall is not None:
            found = await self._recall(scope)
        if found is None:
            return None, [elision.elide(messages, None, 0) for messages in conversations]
        known = msgspec.msgpack.decode(found["chain"], type=Chain) if found["chain"] is not None else None
        cut = chain.cut(known, conversations[0], found["reply"])
        made = elision.elide(conversations[0], cut, policy.keep)
        scope.elided_messages = made.dropped
        return found["version"], [made]
