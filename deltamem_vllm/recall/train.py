"""Make the recall model and its δ-mem adapter from nothing: ``python -m deltamem_vllm.recall.train``."""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from . import ADAPTER_DIR, MODEL_DIR, tokenizer
from .backbone import Backbone, Size, hf_config
from .data import Shape, make_dialogue
from .evaluate import evaluate
from .memory import Memories
from .sessions import heldout_sessions
from .windows import Batch, Layout, collate, lay_out

Kind = tuple[Shape, Layout, int]
"""What a step's dialogues look like, how they are laid out, and how many there are."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stretch of training on one mix of dialogues; each step draws one of ``mix``."""

    steps: int
    mix: tuple[Kind, ...]


PHASES = ("backbone", "adapter", "refine", "heldout")
PEAK_RATES = {"backbone": 3e-3, "adapter": 1e-2, "refine": 8e-3}
WARM_UP = 60

BACKBONE_STAGES = (
    Stage(
        steps=800,
        mix=((Shape(facts=(2, 3), talk=(0, 0), unknown=(0, 1), joined=0.1, kin=0.8), "chat", 48),),
    ),
    Stage(
        steps=400,
        mix=(
            (Shape(facts=(0, 4), talk=(0, 2), early_ask=0.1, kin=0.5), "chat", 40),
            (Shape(facts=(4, 7), talk=(0, 4), early_ask=0.1, kin=0.3), "chat", 24),
        ),
    ),
)

_LONG = Shape(facts=(3, 6), talk=(1, 5), early_ask=0.2, kin=0.2)
ADAPTER_STAGES = (
    Stage(steps=200, mix=((Shape(facts=(1, 1), talk=(0, 0), unknown=(0, 1)), "turns", 64),)),
    Stage(steps=250, mix=((Shape(facts=(1, 3), talk=(0, 1), unknown=(1, 1), kin=0.4), "turns", 48),)),
    Stage(steps=250, mix=((Shape(facts=(2, 5), talk=(0, 3), early_ask=0.2, kin=0.3), "turns", 32),)),
    Stage(
        steps=500,
        mix=(
            (_LONG, "turns", 24),
            (_LONG, "turns", 24),
            (_LONG, "turns", 24),
            (_LONG, "turns", 24),
            (Shape(facts=(1, 3), talk=(0, 1), unknown=(0, 1)), "grown", 16),
        ),
    ),
)


_SESSION: Kind = (Shape(facts=(3, 5), talk=(0, 4), early_ask=0.1, kin=0.1), "turns", 28)
REFINE_STAGES = (
    Stage(
        steps=800,
        mix=(
            *[_SESSION] * 9,
            (Shape(facts=(1, 3), talk=(0, 1), unknown=(0, 1)), "grown", 16),
        ),
    ),
)


def batches(stages: tuple[Stage, ...], seed: str) -> Iterator[Batch]:
    """Training batches of all stages, one per step."""
    rng = random.Random(seed)
    for stage in stages:
        for _ in range(stage.steps):
            shape, layout, rows = rng.choice(stage.mix)
            yield collate([lay_out(make_dialogue(rng, shape), layout) for _ in range(rows)])


def rate(step: int, total: int, peak: float) -> float:
    """Linear warm-up, then a cosine down to a fiftieth."""
    if step < WARM_UP:
        return peak * (step + 1) / WARM_UP
    done = (step - WARM_UP) / max(1, total - WARM_UP)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


def answer_loss(model: Backbone, hidden: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, float, float]:
    """Weighted cross-entropy; loss and accuracy of the answers' first tokens beside it."""
    at = batch.labels >= 0
    labels, weights = batch.labels[at], batch.weights[at]
    logits = model.logits(hidden[at])
    losses = F.cross_entropy(logits, labels, reduction="none")
    answers = weights == 1.0
    right = (logits.argmax(-1) == labels)[answers].float().mean().item()
    loss = (losses * weights).sum() / weights.sum()
    return loss, losses[answers].mean().item(), right


def fit(
    name: str,
    model: Backbone,
    memories: Memories | None,
    stages: tuple[Stage, ...],
    seed: int,
    log: Callable[..., None],
) -> None:
    """Train the memories if there are any, else the backbone."""
    trained = model if memories is None else memories
    peak = PEAK_RATES[name]
    optimizer = torch.optim.AdamW(trained.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.0)
    total = sum(stage.steps for stage in stages)
    for step, batch in enumerate(batches(stages, f"{name}-{seed}")):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, total, peak)
        hidden, _ = model(batch.ids, batch.positions, batch.windows, memories)
        loss, answer, right = answer_loss(model, hidden, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        if step % 25 == 24 or step + 1 == total:
            extra = {} if memories is None else {"mean_beta": round(memories.mean_beta().item(), 4)}
            log(
                phase=name, step=step + 1, of=total, loss=round(loss.item(), 4),
                answer_loss=round(answer, 4), answer_accuracy=round(right, 4), **extra,
            )  # fmt: skip


def save_backbone(model: Backbone, folder: Path) -> None:
    """Write a Hugging Face folder: config, weights, generation config, tokenizer, template."""
    from transformers import GenerationConfig, Qwen3ForCausalLM

    tokenizer.save(folder)
    ids = {w: i for i, w in enumerate(tokenizer.vocabulary())}
    eos, pad = ids[tokenizer.END], ids[tokenizer.PAD]
    saved = Qwen3ForCausalLM(hf_config(model.size, eos=eos, pad=pad))
    saved.load_state_dict(model.state_dict(), strict=False)
    saved.tie_weights()
    saved.generation_config = GenerationConfig(do_sample=False, eos_token_id=eos, pad_token_id=pad)
    saved.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    parser.add_argument("--adapter", type=Path, default=ADAPTER_DIR)
    parser.add_argument("--log", type=Path, default=MODEL_DIR.parent / "training.log")
    parser.add_argument("--first", choices=PHASES, default=PHASES[0], help="keep what earlier phases made")
    args = parser.parse_args()
    import numba

    torch.set_num_threads(args.threads)
    numba.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    began = time.monotonic()
    with args.log.open("w" if args.first == "backbone" else "a", encoding="utf-8") as out:

        def log(**record: object) -> None:
            line = json.dumps({"seconds": round(time.monotonic() - began, 1), **record})
            print(line, file=out, flush=True)
            print(line, flush=True)

        log(phase="start", seed=args.seed, threads=args.threads, torch=torch.__version__)
        if args.first == "backbone":
            model = Backbone(Size(vocab=len(tokenizer.vocabulary())))
            fit("backbone", model, None, BACKBONE_STAGES, args.seed, log)
            save_backbone(model, args.model)
        else:
            model = Backbone.load(args.model)
        model.requires_grad_(False)
        if args.first in ("refine", "heldout"):
            memories = Memories.load(args.adapter, model.size)
        else:
            torch.manual_seed(args.seed + 1)
            memories = Memories(model.size)
            fit("adapter", model, memories, ADAPTER_STAGES, args.seed, log)
            memories.save(args.adapter)
        if args.first != "heldout":
            fit("refine", model, memories, REFINE_STAGES, args.seed, log)
            memories.save(args.adapter)
        log(phase="heldout", sessions=128, **evaluate(model, memories, heldout_sessions(128)))


if __name__ == "__main__":
    main()
