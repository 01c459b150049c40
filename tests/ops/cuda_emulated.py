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
def library(planted: tuple[str, str] | None = None) -> Path:
    """Built once per content of the sources; in ``build/``, which git ignores.

    Args:
        planted: a mistake, as text of ``common.cuh`` and what to put in its place. A process can load one library only.
    """
    sources = sorted([*(CSRC / "cuda").iterdir(), *(CSRC / "bindings").iterdir(), *HERE.iterdir()])
    digest = hashlib.sha256(
        b"".join([f"{torch.__version__}{planted}".encode(), *(path.read_bytes() for path in sources)])
    )
    built = ROOT / "build" / "emulated" / f"{digest.hexdigest()[:16]}.so"
    if built.is_file():
        return built
    root = Path(torch.__file__).parent
    built.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=built.parent) as folder:
        target = Path(folder) / built.name
        csrc = Path(shutil.copytree(CSRC, Path(folder) / "csrc"))
        if planted is not None:
            common = csrc / "cuda" / "common.cuh"
            text = common.read_text(encoding="utf-8")
            assert text.count(planted[0]) == 1
            common.write_text(text.replace(*planted), encoding="utf-8")
        subprocess.run(
            [
                *os.environ.get("CXX", "g++").split(), "-std=c++17", "-O2", "-fPIC", "-shared", "-ffp-contract=off",
                "-Wall", "-Werror", "-Wno-unknown-pragmas", f"-I{HERE}", "-isystem", str(root / "include"),
                "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DDELTAMEM_EMULATED", "-x", "c++",
                str(csrc / "cuda" / "kernels.cu"), str(csrc / "bindings" / "cuda_ops.cpp"), "-o", str(target),
                f"-L{root / 'lib'}", "-ltorch_cpu",
            ],
            check=True,
        )  # fmt: skip
        shutil.move(target, built)  # within one folder: nobody sees half a library
    return built
