"""What memories take, from an adapter's shape alone: ``deltamem size``, and the table of docs/operations.md.

Records are made and encoded, not estimated. What vLLM makes of pages (it may pad them) is measured by ``deltamem
report``.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from deltamem_vllm.errors import AdapterError
from deltamem_vllm.ops.layout import SMALLEST_KERNEL_BLOCK, MemoryShape
from deltamem_vllm.sessions.directory import SESSION_BYTES, size_of
from deltamem_vllm.sessions.windows import DIGEST_BYTES, MAX_BOUNDARIES, Boundary, Window, pack
from deltamem_vllm.store.codec import encode
from deltamem_vllm.store.protocol import Record, SessionKey

FLOAT = 4  # bytes
TURNS = (1, MAX_BOUNDARIES // 2)
"""Turns of a window, each of which has two boundaries: the smallest record, and the largest without pinned facts."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Bytes.

    Attributes:
        state: one session's memory, which is one slot of the device's pool: every wrapped layer's matrices in fp32.
        page_per_token: what pages take beside each token of the KV cache, over all wrapped layers.
        record: one version in the store, after (one turn, as many turns as a window keeps), without pinned facts.
        host: what `--deltamem-host-bytes` counts for a session, after the same turns.
    """

    state: int
    page_per_token: int
    record: tuple[int, int]
    host: tuple[int, int]


def sizes(shape: MemoryShape, layers: int) -> Sizes:
    """What one session takes with an adapter on so many layers."""
    state = layers * shape.state_floats * FLOAT
    records = [_record(shape, layers, turns) for turns in TURNS]
    return Sizes(
        state=state,
        page_per_token=layers * shape.floats_per_token(SMALLEST_KERNEL_BLOCK) * FLOAT,
        record=(len(encode(records[0])), len(encode(records[1]))),
        host=(SESSION_BYTES + size_of(records[0]), SESSION_BYTES + size_of(records[1])),
    )


def _record(shape: MemoryShape, layers: int, turns: int) -> Record:
    """A record with names as long as real ones."""
    state = np.zeros((layers, shape.heads, shape.rank, shape.rank), dtype=np.float32)
    window = Window(tuple(Boundary(count, bytes(DIGEST_BYTES)) for count in range(1, 2 * turns + 1)))
    return Record(
        key=SessionKey("tenant", "0" * 36),
        version=1,
        incarnation="0" * 32,
        request_id="0" * 48,
        adapter="0" * 64,
        model="0" * 64,
        layout=f"L{layers}H{shape.heads}r{shape.rank}",
        base=state,
        end=state,
        window=pack(window),
        created_at=1_700_000_000.25,
        updated_at=1_700_000_000.25,
        tokens=100 * turns,
        windows=1,
    )


def size(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Adapter folder, with delta_mem_config.json.")],
    sessions: Annotated[int, typer.Option(min=1, help="Sessions that the store is to hold.")] = 100_000,
    hot: Annotated[int, typer.Option(min=1, help="Sessions that host memory is to hold.")] = 10_000,
    slots: Annotated[int, typer.Option(min=1, help="As --deltamem-session-slots.")] = 1024,
    keep: Annotated[int, typer.Option(min=1, help="Versions kept of each session, as keep= of the store.")] = 4,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of KV cache to reckon pages for.")] = 100_000,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output: the sizes of one session.")] = False,
) -> None:
    """Say what memories of an adapter take: on the device, in host memory, in the store."""
    from deltamem_vllm.adapter.weights import load_adapter

    try:
        adapter = load_adapter(folder)
    except AdapterError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    found = sizes(adapter.shape, len(adapter.layers))
    if as_json:
        typer.echo(json.dumps(asdict(found)))
        return
    least, most = found.record
    for name, value in {
        "memory of one session": readable(found.state),
        f"pool of {slots:,} slots on the device": readable(slots * found.state),
        f"pages beside {tokens:,} tokens of KV cache": readable(tokens * found.page_per_token),
        "record of one session": f"{readable(least)} (one turn) to {readable(most)} ({TURNS[1]} turns in a window)",
        f"--deltamem-host-bytes for {hot:,} sessions": f"{readable(hot * found.host[0])} to "
        f"{readable(hot * found.host[1])}",
        f"store of {sessions:,} sessions, keep={keep}": f"{readable(sessions * keep * least)} to "
        f"{readable(sessions * keep * most)}, and what the database adds",
    }.items():
        typer.echo(f"{name:<44} {value}")


def readable(count: int) -> str:
    """Bytes for people: three digits, and the unit."""
    value, unit = float(count), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1000:
            break
        value, unit = value / 1024, larger
    return f"{count:,} bytes" if unit == "bytes" else f"{value:.3g} {unit}"
