"""What a memory costs on a CPU: time per token and to the first token, beside vLLM alone and beside a LoRA adapter.

    python -m loadtests.engine [--repeats 7] [--layers 28] [--compiled] [--json FILE]

Real vLLM on a model with random weights in the shape of Qwen3-0.6B, fp32, one engine for each arm: vLLM alone; ours,
rank 8 on q and o, each request a session's with its commit; a LoRA adapter, rank 8 on q and o. The arms take turns
within each repeat, and vLLM alone comes twice: what differs between its two is noise. Figures are medians over the
repeats of the ratio to the first of the two.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

HIDDEN, HEADS, KV_HEADS, HEAD, RANK = 1024, 16, 8, 128, 8
VOCABULARY = 151_936
NEW = 33
"""Tokens that are generated for a time per token."""
ARMS = ("vllm", "ours", "vllm again", "lora")


@dataclass(frozen=True)
class Load:
    """Requests at once, tokens of each one's prompt, tokens that each generates."""

    requests: int
    prompt: int
    new: int

    @property
    def name(self) -> str:
        """As the table calls it."""
        return f"TTFT {self.prompt}" if self.new == 1 else f"TPOT B={self.requests}"


LOADS = (Load(1, 16, NEW), Load(8, 16, NEW), Load(1, 128, 1), Load(1, 2048, 1))


def write_model(folder: Path, layers: int) -> Path:
    """A config without weights: vLLM makes random ones."""
    folder.mkdir()
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": HIDDEN,
        "intermediate_size": 3 * HIDDEN,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_memory(folder: Path, layers: int) -> Path:
    """A random δ-mem adapter."""
    folder.mkdir()
    own = {
        **{f"memory_{x}_proj": torch.randn(RANK, HIDDEN) * 0.02 for x in "qkv"},
        "delta_q_proj": torch.randn(HEADS * HEAD, RANK) * 0.02,
        "delta_o_proj": torch.randn(HIDDEN, RANK) * 0.02,
        "beta_proj": torch.randn(RANK, HIDDEN) * 0.02,
        "beta_bias": torch.full((RANK,), -2.0),
    }
    config = {"rank": RANK, "alpha": 16.0, "num_state_heads": 1, "rankwise_gates": True, "delta_heads": ["q", "o"]}
    (folder / "delta_mem_config.json").write_text(json.dumps({**config, "target_layers": []}))
    named = {f"model.layers.{i}.self_attn.{name}": t.clone() for i in range(layers) for name, t in own.items()}
    save_file(named, folder / "delta_mem_adapter.safetensors")
    return folder


def write_lora(folder: Path, layers: int) -> Path:
    """A random LoRA adapter on the same projections."""
    folder.mkdir()
    sizes = {"q_proj": (HIDDEN, HEADS * HEAD), "o_proj": (HEADS * HEAD, HIDDEN)}
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 16, "target_modules": list(sizes), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {}
    for layer in range(layers):
        for module, (rows, columns) in sizes.items():
            at = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{at}.lora_A.weight"] = torch.randn(RANK, rows) * 0.02
            tensors[f"{at}.lora_B.weight"] = torch.randn(columns, RANK) * 0.02
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def serve(pipe: Connection, arm: str, folder: Path, compiled: bool) -> None:
    """One arm's process: runs what it is sent and answers with seconds."""
    from vllm import LLM, SamplingParams

    options: dict[str, Any] = {
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "max_model_len": 2304,
        "max_num_batched_tokens": 2304,
        "max_num_seqs": 8,
        "enable_prefix_caching": False,
        "disable_log_stats": False,  # the times come from there
        "enforce_eager": not compiled,
    }
    ask: Any
    if arm == "ours":
        from deltamem_vllm.offline import SessionLLM, Turn

        ours = SessionLLM(str(folder / "model"), adapter=str(folder / "memory"), store="memory://", **options)

        def ask(prompts: list[list[int]], names: list[str], params: Any) -> list[Any]:
            turns = [Turn(ids, name, sampling=params) for ids, name in zip(prompts, names, strict=True)]
            answers = ours.run(turns)
            assert all(answer.outcome["status"] == "committed" for answer in answers), answers
            return [answer.output for answer in answers]
    else:
        lora = arm == "lora"
        llm = LLM(str(folder / "model"), enable_lora=lora, max_lora_rank=RANK, **options) if lora else None
        llm = llm or LLM(str(folder / "model"), **options)
        extra: dict[str, Any] = {}
        if lora:
            from vllm.lora.request import LoRARequest

            extra["lora_request"] = LoRARequest("lora", 1, str(folder / "lora"))

        def ask(prompts: list[list[int]], names: list[str], params: Any) -> list[Any]:
            given = [{"prompt_token_ids": ids} for ids in prompts]
            return list(llm.generate(given, params, use_tqdm=False, **extra))

    pipe.send("ready")
    while (load := pipe.recv()) is not None:
        load, seed = load
        rng = np.random.default_rng(seed)
        prompts = [rng.integers(0, VOCABULARY, load.prompt).tolist() for _ in range(load.requests)]
        params = SamplingParams(max_tokens=load.new, temperature=0.0, ignore_eos=True, detokenize=False)
        outputs = ask(prompts, [f"s{seed}-{i}" for i in range(load.requests)], params)
        assert all(len(output.outputs[0].token_ids) == load.new for output in outputs)
        stats = [output.metrics for output in outputs]
        if load.new == 1:
            pipe.send(max(each.first_token_latency for each in stats))
        else:
            pipe.send(statistics.mean((s.last_token_ts - s.first_token_ts) / (load.new - 1) for s in stats))
    if arm == "ours":
        ours.close()


def measure(folder: Path, repeats: int, compiled: bool) -> dict[str, dict[str, list[float]]]:
    """Seconds by load and arm, one for each repeat."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    for arm in ("vllm", "ours", "lora"):
        pipes[arm], theirs = context.Pipe()
        context.Process(target=serve, args=(theirs, arm, folder, compiled)).start()
        assert pipes[arm].recv() == "ready"
    pipes["vllm again"] = pipes["vllm"]
    seconds: dict[str, dict[str, list[float]]] = {load.name: {arm: [] for arm in ARMS} for load in LOADS}
    for repeat in range(repeats + 1):
        for load in LOADS:
            for arm in ARMS:
                pipes[arm].send((load, repeat * 10 + ARMS.index(arm)))
                took = pipes[arm].recv()
                if repeat:  # the first one warms up
                    seconds[load.name][arm].append(took)
    for arm in ("vllm", "ours", "lora"):
        pipes[arm].send(None)
    return seconds


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--compiled", action="store_true", help="with torch.compile, which takes minutes to start")
    parser.add_argument("--json", type=Path, help="file for all measured seconds")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_model(folder / "model", given.layers)
        write_memory(folder / "memory", given.layers)
        write_lora(folder / "lora", given.layers)
        seconds = measure(folder, given.repeats, given.compiled)
    table = Table(title=f"{given.layers} layers, fp32, {torch.get_num_threads()} threads, {given.repeats} repeats")
    for column in ("", "vLLM alone, ms", "again", "ours", "LoRA", "LoRA ÷ ours"):
        table.add_column(column, justify="right" if column else "left")
    for name, arms in seconds.items():
        ratio = {
            arm: statistics.median(b / a for a, b in zip(arms["vllm"], arms[arm], strict=True)) - 1 for arm in ARMS
        }
        beside = statistics.median(b / a for a, b in zip(arms["ours"], arms["lora"], strict=True))
        alone = statistics.median(arms["vllm"]) * 1e3
        shown = [f"{ratio[arm]:+.1%}" for arm in ("vllm again", "ours", "lora")]
        table.add_row(name, f"{alone:.1f}", *shown, f"{beside:.2f}")
    Console().print(table)
    if given.json:
        given.json.write_text(json.dumps(seconds))


if __name__ == "__main__":
    main()
