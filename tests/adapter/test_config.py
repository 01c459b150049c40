from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deltamem_vllm.adapter.config import ARCHIVED, WITHOUT_EFFECT, check_servable, load_config, parse_config
from deltamem_vllm.errors import AdapterError
from tests.adapter.making import OFFICIAL
from tests.ops.paging import make_shape


def test_the_official_file() -> None:
    config = load_config(OFFICIAL)
    assert config.memory_shape == make_shape(8)
    assert config.scaling == 2.0
    assert config.delta_heads == ("q", "o")
    assert config.variant == "TSW"
    check_servable(config, "here")


def test_missing_keys_take_the_official_defaults() -> None:
    config = parse_config({}, "here")
    assert (config.rank, config.alpha, config.delta_heads) == (8, 16.0, ("q", "k", "v", "o"))
    assert config.target_layers == ()


@pytest.mark.parametrize(
    ("given", "heads"),
    [
        (["o", "q"], ("q", "o")),
        ("q,o", ("q", "o")),
        (" O , V ", ("v", "o")),
        ("none", ()),
        ([], ()),
        (["Q"], ("q",)),
    ],
)
def test_heads(given: object, heads: tuple[str, ...]) -> None:
    assert parse_config({"delta_heads": given}, "here").delta_heads == heads


def test_words_are_stripped_and_lower_cased() -> None:
    config = parse_config({"state_update_mode": " No_Lambda ", "global_memory_mode": "SHARED_RW "}, "here")
    assert config.memory_shape.update_mode == "no_lambda"


@pytest.mark.parametrize("alpha", [16, 16.0])
def test_a_whole_number_is_a_float_where_json_makes_no_difference(alpha: float) -> None:
    assert parse_config({"alpha": alpha}, "here").alpha == 16.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rnak": 8}, r"here: unknown key 'rnak'"),
        ({"rank": 0}, r"here: rank: .*got 0"),
        ({"rank": "8"}, r"rank: .*integer.*got '8'"),
        ({"rank": 8.5}, r"rank"),
        ({"rank": True}, r"rank"),
        ({"couple_lambda": 1}, r"couple_lambda"),
        ({"alpha": float("nan")}, r"alpha"),
        ({"state_update_mode": "lambda_inside"}, r"state_update_mode: .*'lambda_inside'"),
        ({"delta_heads": ["q", "x"]}, r"delta_heads: .*unknown head 'x'"),
        ({"target_layers": [1, 1]}, r"target_layers: .*distinct"),
        ({"target_layers": [-1]}, r"target_layers: .*negative"),
        ({"trainable_delta_scale": True, "delta_scale_max": 1.0}, r"delta_scale_max 1\.0 must exceed"),
        ({"delta_scale_init": 0}, r"delta_scale_init"),
        ({"output_init": "base_qkv"}, r"output_init: .*'base_qkv'"),
        ([], r"expected a JSON object, got list"),
    ],
)
def test_refusals(values: Any, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        parse_config(values, "here")


@pytest.mark.parametrize("key", ARCHIVED)
def test_archived_designs(key: str) -> None:
    parse_config({key: ARCHIVED[key]}, "here")
    other = {int: 3, str: "other", list: [1], bool: True}[type(ARCHIVED[key])]
    with pytest.raises(AdapterError) as caught:
        parse_config({key: other}, "here")
    message = str(caught.value)
    assert key in message
    assert repr(other) in message
    assert repr(ARCHIVED[key]) in message
    assert "archived" in message


def test_archived_numbers_are_not_booleans() -> None:
    with pytest.raises(AdapterError, match="num_memory_partitions is True"):
        parse_config({"num_memory_partitions": True}, "here")


@pytest.mark.parametrize("key", sorted(WITHOUT_EFFECT))
def test_keys_without_effect(key: str) -> None:
    assert parse_config({key: 123}, "here") == parse_config({}, "here")


@pytest.mark.parametrize(
    ("values", "variant", "servable"),
    [
        ({}, "TSW", True),
        ({"num_state_heads": 4}, "MSW", True),
        ({"memory_write_granularity": "message_mean"}, "SSW", False),
        (
            {"memory_write_granularity": "sentence_mean", "num_state_heads": 2},
            "2 heads, sentence_mean",
            False,
        ),
    ],
)
def test_variants(values: dict[str, Any], variant: str, servable: bool) -> None:
    config = parse_config(values, "here")
    assert config.variant == variant
    if servable:
        check_servable(config, "here")
        return
    with pytest.raises(AdapterError, match="not served yet; token granularity only"):
        check_servable(config, "here")


def test_other_modules_are_not_served() -> None:
    config = parse_config({"target_modules": ["linear_attn"]}, "here")
    with pytest.raises(AdapterError, match="linear_attn"):
        check_servable(config, "here")


@pytest.mark.parametrize("content", ["", "{", '{"rank": 8', "\x00", "[" * 100_000])
def test_damaged_json(tmp_path: Path, content: str) -> None:
    (tmp_path / "delta_mem_config.json").write_text(content)
    with pytest.raises(AdapterError, match=r"delta_mem_config\.json"):
        load_config(tmp_path)


def test_a_missing_or_huge_config(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="is this a δ-mem adapter folder"):
        load_config(tmp_path)
    (tmp_path / "delta_mem_config.json").write_bytes(b" " * (1 << 21))
    with pytest.raises(AdapterError, match="2097152 bytes"):
        load_config(tmp_path)
