"""What the memory adds to a token: vLLM alone, with the memory, with LoRA; engines that take turns.

    python -m loadtests.overhead [--starts 3] [--rounds 6] [--batches 1,8] [--prompts 128,2048] [--layers 28]

Qwen3-0.6B's shape with random weights, fp32, on the CPU. Every arm is an engine of its own, as users start it
(compiled; vLLM does not compile with LoRA on a CPU). In each round every arm runs the same batch, and arms change after
every step. Three engines of the whole model take 17 GB beside each other. The arms that differ from vanilla by tens of
percents have 8 of its 28 layers, and as large a share of its vocabulary; so can the others (``--layers 8``): what a
step costs beside its layers then weighs three times as much.

Two engines that are the same differ by percents for as long as their weights lie where they lie. So before each round
all arms give up the places of all of their weights and of their KV caches and take others in large pages
(`deltamem_vllm.report.placement`), each of them first, second and so on in turn. Cores differ, too: in a round all
arms take their steps on the same one, in the next round on the next. That is not all of an engine's memory: all of
them start three times, each arm once in each place of the order, behind a start that is not measured, for which vLLM
compiles. A round's figure is the median of an arm's ratios to vanilla in the same step, a start's the median of its
rounds', and what is told the mean over starts, beside its standard error. Vanilla runs twice: memory is compared with
both of its engines, and what the second one is to the first shows how far the noise goes. Prompts of several steps,
which take long, have half of the rounds; so have the arms that are far apart, which start once.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deltamem_vllm.report.arm import Arm, Setup
from deltamem_vllm.report.compare import Figure, Took, first, milliseconds, per_token, ratio, take_turns
from deltamem_vllm.report.random import QWEN3_0_6B, Size, write_adapter, write_lora, write_model
from loadtests.table import console, shown

VANILLA, MEMORY, AGAIN, LORA, LOOP = "vanilla", "memory", "vanilla again", "lora", "plain torch loop"
CLOSE, FAR = (VANILLA, MEMORY, AGAIN), (VANILLA, MEMORY, LORA, LOOP)
"""Arms that differ by percents, and those that differ by so much that one start tells."""
FEW_LAYERS = 8
"""Of the arms that are far apart."""
SHARE = 2
"""Arms that are far apart, and prompts of several steps, have one round where others have so many."""
STEP = 512
"""Tokens of a prompt that one step takes."""
FEW_STEPS = 4
"""Prompts of one step that a round has: one pause of the machine is then no longer all of it."""
START = "start"
"""Which start of the engines a row is of."""
CONTEXT = 64
"""Tokens of the prompts behind which time per token is measured."""


def setups(folder: Path, size: Size, options: dict[str, Any]) -> dict[str, Setup]:
    """The arms' engines."""
    model = str(write_model(folder / "model", size))
    adapter = str(write_adapter(folder / "adapter", size.backbone))
    lora = str(write_lora(folder / "lora", size.backbone))
    common = {"load_format": "dummy", "skip_tokenizer_init": True, "enable_prefix_caching": False, **options}
    # One thread, and one process for all of an arm: processes that wait for each other in a loop would take the second
    # core from a step's second thread now and then.
    common |= {"distributed_executor_backend": "vllm.v1.executor.uniproc_executor.UniProcExecutor"}
    env = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    # Large pages, so that arms do not differ by where in memory their weights happen to lie.
    env |= {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "THP_MEM_ALLOC_ENABLE": "1"}
    return {
        VANILLA: Setup(model, options=common, env=env),
        MEMORY: Setup(model, adapter, options=common, env=env),
        AGAIN: Setup(model, options=common, env=env),
        LORA: Setup(model, lora=lora, options={**common, "max_lora_rank": 8}, env=env),
        LOOP: Setup(model, adapter, kernel="torch", options=common, env=env),
    }


def measure(
    arms: dict[str, Arm], vocabulary: int, batches: Sequence[int], prompts: Sequence[int], tokens: int, rounds: int
) -> list[dict[str, Any]]:
    """One row per measurement and round, see `row`."""
    orders = taking(list(arms))
    cores = sorted(os.sched_getaffinity(0))

    def rows(
        what: str, figure: Figure, batch: int, length: int, generated: int, rounds: int, times: int = 1
    ) -> list[dict[str, Any]]:
        def move(number: int) -> None:
            if number and (number - 1) % times == 0:  # the round that warms up runs where the weights lie
                for arm in arms.values():
                    arm.move_out()
                at = (number - 1) // times
                for name in orders[at % len(orders)]:
                    arms[name].move_in()
                    arms[name].run_on(cores[at % len(cores)])

        took = take_turns(arms, batch, length, generated, vocabulary, times * rounds, move)
        starts = range(0, times * rounds, times)
        return [row(what, {name: each[at : at + times] for name, each in took.items()}, figure) for at in starts]

    found = []
    for batch in batches:
        found += rows(f"TPOT, B={batch}", per_token, batch, CONTEXT, tokens, rounds)
    for length in prompts:
        many = {"rounds": -(-rounds // SHARE)} if length > STEP else {"rounds": rounds, "times": FEW_STEPS}
        found += rows(f"TTFT, {length} tokens", first, 1, length, 1, **many)
    return found


def row(what: str, took: Took, figure: Figure) -> dict[str, Any]:
    """A measurement as plain values: milliseconds of vanilla, percent that each other arm takes more, LoRA's ratio to
    ours."""
    values: dict[str, Any] = {"what": what, "vanilla ms": milliseconds(took[VANILLA], figure)}
    for arm in (arm for arm in took if arm != VANILLA):
        bases = [base for base in (VANILLA, AGAIN) if base in took and base != arm]
        values[f"{arm} %"] = 100 * (statistics.fmean(ratio(took, figure, arm, base) for base in bases) - 1)
    if LORA in took and MEMORY in took:
        values["lora / memory"] = ratio(took, figure, LORA, MEMORY)
    return values


def turned(arms: Sequence[str], number: int) -> tuple[str, ...]:
    """The order in which arms start for the so many-th time: each comes first once, second once, and so on."""
    at = number % len(arms)
    return (*arms[at:], *arms[:at])


def taking(arms: Sequence[str]) -> list[tuple[str, ...]]:
    """The orders in which arms take memory, round after round: in as many rounds as there are arms each takes first
    once, second once, and so on, and in twice as many each two also follow each other both ways."""
    return [turned(each, number) for each in (arms, arms[::-1]) for number in range(len(arms))]


def mean(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of all rounds as one per measurement: means over starts of the medians of their rounds, so that a round
    that was disturbed does not outweigh the others; the memory's standard error; and the rounds themselves."""
    by_what: dict[str, list[dict[str, Any]]] = {}
    for each in rows:
        by_what.setdefault(each["what"], []).append({name: each[name] for name in each if name != "what"})
    found = []
    for what, rounds in by_what.items():
        figures = {name: _by_start(rounds, name) for name in rounds[0] if name != START}
        means: dict[str, Any] = {name: statistics.fmean(each) for name, each in figures.items()}
        if len(rounds) > 1:
            # Of the rounds only where there is one start: those of one start are of the same engines.
            values = figures[f"{MEMORY} %"]
            values = values if len(values) > 1 else [each[f"{MEMORY} %"] for each in rounds]
            means |= {f"{MEMORY} % ±": statistics.stdev(values) / math.sqrt(len(values)), "rounds": len(rounds)}
        found.append({"what": what, **means, "by round": rounds})
    return found


def _by_start(rounds: Sequence[dict[str, Any]], name: str) -> list[float]:
    """A figure's median over the rounds of each start."""
    starts: dict[int, list[float]] = {}
    for each in rounds:
        starts.setdefault(each.get(START, 0), []).append(each[name])
    return [statistics.median(each) for each in starts.values()]


def run(
    batches: Sequence[int] = (1, 8),
    prompts: Sequence[int] = (128, 2048),
    layers: int = QWEN3_0_6B.layers,
    tokens: int = 12,
    rounds: int = 6,
    starts: int = 3,
    eager: bool = False,
) -> list[dict[str, Any]]:
    """Start the arms and measure; rows as of `mean`, those of the close arms first. What each start says by itself goes
    to standard error as soon as it is known. Time to the first token is not measured of the far ones: they have no goal
    for it, and take minutes."""
    options: dict[str, Any] = {
        "dtype": "float32", "max_model_len": 4096, "max_num_seqs": 16, "max_num_batched_tokens": STEP, "seed": 0,
        "enforce_eager": eager,
    }  # fmt: skip

    def once(
        known: dict[str, Setup], names: Sequence[str], size: Size, lengths: Sequence[int], rounds: int
    ) -> list[dict[str, Any]]:
        with contextlib.ExitStack() as stack:
            arms = {name: stack.enter_context(Arm(name, known[name])) for name in names}
            found = measure(arms, size.vocabulary, batches, lengths, tokens, rounds)
        console(stderr=True).print(f"started in the order {', '.join(names)}:", shown(mean(found)))
        return found

    # The same files for all starts, and one that is not measured: what vLLM has compiled for it all others find.
    with tempfile.TemporaryDirectory() as files:
        size, few = QWEN3_0_6B.share(layers), QWEN3_0_6B.share(min(layers, FEW_LAYERS))
        all_layers, few_layers = (setups(Path(files, f"{each.layers}"), each, options) for each in (size, few))
        for name in (VANILLA, MEMORY):
            Arm(name, all_layers[name]).close()
        close = [
            {START: number + 1, **row}
            for number in range(starts)
            for row in once(all_layers, turned(CLOSE, number), size, prompts, rounds)
        ]
        far = mean(once(few_layers, FAR, few, (), -(-rounds // SHARE))) if batches else []
    return mean(close) + [{**row, "what": f"{row['what']}, beside LoRA"} for row in far]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=6, help="of each start")
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--prompts", default="128,2048")
    parser.add_argument("--layers", type=int, default=QWEN3_0_6B.layers)
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    given = parser.parse_args()
    batches, prompts = ([int(x) for x in text.split(",") if x] for text in (given.batches, given.prompts))
    console().print(shown(run(batches, prompts, given.layers, given.tokens, given.rounds, given.starts, given.eager)))


if __name__ == "__main__":
    main()
