"""What one HTTP request says about memory, and what came of it; carried from the middleware to the engine call."""

import contextvars
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from deltamem_vllm.errors import SessionError

Mode = Literal["readwrite", "read", "off"]
MODES = ("readwrite", "read", "off")
MODE_HEADER = "X-DeltaMem-Mode"
VERSION_HEADER = "X-Session-Version"
COMMIT_HEADER = "X-DeltaMem-Commit"
TENANT = "default"
"""Until tenants come from API keys, there is one."""

_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


@dataclass
class Scope:
    """One HTTP request.

    Attributes:
        mode: from the mode header; readwrite unless it says otherwise.
        header_id: the session id of its header, if any.
        writes: roles that are written, from the write header; None: the server's policy.
        stranger: it came without the API key that the server asks for, by a path that vLLM does not guard.
        engine_calls: how many engine requests it has made with a session it may write.
        outcome: what the session service said of its ticket.
        failure: an error of ours that the response must become, headers and status included.
    """

    mode: Mode = "readwrite"
    header_id: str | None = None
    writes: frozenset[str] | None = None
    stranger: bool = False
    engine_calls: int = 0
    outcome: dict[str, Any] = field(default_factory=dict)
    failure: BaseException | None = None


current: contextvars.ContextVar[Scope | None] = contextvars.ContextVar("deltamem_scope", default=None)


def check_id(value: Any, parameter: str) -> str:
    """A session id, wherever it came from.

    Raises:
        SessionError: 400; names what is allowed.
    """
    if not isinstance(value, str) or not _ID.fullmatch(value):
        shown = value[:64] if isinstance(value, str) else value
        raise SessionError(
            f"invalid session id {shown!r}: use 1 to 128 of A-Z a-z 0-9 . _ : -", status=400, parameter=parameter
        )
    return value


def check_mode(value: str) -> Mode:
    """The value of the mode header.

    Raises:
        SessionError: 400; names the modes.
    """
    mode = value.strip().lower()
    if mode not in MODES:
        raise SessionError(
            f"invalid {MODE_HEADER} {value[:64]!r}: use one of {', '.join(MODES)}", status=400, parameter=MODE_HEADER
        )
    return mode  # type: ignore[return-value]
