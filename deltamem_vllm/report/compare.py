"""Letting arms take turns, so that all of them see the same machine, and what is made of the seconds.

A figure is the median over rounds of an arm's ratio to another arm in the same round: what disturbs the machine for
longer than a turn disturbs both.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence

from deltamem_vllm.report.arm import Arm, Timing

Took = dict[str, list[Timing]]
"""By arm, one timing per round."""
Figure = Callable[[Timing], float]
"""Seconds made of a timing."""


def first(timing: Timing) -> float:
    """Seconds to the first token (TTFT) of the batch's last request."""
    return timing.first


def per_token(timing: Timing) -> float:
    """Seconds between two tokens (TPOT), median."""
    return statistics.median(timing.gaps)


def take_turns(arms: Mapping[str, Arm], batch: int, length: int, tokens: int, vocabulary: int, rounds: int) -> Took:
    """Have every arm run a batch of prompts once per round, in an order that rotates; a first round only warms up.

    Args:
        length: tokens of each prompt; random ones, others in each round, so that no cache helps.
        tokens: to generate for each.
    """
    took: Took = {name: [] for name in arms}
    for number in range(rounds + 1):
        dice = random.Random(number)
        prompts = [[dice.randrange(3, vocabulary) for _ in range(length)] for _ in range(batch)]
        names = list(arms)
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            timing = arms[name].time(prompts, tokens)
            if number:
                took[name].append(timing)
    return took


def ratio(took: Took, figure: Figure, arm: str, to: str) -> float:
    """Median over rounds of one arm's seconds divided by another's."""
    return statistics.median(figure(a) / figure(b) for a, b in zip(took[arm], took[to], strict=True))


def milliseconds(timings: Sequence[Timing], figure: Figure) -> float:
    """Median, in milliseconds."""
    return statistics.median(map(figure, timings)) * 1e3
