"""A picture of both arms: time to the first token by pattern, and how the times of all requests are distributed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import numpy as np
from matplotlib import pyplot as plt

from loadtests.slo.replay import Answer
from loadtests.slo.summary import ALL, Rows

TITLES = {
    "ttft": "time to the first token",
    "tpot": "time per further token",
    "commit": "what the end waits until the turn is durable",
}


def draw(rounds: Mapping[str, Sequence[Sequence[Answer]]], rows: Rows, path: Path, caption: str) -> None:
    """Write a PNG."""
    figure, axes = plt.subplots(1, 1 + len(TITLES), figsize=(20, 4.5), layout="constrained")
    patterns = [each for each in dict.fromkeys(row["pattern"] for row in rows) if each != ALL]
    for number, arm in enumerate(rounds):
        of_arm = {row["pattern"]: row for row in rows if row["arm"] == arm and row["ttft p50"] is not None}
        shown = [pattern for pattern in patterns if pattern in of_arm]
        places = [patterns.index(pattern) + 0.4 * number for pattern in shown]
        colour = f"C{number}"
        axes[0].bar(places, [of_arm[pattern]["ttft p50"] for pattern in shown], 0.4, color=colour, label=arm)
        ends = [of_arm[pattern]["ttft p99"] for pattern in shown]
        axes[0].scatter(places, ends, marker="_", color=colour)
        for axis, name in zip(axes[1:], TITLES, strict=True):
            taken = sorted(1e3 * v for each in rounds[arm] for a in each if (v := getattr(a, name)) is not None)
            if taken:
                axis.plot(taken, np.arange(1, len(taken) + 1) / len(taken), color=colour, label=arm)
    axes[0].set_xticks([index + 0.2 for index in range(len(patterns))], patterns, fontsize=7, rotation=30)
    axes[0].set(title="time to the first token: p50, and p99 as a mark", ylabel="ms", yscale="log")
    for axis, title in zip(axes[1:], TITLES.values(), strict=True):
        axis.set(title=title, xlabel="ms", ylabel="share of answers", xscale="log", ylim=(0, 1))
    for axis in axes:
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    figure.suptitle(caption, fontsize=9)
    figure.savefig(path, dpi=100)
    plt.close(figure)
