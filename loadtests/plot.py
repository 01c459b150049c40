"""One picture of a run: what the memory adds to a token, the operators, and time to the first token by history."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

Results = Mapping[str, list[dict[str, Any]]]


def draw(results: Results, path: Path, caption: str) -> None:
    """Write a PNG of the parts that were measured."""
    panels = [(part, panel) for part, panel in PANELS.items() if results.get(part)]
    if not panels:
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(5.5 * len(panels), 4), squeeze=False, layout="constrained")
    for (part, panel), axis in zip(panels, axes[0], strict=True):
        panel(axis, results[part])
    figure.suptitle(caption, fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _overhead(axis: Axes, rows: list[dict[str, Any]]) -> None:
    arms = list(dict.fromkeys(name for row in rows for name in row if name.endswith(" %")))
    width = 0.8 / len(arms)
    for number, arm in enumerate(arms):
        places = [index + number * width for index in range(len(rows))]
        bars = axis.bar(places, [row.get(arm, float("nan")) for row in rows], width, label=arm.removesuffix(" %"))
        axis.bar_label(bars, fmt="%.1f", fontsize=7)
    axis.set_xticks([index + 0.4 - width / 2 for index in range(len(rows))], [row["what"] for row in rows], fontsize=7)
    axis.set(title="added to vLLM alone", ylabel="%")
    axis.legend(fontsize=7)


def _operators(axis: Axes, rows: list[dict[str, Any]]) -> None:
    native = [row for row in rows if row["threads"] == 1 and row["implementation"] == "native"]
    names = [f"r{row['rank']} h{row['heads']}\n{row['isa']}" for row in native]
    scan = [row["scan_ns"] for row in native]
    axis.bar(names, scan, label="scan")
    axis.bar(names, [row["activation_ns"] for row in native], bottom=scan, label="activation")
    axis.set(title="operators, one thread", ylabel="ns per token and layer")
    axis.tick_params(axis="x", labelsize=7)
    axis.legend(fontsize=7)


def _history(axis: Axes, rows: list[dict[str, Any]]) -> None:
    turns = [row["turn"] for row in rows]
    for arm in (name for name in rows[0] if name.endswith(" ms")):
        axis.plot(turns, [row[arm] for row in rows], marker="o", label=arm.removesuffix(" ms"))
    axis.set(title="time to the first token", xlabel="turn of the conversation", ylabel="ms", ylim=(0, None))
    axis.legend(fontsize=7)


def _long_history(axis: Axes, rows: list[dict[str, Any]]) -> None:
    tokens = [row["history"] for row in rows]
    for arm in (name for name in rows[0] if name.endswith(" ms")):
        axis.plot(tokens, [row[arm] for row in rows], marker="o", label=arm.removesuffix(" ms"))
    axis.set_xticks(tokens, [f"{count:,}" for count in tokens])
    axis.set(title="time to the first token of a turn", xlabel="tokens of history", ylabel="ms", yscale="log")
    axis.legend(fontsize=7)


PANELS = {"overhead": _overhead, "operators": _operators, "history": _history, "long history": _long_history}
