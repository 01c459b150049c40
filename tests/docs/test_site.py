"""The site: built strictly, current, and complete without a network."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from docs.generate import pages
from tests.docs.reading import DOCS, ROOT


def build(config: Path, target: Path) -> "subprocess.CompletedProcess[str]":
    """mkdocs, as `make docs` calls it."""
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", config, "--site-dir", target],
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    target = tmp_path_factory.mktemp("site")
    done = build(ROOT / "mkdocs.yml", target)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return target


def test_a_wrong_link_anchor_or_page_fails_the_build(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    for path in DOCS.iterdir():
        if path.name != "generate":
            (tmp_path / "docs" / path.name).symlink_to(path)
    (tmp_path / "docs" / "limits.md").unlink()
    (tmp_path / "docs" / "limits.md").write_text("# Limits\n\n[a](nowhere.md) [b](api.md#nowhere) [c](../nowhere.md)\n")
    (tmp_path / "docs" / "stray.md").write_text("# A page that is not in the navigation\n")
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    config = config.replace("docs_dir: docs", f"docs_dir: {tmp_path}/docs").replace("[docs/", f"[{DOCS}/")
    (tmp_path / "mkdocs.yml").write_text(config)
    done = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert done.returncode != 0
    for said in ("'nowhere.md'", "'#nowhere'", "'../nowhere.md'", "stray.md"):
        assert said in done.stderr, (said, done.stderr)


def test_every_page_is_there_and_can_be_found(site: Path) -> None:
    names = {path.stem for path in DOCS.glob("*.md")} | {"contributing", "changelog"}
    assert names <= {path.stem for path in site.glob("*.html")}
    index = (site / "search" / "search_index.js").read_text(encoding="utf-8")
    assert not [name for name in names if f'"{name}.html' not in index]
    assert "iframe-worker" in (site / "index.html").read_text(encoding="utf-8"), "files cannot be searched without it"


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    fetching = r"""<(?:script|img|iframe)[^>]*\ssrc=["']?(?:https?:)?//|<link[^>]*\shref=["']?(?:https?:)?//"""
    assert re.search(fetching, '<link rel="stylesheet" href="https://fonts.googleapis.com/css">')
    assert not [path.name for path in site.glob("*.html") if re.search(fetching, path.read_text(encoding="utf-8"))]
    styles = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", styles)


def test_lists_and_tables_are_rendered_as_such(site: Path) -> None:
    """Where the site's Markdown wants a blank line that the repository's viewer does not."""
    wrong = re.compile(r"^\s*(\*|\d+\.|\|) ", re.MULTILINE)
    for path in site.glob("*.html"):
        article = path.read_text(encoding="utf-8").partition("<article")[2].partition("</article>")[0]
        assert not [p for p in re.findall(r"<p>(.*?)</p>", article, re.DOTALL) if wrong.search(p)], path.name


@pytest.mark.parametrize("path", pages.current(), ids=lambda path: path.name)
def test_what_is_generated_is_current(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == pages.current()[path], "run python -m docs.generate"


def test_every_generated_part_is_on_one_page() -> None:
    assert sorted(name for path in pages.PAGES for name in pages.named(path.read_text(encoding="utf-8"))) == sorted(
        pages.PARTS
    )


def test_the_output_is_ignored_by_git_and_named_in_the_configuration() -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert config["site_dir"] == "build/docs"
    assert config["strict"] is True
    assert "build/" in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
