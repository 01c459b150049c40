"""What one HTTP request says about memory, and what came of it; carried from the middleware to the engine call."""

import contextvars
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from deltamem_vllm.errors import SessionError
from deltamem_vllm.policy import Policy, parse_policy
from deltamem_vllm.server import elision
from deltamem_vllm.server.tenants import EVERYBODY, Tenant

Mode = Literal["readwrite", "read", "off"]
MODES = ("readwrite", "read", "off")
MODE_HEADER = "X-DeltaMem-Mode"
VERSION_HEADER = "X-Session-Version"
COMMIT_HEADER = "X-DeltaMem-Commit"
ELIDED_HEADER = "X-DeltaMem-Elided-Tokens"

_TAG = re.compile(r'"([0-9]{1,15})"')
_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


@dataclass
class Scope:
    """One HTTP request.

    Attributes:
        tenant: whose it is; None for a stranger, who came by a path that is served without a key, and has no sessions.
        mode: from the mode header; readwrite unless it says otherwise.
        writes: roles that are written, from the write header; None: the server's policy.
        history: from the history header; None: the server's policy.
        if_match: versions of which the session must have one, from ``If-Match``; empty: whichever it has.
        header_id: the session id of its header, if any.
        ids: every session id it is known to name so far.
        elided_messages, elided_tokens: what of a resent history was left out.
        reserved: ids that no session can have, because the server has something else at their paths.
        admitted: its first engine request was let through.
        engine_calls: how many engine requests it has made with a session it may write.
        outcome: what the session service said of its ticket.
        failure: an error of ours that the response must become, headers and status included.
    """

    tenant: Tenant | None = EVERYBODY
    mode: Mode = "readwrite"
    writes: Policy | None = None
    history: elision.Policy | None = None
    if_match: list[int] | None = None
    header_id: str | None = None
    elided_messages: int = 0
    elided_tokens: int = 0
    ids: set[str] = field(default_factory=set)
    reserved: frozenset[str] = frozenset()
    admitted: bool = False
    engine_calls: int = 0
    outcome: dict[str, Any] = field(default_factory=dict)
    failure: BaseException | None = None

    def policy(self, session: str | None, server: Policy) -> Policy:
        """Roles whose messages are written: as the request says, else as the session does, else the server."""
        if self.writes is not None:
            return self.writes
        return server if session is None else parse_policy(session)


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
    scope = current.get()
    if scope is not None and value in scope.reserved:
        raise SessionError(
            f"no session can be called {value!r} on this server, which has a page at its path: use another id",
            status=400,
            parameter=parameter,
        )
    return value


def parse_match(value: str | None) -> list[int] | None:
    """The value of ``If-Match``: versions, or an empty list for ``*``.

    Raises:
        SessionError: 400; it is neither.
    """
    if value is None:
        return None
    if value.strip() == "*":
        return []
    tags = [_TAG.fullmatch(each.strip()) for each in value.split(",")]
    if any(tag is None for tag in tags):
        raise SessionError(
            f'invalid If-Match {value[:64]!r}: use a session\'s ETag, as in "7", or *', status=400, parameter="If-Match"
        )
    return [int(tag[1]) for tag in tags if tag is not None]


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
