"""Message chains: which messages of a resent conversation the memory already holds.

A chat client resends its history with every request. The first n messages of it are summed up in one *link*, a hash
chained over canonical messages, so that eight bytes per session tell whether a conversation begins with what was
written. What the model itself answered is not part of the chain (a parser may have turned it into something else before
the client saw it); it is one more message of the assistant between two points, and is compared where its text is known.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from deltamem_vllm.messages import fields, role
from deltamem_vllm.sessions.attributes import Chain, Point

ROOT = b"\0" * 8
"""The link of no messages."""
_ENCODER = json.JSONEncoder(sort_keys=True, ensure_ascii=False, default=str)
"""Made once: a long history has thousands of messages, and ``json.dumps`` would make one for each."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Where a resent conversation can be cut.

    Attributes:
        messages: how many of its messages are in the memory.
        state: the state they are in: the session's latest (``end``), or the one that its window began from (``base``).
        tokens: tokens that they came to.
    """

    messages: int
    state: Literal["end", "base"]
    tokens: int


def canonical(message: Any) -> bytes:
    """A message as bytes that are equal for equal messages, however a client's library writes them.

    Role, text, name, tool calls and the call that a tool answers count. Empty and unknown fields do not, and neither
    does whether text is one string or a list of text parts.
    """
    said = fields(message)
    calls = [
        {"name": call.get("function", {}).get("name"), "arguments": _json(call.get("function", {}).get("arguments"))}
        for call in said.get("tool_calls") or ()
        if isinstance(call, Mapping)
    ]
    known = {
        "role": said.get("role"),
        "text": _text(said.get("content")),
        "name": said.get("name"),
        "calls": calls,
        "answers": said.get("tool_call_id"),
    }
    kept = {name: value for name, value in known.items() if value}
    return _ENCODER.encode(kept).encode("utf-8", "surrogatepass")


def links(messages: Sequence[Any]) -> list[bytes]:
    """The links after 0, 1, … all messages; 8 bytes each."""
    made = [ROOT]
    for message in messages:
        made.append(hashlib.blake2b(made[-1] + canonical(message), digest_size=8, person=b"deltamem-chain").digest())
    return made


def reply_digests(text: str) -> list[bytes]:
    """What a generated text may be called when the client sends it back: as it is, or without its reasoning."""
    said = {text, text.rpartition("</think>")[2]}
    return sorted(_reply_digest(one) for one in said)


def cut(
    chain: Chain | None, messages: Sequence[Any], made: Sequence[bytes], reply: Sequence[bytes] | None
) -> Cut | None:
    """Where a conversation can be cut, or None where the memory does not hold its beginning.

    Args:
        chain: the session's.
        messages: the client's, all of them.
        made: their `links`.
        reply: `reply_digests` of the latest reply; None where its text is not known any more: any one is accepted.
    """
    if chain is None:
        return None
    if _follows(chain.end, messages, made) and _is_reply(messages[chain.end.messages], reply):
        return Cut(chain.end.messages + 1, "end", chain.end.tokens)
    if chain.base is not None and _follows(chain.base, messages, made):
        return Cut(chain.base.messages + 1, "base", chain.base.tokens)
    return None


def advance(chain: Chain | None, at: Cut | None, messages: int, link: bytes, written: int, state: bytes) -> Chain:
    """The chain after a request that wrote a conversation's rest and its reply.

    Args:
        state: digest of the state after it.
        at: where the conversation was cut; None: all of it was written.
        messages, link: of the whole conversation, the new reply not counted.
        written: tokens that this request wrote.
    """
    if at is None:
        return Chain(state, Point(messages, link, written))
    base = chain.end if chain is not None and at.state == "end" else chain.base if chain is not None else None
    return Chain(state, Point(messages, link, at.tokens + written), base)


def _follows(point: Point, messages: Sequence[Any], made: Sequence[bytes]) -> bool:
    """Whether a conversation goes on after a point: its messages, a reply, and something new."""
    return (
        len(messages) > point.messages + 1
        and made[point.messages] == point.link
        and role(messages[point.messages]) == "assistant"
    )


def _is_reply(message: Any, reply: Sequence[bytes] | None) -> bool:
    said = fields(message)
    if reply is None or said.get("tool_calls"):
        return True
    return _reply_digest(_text(said.get("content"))) in reply


def _reply_digest(text: str) -> bytes:
    return hashlib.blake2b(
        text.strip().encode("utf-8", "surrogatepass"), digest_size=8, person=b"deltamem-reply"
    ).digest()


def _text(content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    parts = [
        part["text"] if isinstance(part, Mapping) and isinstance(part.get("text"), str) else _json(part)
        for part in content
    ]
    return "".join(parts)


def _json(value: Any) -> str:
    """JSON with sorted keys; a string that holds JSON is taken for what it says."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return value  # type: ignore[no-any-return]
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
