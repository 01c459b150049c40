"""Records for tests: deterministic from a few numbers, so that another process can make the same bytes."""

from typing import Any

import numpy as np
from msgspec import structs

from deltamem_vllm.store.protocol import Record, SessionKey

INCARNATION = "00112233445566778899aabbccddeeff"
KEY = SessionKey("tenant", "session")


def record(version: int = 1, key: SessionKey = KEY, *, seed: int = 0, layout: str = "L3H1r8", **fields: Any) -> Record:
    """Version ``version`` of a session; ``seed`` tells writers apart."""
    layers, heads, rank = (int(part) for part in layout.replace("L", "").replace("H", " ").replace("r", " ").split())
    rng = np.random.default_rng([version, seed])  # what is drawn, and in which order, is fixed by the golden files
    base, end = rng.standard_normal((2, layers, heads, rank, rank), dtype=np.float32)
    made = Record(
        key=key,
        version=version,
        incarnation=INCARNATION,
        request_id=f"request-{seed}-{version}",
        adapter="adapter-fingerprint",
        model="model-fingerprint",
        layout=layout,
        base=base,
        end=end,
        window=bytes(rng.integers(0, 256, 44, dtype=np.uint8)),
        created_at=1_700_000_000.25,
        updated_at=1_700_000_000.25 + version,
        tokens=10 * version,
        windows=1,
        attributes=bytes(rng.integers(0, 256, 21, dtype=np.uint8)),
    )
    return structs.replace(made, **fields)
