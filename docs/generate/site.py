"""What mkdocs calls while it builds the site (``hooks`` in mkdocs.yml).

The pages are written to be read in the repository, too. Here files from its root become pages, and links to files
that the site does not have become their text.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Files of the root that the site shows, and as what."""

_LINK = re.compile(r"(?<!!)\[([^\]\n]+)\]\(([^)\s#]*)(#[^)\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the root's pages."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links as the site has them."""
    name = page.file.src_uri
    folder = ROOT if name in PAGES.values() else ROOT / "docs"
    return _LINK.sub(lambda link: _as_on_site(link, folder), markdown)


def _as_on_site(link: re.Match[str], folder: Path) -> str:
    text, target, anchor = link[1], link[2], link[3] or ""
    if not target or "://" in target:
        return link[0]
    path = (folder / target).resolve()
    if not path.exists() or not path.is_relative_to(ROOT):
        return link[0]  # mkdocs says so, and the build fails
    inside = path.relative_to(ROOT).as_posix()
    if inside.startswith("docs/"):
        return f"[{text}]({inside.removeprefix('docs/')}{anchor})"
    if inside in PAGES:
        return f"[{text}]({PAGES[inside]}{anchor})"
    return text
