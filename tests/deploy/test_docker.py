"""The Dockerfiles: hadolint, and what it does not look at. No image is built here: `test_release` runs their steps that
build and install the wheel."""

import re
from pathlib import Path

import pytest
import tomllib

from deploy.release.release import normal, pins
from tests.deploy.shipped import DEPLOY, ROOT, tool

DOCKERFILES = sorted(path for path in (DEPLOY / "docker").glob("Dockerfile.*") if path.suffix != ".dockerignore")


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint_finds_nothing(path: Path) -> None:
    done = tool("hadolint", path)
    assert done.returncode == 0, done.stdout


def test_hadolint_sees_a_planted_mistake(tmp_path: Path) -> None:
    planted = tmp_path / "Dockerfile"
    planted.write_text(DOCKERFILES[0].read_text(encoding="utf-8").replace("USER 10001:10001", "USER root"))
    done = tool("hadolint", planted)
    assert "DL3002" in done.stdout


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_runs_as_nobody_in_particular_and_says_how_it_is(path: Path) -> None:
    last = path.read_text(encoding="utf-8").rpartition("\nFROM ")[2]
    assert re.findall(r"^USER (.*)$", last, re.MULTILINE) == ["10001:10001"]
    assert "HEALTHCHECK" in last
    assert "/health" in last
    assert 'ENTRYPOINT ["vllm", "serve"]' in last


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_no_secret_is_baked_in_and_the_context_has_none(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"(?i)(ENV|ARG)\s[^\n]*(password|secret|token|api_key)", text)
    ignored = path.with_name(f"{path.name}.dockerignore").read_text(encoding="utf-8").splitlines()
    assert ignored[1] == "*", "everything is left out that is not named"
    kept = [line[1:] for line in ignored if line.startswith("!")]
    assert all((ROOT / each).exists() for each in kept)
    lines = re.findall(r"^COPY (?!--from)(.*)$", text, re.MULTILINE)
    copied = [source for line in lines for source in line.split()[:-1]]
    assert all((ROOT / each).exists() and (each == "." or each.startswith(tuple(kept))) for each in copied), copied


def test_images_have_the_versions_that_the_tests_have() -> None:
    tested = pins(DEPLOY / "cpu" / "requirements.lock", DEPLOY / "cpu" / "requirements-dev.lock")
    for name in ("runtime.txt", "build.txt"):
        for package, version in pins(DEPLOY / "docker" / name).items():
            assert tested[package] == version, f"{name}: {package}"


def test_images_have_all_that_the_package_needs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    needed = [*project["dependencies"], *extras["postgres"], *extras["redis"], *extras["encryption"]]
    names = {normal(re.split(r"[\[<>=;~! ]", each)[0]) for each in needed}
    there = pins(DEPLOY / "cpu" / "requirements.lock", DEPLOY / "docker" / "runtime.txt").keys() | {"vllm"}
    assert names <= there, "vLLM's own set or deploy/docker/runtime.txt must have it"
