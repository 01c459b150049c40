"""A session's memory as numbers, for people who want to look at it. Changes nothing."""

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from deltamem_vllm.store.protocol import SessionKey

if TYPE_CHECKING:
    from deltamem_vllm.sessions.service import SessionService

MAX_VALUES = 16_384
"""Values in one answer, beyond the first layer of it: about 200 kB of JSON."""


async def state(
    service: "SessionService", key: SessionKey, version: int | None = None, values: bool = True, first: int = 0
) -> dict[str, Any] | None:
    """The memory of a session's latest version, or of a kept one; None without a session.

    Args:
        values: also the values of the layers from ``first`` on, as many layers as an answer may have.

    Returns:
        shape: (layers, heads, rank); norm: of all layers together; first, values: a layer's number, and fp32 bytes
        [layers, heads, rank, rank] from it on, S[value, key]; layers: norm, largest absolute entry, and the norm of
        what the present window has changed, of each layer.

    Raises:
        SessionError: 404; the version is not kept.
    """
    if values:
        service.commits.check_audit()
    record = await service.records.latest(service.directory.get(key))
    if record is None:
        return None
    if version is not None:
        record = await service.records.kept(record, version)
    end = record.end
    layers, heads, rank, _ = end.shape
    fit = max(1, MAX_VALUES // (heads * rank * rank)) if values else 0
    part = end[first : first + fit]
    if values:
        await service.commits.note("inspect", key, record.version)
    flat, change = end.reshape(layers, -1), (end - record.base).reshape(layers, -1)
    return {
        "version": record.version,
        "updated_at": record.updated_at,
        "tokens": record.tokens,
        "shape": (layers, heads, rank),
        "norm": float(np.linalg.norm(end)),
        "layers": [
            {"layer": i, "norm": float(norm), "max": float(largest), "change": float(changed)}
            for i, (norm, largest, changed) in enumerate(
                zip(
                    np.linalg.norm(flat, axis=1),
                    np.abs(flat).max(axis=1),
                    np.linalg.norm(change, axis=1),
                    strict=True,
                )
            )
        ],
        "first": first,
        "values": part.tobytes(),
    }


QUESTIONS: dict[str, Callable[..., Awaitable[Any]]] = {"state": state}
