"""What is published: built, looked into, and installed into an empty environment that sees a vLLM and a torch."""

import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from deploy.release import release
from tests.deploy.shipped import ROOT

VERSION = r"\d+\.\d+\.\d+[a-z0-9.+]*"
pytestmark = pytest.mark.timeout(600)


@dataclass
class Released:
    wheel: Path
    sdist: Path
    folder: Path


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Released:
    folder = tmp_path_factory.mktemp("release")
    done = subprocess.run(
        [sys.executable, ROOT / "deploy" / "release" / "release.py", folder], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return Released(*(next(folder.glob(pattern)) for pattern in ("*.whl", "*.tar.gz")), folder)


def version_of(path: Path) -> str:
    return path.name.removesuffix(".tar.gz").split("-")[1]


def test_names_and_versions(released: Released) -> None:
    match = re.fullmatch(rf"deltamem_vllm-({VERSION})-py3-none-(many)?linux\w*_x86_64\.whl", released.wheel.name)
    assert match is not None, released.wheel.name
    assert version_of(released.sdist) == match.group(1)
    with zipfile.ZipFile(released.wheel) as wheel:
        [metadata] = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
        assert f"\nVersion: {match.group(1)}\n" in wheel.read(metadata).decode()


def test_the_wheel_has_what_it_needs_and_nothing_else(released: Released) -> None:
    with zipfile.ZipFile(released.wheel) as wheel:
        names = wheel.namelist()
    tops = {"deltamem_vllm", f"deltamem_vllm-{version_of(released.wheel)}.dist-info"}
    assert {name.split("/")[0] for name in names} == tops
    assert any(name.endswith("licenses/LICENSE") for name in names)
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "deltamem_vllm"]
    sources = set(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split())
    assert sources <= set(names), "a file of the package is missing"
    made = {name for name in names if name.startswith("deltamem_vllm/")} - sources
    libraries = [f"deltamem_vllm/ops/{name}.so" for name in ("_native", "_direct", "_cuda")]
    assert set(libraries[:2]) <= made <= set(libraries)
    assert any(name.startswith("deltamem_vllm/recall/") and name.endswith(".safetensors") for name in names)


def test_the_sdist_has_the_sources_and_no_build(released: Released) -> None:
    with tarfile.open(released.sdist) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"pyproject.toml", "PKG-INFO", "README.md", "LICENSE", "csrc/CMakeLists.txt"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]
    assert not [name for name in names if name.startswith(("tests/", "docs/", ".venv", "build/"))]


def test_the_bill_of_materials_names_what_runs(released: Released) -> None:
    document = json.loads((released.folder / "sbom.json").read_text(encoding="utf-8"))
    assert document["bomFormat"] == "CycloneDX"
    assert document["metadata"]["component"]["version"] == version_of(released.wheel)
    named = {release.normal(each["name"]): each["version"] for each in document["components"]}
    pinned = release.pins(*release.PINNED)
    assert named.keys() == pinned.keys()
    assert {name for name in named if named[name].split("+")[0] != pinned[name]} == set()
    assert "pytest" not in named
    references = {each["bom-ref"] for each in [*document["components"], document["metadata"]["component"]]}
    for each in document["dependencies"]:
        assert {each["ref"], *each.get("dependsOn", [])} <= references


def test_it_runs_where_nothing_else_of_ours_is(released: Released, tmp_path: Path) -> None:
    """In an environment with the wheel alone, that sees the packages of this one but not its editable install."""
    made = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", made], check=True, timeout=120)
    python = made / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps", released.wheel]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    [site] = made.glob("lib/python*/site-packages")
    seen = Path(next(path for path in sys.path if path.endswith("site-packages")))
    (site / "others.pth").write_text(f"{seen}\n")  # a plain path: the .pth files in there are not read
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VLLM_PLUGINS")}

    def run(*arguments: str | Path) -> str:
        done = subprocess.run(arguments, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    helped = run(made / "bin" / "deltamem", "--help")
    for word in ("adapter", "store", "keys", "audit"):
        assert word in helped
    checked = run(
        python,
        "-c",
        "import torch, deltamem_vllm\n"
        "from importlib.metadata import version\n"
        "from deltamem_vllm.ops.dispatch import select\n"
        "kernels = select(torch.device('cpu'), 'native')\n"
        "print(deltamem_vllm.__file__, version('deltamem-vllm'), kernels.description, sep='|')",
    )
    where, version, description = checked.strip().splitlines()[-1].split("|")
    assert Path(where).is_relative_to(made)
    assert version == version_of(released.wheel)
    assert "native" in description or "compiled" in description or "AVX" in description.upper(), description


def test_without_git_the_version_is_the_fallback(released: Released, tmp_path: Path) -> None:
    """A copy without .git, as in an image; and the sdist, which knows its own."""
    ask = "from scikit_build_core.metadata.setuptools_scm import dynamic_metadata as d; print(d('version', {}))"
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    env = {k: v for k, v in os.environ.items() if not k.startswith("SETUPTOOLS_SCM")}
    found = subprocess.run([sys.executable, "-c", ask], cwd=tmp_path / "copy", env=env, capture_output=True, text=True)
    assert found.stdout.strip() == "0.1.0", found.stderr
    with tarfile.open(released.sdist) as sdist:
        sdist.extractall(tmp_path / "sdist", filter="data")
    [tree] = (tmp_path / "sdist").iterdir()
    found = subprocess.run([sys.executable, "-c", ask], cwd=tree, env=env, capture_output=True, text=True)
    assert found.stdout.strip() == version_of(released.sdist), found.stderr
