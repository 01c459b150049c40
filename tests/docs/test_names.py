"""What the documents name exists, and what exists is named."""

import ast
import importlib
import importlib.util
import re
from functools import cache
from typing import Any, get_args

import pytest
import typer

from deltamem_vllm import errors
from deltamem_vllm.cli import app
from deltamem_vllm.metrics import TABLE
from deltamem_vllm.plugin import _FLAGS
from deltamem_vllm.server import scope
from deltamem_vllm.server.models import SessionInfo
from deltamem_vllm.sessions.grants import OutcomeStatus
from deltamem_vllm.store.url import OPTIONS
from docs.generate.settings import SEE
from tests.docs.reading import PRESENT, ROOT, code, headings

HTTP = PRESENT["docs/http.md"]
CONFIGURATION = PRESENT["docs/configuration.md"]
SERVER = ROOT / "deltamem_vllm" / "server"
ALL = "\n".join(PRESENT.values())
SERIES = ("", "_bucket", "_sum", "_count")
METRICS = {metric.name: metric for metric in TABLE}
NO_METRICS = {"deltamem_vllm", "deltamem_elided_tokens"}
"""The package, and a field of `usage`."""
CLICK: Any = typer.main.get_command(app)


def first_column(text: str) -> list[str]:
    """What the rows of a document's tables begin with, where that is code."""
    return re.findall(r"^\| `([^`]+)`", text, re.MULTILINE)


@pytest.mark.parametrize("document", PRESENT)
def test_no_flag_is_named_that_does_not_exist(document: str) -> None:
    assert set(re.findall(r"--deltamem-([a-z-]*[a-z])", PRESENT[document])) <= set(_FLAGS)


@pytest.mark.parametrize("flag", _FLAGS)
def test_every_flag_is_in_the_reference(flag: str) -> None:
    assert f"--deltamem-{flag}" in {each.split()[0] for each in first_column(CONFIGURATION)}


def test_more_is_said_only_of_flags_that_exist() -> None:
    assert set(SEE) <= set(_FLAGS)


@pytest.mark.parametrize("option", [name for options in OPTIONS.values() for name in options])
def test_every_option_of_a_store_is_in_the_reference(option: str) -> None:
    assert f"{option}=" in first_column(CONFIGURATION)


def test_variables_of_the_environment_exist() -> None:
    settings = {f"DELTAMEM_{flag.replace('-', '_').upper()}" for flag in _FLAGS}
    folders = ("deltamem_vllm", "tests", "csrc", "deploy")
    sources = [p for folder in folders for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".sh", ".txt", "")]
    sources += (ROOT / "deploy" / "docker").iterdir()
    there = "".join(p.read_text(encoding="utf-8") for p in sources if p.is_file() and p.name != "test_names.py")
    named = set(re.findall(r"\bDELTAMEM_[A-Z_]+[A-Z]\b", ALL))
    assert {name for name in named - settings if name not in there} == set()


def headers_of_the_code() -> set[str]:
    """Headers that the server's code names: ours, and those of HTTP's that its routes take."""
    found = set()
    for path in SERVER.glob("*.py"):
        strings = {n.value for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, ast.Constant)}
        found |= {s for s in strings if isinstance(s, str) and re.fullmatch(r"(X|If|Idempotency)(-[A-Z][A-Za-z]+)+", s)}
    return found


def test_headers() -> None:
    known = headers_of_the_code()
    assert {"X-Session-ID", scope.MODE_HEADER, scope.COMMIT_HEADER, "If-Match", "Idempotency-Key"} <= known
    assert {header for header in known if not re.search(rf"^\| `{header}\b", HTTP, re.MULTILINE)} == set()
    assert set(re.findall(r"\bX-(?:Session|DeltaMem)(?:-[A-Z][A-Za-z]*)+", ALL)) <= known


@pytest.mark.parametrize("mode", scope.MODES)
def test_every_mode_is_named(mode: str) -> None:
    assert f"| `{scope.MODE_HEADER}: {mode}` |" in HTTP


@pytest.mark.parametrize("status", get_args(OutcomeStatus))
def test_every_outcome_is_explained(status: str) -> None:
    assert f"| `{status}` |" in HTTP
    assert f"`{status}`" in PRESENT["docs/sessions.md"]


def test_what_a_client_sees_of_a_session_is_explained() -> None:
    assert {"version", "state_bytes", "durable"} <= set(SessionInfo.model_fields)
    assert "`state_bytes`" in PRESENT["docs/sessions.md"]
    assert '"durable": false' in PRESENT["docs/sessions.md"]


def routes_of_the_code() -> set[str]:
    """Methods and paths of every router that the plugin gives vLLM's application."""
    tree = ast.parse((SERVER / "endpoints.py").read_text(encoding="utf-8"))
    made = [
        ast.unparse(n.args[0])
        for n in ast.walk(tree)
        if isinstance(n, ast.Call) and "include_router" in ast.unparse(n.func)
    ]
    endpoints = importlib.import_module("deltamem_vllm.server.endpoints")
    routers = [getattr(endpoints, re.match(r"\w+", call)[0])() for call in made]  # type: ignore[index]
    return {f"{method} {route.path}" for router in routers for route in router.routes for method in route.methods}


def test_routes() -> None:
    known = routes_of_the_code()
    assert {"GET /v1/sessions", "POST /v1/sessions/{session_id}/facts"} <= known
    assert known - set(first_column(ALL)) == set()
    nameless = {re.sub(r"\{\w+\}", "{}", route) for route in known}
    named = re.findall(r"\b(?:GET|POST|PATCH|PUT|DELETE) /v1/sessions[^`?\s]*", ALL)
    spoken = {re.sub(r"\{\w+\}|3fa9c2d17b04…", "{}", route) for route in named}
    assert spoken <= nameless


@pytest.mark.parametrize("document", PRESENT)
def test_metrics_exist_with_their_labels(document: str) -> None:
    text = PRESENT[document]
    tables = {f"deltamem_{name}" for name in ("sessions", "versions")} if document == "docs/stores.md" else set()
    named = set(re.findall(r"(?<![\w:])deltamem_[a-z_]*[a-z]", text)) - NO_METRICS - tables
    assert named <= {name + end for name in METRICS for end in SERIES}
    for name, matchers in re.findall(r"\b(deltamem_[a-z_]+)\{([^}]+)\}", text):
        metric = METRICS[name if name in METRICS else re.sub(r"_(bucket|sum|count)$", "", name)]
        values = dict(zip(metric.labels, metric.values, strict=True))
        for label, value in re.findall(r'(\w+)!?=~?"([^"]*)"', matchers):
            if label == "le":
                assert float(value) in metric.buckets, (name, value)
            else:
                assert set(value.split("|")) <= set(values[label] or [value]), (name, label, value)


def test_every_alert_has_a_section_of_the_runbook() -> None:
    rules = (path.read_text(encoding="utf-8") for path in (ROOT / "deploy" / "prometheus").rglob("*.yml"))
    alerts = {name for text in rules for name in re.findall(r"^ *- alert: (\w+)", text, re.MULTILINE)}
    sections = {each for each in headings(PRESENT["docs/operations.md"]) if re.fullmatch(r"Deltamem\w+", each)}
    assert sections
    assert alerts <= sections, "an alert wakes somebody who finds nothing to do"
    assert not alerts or sections == alerts


def test_every_class_of_errors_is_named() -> None:
    classes = {name for name, each in vars(errors).items() if isinstance(each, type) and issubclass(each, Exception)}
    table = HTTP.partition("| class | who must act")[2].partition("## ")[0]
    assert set(first_column(table)) == classes


@pytest.mark.parametrize("document", PRESENT)
def test_commands_are_as_the_parser_has_them(document: str) -> None:
    for line in code(PRESENT[document]):
        words = line.split()
        if words[:1] != ["deltamem"] or len(words) < 2 or not re.fullmatch(r"[a-z]+", words[1]):
            continue
        command, rest = CLICK.commands[words[1]], words[2:]
        if hasattr(command, "commands"):
            if not rest or not re.fullmatch(r"[a-z]+", rest[0]):
                continue
            command, rest = command.commands[rest[0]], rest[1:]
        options = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        assert {word.strip("[]") for word in rest if word.strip("[").startswith("--")} <= options, line


@pytest.mark.parametrize("document", PRESENT)
def test_targets_and_modules_exist(document: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for line in code(PRESENT[document]):
        for target in re.findall(r"(?:^|\s)make ([a-z-]+)", line):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), line
        for module in re.findall(r"(?:python3?|\$PY) -m ((?:deltamem_vllm|loadtests|docs)[a-z_.]*)", line):
            assert importlib.util.find_spec(module), line


@cache
def files() -> list[str]:
    """Every file of the repository that a document may speak of, each after a slash."""
    folders = ("deltamem_vllm", "tests", "csrc", "deploy", "loadtests", "docs", ".ci")
    found = [path for folder in folders for path in (ROOT / folder).rglob("*.*") if "node_modules" not in path.parts]
    return [f"/{path.relative_to(ROOT).as_posix()}" for path in [*ROOT.glob("*.*"), *found]]


@pytest.mark.parametrize("document", PRESENT)
def test_files_exist(document: str) -> None:
    pattern = r"(?<![\w./-])[a-z][\w./-]*\.(?:py|cuh|cu|h|sh|yaml|yml|lock)\b"
    named = {name for each in code(PRESENT[document]) for name in re.findall(pattern, each.replace("../", ""))}
    assert {name for name in named if not any(path.endswith(f"/{name}") for path in files())} == set()
