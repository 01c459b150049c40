"""Attention layers pass by a connector that transfers no keys and values, and by no other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
from vllm.distributed.kv_transfer import kv_transfer_state
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1
from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector
from vllm.model_executor.layers.attention import attention, kv_transfer_utils

from deltamem_vllm import compat
from deltamem_vllm.sessions.connector import DeltaMemConnector

LAYER = "model.layers.0.self_attn.attn"


@pytest.fixture
def attend(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], mock.Mock]:
    """Runs an attention layer with a connector, and returns what looked the layer up."""
    looked_up = mock.Mock(return_value=("metadata", None, "cache", None))
    monkeypatch.setattr(attention, "get_attention_context", looked_up)
    monkeypatch.setattr(kv_transfer_utils, "has_kv_transfer_group", kv_transfer_state.has_kv_transfer_group)
    compat.skip_layer_transfers()

    @kv_transfer_utils.maybe_transfer_kv_layer
    def layer(query: int, layer_name: str) -> int:
        return query + 1

    def run(connector: Any) -> mock.Mock:
        monkeypatch.setattr(kv_transfer_state, "_KV_CONNECTOR_AGENT", connector)
        assert layer(1, LAYER) == 2
        return looked_up

    return run


def test_without_a_connector_nothing_is_looked_up(attend: Callable[[Any], mock.Mock]) -> None:
    attend(None).assert_not_called()


def test_ours_transfers_no_layers(attend: Callable[[Any], mock.Mock]) -> None:
    ours = mock.Mock(spec=DeltaMemConnector)
    ours.transfers_no_layers = DeltaMemConnector.transfers_no_layers
    attend(ours).assert_not_called()
    ours.wait_for_layer_load.assert_not_called()


@pytest.mark.parametrize("kind", [KVConnectorBase_V1, MultiConnector])
def test_another_one_still_does(kind: type, attend: Callable[[Any], mock.Mock]) -> None:
    other = mock.Mock(spec=kind)
    attend(other).assert_called_once()
    other.wait_for_layer_load.assert_called_once_with(LAYER)
    other.save_kv_layer.assert_called_once_with(LAYER, "cache", "metadata")
