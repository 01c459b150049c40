"""vLLM multiplies eight-bit weights as on a CPU without AMX: its kernels for AMX take no float32 activations, and end
the engine."""

import sys

from tests.engine.after_import import AfterImport

sys.meta_path.insert(
    0,
    AfterImport(
        "vllm.model_executor.kernels.linear.scaled_mm.cpu",
        lambda module: setattr(module, "check_cpu_sgl_kernel", lambda *weight: False),
    ),
)
