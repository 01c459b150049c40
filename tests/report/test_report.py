"""`deltamem report`: what is made of timings, what it refuses, and (at night) a whole run on two real engines."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deltamem_vllm.adapter.weights import load_adapter
from deltamem_vllm.cli import app
from deltamem_vllm.folders import PREFIX
from deltamem_vllm.report.arm import Arm, Setup, Timing
from deltamem_vllm.report.compare import first, milliseconds, per_token, ratio
from deltamem_vllm.report.random import QWEN3_0_6B, TINY, write_adapter, write_lora, write_model
from deltamem_vllm.report.table import markdown

MODEL = Path(__file__).parents[1] / "fixtures" / "qwen3_tsw_r8" / "model"
ADAPTER = MODEL.parent / "adapter"


def timing(first_token: float, *gaps: float) -> Timing:
    return Timing(first_token, list(gaps), 0.0)


def test_a_ratio_is_that_of_the_same_round() -> None:
    """A machine that is ten times slower in one round changes nothing."""
    slow = [1.0, 10.0, 1.0]
    took = {
        "a": [timing(2 * s, 1.1 * s, 1.1 * s, 9 * s) for s in slow],
        "b": [timing(1 * s, 1 * s, 1 * s, 9 * s) for s in slow],
    }
    assert ratio(took, first, "a", "b") == pytest.approx(2)
    assert ratio(took, per_token, "a", "b") == pytest.approx(1.1), "the median of gaps, which one hiccup does not move"
    assert milliseconds(took["b"], first) == pytest.approx(1000)


def test_random_adapters_fit_their_model(tmp_path: Path) -> None:
    adapter = load_adapter(write_adapter(tmp_path, TINY.backbone), TINY.backbone)
    assert adapter.backbone == TINY.backbone
    assert set(adapter.layers) == set(range(TINY.layers))


def test_a_share_of_a_model_has_the_same_layers() -> None:
    share = QWEN3_0_6B.share(8)
    assert (share.layers, share.hidden, share.inner) == (8, QWEN3_0_6B.hidden, QWEN3_0_6B.inner)
    assert share.vocabulary / QWEN3_0_6B.vocabulary == pytest.approx(8 / 28, rel=1e-4)


def test_folders_are_what_vllm_and_peft_look_for(tmp_path: Path) -> None:
    config = json.loads((write_model(tmp_path / "model", TINY) / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    lora = json.loads((write_lora(tmp_path / "lora", TINY.backbone) / "adapter_config.json").read_text())
    assert lora["target_modules"] == ["q_proj", "o_proj"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([str(MODEL), str(MODEL)], "holds neither delta_mem_adapter.safetensors nor"),
        ([str(MODEL), str(ADAPTER), "--batches", "1,zero"], "'1,zero' is not a list of whole numbers"),
        ([str(MODEL), str(ADAPTER), "--lengths", "0"], "'0' is not a list of whole numbers"),
        ([str(MODEL), str(ADAPTER), "--engine", "dtype"], "'dtype' is not NAME=JSON"),
    ],
)
def test_wrong_arguments_are_said_before_an_engine_starts(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["report", *arguments], env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code != 0
    assert said in result.output


def test_an_engine_runs_on_once_its_memory_lies_elsewhere() -> None:
    options = {"dtype": "float32", "max_model_len": 512, "enforce_eager": True, "block_size": 32}
    setup = Setup(str(MODEL), str(ADAPTER), options=options, env={"VLLM_CPU_KVCACHE_SPACE": "1"})
    layers = len(load_adapter(ADAPTER).layers)
    with Arm("memory", setup) as arm:
        for _ in range(2):
            arm.move_out()
            weights, cache = arm.move_in()
            assert weights >= 4 * layers, "of qkv, o, gate and up, and down, some were not watched"
            assert 0.9 * 2**30 < cache <= 2**30, "not the cache that the engine was given room for"
            arm.begin([[5, 6, 7], [8, 9]], 4)
            while arm.step():
                pass
            assert len(arm.end().gaps) == 3


@pytest.mark.nightly
def test_a_report_of_a_real_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["report", str(MODEL), str(ADAPTER), "--batches", "1,2", "--lengths", "40", "--tokens", "6"]
    arguments += ["--rounds", "2", "--out", str(tmp_path)]
    for option in ("dtype=float32", "max_model_len=512", "enforce_eager=true", "block_size=32"):
        arguments += ["--engine", option]
    (room := tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(room))
    result = CliRunner().invoke(app, arguments, env={"VLLM_CPU_KVCACHE_SPACE": "1", "TMPDIR": str(room)})
    assert result.exit_code == 0, result.output
    assert not list(room.glob(f"{PREFIX}*")), "an engine left a folder behind"
    found = json.loads((tmp_path / "report.json").read_text())
    assert (tmp_path / "report.md").read_text() == markdown(found)
    adapter = load_adapter(ADAPTER)
    sizes = found["sizes"]
    assert sizes["added parameters"] == adapter.parameters
    assert sizes["memory of one session"] == adapter.state_bytes
    assert sizes["record of one session in the store"] > 2 * adapter.state_bytes
    held = [sizes[f"tokens that the KV cache holds {which} memory"] for which in ("without", "with")]
    per_token_bytes = [sizes["KV cache per token"], sizes["KV cache per token"] + sizes["state pages per token"]]
    assert held[0] / held[1] == pytest.approx(per_token_bytes[1] / per_token_bytes[0], rel=0.02)
    assert [(row["requests"], row["prompt_tokens"]) for row in found["times"]] == [(1, 40), (2, 40)]
    assert all(row[key] > 0 for row in found["times"] for key in ("ttft_ms_with", "tpot_ms_with", "commit_ms"))
