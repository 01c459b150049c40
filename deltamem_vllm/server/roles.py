"""Write policy: which messages of a conversation are written to the memory, and where their tokens lie.

The memory learns from what it is allowed to write. A tool's output is text that an outsider can choose, so by default
it is read like everything in the prompt but not remembered. A server's policy names roles; a request can name others in
`WRITE_HEADER`; a message's own flag, ``"deltamem": {"write": false}``, overrules both.
"""

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any

from deltamem_vllm.errors import SessionError
from deltamem_vllm.policy import Policy, parse_policy
from deltamem_vllm.sessions.masks import OPEN, Spans, normal

WRITE_HEADER = "X-DeltaMem-Write"
_SAME = {"developer": "system", "function": "tool"}

Render = Callable[[list[Any]], Awaitable[Sequence[int]]]


def requested(text: str) -> Policy:
    """The policy that a request asks for in `WRITE_HEADER`.

    Raises:
        SessionError: 400; names the roles.
    """
    try:
        return parse_policy(text)
    except ValueError as e:
        raise SessionError(f"invalid {WRITE_HEADER}: {e}", status=400, parameter=WRITE_HEADER) from None


FLAGS = {"write", "pin"}


def _flags(message: Any) -> Mapping[str, bool]:
    """What a message says about itself.

    Raises:
        SessionError: 400; it says what it cannot.
    """
    said = message.get("deltamem") if isinstance(message, Mapping) else None
    if said is None:
        return {}
    if not isinstance(said, Mapping) or not said or not set(said) <= FLAGS or {*map(type, said.values())} != {bool}:
        raise SessionError(
            'a message\'s "deltamem" must be of the form {"write": false, "pin": true}, with one of them or both',
            status=400,
            parameter="messages",
        )
    return said


def pinned(messages: Sequence[Any]) -> list[Any]:
    """The messages that are to be pinned: flagged so, and new, that is behind the last one of the assistant. A client
    that resends its history resends its flags too, and what was deleted since must not come back.

    Raises:
        SessionError: 400; a flag is not valid.
    """
    flagged: list[Any] = []
    for message in messages:
        if _flags(message).get("pin"):
            flagged.append(message)
        elif isinstance(message, Mapping) and message.get("role") == "assistant":
            flagged.clear()
    return flagged


def is_written(message: Any, policy: Policy) -> bool:
    """Whether a message is to be written: its own flag decides, else its role.

    Raises:
        SessionError: 400; a flag is not valid.
    """
    write = _flags(message).get("write")
    if write is not None:
        return write
    role = str(message.get("role", "user") if isinstance(message, Mapping) else getattr(message, "role", "user"))
    return _SAME.get(role, role) in policy


def plain_messages(messages: Sequence[Any]) -> list[Any]:
    """The messages as the chat template is to see them: without our flag, and with lists where pydantic has put
    iterators that can be read only once."""
    return [
        {name: _lasting(value) for name, value in message.items() if name != "deltamem"}
        if isinstance(message, Mapping)
        else message
        for message in messages
    ]


def _lasting(value: Any) -> Any:
    return list(value) if isinstance(value, Iterator) else value


async def unwritten(
    messages: list[Any], written: Sequence[bool], prompt: Sequence[int], render: Render, reply: bool = True
) -> Spans:
    """Where the tokens of the messages that are not written lie in a rendered prompt.

    The places are found by rendering what comes before each of them. A chat template need not render a shorter
    conversation to a prefix of a longer one; where it does not, the span is made longer, never shorter: what must
    not be written is not written.

    Args:
        messages: the conversation, without flags.
        written: for each message, whether it is written.
        prompt: token ids of the whole conversation, rendered.
        render: renders the beginning of the conversation, without a generation prompt.
        reply: whether the reply is written, and with it what the template puts before it.
    """
    spans: list[tuple[int, int]] = []
    index, count = 0, len(messages)
    while index < count:
        if written[index]:
            index += 1
            continue
        stop = index
        while stop < count and not written[stop]:
            stop += 1
        start_at = _shared(await _try(render, messages[:index]), prompt) if index else 0
        stop_at = None
        while stop_at is None and stop < count:
            stop_at = _whole(await _try(render, messages[:stop]), prompt)
            stop += stop_at is None
        if stop_at is None and reply:  # the last message: what follows it is the template's own
            stop_at = _whole(await _try(render, messages), prompt)
        spans.append((start_at, len(prompt) if stop_at is None else stop_at))
        index = stop
    if not reply and written[-1]:
        spans.append((_shared(await _try(render, messages), prompt), len(prompt)))
    return normal(spans)


def mask_of(conversation: Spans | None, prompt_tokens: int, policy: Policy) -> Spans:
    """The mask of a whole request: prompt and reply.

    Args:
        conversation: what is not written of a rendered conversation; None for a raw prompt, which counts as the
            user's.
    """
    if conversation is None:
        conversation = () if "user" in policy else ((0, prompt_tokens),)
    return conversation if "assistant" in policy else normal([*conversation, (prompt_tokens, OPEN)])


async def _try(render: Render, messages: list[Any]) -> Sequence[int] | None:
    """The rendered beginning, or None where the template refuses a conversation that ends there."""
    try:
        return await render(messages)
    except ValueError:  # what vLLM makes of whatever the template raised
        return None


def _shared(beginning: Sequence[int] | None, prompt: Sequence[int]) -> int:
    """How many tokens the prompt shares with a rendered beginning; none where there is no rendering."""
    count = 0
    for ours, theirs in zip(beginning or (), prompt, strict=False):
        if ours != theirs:
            break
        count += 1
    return count


def _whole(beginning: Sequence[int] | None, prompt: Sequence[int]) -> int | None:
    """The length of a rendered beginning if the prompt begins with all of it, else None."""
    if beginning is None or len(beginning) > len(prompt) or _shared(beginning, prompt) < len(beginning):
        return None
    return len(beginning)
