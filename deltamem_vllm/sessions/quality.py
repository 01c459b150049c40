"""What the memory does, found out from committed states after their requests: nothing here runs in a model's step.

Two figures are not known in the engine process and come from workers, see `SampleOfMemory`: how large a layer's own
attention output is, once, and gates, of one commit in `SAMPLED`.
"""

import logging
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from deltamem_vllm import metrics
from deltamem_vllm.sessions.meters import Meters, Sample, gauge

if TYPE_CHECKING:  # a session service needs no torch
    from deltamem_vllm.adapter.weights import Adapter

logger = logging.getLogger("vllm.deltamem")

SAMPLED = 16
"""Of so many commits a worker looks at the gates of one."""
WEIGHT = 1 / 16
"""Of a new value in a moving average."""
RECENT = 16
"""Commits that must all have been inert for the memory to be called so."""

Gates = tuple[float, float | None]
"""Means of β and of λ; None where the adapter has no λ of its own."""


@dataclass
class SampleOfMemory:
    """What workers have seen, by position of the layer in a session state.

    Attributes:
        outputs: root mean square of |o|, the layer's attention output without a correction: see
            `deltamem_vllm.memory.outputs`.
        gates: of one committed request's newest block.
    """

    outputs: dict[int, float] = field(default_factory=dict)
    gates: dict[int, Gates] = field(default_factory=dict)

    def update(self, other: "SampleOfMemory") -> None:
        """Add what another pipeline stage has seen."""
        self.outputs.update(other.outputs)
        self.gates.update(other.gates)


@dataclass(frozen=True)
class Corrections:
    """How large δo is for a given state, on average over queries of norm 1 in every direction.

    Attributes:
        gram: [L, H, r, r], per state head (s·g·B_o)ᵀ(s·g·B_o) of its columns.
        width: D, length of δo.
        norms: per layer (mean square of the norm's weight, its epsilon) where δo is normalised; else empty. δo is taken
            to be as large where the weight is large as where it is small.
    """

    gram: NDArray[np.float32]
    width: int
    norms: tuple[tuple[float, float], ...] = ()

    def of(self, state: NDArray[np.float32]) -> NDArray[np.float32]:
        """Root mean square of |δo| per layer, [L]; ``state [L, H, r, r]``."""
        square = self._square(state)
        for layer, (weight, epsilon) in enumerate(self.norms):
            mean = square[layer] / self.width
            square[layer] = weight * self.width * mean / (mean + epsilon)
        return np.sqrt(square)

    def _square(self, state: NDArray[np.float32]) -> NDArray[np.float32]:
        # E |B S q|² = tr(BᵀB · S Sᵀ) / r for q uniform on the unit sphere; heads' queries are independent.
        outer = state @ state.swapaxes(2, 3)
        found: NDArray[np.float32] = (self.gram * outer).sum(axis=(1, 2, 3)) / state.shape[-1]
        return found


class Quality:
    """The figures of one engine; for the session service's event loop only.

    Args:
        meters: counts.
        layers: the model's number of each layer of a state, as labels.
        corrections: None where the adapter does not correct the attention output: then there is no ratio.
    """

    def __init__(self, meters: Meters, layers: Sequence[int], corrections: Corrections | None) -> None:
        self._meters, self._labels, self._corrections = meters, [str(layer) for layer in layers], corrections
        self._outputs: dict[int, float] = {}
        self._averages: dict[metrics.Metric, NDArray[np.float32]] = {}  # by layer
        self._gates: dict[tuple[str, str], float] = {}
        self._recent: deque[bool] = deque(maxlen=RECENT)
        self._broken = False

    def note_sample(self, sample: SampleOfMemory) -> None:
        """What workers have seen."""
        self._outputs.update(sample.outputs)
        for position, (beta, keep) in sample.gates.items():
            for gate, value in (("beta", beta), ("lambda", keep)):
                if value is not None:
                    name = gate, self._labels[position]
                    known = self._gates.setdefault(name, value)
                    self._gates[name] = known + WEIGHT * (value - known)

    def note_commit(self, state: NDArray[np.float32]) -> None:
        """A session has this state now, [L, H, r, r]. Never raises."""
        try:
            self._note_commit(state)
        except Exception:
            if not self._broken:
                logger.exception("what the memory does is not measured any more; sessions are not affected")
            self._broken = True

    def _note_commit(self, state: NDArray[np.float32]) -> None:
        if len(state) != len(self._labels):
            raise ValueError(f"a state of {len(state)} layers, not {len(self._labels)}")
        squares = np.square(state).sum(axis=(2, 3)).mean(axis=1)
        self._meters.observe(metrics.STATE_NORM, math.sqrt(squares.mean()))
        self._average(metrics.LAYER_STATE_NORM, np.sqrt(squares))
        ratios = self._ratios(state)
        if ratios is None:
            return
        ratio = math.sqrt(float(np.square(ratios).mean()))
        self._meters.observe(metrics.CORRECTION_RATIO, ratio)
        self._average(metrics.LAYER_CORRECTION_RATIO, ratios)
        inert = ratio < metrics.INERT_RATIO
        self._recent.append(inert)
        self._meters.add(metrics.MEMORY_COMMITS, "inert" if inert else "live")

    def _ratios(self, state: NDArray[np.float32]) -> NDArray[np.float32] | None:
        if self._corrections is None or len(self._outputs) < len(self._labels):
            return None
        outputs = np.array([self._outputs[position] for position in range(len(self._labels))], np.float32)
        ratios: NDArray[np.float32] = self._corrections.of(state) / np.maximum(outputs, np.float32(1e-12))
        return ratios

    def samples(self) -> list[Sample]:
        """Averages as they are now."""
        found = [gauge(metrics.GATE_MEAN, value, *labels) for labels, value in self._gates.items()]
        for metric, values in self._averages.items():
            found += [gauge(metric, value, label) for label, value in zip(self._labels, values.tolist(), strict=True)]
        inert = len(self._recent) == RECENT and all(self._recent)
        return [*found, gauge(metrics.INERT, inert)]

    def _average(self, metric: metrics.Metric, values: NDArray[np.float32]) -> None:
        known = self._averages.setdefault(metric, values)
        self._averages[metric] = known + np.float32(WEIGHT) * (values - known)


def corrections_of(adapter: "Adapter") -> Corrections | None:
    """An adapter's; None where it does not correct the attention output."""
    grams, norms, width = [], [], 0
    for _, layer in sorted(adapter.layers.items()):
        if "o" not in layer.delta:
            return None
        matrix = layer.delta["o"].float().numpy() * (adapter.config.scaling * layer.scale.get("o", 1.0))
        width = len(matrix)
        columns = matrix.reshape(width, adapter.shape.heads, adapter.shape.rank)
        grams.append(np.einsum("dhi,dhj->hij", columns, columns))
        if layer.o_norm_weight is not None:
            norms.append((float(layer.o_norm_weight.float().square().mean()), layer.o_norm_eps))
    return Corrections(np.stack(grams), width, tuple(norms))
