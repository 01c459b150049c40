from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from deltamem_vllm.adapter.weights import BackboneShape, load_adapter
from deltamem_vllm.errors import AdapterError
from tests.adapter.making import BACKBONE, OFFICIAL, make_tensors, write_folder

L1 = "model.layers.1.self_attn."


def test_the_official_folder() -> None:
    adapter = load_adapter(OFFICIAL, BackboneShape(3, 64, 128, 64, "qwen3"))
    assert list(adapter.layers) == [0, 1, 2]
    assert adapter.shape.rank == 8
    assert adapter.state_bytes == 3 * 64 * 4
    assert adapter.parameters == 10_776
    layer = adapter.layers[1]
    raw = torch.load(OFFICIAL / "delta_mem_adapter.pt", weights_only=True)
    parts = ("memory_q_proj", "memory_k_proj", "memory_v_proj", "beta_proj")
    assert torch.equal(layer.projection, torch.cat([raw[L1 + part] for part in parts]))
    assert layer.projection.shape == (adapter.shape.projected_columns, 64)
    assert torch.equal(layer.bias, raw[L1 + "beta_bias"])
    assert set(layer.delta) == {"q", "o"}
    assert layer.scale == {"q": 1.0, "o": 1.0}
    assert layer.o_norm_weight is None


@pytest.mark.parametrize("couple", [True, False])
@pytest.mark.parametrize("rankwise", [True, False])
@pytest.mark.parametrize("mode", ["standard", "lambda_outside", "no_lambda"])
@pytest.mark.parametrize("heads", [1, 3])
def test_every_gate_layout(tmp_path: Path, couple: bool, rankwise: bool, mode: str, heads: int) -> None:
    config = {
        "rank": 4,
        "num_state_heads": heads,
        "couple_lambda": couple,
        "rankwise_gates": rankwise,
        "state_update_mode": mode,
    }
    tensors = make_tensors(config)
    adapter = load_adapter(write_folder(tmp_path / "a", config, tensors), BACKBONE)
    layer = adapter.layers[1]
    assert layer.projection.shape == (adapter.shape.projected_columns, 24)
    assert layer.bias.shape == (adapter.shape.bias_columns,)
    if adapter.shape.has_lambda:
        assert torch.equal(layer.projection[-adapter.shape.gates :], tensors[L1 + "lambda_proj"])
        assert torch.equal(layer.bias[-adapter.shape.gates :], tensors[L1 + "lambda_bias"])
    sizes = {head: tuple(tensor.shape) for head, tensor in layer.delta.items()}
    r = 4 * heads
    assert sizes == {"q": (32, r), "k": (16, r), "v": (16, r), "o": (24, r)}


@pytest.mark.parametrize("granularity", ["layer", "head"])
def test_trained_scales(tmp_path: Path, granularity: str) -> None:
    config = {
        "trainable_delta_scale": True,
        "delta_scale_max": 3.0,
        "delta_scale_granularity": granularity,
        "delta_heads": "v,o",
    }
    tensors = make_tensors(config)
    raw = torch.tensor([0.0]) if granularity == "layer" else torch.tensor([9.0, 9.0, 0.0, -1.0])
    tensors[L1 + "delta_scale_raw"] = raw
    scale = load_adapter(write_folder(tmp_path / "a", config, tensors), BACKBONE).layers[1].scale
    o = 1.5 if granularity == "layer" else 3.0 / (1.0 + torch.e)
    assert scale == pytest.approx({"v": 1.5, "o": o})


@pytest.mark.parametrize("heads", ["q,o", "q"])
def test_norm_of_o(tmp_path: Path, heads: str) -> None:
    config = {"delta_o_rmsnorm": True, "delta_o_rmsnorm_eps": 1e-5, "delta_heads": heads}
    layer = load_adapter(write_folder(tmp_path / "a", config), BACKBONE).layers[0]
    assert (layer.o_norm_weight is not None) == ("o" in heads)
    assert layer.o_norm_eps == 1e-5


def test_inactive_heads_are_ignored_by_config_not_by_value(tmp_path: Path) -> None:
    config = {"delta_heads": ["q", "o"]}
    tensors = make_tensors(config)
    first = load_adapter(write_folder(tmp_path / "a", config, tensors), BACKBONE)
    tensors[L1 + "delta_k_proj"] = torch.ones(16, 8)
    second = load_adapter(write_folder(tmp_path / "b", config, tensors), BACKBONE)
    assert set(second.layers[1].delta) == {"q", "o"}
    assert second.fingerprint == first.fingerprint


def test_some_layers_only(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", {"target_layers": [2, 0]})
    assert list(load_adapter(folder, BACKBONE).layers) == [0, 2]
    tensors = make_tensors({})
    with pytest.raises(AdapterError, match=r"layers\.1\..*target_layers are \[0, 2\]"):
        load_adapter(write_folder(tmp_path / "b", {"target_layers": [2, 0]}, tensors), BACKBONE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files(tmp_path: Path, dtype: torch.dtype) -> None:
    layer = load_adapter(write_folder(tmp_path / "a", {}, make_tensors({}, dtype=dtype)), BACKBONE).layers[0]
    assert layer.projection.dtype == layer.delta["q"].dtype == dtype
    assert layer.bias.dtype == torch.float32


def test_fingerprint(tmp_path: Path) -> None:
    config: dict[str, Any] = {"delta_heads": "q,o"}
    tensors = make_tensors(config)
    prints = [
        load_adapter(write_folder(tmp_path / kind, config, tensors, kind), BACKBONE).fingerprint
        for kind in ("pt", "safetensors")
    ]
    spelled = {**config, "rank": 8, "beta_bias_init": -2.0, "latent_gate_init": 0.5}
    prints.append(load_adapter(write_folder(tmp_path / "spelled", spelled, tensors), BACKBONE).fingerprint)
    assert len(set(prints)) == 1
    for change in ({"alpha": 8.0}, {"delta_heads": "q"}, {"state_update_mode": "no_lambda"}):
        other = load_adapter(write_folder(tmp_path / "other", {**config, **change}, tensors), BACKBONE)
        assert other.fingerprint != prints[0]
    tensors[L1 + "delta_q_proj"][0, 0] += 1e-3
    assert load_adapter(write_folder(tmp_path / "moved", config, tensors)).fingerprint != prints[0]


def test_safetensors_is_preferred(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", {}, kind="safetensors")
    (folder / "delta_mem_adapter.pt").write_bytes(b"never read")
    assert load_adapter(folder, BACKBONE).source.name == "delta_mem_adapter.safetensors"


def _change(name: str, value: Tensor | None) -> dict[str, Tensor]:
    tensors = make_tensors({"delta_heads": "q,o"})
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value
    return tensors


@pytest.mark.parametrize("backbone", [BACKBONE, None])
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (L1 + "beta_bias", None, r"missing tensor '.*1\.self_attn\.beta_bias', expected shape \[8\]"),
        (L1 + "delta_k_proj", None, r"missing tensor '.*delta_k_proj'"),
        (L1 + "memory_q_proj", torch.ones(8, 25), r"shape \[8, 25\], expected \[8, 24\]"),
        (L1 + "memory_q_proj", torch.ones(24, 8), r"shape \[24, 8\], expected \[8, 24\]"),
        (L1 + "beta_bias", torch.ones(1), r"beta_bias' has shape \[1\], expected \[8\]"),
        (L1 + "beta_bias", torch.full((8,), float("nan")), r"beta_bias' holds NaN"),
        (L1 + "delta_o_proj", torch.full((24, 8), float("inf")), r"delta_o_proj' holds NaN or infinity"),
        (L1 + "beta_bias", torch.ones(8, dtype=torch.int64), r"is torch\.int64, expected float32"),
        (L1 + "beta_bias", torch.ones(8, dtype=torch.float64), r"is torch\.float64"),
        (L1 + "lambda_bias", torch.ones(8), r"unexpected tensor .*lambda_bias'.*couple_lambda is True"),
        (L1 + "delta_scale_raw", torch.ones(1), r"delta_scale_raw'.*trainable_delta_scale is False"),
        (L1 + "lora_A", torch.ones(1), r"lora_A'.*no δ-mem parameter"),
        ("model.layers.1.mlp.beta_bias", torch.ones(8), r"unexpected tensor 'model\.layers\.1\.mlp"),
        ("language.layers.1.self_attn.beta_bias", torch.ones(8), r"two module paths"),
        ("model.layers.01.self_attn.beta_bias", torch.ones(8), r"unexpected tensor"),
        ("lm_head", torch.ones(8), r"unexpected tensor 'lm_head'"),
    ],
)
def test_one_wrong_tensor_is_named(
    tmp_path: Path, backbone: BackboneShape | None, name: str, value: Tensor | None, message: str
) -> None:
    tensors = _change(name, value)
    for kind in ("pt", "safetensors"):
        folder = write_folder(tmp_path / kind, {"delta_heads": "q,o"}, tensors, kind)
        with pytest.raises(AdapterError, match=message) as caught:
            load_adapter(folder, backbone)
        assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    "other",
    [
        BackboneShape(4, 24, 32, 16),
        BackboneShape(2, 24, 32, 16),
        BackboneShape(3, 48, 32, 16),
        BackboneShape(3, 24, 64, 16),
        BackboneShape(3, 24, 32, 8),
    ],
    ids=str,
)
def test_an_adapter_of_another_model(tmp_path: Path, other: BackboneShape) -> None:
    with pytest.raises(AdapterError) as caught:
        load_adapter(write_folder(tmp_path / "a", {}), other)
    assert str(BACKBONE) in str(caught.value)
    assert str(other) in str(caught.value)


def test_a_far_too_large_file_is_not_even_read(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", {})
    with (folder / "delta_mem_adapter.pt").open("ab") as file:
        file.truncate(5 << 20)
    with pytest.raises(AdapterError, match=r"5242880 bytes, but an adapter with this config has at most"):
        load_adapter(folder, BACKBONE)


def test_message_means_are_valid_but_not_served(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", {"memory_write_granularity": "message_mean"})
    assert load_adapter(folder).config.variant == "SSW"
    with pytest.raises(AdapterError, match="not served yet"):
        load_adapter(folder, BACKBONE)


class _Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def test_a_pickle_bomb_does_not_go_off(tmp_path: Path) -> None:
    folder, marker = write_folder(tmp_path / "a", {}), tmp_path / "boom"
    torch.save({"x": _Bomb(marker)}, folder / "delta_mem_adapter.pt")
    with pytest.raises(AdapterError, match=r"delta_mem_adapter\.pt: refused"):
        load_adapter(folder, BACKBONE)
    assert not marker.exists()
    (folder / "delta_mem_adapter.pt").write_bytes(pickle.dumps(_Bomb(marker)))
    with pytest.raises(AdapterError, match=r"not a file of torch\.save"):
        load_adapter(folder, BACKBONE)
    assert not marker.exists()


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", {})
    path = folder / "delta_mem_adapter.pt"
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    with pytest.raises(AdapterError, match="is compressed"):
        load_adapter(folder, BACKBONE)


def test_a_view_that_claims_more_than_the_file(tmp_path: Path) -> None:
    tensors = _change(L1 + "delta_q_proj", torch.zeros(1).expand(1 << 20, 1 << 20))
    folder = write_folder(tmp_path / "a", {"delta_heads": "q,o"}, tensors)
    for backbone in (BACKBONE, None):
        with pytest.raises(AdapterError, match="claim"):
            load_adapter(folder, backbone)


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
@pytest.mark.parametrize("damage", ["empty", "cut", "zeros", "noise"])
def test_damaged_files(tmp_path: Path, kind: str, damage: str) -> None:
    folder = write_folder(tmp_path / "a", {}, kind=kind)
    path = folder / f"delta_mem_adapter.{kind}"
    data = path.read_bytes()
    damaged = {
        "empty": b"",
        "cut": data[: len(data) // 2],
        "zeros": bytes(len(data)),
        "noise": bytes(b ^ 0x5A for b in data),
    }
    path.write_bytes(damaged[damage])
    with pytest.raises(AdapterError, match=path.name):
        load_adapter(folder, BACKBONE)


@pytest.mark.parametrize("content", [[1, 2], {"x": 3}, {1: torch.ones(1)}, {}, {"x": {"y": torch.ones(1)}}])
def test_other_contents(tmp_path: Path, content: object) -> None:
    folder = write_folder(tmp_path / "a", {})
    torch.save(content, folder / "delta_mem_adapter.pt")
    with pytest.raises(AdapterError, match=r"expected|no tensors"):
        load_adapter(folder, BACKBONE)


def test_folders(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no such folder"):
        load_adapter(tmp_path / "nowhere")
    with pytest.raises(AdapterError, match="holds neither"):
        load_adapter(tmp_path)
    folder = write_folder(tmp_path / "a", {})
    with pytest.raises(AdapterError, match=f"give {folder}"):
        load_adapter(folder / "delta_mem_adapter.pt")
    (tmp_path / "link").symlink_to(folder)
    assert load_adapter(tmp_path / "link", BACKBONE).parameters > 0
    (folder / "delta_mem_config.json").unlink()
    with pytest.raises(AdapterError, match=r"no delta_mem_config\.json"):
        load_adapter(folder)


def test_an_empty_safetensors_file(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", {})
    save_file({}, folder / "delta_mem_adapter.safetensors")
    with pytest.raises(AdapterError, match="no tensors"):
        load_adapter(folder)
