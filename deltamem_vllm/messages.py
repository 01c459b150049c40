"""Chat messages, as clients and vLLM's own parsers write them: mappings or objects."""

from collections.abc import Mapping
from typing import Any


def fields(message: Any) -> Mapping[str, Any]:
    """A message's fields by name."""
    return message if isinstance(message, Mapping) else vars(message)


def role(message: Any) -> Any:
    """Who speaks; None where the message does not say."""
    return message.get("role") if isinstance(message, Mapping) else getattr(message, "role", None)
