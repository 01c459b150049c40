"""`deltamem adapter inspect` and `convert`, as a user runs them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deltamem_vllm.adapter.weights import load_adapter
from deltamem_vllm.cli import app
from tests.adapter.making import OFFICIAL, write_folder

runner = CliRunner()


def test_inspect_in_words() -> None:
    result = runner.invoke(app, ["adapter", "inspect", str(OFFICIAL)])
    assert result.exit_code == 0
    lines = dict(line.split("  ", 1) for line in result.stdout.splitlines())
    words = {key: value.strip() for key, value in lines.items()}
    assert words["variant"] == "TSW"
    assert words["corrections"] == "q, o"
    assert words["layers"] == "3 (0 to 2)"
    assert words["parameters"] == "10,776"
    assert words["state bytes per session"] == "768"
    assert words["servable"] == "yes"
    assert words["fingerprint"] == load_adapter(OFFICIAL).fingerprint


def test_inspect_as_json(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", {"memory_write_granularity": "message_mean", "num_state_heads": 2})
    result = runner.invoke(app, ["adapter", "inspect", str(folder), "--json"])
    assert result.exit_code == 0
    description = json.loads(result.stdout)
    assert description["variant"] == "2 heads, message_mean"
    assert description["layers"] == [0, 1, 2]
    assert description["backbone"] == {"num_layers": 3, "hidden_size": 24, "q_size": 32, "kv_size": 16}
    assert "not served yet" in description["servable"]


def test_inspect_of_nothing(tmp_path: Path) -> None:
    result = runner.invoke(app, ["adapter", "inspect", str(tmp_path)])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert str(tmp_path) in result.stderr


def test_convert(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(OFFICIAL, folder)
    before = load_adapter(folder)
    result = runner.invoke(app, ["adapter", "convert", str(folder)])
    assert result.exit_code == 0, result.stderr
    after = load_adapter(folder)
    assert after.source.suffix == ".safetensors"
    assert after.fingerprint == before.fingerprint
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["delta_mem_adapter.pt", "delta_mem_adapter.safetensors", "delta_mem_config.json"]

    again = runner.invoke(app, ["adapter", "convert", str(folder)])
    assert again.exit_code == 1
    assert "--overwrite" in again.stderr
    assert runner.invoke(app, ["adapter", "convert", str(folder), "--overwrite"]).exit_code == 0


@pytest.mark.parametrize("missing", ["delta_mem_adapter.pt", "delta_mem_config.json"])
def test_a_failed_conversion_leaves_nothing(tmp_path: Path, missing: str) -> None:
    folder = write_folder(tmp_path / "a", {})
    (folder / missing).unlink()
    result = runner.invoke(app, ["adapter", "convert", str(folder)])
    assert result.exit_code == 1
    assert missing in result.stderr
    assert len(list(folder.iterdir())) == 1
