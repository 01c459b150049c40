"""Between a conversation and its prompt: what of it is rendered, what is put in, and which of the tokens are written.

vLLM renders every chat-like endpoint's messages (chat, responses, Anthropic messages, batches) with one method of one
renderer; wrapping it sees messages and tokens of the same request. What is found there travels to the gateway in the
prompt itself, under `MASK`, `WRITES`, `HISTORY`, `OFFERED` and `PINS`.
"""

import dataclasses
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec
from vllm.exceptions import VLLMValidationError

from deltamem_vllm.errors import DeltaMemError
from deltamem_vllm.policy import Policy
from deltamem_vllm.server import elision
from deltamem_vllm.server.elision import Elided
from deltamem_vllm.server.named import named
from deltamem_vllm.server.offering import PINS, Offering, query_of, text_of
from deltamem_vllm.server.roles import is_written, pinned, plain_messages, unwritten
from deltamem_vllm.server.scope import Scope, current
from deltamem_vllm.sessions import chain
from deltamem_vllm.sessions.attributes import Chain
from deltamem_vllm.store.protocol import SessionKey

MASK = "deltamem_unwritten"
"""Key of a rendered conversation with the spans of its tokens that are not written; raw prompts have none."""
HISTORY = "deltamem_history"
"""Key of a rendered conversation whose history may be left out: what `deltamem_vllm.sessions.grants.History` holds."""

WRITES = "deltamem_writes"
"""Key of a rendered conversation with the roles that were to be written of it."""

Recall = Callable[[SessionKey, str, int], Awaitable[dict[str, Any]]]
_NOTHING: dict[str, Any] = {"write": None, "facts": ()}
"""What is known without a session."""


class ChatPrompts:
    """Renders conversations with their write masks, without the history that the memory holds, with pinned facts.

    Args:
        policy: roles that are written where a request does not say otherwise.
        history: what is done with a resent history where a request does not say otherwise.
        recall: asks what a session says of a prompt, for a question and so many characters of facts; None: nobody is
            asked.
        offering: puts a session's facts into its prompts; None: nobody does.
    """

    def __init__(
        self,
        policy: Policy,
        history: elision.Policy | None = None,
        recall: Recall | None = None,
        offering: Offering | None = None,
    ) -> None:
        self.policy, self.history = policy, history or elision.Policy()
        self._recall, self._offering = recall, offering

    def wrap(self, render_chat: Any) -> Any:
        """``renderer.render_chat_async`` with all that."""

        async def rendered(conversations: Any, chat_params: Any, tok_params: Any = None, **kwargs: Any) -> Any:
            scope = current.get()
            plain = [plain_messages(messages) for messages in conversations]
            if scope is None or scope.mode == "off":
                return await render_chat(plain, chat_params, tok_params, **kwargs)

            async def render(messages: list[Any], params: Any = chat_params) -> dict[str, Any]:
                _, (prompt,) = await render_chat([messages], params, tok_params, **kwargs)
                return dict(prompt)

            try:
                pins = [[text_of(message) for message in pinned(messages)] for messages in conversations]
                known = [await self._known(messages) for messages in plain]
                policies = [scope.policy(each["write"], self.policy) for each in known]
                written = [
                    [is_written(message, policy) for message in messages]
                    for messages, policy in zip(conversations, policies, strict=True)
                ]
                history, shown = self._shown(scope, plain, known)
                made = await render_chat([each.messages for each in shown], chat_params, tok_params, **kwargs)
                for number, prompt in enumerate(made[1]):
                    if prompt.get("prompt_token_ids"):
                        prompt[WRITES], prompt[PINS] = policies[number], [(t, "message", None) for t in pins[number]]
                        reply = "assistant" in policies[number]
                        await self._mark(prompt, shown[number], written[number], reply, chat_params, render)
                        if self._offering is not None:
                            texts, messages = known[number]["facts"], shown[number].messages
                            await self._offering.offer(texts, messages, prompt, render, MASK)
                        if history is not None:
                            prompt[HISTORY] = history
            except DeltaMemError as e:  # vLLM may log what it is told; the response is made from ``failure``
                scope.failure = e
                raise VLLMValidationError("the conversation was refused") from None
            return made

        return rendered

    async def _known(self, messages: list[Any]) -> dict[str, Any]:
        """What the request's session says of a prompt: see `deltamem_vllm.sessions.histories.recall`."""
        key = named.get()
        if key is None or self._recall is None:
            return _NOTHING
        chars = self._offering.chars if self._offering is not None else 0
        return await self._recall(key, query_of(messages), chars)

    async def _mark(
        self,
        prompt: dict[str, Any],
        shown: Elided,
        written: Sequence[bool],
        reply: bool,
        chat_params: Any,
        render: Callable[..., Awaitable[dict[str, Any]]],
    ) -> None:
        """Say of a rendered prompt what of it is written."""

        async def beginning(messages: list[Any]) -> list[int]:
            template = {**chat_params.chat_template_kwargs, "add_generation_prompt": False}
            template["continue_final_message"] = False
            params = dataclasses.replace(chat_params, chat_template_kwargs=template)
            return list((await render(messages, params))["prompt_token_ids"])

        context = sum(shown.context)
        marks = [*[False] * context, *written[len(written) - (len(shown.messages) - context) :]]
        tokens = prompt["prompt_token_ids"]
        everything = all(marks) and reply
        prompt[MASK] = () if everything else await unwritten(shown.messages, marks, tokens, beginning, reply)

    def _shown(
        self, scope: Scope, conversations: list[list[Any]], known: list[dict[str, Any]]
    ) -> tuple[dict[str, Any] | None, list[Elided]]:
        """What the session service has to know of a history, where one may be left out; what is rendered."""
        policy = scope.history or self.history
        if not policy.elide or len(conversations) != 1 or known[0] is _NOTHING:
            return None, [elision.elide(messages, None, 0) for messages in conversations]
        (messages,), (found,) = conversations, known
        held = msgspec.msgpack.decode(found["chain"], type=Chain) if found["chain"] is not None else None
        links = chain.links(messages)
        cut = chain.cut(held, messages, links, found["reply"])
        keep = policy.keep if policy.keep is not None else self.history.keep
        made = elision.elide(messages, cut, elision.KEEP if keep is None else keep)
        scope.elided_messages = made.dropped
        at = None if cut is None else [cut.state, cut.tokens, cut.messages]
        return {"version": found["version"], "messages": len(messages), "link": links[-1], "cut": at}, [made]
