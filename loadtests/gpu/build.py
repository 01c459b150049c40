"""Part 1: what machine this is, and the CUDA library for it, built with nvcc into the output folder."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from pathlib import Path

import torch

from deltamem_vllm.ops.cuda import CUDA_LIBRARY
from loadtests.gpu.common import Part

CSRC = Path(__file__).parents[2] / "csrc"


def command(nvcc: str, library: Path, capability: tuple[int, int]) -> list[str]:
    """The compiler's command line for a GPU of a compute capability."""
    root = Path(torch.__file__).parent
    code = "".join(map(str, capability))
    return [
        nvcc, "-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC", "-lineinfo",
        "-gencode", f"arch=compute_{code},code=sm_{code}", "-isystem", str(root / "include"),
        "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DUSE_CUDA",
        str(CSRC / "cuda" / "kernels.cu"), str(CSRC / "bindings" / "cuda_ops.cpp"), "-o", str(library),
        "-L", str(root / "lib"), "-ltorch_cuda", "-ltorch_cpu", "-Xlinker", "-rpath", "-Xlinker", str(root / "lib"),
    ]  # fmt: skip


def main() -> None:
    """Describe, build, try."""
    part = Part.begin("build")
    part.note("torch", torch.__version__)
    part.note("python", platform.python_version())
    if part.tiny:
        part.note("gpu", "none: a tiny run on the CPU")
        part.note("command", command("nvcc", part.out / CUDA_LIBRARY, (9, 0)))
        return
    part.note("gpu", torch.cuda.get_device_name())
    part.note("driver and CUDA", f"{torch.version.cuda}, {torch.cuda.get_device_properties(0).total_memory >> 30} GiB")
    nvcc = shutil.which("nvcc") or str(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "nvcc")
    start = time.perf_counter()
    run = subprocess.run(
        command(nvcc, part.out / CUDA_LIBRARY, torch.cuda.get_device_capability()),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    part.note("build seconds", round(time.perf_counter() - start, 1))
    if run.returncode:
        part.note("build failed", (run.stdout + run.stderr)[-3000:])
        raise SystemExit(1)


if __name__ == "__main__":
    main()
