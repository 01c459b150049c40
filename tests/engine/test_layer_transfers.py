"""Attention layers ask a connector first whether there is anything to transfer, and look themselves up only then."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
from vllm.model_executor.layers.attention import attention, kv_transfer_utils

from deltamem_vllm import compat

LAYER = "model.layers.0.self_attn.attn"


class Connector:
    """Transfers in a step for which it has metadata."""

    def __init__(self, transfers: bool) -> None:
        self.transfers, self.said = transfers, list[str]()

    def has_connector_metadata(self) -> bool:
        return self.transfers

    def wait_for_layer_load(self, layer: str) -> None:
        self.said.append("wait")

    def save_kv_layer(self, layer: str, cache: Any, metadata: Any) -> None:
        self.said.append("save")


@pytest.mark.parametrize("group", [True, False])
@pytest.mark.parametrize("transfers", [True, False])
def test_only_who_transfers_pays(transfers: bool, group: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    connector, looked_up = Connector(transfers), mock.Mock(return_value=("metadata", None, "cache", None))
    monkeypatch.setattr(kv_transfer_utils, "has_kv_transfer_group", lambda: group)
    monkeypatch.setattr(kv_transfer_utils, "is_v1_kv_transfer_group", lambda connector=None: True)
    monkeypatch.setattr(kv_transfer_utils, "get_kv_transfer_group", lambda: connector)
    monkeypatch.setattr(attention, "get_attention_context", looked_up)
    compat.skip_layer_transfers()

    @kv_transfer_utils.maybe_transfer_kv_layer
    def attend(query: int, layer_name: str) -> int:
        return query + 1

    assert attend(1, LAYER) == 2
    assert connector.said == (["wait", "save"] if transfers and group else [])
    assert looked_up.call_count == (transfers and group)
