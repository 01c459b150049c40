"""Who may import what. Read from the source, so nothing is imported and functions' own imports count too."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "deltamem_vllm"
MODULES = sorted(p.relative_to(ROOT) for p in PACKAGE.rglob("*.py"))

#: The only modules that know vLLM.
KNOW_VLLM = (
    "plugin.py",
    "compat.py",
    "offline.py",
    "report/arm.py",
    "memory/",
    "sessions/connector.py",
    "sessions/scheduler.py",
    "sessions/worker.py",
    "sessions/marks.py",
    "sessions/steps.py",
    "sessions/pool.py",
    "server/chat.py",
    "server/gateway.py",
    "server/endpoints.py",
)
WITHOUT_TORCH_AND_VLLM = ("store/", "sessions/windows.py", "errors.py", "config.py", "demo/")


def imports_of(source: str, module: str) -> set[str]:
    """Absolute names of everything a module imports, inside functions too; not what is for type checkers only."""
    package = module.split(".")[:-1]
    found = set()
    tree = ast.parse(source)
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def read(path: Path) -> set[str]:
    """Imports of one of our modules."""
    return imports_of((ROOT / path).read_text(encoding="utf-8"), ".".join(path.with_suffix("").parts))


def within(path: Path, places: tuple[str, ...]) -> bool:
    """Whether a module is one of the places (files, or folders ending in /)."""
    name = path.relative_to("deltamem_vllm").as_posix()
    return any(name.startswith(place) if place.endswith("/") else name == place for place in places)


def roots(names: set[str]) -> set[str]:
    """First parts: the distributions' top-level packages."""
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_vllm_is_imported_only_where_it_may(path: Path) -> None:
    if not within(path, KNOW_VLLM):
        assert "vllm" not in roots(read(path)), f"{path} imports vllm; only {', '.join(KNOW_VLLM)} may"


@pytest.mark.parametrize("path", [p for p in MODULES if within(p, WITHOUT_TORCH_AND_VLLM)], ids=str)
def test_neither_torch_nor_vllm(path: Path) -> None:
    assert not roots(read(path)) & {"torch", "vllm"}


@pytest.mark.parametrize("path", [p for p in MODULES if within(p, ("ops/",))], ids=str)
def test_ops_imports_nothing_of_ours_but_errors(path: Path) -> None:
    ours = {name for name in read(path) if name.startswith("deltamem_vllm.")}
    assert {n for n in ours if not n.startswith(("deltamem_vllm.ops", "deltamem_vllm.errors"))} == set()


@pytest.mark.parametrize("path", [p for p in MODULES if within(p, ("store/",))], ids=str)
def test_store_imports_nothing_of_ours_but_errors(path: Path) -> None:
    ours = {name for name in read(path) if name.startswith("deltamem_vllm.")}
    assert {n for n in ours if not n.startswith(("deltamem_vllm.store", "deltamem_vllm.errors"))} == set()


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_environment_is_read_in_config_only(path: Path) -> None:
    """``DELTAMEM_*`` settings have one reader."""
    source = (ROOT / path).read_text(encoding="utf-8")
    reads = [
        ast.unparse(node)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call | ast.Subscript) and ast.unparse(node).startswith(("os.environ", "os.getenv"))
    ]
    if path != Path("deltamem_vllm/config.py"):
        assert not [text for text in reads if "DELTAMEM_" in text]


def test_the_reader_sees_every_kind_of_import() -> None:
    """The rules above are worth something only if no way of importing escapes them."""
    source = (
        "import a.b as c\nfrom d import e\nfrom . import f\nfrom ..g import h\n"
        "def late():\n    import i\n"
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import j\nelse:\n    import k\n"
    )
    found = imports_of(source, "deltamem_vllm.sub.module")
    assert {"a.b", "d.e", "deltamem_vllm.sub.f", "deltamem_vllm.g.h", "i", "k"} <= found
    assert "j" not in found
