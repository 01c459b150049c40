"""Letting arms take turns, so that all of them see the same machine, and what is made of the seconds.

Arms change after every step of their engines. A figure is the median of an arm's ratios to another arm in the same step
of the same round: what disturbs the machine for longer than a step disturbs both.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence

from deltamem_vllm.report.arm import Arm, Timing

Took = dict[str, list[Timing]]
"""By arm, one timing per round."""
Figure = Callable[[Timing], Sequence[float]]
"""What of a timing is compared: seconds, each with another arm's at the same place."""


def first(timing: Timing) -> list[float]:
    """Seconds to the first token (TTFT) of the batch's last request."""
    return [timing.first]


def per_token(timing: Timing) -> list[float]:
    """Seconds of each further token (TPOT)."""
    return timing.gaps


def take_turns(
    arms: Mapping[str, Arm],
    batch: int,
    length: int,
    tokens: int,
    vocabulary: int,
    rounds: int,
    before: Callable[[int], object] = lambda number: None,
) -> Took:
    """Have every arm run a batch of prompts once per round, one step after the other's, in an order that changes with
    every step; a first round only warms up.

    Args:
        length: tokens of each prompt; random ones, others in each round, so that no cache helps.
        tokens: to generate for each.
        before: called before each round, with its number; 0 is the one that warms up.
    """
    took: Took = {name: [] for name in arms}
    for number in range(rounds + 1):
        before(number)
        dice = random.Random(number)
        prompts = [[dice.randrange(3, vocabulary) for _ in range(length)] for _ in range(batch)]
        for name in dice.sample(list(arms), len(arms)):
            arms[name].begin(prompts, tokens)
        going = list(arms)
        while going:
            going = [name for name in dice.sample(going, len(going)) if arms[name].step()]
        for name in arms:
            timing = arms[name].end()
            if number:
                took[name].append(timing)
    return took


def ratio(took: Took, figure: Figure, arm: str, to: str) -> float:
    """Median of one arm's seconds divided by another's."""
    rounds = zip(took[arm], took[to], strict=True)
    return statistics.median(x / y for a, b in rounds for x, y in zip(figure(a), figure(b), strict=True))


def milliseconds(timings: Sequence[Timing], figure: Figure) -> float:
    """Median, in milliseconds."""
    return statistics.median(seconds for timing in timings for seconds in figure(timing)) * 1e3
