"""The CUDA kernels' own source, compiled for a CPU (``emulated/cuda_runtime.h``)."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
HERE = Path(__file__).parent / "emulated"


@functools.cache
def library() -> Path:
    """Built once per content of the sources; in ``build/``, which git ignores."""
    sources = sorted([*(CSRC / "cuda").iterdir(), *(CSRC / "bindings").iterdir(), *HERE.iterdir()])
    digest = hashlib.sha256(b"".join([torch.__version__.encode(), *(path.read_bytes() for path in sources)]))
    built = ROOT / "build" / "emulated" / f"{digest.hexdigest()[:16]}.so"
    if built.is_file():
        return built
    root = Path(torch.__file__).parent
    built.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=built.parent) as folder:
        target = Path(folder) / built.name
        subprocess.run(
            [
                *os.environ.get("CXX", "g++").split(), "-std=c++17", "-O2", "-fPIC", "-shared", "-ffp-contract=off",
                "-Wall", "-Werror", "-Wno-unknown-pragmas", f"-I{HERE}", "-isystem", str(root / "include"),
                "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DDELTAMEM_EMULATED", "-x", "c++",
                str(CSRC / "cuda" / "kernels.cu"), str(CSRC / "bindings" / "cuda_ops.cpp"), "-o", str(target),
                f"-L{root / 'lib'}", "-ltorch_cpu",
            ],
            check=True,
        )  # fmt: skip
        shutil.move(target, built)  # within one folder: nobody sees half a library
    return built
