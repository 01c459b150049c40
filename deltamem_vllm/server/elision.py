"""History elision: of a conversation that is resent, only what the memory does not hold yet goes through the model.

A client that resends everything pays for its whole history with every turn. With elision the server recognises the
messages that are in the session's memory already, leaves them out, and renders the system messages, the last few
messages as context (read, not written again) and what is new. It is lossy, as the memory is, so it is off by default.
Where the memory does not hold the conversation's beginning (it was edited, it is another conversation, another window)
everything is rendered as it is.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deltamem_vllm.errors import SessionError
from deltamem_vllm.messages import role
from deltamem_vllm.sessions.chain import Cut

HISTORY_HEADER = "X-DeltaMem-History"
KEEP = 2
MAX_KEEP = 1000

_FORM = re.compile(r"(full|elide)(?:\s*;\s*keep=(\d{1,4}))?")


@dataclass(frozen=True, slots=True)
class Policy:
    """What to do with a resent history.

    Attributes:
        elide: leave out what the memory holds.
        keep: of the messages that it holds, how many of the last are sent along as context; None: as many as the
            server's policy says.
    """

    elide: bool = False
    keep: int | None = KEEP


def requested(text: str) -> Policy:
    """The policy of `HISTORY_HEADER`: ``full``, ``elide`` or ``elide; keep=4``.

    Raises:
        SessionError: 400.
    """
    found = _FORM.fullmatch(text.strip().lower())
    if found is None or (found[2] is not None and int(found[2]) > MAX_KEEP):
        raise SessionError(
            f"invalid {HISTORY_HEADER} {text[:64]!r}: use full, elide, or elide; keep=N with N up to {MAX_KEEP}",
            status=400,
            parameter=HISTORY_HEADER,
        )
    return Policy(found[1] == "elide", int(found[2]) if found[2] is not None else None)


@dataclass(frozen=True, slots=True)
class Elided:
    """A conversation with its written beginning left out.

    Attributes:
        messages: what is rendered.
        context: for each of them, whether it is only context: in the memory already.
        dropped: how many messages were left out.
        cut: where; None: nowhere.
    """

    messages: list[Any]
    context: list[bool]
    dropped: int
    cut: Cut | None


def elide(messages: Sequence[Any], cut: Cut | None, keep: int) -> Elided:
    """Leave out what lies before the cut: all but leading system messages and the last ``keep`` messages.

    The context begins with a user's message where it can, because many chat templates ask for that.
    """
    if cut is None:
        return Elided(list(messages), [False] * len(messages), 0, None)
    system = 0
    while system < cut.messages and role(messages[system]) in ("system", "developer"):
        system += 1
    start = max(cut.messages - keep, system)
    while start < cut.messages and role(messages[start]) != "user":
        start += 1
    kept = [*messages[:system], *messages[start:]]
    written = system + cut.messages - start
    return Elided(kept, [index < written for index in range(len(kept))], start - system, cut)
