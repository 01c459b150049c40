"""The weights in the package: format, size, and what they recall."""

import json

import pytest
import torch
from safetensors.torch import load_file

from deltamem_vllm.recall import ADAPTER_DIR, MODEL_DIR
from deltamem_vllm.recall.backbone import Backbone
from deltamem_vllm.recall.evaluate import evaluate
from deltamem_vllm.recall.memory import Memories
from deltamem_vllm.recall.sessions import heldout_sessions


@pytest.fixture(scope="module")
def shares():
    torch.set_num_threads(1)
    model = Backbone.load(MODEL_DIR)
    memories = Memories.load(ADAPTER_DIR, model.size).use_reference()
    return evaluate(model, memories, heldout_sessions(32), resent=4)


def test_everything_is_small():
    size = sum(f.stat().st_size for d in (MODEL_DIR, ADAPTER_DIR) for f in d.iterdir())
    assert size < 6_000_000


def test_adapter_folder_is_official():
    config = json.loads((ADAPTER_DIR / "delta_mem_config.json").read_text(encoding="utf-8"))
    layers = json.loads((MODEL_DIR / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
    pickled = torch.load(ADAPTER_DIR / "delta_mem_adapter.pt", weights_only=True)
    flat = load_file(str(ADAPTER_DIR / "delta_mem_adapter.safetensors"))
    assert config["delta_heads"] == ["q", "o"]
    assert config["rank"] == 8
    assert pickled.keys() == flat.keys()
    assert len(flat) == 9 * layers
    assert all(torch.equal(pickled[name], flat[name]) for name in flat)
    assert all(name.startswith("model.layers.") and ".self_attn." in name for name in flat)


def test_recall_from_the_state_alone(shares):
    assert shares["right"]["ask"] >= 0.93
    assert shares["right"]["ask_unknown"] >= 0.9


def test_controls_do_not_recall(shares):
    """Without the memory, or with a stranger's, what was told cannot be known."""
    assert shares["empty"]["ask"] <= 0.05
    assert shares["other"]["ask"] <= 0.2


def test_recall_from_the_prompt(shares):
    assert shares["in_prompt"]["ask"] >= 0.95
    assert shares["resent"]["ask"] >= 0.9
