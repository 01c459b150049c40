"""``python -m docs.generate``: write every generated part of the pages anew; says which files changed."""

from docs.generate.pages import current

for path, text in current().items():
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
        print(f"{path.name} is new")
