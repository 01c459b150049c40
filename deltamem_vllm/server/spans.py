"""What vLLM's OpenTelemetry span of a request says of its session; never which session it is.

vLLM sends the span of a request when the engine has finished it. What became of the session is known a moment later,
so the span waits for that, with the times that it had.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any

from deltamem_vllm.server.scope import Scope

logger = logging.getLogger("vllm.deltamem")

Emit = Callable[[dict[str, Any]], None]
"""Sends a span, with these attributes beside its own."""


class RequestSpans:
    """Spans of requests of sessions, on their way."""

    def __init__(self) -> None:
        self._held: dict[str, list[Emit]] = {}

    def expect(self, request: str) -> None:
        """A request of a session begins: its spans are to wait for `finish`."""
        self._held[request] = []

    def hold(self, request: Any, emit: Emit) -> bool:
        """A span of a request is complete; whether it is to wait."""
        held = self._held.get(request)
        if held is None:
            return False
        held.append(emit)
        return True

    def finish(self, request: str, attributes: dict[str, Any]) -> None:
        """A request has ended, however it did: send what waits."""
        for emit in self._held.pop(request, ()):
            try:
                emit(attributes)
            except Exception:
                logger.exception("the span of a request could not be sent")


def attributes_of(scope: Scope, grant: Mapping[str, Any]) -> dict[str, Any]:
    """What is told of a request of a session.

    Args:
        grant: the session service's; empty where the request was not admitted.
    """
    found = {
        "deltamem.session": True,
        "deltamem.mode": scope.mode,
        "deltamem.window": grant.get("window"),
        "deltamem.tokens.matched": grant.get("matched"),
        "deltamem.tokens.elided": scope.elided_tokens,
        "deltamem.session.version": scope.outcome.get("version"),
        "deltamem.commit": scope.outcome.get("status"),
    }
    return {name: value for name, value in found.items() if value is not None}
