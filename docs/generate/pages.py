"""Where generated parts go: between ``<!-- generated: NAME -->`` and ``<!-- end -->`` of a page."""

import re
from collections.abc import Callable
from pathlib import Path

from docs.generate import commands, picture, settings, sizing

DOCS = Path(__file__).parents[1]
PAGES = sorted(DOCS.glob("*.md"))
PICTURE = DOCS / "assets" / "life-of-a-request.svg"
PARTS: dict[str, Callable[[], str]] = {
    "flags": settings.flags,
    "store options": settings.store_options,
    "commands": commands.commands,
    "sizes": sizing.sizes_of_adapters,
}

_PART = re.compile(r"(<!-- generated: ([a-z ]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def renewed(text: str) -> str:
    """A page with its generated parts as the code has them now.

    Raises:
        KeyError: there is no part of that name.
    """
    return _PART.sub(lambda part: f"{part[1]}\n{PARTS[part[2]]().strip()}\n\n{part[4]}", text)


def named(text: str) -> list[str]:
    """The generated parts that a page has."""
    return [part[2] for part in _PART.finditer(text)]


def current() -> dict[Path, str]:
    """Every file that is generated, wholly or in part, as it should be."""
    return {**{path: renewed(path.read_text(encoding="utf-8")) for path in PAGES}, PICTURE: picture.svg()}
