"""What a request was granted: from which state it starts, what it may write, and what it will commit against."""

from dataclasses import dataclass
from typing import Literal

import msgspec
import numpy as np
from blake3 import blake3

from deltamem_vllm.names import Names
from deltamem_vllm.sessions.chain import Cut
from deltamem_vllm.sessions.facts import Pin
from deltamem_vllm.sessions.masks import Spans
from deltamem_vllm.sessions.windows import WRITE_ALL, Mode, Plan
from deltamem_vllm.store.protocol import Expect, SessionKey

#: Name of our entry in a request's ``sampling_params.extra_args``.
EXTRA = "deltamem"

ZERO = "zero"
"""Digest of the empty memory."""

OutcomeStatus = Literal["committed", "pending", "unchanged", "aborted", "conflict", "degraded", "failed", "unknown"]


WRITTEN = ("committed", "pending", "degraded")
"""Outcomes after which the session has what the request wrote."""


def fed_tokens(prompt_tokens: int, sampled: int, finish_reason: str | None) -> int | None:
    """Tokens that a session is to have of an answer as its client got it: all but the last one, which was not fed.

    None, nothing, of an answer that the engine did not complete. ``finish_reason`` is vLLM's.
    """
    return None if finish_reason in (None, "abort", "error") else prompt_tokens + sampled - 1


@dataclass(frozen=True)
class History:
    """What a request says about the conversation it was rendered from, where its history may be left out.

    Attributes:
        version: the session's, when it was rendered.
        messages, link: of the whole conversation, see `deltamem_vllm.sessions.chain`.
        cut: where its beginning was left out; None: all of it is in the prompt.
    """

    version: int
    messages: int
    link: bytes
    cut: Cut | None


class Grant(msgspec.Struct, frozen=True, eq=False):
    """One admitted request.

    Attributes:
        ticket: names the request between the API process and the engine.
        key: the session.
        mode: ``readwrite`` owns the session until its outcome is known; ``read`` runs on a snapshot.
        plan: how its prompt relates to the session's window.
        prompt_tokens: length of the prompt it was planned for.
        base: [layers, H, r, r] fp32 state before the prompt's first token; None is the empty memory.
        base_digest: identifies ``base`` by content.
        write_limit: positions at or past it are read only.
        spans: positions before it that are read only.
        offered: those among them that the server has put into the prompt, and that are no part of the conversation.
        history: for a client that lets its history be left out.
        pins: facts that are pinned when it commits.
        expect: what the store must hold for the commit; None for a session without a record.
        incarnation: the session's; a deleted and re-created session has another one.
        held_for_verdict: it has stop strings, which only its API process sees: the engine hears of one as an abort, or
            has by then completed the request by itself, with tokens that the client never got. Either way that process
            says where the answer ended.
    """

    ticket: str
    key: SessionKey
    mode: Mode
    plan: Plan
    prompt_tokens: int
    base: np.ndarray | None
    base_digest: str
    write_limit: int
    expect: Expect | None
    incarnation: str
    held_for_verdict: bool = False
    spans: Spans = ()
    offered: Spans = ()
    history: History | None = None
    pins: tuple[Pin, ...] = ()

    @property
    def commits(self) -> bool:
        """Whether the request leaves something behind."""
        return self.mode == "readwrite"


def state_digest(state: np.ndarray | None) -> str:
    """Hex name of a state's content: equal names, equal bits. Names are compared within one process and stored
    nowhere."""
    if state is None:
        return ZERO
    return blake3(np.ascontiguousarray(state).data.cast("B")).hexdigest(16)


def cache_salt(
    key: SessionKey,
    incarnation: str,
    base_digest: str,
    limit: int,
    adapter: str,
    clients: str | None,
    names: Names,
) -> str:
    """Prefix-cache salt of a request of a session.

    A cached block is right for a request only if the tokens before it *and* the memory they started from are equal,
    and if the same of them were written. All of that goes in, so that blocks made from another memory, or in another
    session, can never be taken for ours. It is an HMAC with the server's secret, so no client can name another's salt,
    and the salt, which KV events carry, does not tell what it was made of.
    """
    return names.salt(
        "session",
        key.tenant,
        key.session,
        incarnation,
        base_digest,
        "all" if limit == WRITE_ALL else str(limit),
        adapter,
        clients or "",
    )
