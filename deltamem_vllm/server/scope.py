"""What one HTTP request says about memory, and what came of it; carried from the middleware to the engine call."""

import contextvars
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from deltamem_vllm.errors import SessionError
from deltamem_vllm.server.tenants import EVERYBODY, Tenant

Mode = Literal["readwrite", "read", "off"]
MODES = ("readwrite", "read", "off")
MODE_HEADER = "X-DeltaMem-Mode"
VERSION_HEADER = "X-Session-Version"
COMMIT_HEADER = "X-DeltaMem-Commit"

_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


@dataclass
class Scope:
    """One HTTP request.

    Attributes:
        tenant: whose it is; None for a stranger, who came by a path that is served without a key, and has no sessions.
        mode: from the mode header; readwrite unless it says otherwise.
        writes: roles that are written, from the write header; None: the server's policy.
        header_id: the session id of its header, if any.
        ids: every session id it is known to name so far.
        admitted: its first engine request was let through.
        engine_calls: how many engine requests it has made with a session it may write.
        outcome: what the session service said of its ticket.
        failure: an error of ours that the response must become, headers and status included.
    """

    tenant: Tenant | None = EVERYBODY
    mode: Mode = "readwrite"
    writes: frozenset[str] | None = None
    header_id: str | None = None
    ids: set[str] = field(default_factory=set)
    admitted: bool = False
    engine_calls: int = 0
    outcome: dict[str, Any] = field(default_factory=dict)
    failure: BaseException | None = None


current: contextvars.ContextVar[Scope | None] = contextvars.ContextVar("deltamem_scope", default=None)


def tenant_of_request() -> Tenant:
    """Whose request is being served.

    Raises:
        SessionError: 401; a stranger's.
    """
    scope = current.get()
    if scope is None or scope.tenant is None:
        raise no_key("a session needs the API key")
    return scope.tenant


def no_key(what: str) -> SessionError:
    """What a stranger is told."""
    return SessionError(f"{what}: send Authorization: Bearer KEY", status=401)


def check_id(value: Any, parameter: str) -> str:
    """A session id, wherever it came from.

    Raises:
        SessionError: 400; names what is allowed.
    """
    if not isinstance(value, str) or not _ID.fullmatch(value):
        shown = repr(value[:64]) if isinstance(value, str) else repr(value)[:64]
        raise SessionError(
            f"invalid session id {shown}: use 1 to 128 of A-Z a-z 0-9 . _ : -", status=400, parameter=parameter
        )
    return value


def effective_id(resolved: str | None, header: str | None, extra: Any) -> str | None:
    """The one session that a request names, or None where it names none.

    Args:
        resolved: what vLLM made of the request: the body's id before the header's before that in ``vllm_xargs``.
        header: the header's.
        extra: ``session_id`` of ``vllm_xargs``, whatever it is; empty means none, as to vLLM.

    Raises:
        SessionError: 400; an id is not valid, or the request names different ones.
    """
    named = {"the session header": header, "vllm_xargs.session_id": extra}
    named = {where: check_id(each, "session_id") for where, each in named.items() if each not in (None, "")}
    if resolved and check_id(resolved, "session_id") not in named.values():
        named["session_id in the body"] = resolved
    if len(set(named.values())) > 1:
        said = ", ".join(f"{where} says {each!r}" for where, each in named.items())
        raise SessionError(
            f"the request names different sessions: {said}: send one id", status=400, parameter="session_id"
        )
    return resolved or None


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
