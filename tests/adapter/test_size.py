"""`deltamem size`: what it reckons is what the store, the host's memory and the pages of real code take."""

import json
from contextlib import closing
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deltamem_vllm.adapter.weights import load_adapter
from deltamem_vllm.cli import app
from deltamem_vllm.ops.layout import SMALLEST_KERNEL_BLOCK, MemoryShape
from deltamem_vllm.sessions.directory import Directory
from deltamem_vllm.sizing import TURNS, Sizes, _record, readable, sizes
from deltamem_vllm.store.sqlite import SQLiteStore

BUNDLED = Path(__file__).parents[2] / "deltamem_vllm" / "recall" / "adapter"
LAYERS = 4


@pytest.fixture(params=[1, 4])
def shape(request: pytest.FixtureRequest) -> MemoryShape:
    return MemoryShape(
        rank=8,
        heads=request.param,
        rankwise_gates=True,
        couple_lambda=True,
        update_mode="standard",
        normalize_qk=True,
    )


@pytest.fixture
def found(shape: MemoryShape) -> Sizes:
    return sizes(shape, LAYERS)


@pytest.mark.parametrize("which", [0, 1])
def test_a_record_takes_so_much_in_a_store(shape: MemoryShape, found: Sizes, which: int, tmp_path: Path) -> None:
    record = _record(shape, LAYERS, TURNS[which])
    with closing(SQLiteStore(tmp_path / "s.db")) as store:
        store.put(record, None)
        assert store.usage(record.key.tenant).bytes == found.record[which]


@pytest.mark.parametrize("which", [0, 1])
def test_a_session_takes_so_much_of_the_budget(shape: MemoryShape, found: Sizes, which: int) -> None:
    record = _record(shape, LAYERS, TURNS[which])
    directory = Directory(1 << 30)
    directory.get(record.key).set_record(record)
    assert directory.used == found.host[which]


def test_a_page_has_that_room(shape: MemoryShape, found: Sizes) -> None:
    page = 4 * shape.page_floats(SMALLEST_KERNEL_BLOCK) * LAYERS
    assert found.page_per_token * SMALLEST_KERNEL_BLOCK == page
    assert page >= 4 * shape.content_floats(SMALLEST_KERNEL_BLOCK) * LAYERS


def test_the_command_reckons_the_adapter_that_it_is_given() -> None:
    adapter = load_adapter(BUNDLED)
    done = CliRunner().invoke(app, ["size", str(BUNDLED), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["state"] == adapter.state_bytes
    done = CliRunner().invoke(app, ["size", str(BUNDLED), "--slots", "3"])
    assert "pool of 3 slots on the device" in done.output
    assert readable(3 * adapter.state_bytes) in done.output


def test_a_folder_that_is_no_adapter_is_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["size", str(tmp_path)])
    assert done.exit_code == 1
    assert "error: " in done.output


@pytest.mark.parametrize(
    ("count", "said"), [(0, "0 bytes"), (999, "999 bytes"), (1000, "0.977 KiB"), (1 << 30, "1 GiB")]
)
def test_bytes_are_readable(count: int, said: str) -> None:
    assert readable(count) == said
