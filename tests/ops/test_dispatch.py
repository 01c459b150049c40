"""The choice is logged with its reason; auto never falls back silently; native never falls back at all."""

from __future__ import annotations

import ast
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

import deltamem_vllm.ops
from deltamem_vllm.errors import ConfigError
from deltamem_vllm.ops import dispatch
from deltamem_vllm.ops.dispatch import select
from deltamem_vllm.ops.native import NativeOps
from deltamem_vllm.ops.paged_torch import TorchOps


@pytest.fixture(autouse=True)
def _fresh_choice(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level(logging.INFO, logger="deltamem_vllm.ops.dispatch")
    select.cache_clear()
    yield
    select.cache_clear()


def test_auto_takes_native_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    ops = select("cpu")
    assert isinstance(ops, NativeOps)
    assert ops.isa in ("portable", "avx2", "avx512")
    assert select("cpu") is ops
    assert caplog.messages == [f"delta rule: native ({ops.isa}), because device=cpu"]


@pytest.mark.parametrize("broken", ["missing", "garbage"])
def test_auto_warns_once_with_the_reason_and_the_remedy(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    library = tmp_path / "_native.so"
    library.write_bytes(b"not a library")
    monkeypatch.setattr(dispatch, "find_library", lambda: library if broken == "garbage" else None)
    if broken == "garbage":
        monkeypatch.setattr(dispatch, "NativeOps", _FailingNative)
    for _ in range(2):
        assert isinstance(select("cpu"), TorchOps)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "torch (slow), because _native.so" in record.message
    assert "pip install" in record.message
    with pytest.raises(ConfigError, match=r"native was asked for, but _native\.so"):
        select("cpu", "native")


class _FailingNative:
    def __init__(self, library: Path) -> None:
        raise OSError(f"{library}: file too short")


def test_torch_on_request_is_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert isinstance(select("cpu", "torch"), TorchOps)
    assert [record.levelno for record in caplog.records] == [logging.INFO]


def test_other_devices(caplog: pytest.LogCaptureFixture) -> None:
    assert isinstance(select("cuda:0"), TorchOps)
    assert "device=cuda" in caplog.text
    with pytest.raises(ConfigError, match="device=cuda"):
        select("cuda:0", "native")
    with pytest.raises(ConfigError, match="'fast'"):
        select("cpu", "fast")  # type: ignore[arg-type]


def test_ops_imports_nothing_of_ours() -> None:
    for path in Path(deltamem_vllm.ops.__path__[0]).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            ours = [name for name in names if name.startswith("deltamem_vllm")]
            assert all(name.startswith(("deltamem_vllm.ops", "deltamem_vllm.errors")) for name in ours), path
            assert not any(name.split(".")[0] == "vllm" for name in names), path
