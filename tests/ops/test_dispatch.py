"""The choice is logged with its reason; auto never falls back silently; native never falls back at all."""

from __future__ import annotations

import ast
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import deltamem_vllm.ops
from deltamem_vllm.errors import ConfigError
from deltamem_vllm.ops import dispatch
from deltamem_vllm.ops.dispatch import select
from deltamem_vllm.ops.native import NativeOps
from deltamem_vllm.ops.paged_torch import TorchOps
from deltamem_vllm.ops.selfcheck import why_not


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
    monkeypatch.setattr(dispatch, "find_library", lambda name: library if broken == "garbage" else None)
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


def test_a_gpu_without_kernels_gets_torch_and_every_reason(caplog: pytest.LogCaptureFixture) -> None:
    assert isinstance(select("cuda:0"), TorchOps)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "_cuda.so for device=cuda has not been built: build it (nvcc" in record.message
    assert "Triton cannot be imported" in record.message
    with pytest.raises(ConfigError, match=r"native was asked for, but _cuda\.so"):
        select("cuda:0", "native")
    with pytest.raises(ConfigError, match=r"triton was asked for, but Triton cannot be imported.*pip install"):
        select("cuda:0", "triton")


def test_other_devices() -> None:
    with pytest.raises(ConfigError, match="device=meta"):
        select("meta", "native")
    with pytest.raises(ConfigError, match="triton was asked for, but there is no Triton kernel for device=cpu"):
        select("cpu", "triton")
    with pytest.raises(ConfigError, match="'fast'"):
        select("cpu", "fast")  # type: ignore[arg-type]


class _OnCpu(TorchOps):
    """Stands in for a kernel on a GPU, of which there may be none here."""

    name, description, graph_safe = "stand-in", "stand-in", True

    def __init__(self, library: Path) -> None:
        self.library = library


class _Wrong(_OnCpu):
    def page_scan(self, shape, projected, bias, pages, batch, reads) -> None:  # type: ignore[no-untyped-def]
        super().page_scan(shape, projected, bias, pages, batch, reads)
        reads[8, 0] += 1e-3


class _Silent(_OnCpu):
    def page_scan(self, *args: object) -> None:
        """A kernel that was launched and never ran."""


class _Refuses(_OnCpu):
    def page_scan(self, *args: object) -> None:
        raise RuntimeError("no kernel image is available for execution on the device\nCUDA_LAUNCH_BLOCKING")


@pytest.mark.parametrize(
    ("kernels", "reason"),
    [(_Wrong, "e-04 of its largest value"), (_Silent, "off by"), (_Refuses, "RuntimeError: no kernel image")],
)
def test_what_does_not_work_on_a_device_is_not_chosen(kernels: type[_OnCpu], reason: str) -> None:
    problem = why_not(kernels(Path()), torch.device("cpu"))
    assert problem is not None
    assert reason in problem
    assert "\n" not in problem


def test_what_works_on_a_device_is_chosen() -> None:
    assert why_not(_OnCpu(Path()), torch.device("cpu")) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_trial_does_not_depend_on_the_defaults_under_which_a_model_is_built(dtype: torch.dtype) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            assert why_not(_OnCpu(Path()), torch.device("cpu")) is None
    finally:
        torch.set_default_dtype(before)


def test_ops_imports_nothing_of_ours() -> None:
    for path in Path(deltamem_vllm.ops.__path__[0]).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            ours = [name for name in names if name.startswith("deltamem_vllm")]
            assert all(name.startswith(("deltamem_vllm.ops", "deltamem_vllm.errors")) for name in ours), path
            assert not any(name.split(".")[0] == "vllm" for name in names), path
