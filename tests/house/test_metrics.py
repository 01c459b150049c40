"""Metrics have one home: the table, its document, and nobody else who names one."""

import re
from pathlib import Path

import pytest

from deltamem_vllm.metrics import ENGINE, TABLE, Metric, as_markdown

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
NAMES = {metric.name for metric in TABLE}
FORBIDDEN = ("session", "tenant", "user", "client", "request", "key", "id")


def test_the_document_has_the_table_as_the_code_prints_it() -> None:
    assert as_markdown() in DOCUMENT, "paste what `python -m deltamem_vllm.metrics` prints"


MODULES = sorted(
    path.relative_to(ROOT)
    for path in (ROOT / "deltamem_vllm").rglob("*.py")
    if path.name != "metrics.py" and path.parent.name != "store"  # whose tables are called so
)


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_no_other_module_names_a_metric(path: Path) -> None:
    source = (ROOT / path).read_text(encoding="utf-8")
    assert not {name for name in NAMES if re.search(rf"\b{name}\b", source)}


@pytest.mark.parametrize("metric", TABLE, ids=lambda m: m.name)
def test_names_and_labels_keep_prometheus_rules(metric: Metric) -> None:
    assert re.fullmatch(r"deltamem_[a-z_]+", metric.name)
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    assert bool(metric.buckets) == (metric.kind == "histogram")
    assert list(metric.buckets) == sorted(set(metric.buckets))
    assert metric.name.endswith(("_seconds", "_bytes")) == metric.unit.startswith(("seconds", "bytes"))
    assert not {ENGINE, *FORBIDDEN} & set(metric.labels)
    assert metric.help.endswith(".")


def test_no_metric_is_named_twice() -> None:
    assert len(NAMES) == len(TABLE)
