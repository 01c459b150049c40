"""What a memory costs one model: sizes, and times beside the same engine without it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from deltamem_vllm.adapter.weights import Adapter, load_adapter
from deltamem_vllm.report.arm import Arm, Setup, Timing
from deltamem_vllm.report.compare import first, milliseconds, per_token, ratio, take_turns

WITHOUT, WITH = "without memory", "with memory"


def report(
    model: str,
    adapter: Path,
    batches: Sequence[int],
    lengths: Sequence[int],
    tokens: int,
    rounds: int,
    options: Mapping[str, Any],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Start two engines, let them take turns, and gather sizes and times.

    Args:
        model, adapter: folders.
        batches, lengths: requests at once, and tokens of each prompt; every pair is measured.
        tokens: to generate for each request, at least 2.
        options: arguments of ``vllm.LLM``.
        say: told what happens.

    Returns:
        JSON-ready: ``sizes`` (bytes unless said) and ``times`` (one entry per pair).

    Raises:
        AdapterError: the adapter folder is not valid.
        ArmError: an engine did not start, or failed.
    """
    loaded = load_adapter(adapter)
    common = {"enable_prefix_caching": False, **options}
    with contextlib.ExitStack() as stack:
        arms = {}
        for name, setup in (
            (WITHOUT, Setup(model, options=common)),
            (WITH, Setup(model, str(adapter), options=common)),
        ):
            say(f"starting the engine {name}")
            arms[name] = stack.enter_context(Arm(name, setup))
        vocabulary = arms[WITHOUT].facts()["vocabulary"]
        times = []
        for batch in batches:
            for length in lengths:
                say(f"{batch} request(s) of {length} tokens")
                took = take_turns(arms, batch, length, tokens, vocabulary, rounds)
                times.append({"requests": batch, "prompt_tokens": length, **_times(took, batch, tokens)})
        facts = {name: arm.facts() for name, arm in arms.items()}
    return {"settings": _settings(loaded, facts, rounds, tokens), "sizes": _sizes(loaded, facts), "times": times}


def _settings(adapter: Adapter, facts: Mapping[str, Mapping[str, Any]], rounds: int, tokens: int) -> dict[str, Any]:
    kept = ("model", "dtype", "compilation", "block_size")
    return {
        **{key: facts[WITH][key] for key in kept},
        "adapter": str(adapter.source),
        "variant": adapter.config.variant,
        "rank": adapter.config.rank,
        "rounds": rounds,
        "generated_tokens": tokens,
    }


def _sizes(adapter: Adapter, facts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """See the keys: bytes unless they say otherwise."""
    own, bare, layers = facts[WITH], facts[WITHOUT], len(adapter.layers)
    width = {"float32": 4}.get(own["dtype"], 2)
    shape = adapter.shape
    return {
        "added parameters": adapter.parameters,
        "added weights": adapter.parameters * width,
        "memory of one session": adapter.state_bytes,
        "record of one session in the store": own["record_bytes"],
        "KV cache per token": 2 * adapter.backbone.kv_size * width * own["layers"],
        "state pages per token": 4 * shape.floats_per_token(min(own["block_size"], 16)) * layers,
        "tokens that the KV cache holds without memory": bare["kv_tokens"],
        "tokens that the KV cache holds with memory": own["kv_tokens"],
        "peak of host memory without memory": bare["peak_bytes"],
        "peak of host memory with memory": own["peak_bytes"],
    }


def _times(took: Mapping[str, list[Timing]], batch: int, tokens: int) -> dict[str, Any]:
    times: dict[str, Any] = {}
    for what, figure in (("ttft", first), ("tpot", per_token)):
        for name, arm in (("without", WITHOUT), ("with", WITH)):
            times[f"{what}_ms_{name}"] = milliseconds(took[arm], figure)
        times[f"{what}_percent"] = 100 * (ratio(dict(took), figure, WITH, WITHOUT) - 1)
    for name, arm in (("without", WITHOUT), ("with", WITH)):
        whole = milliseconds(took[arm], lambda timing: [timing.first + sum(timing.gaps)]) / 1e3
        times[f"tokens_per_second_{name}"] = batch * tokens / whole
    times["commit_ms"] = milliseconds(took[WITH], lambda timing: [timing.commit])
    return times
