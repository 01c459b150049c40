"""Which session a chat-like request names, known before its conversation is rendered.

vLLM tells the engine call which session a request belongs to, but only after rendering. What goes into the prompt
depends on the session, so it is found here in vLLM's own order, and checked again at the engine call.
"""

import contextvars
from collections.abc import Mapping
from typing import Any

from deltamem_vllm.errors import SessionError
from deltamem_vllm.server.scope import check_id, current
from deltamem_vllm.store.protocol import SessionKey

named: contextvars.ContextVar[SessionKey | None] = contextvars.ContextVar("deltamem_named", default=None)
"""The session of the request that is being rendered."""


def noting_session(preprocess_chat: Any) -> Any:
    """``OnlineRenderer.preprocess_chat``, with `named` set to the session of its request while it renders."""

    async def with_session(request: Any, *args: Any, **kwargs: Any) -> Any:
        token = named.set(session_named(request))
        try:
            return await preprocess_chat(request, *args, **kwargs)
        finally:
            named.reset(token)

    return with_session


def session_named(request: Any) -> SessionKey | None:
    """The session of one of vLLM's requests, in vLLM's order: body, header, ``vllm_xargs``. None: none, or an id that
    is refused before the request reaches the engine."""
    scope = current.get()
    if scope is None or scope.tenant is None:
        return None
    extra = getattr(request, "vllm_xargs", None)
    candidates = (
        getattr(request, "session_id", None),
        scope.header_id,
        extra.get("session_id") if isinstance(extra, Mapping) else None,
    )
    found = next((name for name in candidates if name), None)
    if isinstance(found, str):
        scope.ids.add(found)
    try:
        return SessionKey(scope.tenant.name, check_id(found, "session_id")) if found else None
    except SessionError:
        return None
