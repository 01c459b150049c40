"""Alerts have one document, which says what each means and what to do first."""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"^\| `(Deltamem\w+)` \| (\w+) \| ([^|]+) \| ([^|]+) \|$", re.MULTILINE)
DOCUMENT = (ROOT / "docs" / "alerts.md").read_text(encoding="utf-8")
RULES = [
    rule
    for path in sorted((ROOT / "deploy" / "prometheus" / "rules").glob("*.yml"))
    for group in yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]
    for rule in group["rules"]
]


def test_the_document_has_every_alert_with_its_severity_and_a_first_step() -> None:
    shipped = [(rule["alert"], rule["labels"]["severity"]) for rule in RULES if "alert" in rule]
    assert sorted(found[:2] for found in ROW.findall(DOCUMENT)) == sorted(shipped)


def test_the_document_names_every_recorded_series_and_no_other() -> None:
    recorded = {rule["record"] for rule in RULES if "record" in rule}
    named = set(re.findall(r"`(\w+:\w+:\w+)`", DOCUMENT))
    windows = {name for name in recorded if re.search("(30m|1h|6h)$", name)}
    assert named == recorded - windows
    assert all(f"`{name.rpartition('rate')[2]}`" in DOCUMENT for name in windows)


def test_the_document_names_no_alert_that_does_not_exist() -> None:
    assert set(re.findall(r"`(Deltamem\w+)`", DOCUMENT)) == {rule["alert"] for rule in RULES if "alert" in rule}
