"""The tree: sizes of files, entry points, scripts, locks. Documents have tests of their own, in tests/docs."""

import re
import stat
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import tomllib

from deltamem_vllm.config import Settings
from deltamem_vllm.plugin import _FLAGS

ROOT = Path(__file__).parents[2]
LINES = 400
SOURCES = sorted(
    path.relative_to(ROOT)
    for folder in ("deltamem_vllm", "csrc", "tests", "loadtests", "docs")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".cpp", ".cu", ".cuh", ".h")
)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_no_file_is_too_long(path: Path) -> None:
    lines = len((ROOT / path).read_text(encoding="utf-8").splitlines())
    assert lines <= LINES, f"{path} has {lines} lines: split it"


def test_every_flag_is_a_setting() -> None:
    """The reference of docs/configuration.md takes defaults and bounds from there."""
    assert {flag.replace("-", "_") for flag in _FLAGS} == set(Settings.model_fields) - {"control"}


@pytest.mark.parametrize(
    ("group", "name", "value"),
    [
        *(("console_scripts", name, value) for name, value in PROJECT["scripts"].items()),
        *((g, name, value) for g, points in PROJECT["entry-points"].items() for name, value in points.items()),
    ],
)
def test_entry_points_resolve(group: str, name: str, value: str) -> None:
    assert callable(EntryPoint(name, value, group).load())


@pytest.mark.parametrize("script", [".ci/run", "deploy/cpu/install.sh"])
def test_scripts_are_executable(script: str) -> None:
    assert (ROOT / script).stat().st_mode & stat.S_IXUSR


def test_locks_pin_every_package() -> None:
    for lock in (ROOT / "deploy" / "cpu").glob("*.lock"):
        lines = [x for x in lock.read_text(encoding="utf-8").splitlines() if x and not x.startswith("#")]
        assert not [x for x in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==(\d+!)?[A-Za-z0-9.]+", x)]
