"""Between a conversation and its prompt: where a request's write policy becomes a mask of token positions.

vLLM renders every chat-like endpoint's messages (chat, responses, Anthropic messages, batches) with one method of one
renderer; wrapping it sees messages and tokens of the same request. What is found there travels to the gateway in the
prompt itself, under `MASK`.
"""

import dataclasses
from typing import Any

from vllm.exceptions import VLLMValidationError

from deltamem_vllm.errors import DeltaMemError, SessionError
from deltamem_vllm.policy import Policy
from deltamem_vllm.redaction import redact
from deltamem_vllm.server.offering import PINS, Offering, text_of
from deltamem_vllm.server.roles import is_written, pinned, unwritten, without_flags
from deltamem_vllm.server.scope import current

MASK = "deltamem_unwritten"
"""Key of a rendered conversation with the spans of its tokens that are not written; raw prompts have none."""


class ChatPrompts:
    """Renders conversations with their write masks.

    Args:
        policy: roles that are written where a request does not say otherwise.
        offering: puts a session's facts into its prompts; None: nobody does.
    """

    def __init__(self, policy: Policy, offering: Offering | None = None) -> None:
        self.policy, self.offering = policy, offering

    def wrap(self, render_chat: Any) -> Any:
        """``renderer.render_chat_async`` with masks."""

        async def with_masks(conversations: Any, chat_params: Any, tok_params: Any = None, **kwargs: Any) -> Any:
            scope = current.get()
            if scope is None or scope.mode == "off":
                plain = [without_flags(messages) for messages in conversations]
                return await render_chat(plain, chat_params, tok_params, **kwargs)
            try:
                policy = self.policy if scope.writes is None else scope.writes
                written = [[is_written(message, policy) for message in messages] for messages in conversations]
                pins = [[text_of(message) for message in pinned(messages)] for messages in conversations]
            except SessionError as e:
                scope.failure = e
                raise VLLMValidationError(str(e), parameter=e.parameter) from None
            plain = [without_flags(messages) for messages in conversations]
            rendered = await render_chat(plain, chat_params, tok_params, **kwargs)
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

            async def again(messages: list[Any]) -> dict[str, Any]:
                _, (prompt,) = await render_chat([messages], chat_params, tok_params, **kwargs)
                return dict(prompt)

            for messages, marks, texts, prompt in zip(plain, written, pins, rendered[1], strict=True):
                if tokens := prompt.get("prompt_token_ids"):
                    spans = () if all(marks) else await unwritten(messages, marks, tokens, render)
                    prompt[MASK] = spans
                    prompt[PINS] = [(text, "message", None) for text in texts]
                    if self.offering is not None:
                        try:
                            await self.offering.offer(messages, prompt, again, MASK)
                        except DeltaMemError as e:
                            scope.failure = e
                            said = redact(str(e), ids=scope.ids)  # vLLM may log it
                            raise VLLMValidationError(said, parameter=getattr(e, "parameter", None)) from None
            return rendered

        return with_masks
