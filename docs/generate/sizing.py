"""The sizing table: what `deltamem size` reckons, for a few shapes."""

from deltamem_vllm.ops.layout import MemoryShape
from deltamem_vllm.sizing import readable, sizes

SHAPES = {
    "the bundled model: 4 layers, rank 8": (4, 8, 1),
    "36 layers, rank 8 (Qwen3-4B has so many)": (36, 8, 1),
    "36 layers, 4 heads of rank 8": (36, 8, 4),
    "64 layers, rank 16": (64, 16, 1),
}
"""(layers, rank, state heads) by name; gates as adapters have them by default."""


def sizes_of_adapters() -> str:
    """One row per shape."""
    rows = [
        "| adapter | memory of one session | pool of 1,024 slots | pages per 1,000 tokens of KV cache | "
        "record in the store | 100,000 sessions stored, `keep=4` | 10,000 sessions in host memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, (layers, rank, heads) in SHAPES.items():
        found = sizes(
            MemoryShape(
                rank=rank,
                heads=heads,
                rankwise_gates=True,
                couple_lambda=True,
                update_mode="standard",
                normalize_qk=True,
            ),
            layers,
        )
        cells = [
            readable(found.state),
            readable(1024 * found.state),
            readable(1000 * found.page_per_token),
            _span(found.record),
            _span((400_000 * found.record[0], 400_000 * found.record[1])),
            _span((10_000 * found.host[0], 10_000 * found.host[1])),
        ]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _span(of: tuple[int, int]) -> str:
    return f"{readable(of[0])} to {readable(of[1])}"
