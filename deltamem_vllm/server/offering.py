"""A session's pinned facts, put into its prompts.

The block of facts is the server's, not the client's: it is read but never written to the memory, and no part of the
conversation that windows are matched with, so it may differ from turn to turn, or be gone. To be sure of that, its
place is found by comparing the prompt with and without it: taking out one span must leave the very prompt that would
have been sent without facts.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from deltamem_vllm.errors import SessionError
from deltamem_vllm.messages import role
from deltamem_vllm.sessions.facts import BLOCK, block
from deltamem_vllm.sessions.masks import insertion, with_offer

OFFERED = "deltamem_offered"
"""Key of a rendered conversation with the spans of its tokens that the server has put in."""
PINS = "deltamem_pins"
"""Key of a rendered conversation with the texts that are to be pinned."""

Again = Callable[[list[Any]], Awaitable[dict[str, Any]]]


def text_of(message: Any) -> str:
    """The text of a message: all its text parts, line by line."""
    content = message.get("content") if isinstance(message, Mapping) else getattr(message, "content", None)
    if isinstance(content, str):
        return content
    parts = [part.get("text") for part in content or () if isinstance(part, Mapping)]
    return "\n".join(part for part in parts if isinstance(part, str))


class Offering:
    """Offers facts.

    Args:
        chars: how much of the facts' texts a prompt may take.
        form: the block's text; empty: the built-in one.
        renderer: vLLM's, for its tokenizer's special tokens.
    """

    def __init__(self, chars: int, form: str, renderer: Any) -> None:
        self.chars, self._form = chars, form or BLOCK
        self._renderer = renderer
        self._special: list[str] | None = None

    async def offer(
        self, texts: Sequence[str], messages: list[Any], prompt: dict[str, Any], again: Again, mask: str
    ) -> None:
        """Put facts into a prompt.

        Args:
            texts: the facts'.
            messages: the conversation, without flags.
            prompt: as rendered, with its spans under ``mask``; changed in place.
            again: renders other messages in the same way.

        Raises:
            SessionError: 422; the chat template has no place for them.
        """
        if texts:
            await self._insert(block(texts, self._form, self._tokens()), messages, prompt, again, mask)

    async def _insert(self, text: str, messages: list[Any], prompt: dict[str, Any], again: Again, mask: str) -> None:
        own = prompt["prompt_token_ids"]
        for candidate in (before_last_user(messages, text), in_system(messages, text)):
            try:
                made = await again(candidate)
            except ValueError:  # what vLLM makes of whatever the template raised
                continue
            span = insertion(own, made.get("prompt_token_ids") or ())
            if span is not None:
                ours = {key: value for key, value in prompt.items() if key not in made}
                prompt.clear()
                prompt.update({**made, **ours, mask: with_offer(ours[mask], span), OFFERED: (span,)})
                return
        raise SessionError(
            "the session has pinned facts, and this model's chat template has no place for them in this conversation "
            "(or no room, where prompts are cut to a length): delete the facts, or send X-DeltaMem-Mode: off",
            status=422,
            parameter="messages",
        )

    def _tokens(self) -> list[str]:
        if self._special is None:
            tokenizer = self._renderer.tokenizer
            added = tokenizer.get_added_vocab() if hasattr(tokenizer, "get_added_vocab") else ()
            self._special = sorted({*added, *getattr(tokenizer, "all_special_tokens", ())})
        return self._special


def before_last_user(messages: Sequence[Any], text: str) -> list[Any]:
    """A system message of its own directly before the last message of the user: what comes before it stays as it was,
    in the prefix cache too."""
    users = [index for index, message in enumerate(messages) if role(message) == "user"]
    at = users[-1] if users else 0
    return [*messages[:at], {"role": "system", "content": text}, *messages[at:]]


def in_system(messages: Sequence[Any], text: str) -> list[Any]:
    """At the end of the first system message, where a template wants only one; or as that."""
    if not messages or role(messages[0]) not in ("system", "developer") or not isinstance(messages[0], Mapping):
        return [{"role": "system", "content": text}, *messages]
    content = messages[0].get("content")
    joined = f"{content}\n\n{text}" if isinstance(content, str) else [*(content or ()), {"type": "text", "text": text}]
    return [{**messages[0], "content": joined}, *messages[1:]]


def query_of(messages: Sequence[Any]) -> str:
    """What facts are wanted for: the last message of the user."""
    return next((text_of(message) for message in reversed(messages) if role(message) == "user"), "")
