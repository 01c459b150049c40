"""Test only: vLLM's V2 model runner, with asynchronous scheduling, on a CPU.

Put on ``PYTHONPATH`` of an engine's process. V2 needs Triton kernels, and Triton has no CPU backend: this pretends
there is one and has Triton's interpreter run them. vLLM's CPU platform switches asynchronous scheduling off; this
switches it on again.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"


class _Driver:
    @staticmethod
    def is_active() -> bool:
        return True


class _Backend:
    driver = _Driver
    compiler = None


class _AfterCpuPlatform(importlib.abc.MetaPathFinder):
    """Wraps ``CpuPlatform.check_and_update_config`` once its module has been imported."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != "vllm.platforms.cpu":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        loader: Any = spec.loader
        execute = loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            original = module.CpuPlatform.check_and_update_config.__func__

            def check_and_update_config(cls: Any, vllm_config: Any) -> None:
                original(cls, vllm_config)
                vllm_config.scheduler_config.async_scheduling = True

            module.CpuPlatform.check_and_update_config = classmethod(check_and_update_config)

        loader.exec_module = exec_module
        return spec


if importlib.util.find_spec("triton") is not None:  # other Pythons start with this file on their path, too
    from triton import backends

    backends.backends["cpu"] = _Backend
sys.meta_path.insert(0, _AfterCpuPlatform())
