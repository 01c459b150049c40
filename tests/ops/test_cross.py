"""The CPU kernels for instruction sets that this machine lacks: NEON in an emulator, and the code for 16 lanes (that of
AVX-512) on whatever registers there are. Nightly: it needs a cross-compiler and qemu (deploy/ci/install-cross.sh).
"""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch

from deltamem_vllm.ops.layout import UPDATE_MODES, MemoryShape
from deltamem_vllm.ops.native import tiled
from tests.conftest import NIGHTLY
from tests.ops.paging import FEW_SHAPES, make_shape, name_of, random_inputs, truth
from tests.tolerances import KERNEL_READS

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(not NIGHTLY, reason="nightly: DELTAMEM_NIGHTLY=1"),
]
CPU = Path(__file__).parents[2] / "csrc" / "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
N, TOKENS, CORRECTED = 16, 50, 50
#: target: compiler, its options, what runs its programs
TARGETS: dict[str, tuple[str, list[str], list[str]]] = {
    "aarch64": ("aarch64-linux-gnu-g++", [], ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"]),
    "16 lanes": ("g++", ["-DDELTAMEM_LANES=16"], []),
}
SHAPES = [*FEW_SHAPES, make_shape(8, 2, normalize_qk=False), make_shape(21, 2), make_shape(32)]


@pytest.fixture(scope="module", params=TARGETS)
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return build(request.param, tmp_path_factory.mktemp("cross"))


def build(target: str, folder: Path, planted: tuple[str, str, str] | None = None) -> list[str]:
    """The command that runs one step on ``target``; ``planted``: a file, text of it and a mistake in its place."""
    compiler, options, runner = TARGETS[target]
    for tool in (compiler, *runner[:1]):
        if shutil.which(tool) is None:
            pytest.fail(f"{tool} is not installed: run deploy/ci/install-cross.sh")
    source = Path(shutil.copytree(CPU, folder / "cpu"))
    if planted is not None:
        name, right, wrong = planted
        text = (source / name).read_text(encoding="utf-8")
        assert text.count(right) == 1
        (source / name).write_text(text.replace(right, wrong), encoding="utf-8")
    cmake = (CPU.parent / "CMakeLists.txt").read_text(encoding="utf-8")
    flags = re.search(r"add_compile_options\(([^)]*)\)", cmake)
    assert flags, "the options that the library is built with"
    built = folder / "one_step"
    subprocess.run(
        [
            compiler, "-std=c++17", *flags[1].split(), *options, "-DDELTAMEM_ISA=isa_cross", f"-I{source}",
            str(source / "kernels.cpp"), str(Path(__file__).parent / "cross" / "one_step.cpp"), "-o", str(built),
        ],
        check=True,
    )  # fmt: skip
    return [*runner, str(built)]


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def difference(program: list[str], shape: MemoryShape, dtype: torch.dtype, folder: Path) -> float:
    """The largest difference of a step's reads from the reference's; infinite if what they correct is wrong."""
    projected, bias, state = random_inputs(shape, TOKENS)
    projected = projected.to(dtype)
    blocks, floats = -(-TOKENS // N), shape.page_floats(N)
    pages = torch.full((blocks, floats), float("nan"))
    table = torch.randperm(blocks, generator=torch.Generator().manual_seed(0)).to(torch.int32)
    pages[table[0], : shape.state_floats] = state.flatten()
    head = [
        shape.rank, shape.heads, shape.rankwise_gates, shape.couple_lambda, shape.normalize_qk,
        UPDATE_MODES.index(shape.update_mode), DTYPES.index(dtype), TOKENS, N, blocks, floats,
    ]  # fmt: skip
    data = projected.view(torch.uint8).numpy().tobytes()
    parts = [struct.pack("<11i", *head), data + bytes(-len(data) % 4)]
    parts += [tensor.numpy().tobytes() for tensor in (bias, pages, table)]
    random = torch.Generator().manual_seed(1)
    rows, matrix = (torch.randn(n, CORRECTED, generator=random).to(dtype) for n in (TOKENS, shape.width))
    parts += [_bytes(rows) + bytes(-len(_bytes(rows)) % 4), _bytes(tiled(matrix))]
    (folder / "in").write_bytes(b"".join(parts))
    subprocess.run([*program, str(folder / "in"), str(folder / "out")], check=True, timeout=120)
    result = torch.frombuffer(bytearray((folder / "out").read_bytes()), dtype=torch.float32)
    reads = result[: TOKENS * shape.width].view(TOKENS, shape.width)
    distance = (reads.double() - truth(shape, projected.float(), bias, state)[0]).abs()
    behind = result[reads.numel() + pages.numel() :].contiguous().view(dtype)[: rows.numel()].view(rows.shape)
    exact = rows.double() + reads.double() @ matrix.double()
    rounding = 2 * torch.finfo(dtype).eps * exact.abs() + 5e-6  # of fp32's sums, then of the dtype
    corrected = (behind.double() - exact).abs() <= rounding
    return float(distance.max()) if bool(distance.isfinite().all() and corrected.all()) else float("inf")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_a_step_is_the_reference(program: list[str], shape: MemoryShape, dtype: torch.dtype, tmp_path: Path) -> None:
    assert difference(program, shape, dtype, tmp_path) <= KERNEL_READS


PLANTS = (
    ("spans.h", "fused<N>(delta, spread<N>(k[j]), s[j] * gates.keep)", "s[j] * gates.keep"),
    ("correction.h", "correct_rest<D>(r, rest,", "correct_rest<D>(r, rest - 1,"),
)


@pytest.mark.parametrize("planted", PLANTS, ids=lambda planted: planted[0])
def test_a_planted_mistake_is_seen(planted: tuple[str, str, str], tmp_path: Path) -> None:
    program = build("aarch64", tmp_path, planted)
    assert difference(program, make_shape(8), torch.float32, tmp_path) > KERNEL_READS


def test_neon_fuses(program: list[str]) -> None:
    """Multiply-adds of whole registers, not of single floats."""
    if program[0] != "qemu-aarch64":
        pytest.skip("not NEON")
    run = subprocess.run(["aarch64-linux-gnu-objdump", "-d", program[-1]], check=True, capture_output=True, text=True)
    assert len(re.findall(r"fml[as]\s+v\d+\.4s", run.stdout)) > 100
