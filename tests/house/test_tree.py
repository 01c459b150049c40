"""The tree: sizes of files, and documents that keep up with the code."""

import re
import stat
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import get_args

import pytest
import tomllib

from deltamem_vllm.config import Settings
from deltamem_vllm.plugin import _FLAGS
from deltamem_vllm.server import scope
from deltamem_vllm.server.routes import SessionInfo
from deltamem_vllm.sessions.grants import OutcomeStatus

ROOT = Path(__file__).parents[2]
LINES = 400
SOURCES = sorted(
    path.relative_to(ROOT)
    for folder in ("deltamem_vllm", "csrc", "tests", "loadtests")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".cpp", ".cu", ".cuh", ".h")
)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SESSIONS = (ROOT / "docs" / "sessions.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_no_file_is_too_long(path: Path) -> None:
    lines = len((ROOT / path).read_text(encoding="utf-8").splitlines())
    assert lines <= LINES, f"{path} has {lines} lines: split it"


@pytest.mark.parametrize("flag", _FLAGS)
def test_readme_names_every_flag(flag: str) -> None:
    assert re.search(rf"`--deltamem-{re.escape(flag)}[ `]", README)


def test_readme_names_no_flag_that_does_not_exist() -> None:
    assert set(re.findall(r"--deltamem-([a-z-]*[a-z])", README)) <= set(_FLAGS)


@pytest.mark.parametrize("flag", _FLAGS)
def test_every_flag_is_a_setting_with_the_default_that_readme_says(flag: str) -> None:
    field = Settings.model_fields[flag.replace("-", "_")]
    row = next(line for line in README.splitlines() if re.match(rf"\| `--deltamem-{re.escape(flag)}[ `]", line))
    said = row.replace("\\|", "/").split("|")[2].strip(" `")
    if not field.is_required():
        words = {"": "none", "False": "off"}
        default = f"{field.default:g}" if isinstance(field.default, float) else str(field.default)
        assert said == words.get(default, default)


@pytest.mark.parametrize("header", ["X-Session-ID", scope.MODE_HEADER, scope.VERSION_HEADER, scope.COMMIT_HEADER])
def test_readme_names_every_header(header: str) -> None:
    assert header in README


@pytest.mark.parametrize("mode", scope.MODES)
def test_readme_names_every_mode(mode: str) -> None:
    assert f"{scope.MODE_HEADER}: {mode}" in README


@pytest.mark.parametrize("status", get_args(OutcomeStatus))
def test_documents_explain_every_outcome(status: str) -> None:
    assert f"`{status}`" in README
    assert f"`{status}`" in SESSIONS


def test_documents_explain_what_a_client_sees_of_a_session() -> None:
    assert {"version", "state_bytes", "durable"} <= set(SessionInfo.model_fields)
    assert "`state_bytes`" in SESSIONS
    assert '"durable": false' in SESSIONS


@pytest.mark.parametrize(
    ("group", "name", "value"),
    [
        *(("console_scripts", name, value) for name, value in PROJECT["scripts"].items()),
        *((g, name, value) for g, points in PROJECT["entry-points"].items() for name, value in points.items()),
    ],
)
def test_entry_points_resolve(group: str, name: str, value: str) -> None:
    assert callable(EntryPoint(name, value, group).load())


@pytest.mark.parametrize(
    "document", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_links_between_documents_lead_somewhere(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    targets = [t for t in re.findall(r"\]\(([^)#]+)", text) if "://" not in t]
    missing = [t for t in targets if not ((ROOT / document).parent / t).exists()]
    assert not missing


def test_documents_name_files_that_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:[a-z_]+/)+(?:[a-z_]+\.py)?|[a-z_]+\.py)`", text))
    assert {n for n in named if not any((ROOT / base / n).exists() for base in ("deltamem_vllm", "."))} == set()


@pytest.mark.parametrize("script", [".ci/run", "deploy/cpu/install.sh"])
def test_scripts_are_executable(script: str) -> None:
    assert (ROOT / script).stat().st_mode & stat.S_IXUSR


def test_locks_pin_every_package() -> None:
    for lock in (ROOT / "deploy" / "cpu").glob("*.lock"):
        lines = [x for x in lock.read_text(encoding="utf-8").splitlines() if x and not x.startswith("#")]
        assert not [x for x in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==(\d+!)?[A-Za-z0-9.]+", x)]
