"""The documents, as the tests here look at them."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md"), ROOT / "loadtests" / "README.md"])
TEXT = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in DOCUMENTS}
"""Every document, by its path in the repository."""
PRESENT = {name: text for name, text in TEXT.items() if name != "CHANGELOG.md"}
"""Those that speak of the package as it is: a changelog may name what is gone."""

_FENCE = re.compile(r"(?:^<!-- ([^\n]*?) -->\n)?^( *)```([a-z]*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"`([^`\n]+)`")


@dataclass(frozen=True)
class Fence:
    """A block of code; ``mark`` is the comment directly before it, if there is one."""

    language: str
    code: str
    mark: str


def fences(text: str) -> list[Fence]:
    """A document's blocks of code, in order."""
    return [Fence(match[3], match[4], match[1] or "") for match in _FENCE.finditer(text)]


def code(text: str) -> list[str]:
    """Everything that a document shows as code: spans, and the lines of blocks with continued ones joined."""
    lines = [line for fence in fences(text) for line in fence.code.replace("\\\n", " ").splitlines()]
    return [*lines, *_SPAN.findall(_FENCE.sub("", text))]


def headings(text: str) -> list[str]:
    """A document's headings."""
    return re.findall(r"^#{1,6} (.+)$", _FENCE.sub("", text), re.MULTILINE)
