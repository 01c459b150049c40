"""What is asked inside a worker's process."""

from __future__ import annotations

from typing import Any


def compiled_graphs(worker: Any) -> int:
    """Graphs that torch.compile has traced."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])
