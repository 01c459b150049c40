"""Test only: vLLM's V2 model runner, with asynchronous scheduling, on a CPU.

Put on ``PYTHONPATH`` of an engine's process. V2 needs Triton kernels, and Triton has no CPU backend: this pretends
there is one and has Triton's interpreter run them. vLLM's CPU platform switches asynchronous scheduling off; this
switches it on again.
"""

import importlib.util
import os
from typing import Any

from tests.engine.after_import import after_import

os.environ["TRITON_INTERPRET"] = "1"
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"


class _Driver:
    @staticmethod
    def is_active() -> bool:
        return True


class _Backend:
    driver = _Driver
    compiler = None


def _schedule_asynchronously(module: Any) -> None:
    original = module.CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        original(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    module.CpuPlatform.check_and_update_config = classmethod(check_and_update_config)


if importlib.util.find_spec("triton") is not None:  # other Pythons start with this file on their path, too
    from triton import backends  # type: ignore[import-not-found, unused-ignore]

    backends.backends["cpu"] = _Backend
after_import("vllm.platforms.cpu", _schedule_asynchronously)
