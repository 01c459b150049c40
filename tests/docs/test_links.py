"""Links between documents as the repository's viewer sees them; the site's are checked by its strict build."""

import re
from pathlib import Path

import pytest
from markdown.extensions.toc import slugify

from tests.docs.reading import ROOT, TEXT, headings

_LINK = re.compile(r"\]\(([^)\s#]*)(?:#([^)\s]*))?\)")


def github_slug(heading: str) -> str:
    """The anchor that a repository's viewer gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("document", TEXT)
def test_links_and_anchors_lead_somewhere(document: str) -> None:
    folder, missing = (ROOT / document).parent, []
    for target, anchor in _LINK.findall(TEXT[document]):
        if "://" in target:
            continue
        path: Path = (folder / target).resolve() if target else ROOT / document
        if not path.exists():
            missing.append(target)
        elif anchor:
            found = headings(path.read_text(encoding="utf-8"))
            if anchor not in {github_slug(each) for each in found} & {slugify(each, "-") for each in found}:
                missing.append(f"{target}#{anchor}")
    assert missing == []


def test_readme_links_every_page() -> None:
    pages = {name for name in TEXT if name.startswith("docs/")}
    assert pages - set(re.findall(r"\]\((docs/[^)#]*)", TEXT["README.md"])) == set()
