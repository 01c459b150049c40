"""The configurations of vLLM under which the answers must stay the same."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.engine.engine import ASK_INSIDE, Setup
from tests.engine.official import Case

TRITON = os.environ.get("DELTAMEM_TEST_TRITON") or str(Path(sys.prefix) / "triton")
"""A folder with Triton, which only these tests want: installed beside the packages, not among them (see
``deploy/cpu/install.sh``), so that vLLM runs as it does for users, whose CPU machines have none."""

OPTIONS: dict[str, dict[str, Any]] = {
    "chunked": {"max_num_batched_tokens": 24, "enable_chunked_prefill": True},
    "uncached": {"enable_prefix_caching": False},
    "ngram": {
        "speculative_config": {
            "method": "ngram",
            "num_speculative_tokens": 3,
            "prompt_lookup_min": 1,
            "prompt_lookup_max": 3,
        }
    },
    "compiled": {"enforce_eager": False, "compilation_config": {"mode": 3}},
    "v2_async": {},
    "own_process": {},
    "tp2": {"tensor_parallel_size": 2},
    "pp2": {"pipeline_parallel_size": 2, "enforce_eager": False},  # eager PP=2 fails on a CPU in vLLM itself
}

WORKERS = ("own_process", "tp2", "pp2")
"""Workers in processes of their own, as vLLM has them on a CPU."""
ENV: dict[str, dict[str, str]] = {
    "compiled": {"VLLM_DISABLE_COMPILE_CACHE": "1", **ASK_INSIDE},
    "tp2": {"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
    "pp2": {"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
}


def setup(name: str, case: Case, **options: Any) -> Setup:
    """A configuration by name, for one case."""
    path: tuple[str, ...] = ()
    if name == "v2_async":
        if not Path(TRITON, "triton").is_dir():
            pytest.fail(
                f"the V2 model runner needs Triton in {TRITON}: run deploy/cpu/install.sh, or name another "
                "folder in DELTAMEM_TEST_TRITON (pip install --no-deps --target DIR triton==3.6.0)"
            )
        path = (str(Path(__file__).parent / "v2_shim"), TRITON)
    return Setup(
        case.model,
        case.adapter,
        {**OPTIONS[name], **options},
        env=ENV.get(name, {}),
        path=path,
        workers=name in WORKERS,
    )
