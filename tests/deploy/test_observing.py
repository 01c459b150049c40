"""Dashboards and rules as they are shipped, without a server: what they name, where they lead, what made them."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from deltamem_vllm.metrics import TABLE
from deploy.grafana.generate import DASHBOARDS, relinked, text
from tests.deploy.prometheus import AGES, DURATIONS, RULES, alerts, compressed, intervals
from tests.deploy.shipped import DEPLOY, documents, program

FOLDER = DEPLOY / "grafana" / "dashboards"
NAMES = {metric.name for metric in TABLE}
ALERTS = [alert["alert"] for alert in alerts()]
TESTS = sorted((DEPLOY / "prometheus" / "tests").glob("*.yml"))


def shipped(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return found


def metrics_in(expression: str) -> set[str]:
    """Metrics that an expression asks for; series of recording rules have a colon before their name."""
    found = set(re.findall(r"(?<![:\w])deltamem_[a-z_]+", expression))
    return {re.sub("_(bucket|sum|count)$", "", name) for name in found}


def test_promtool_takes_the_rules() -> None:
    promtool = program("promtool", remedy="run deploy/ci/install-services.sh as root")
    done = subprocess.run([promtool, "check", "rules", *RULES], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "duplicate" not in done.stdout, done.stdout


def test_every_alert_fires_and_does_not_fire(tmp_path: Path) -> None:
    promtool = program("promtool", remedy="run deploy/ci/install-services.sh as root")
    done = subprocess.run([promtool, "test", "rules", *TESTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    tested = [test["name"] for path in TESTS for file in documents(path) for test in file["tests"]]
    assert sorted(tested) == sorted(ALERTS)


@pytest.mark.parametrize(
    ("was", "planted"), [("norm_bucket[10m]))) > 30", "norm_bucket[10m]))) > 130"), ("== 1", ">= 0")]
)
def test_a_wrong_rule_is_seen(was: str, planted: str, tmp_path: Path) -> None:
    """One that never fires, and one that always does."""
    promtool = program("promtool", remedy="run deploy/ci/install-services.sh as root")
    for folder in ("rules", "tests"):
        (tmp_path / folder).mkdir()
    for path in (*RULES, *TESTS):
        content = path.read_text(encoding="utf-8")
        if path.parent.name == "rules" and path.name == "memory.yml":
            assert was in content
            content = content.replace(was, planted)
        (tmp_path / path.parent.name / path.name).write_text(content, encoding="utf-8")
    done = subprocess.run(
        [promtool, "test", "rules", tmp_path / "tests" / "memory.yml"], capture_output=True, text=True
    )
    assert done.returncode == 1, done.stdout


def test_only_durations_are_compressed() -> None:
    """For the tests on live servers: all of them, by the same factor."""
    rules = "\n".join(path.read_text(encoding="utf-8") for path in RULES)
    made = compressed(rules)
    durations = re.findall(r"(?:\[|for: )\d+[smh]\b", rules)
    assert len(durations) > 40
    assert len(DURATIONS.findall(rules)) == len(durations)
    assert len(AGES.findall(rules)) == 1
    assert not DURATIONS.findall(made)
    plain = re.sub(r"(\[|for: )\d+(s|m|h|ms)\b|(age_seconds\) > )[\d.]+", r"\1\3", f"{rules}\n---\n{made}")
    before, after = plain.split("\n---\n")
    assert before == after
    assert (
        compressed("[5m]\n for: 1h\n  max(x_age_seconds) > 30") == "[5000ms]\n for: 60000ms\n  max(x_age_seconds) > 0.5"
    )
    assert intervals() == {"scrape_interval": "250ms", "evaluation_interval": "250ms"}


@pytest.mark.parametrize("alert", alerts(), ids=lambda alert: alert["alert"])
def test_an_alert_says_what_to_do(alert: dict[str, Any]) -> None:
    name = alert["alert"]
    assert re.fullmatch(r"Deltamem[A-Z][A-Za-z]+", name)
    assert alert["labels"]["severity"] in ("critical", "warning")
    assert alert["annotations"].keys() == {"summary", "description", "runbook_url"}
    assert alert["annotations"]["runbook_url"] == f"docs/operations.md#{name.lower()}"
    expression = alert["expr"]
    assert metrics_in(expression) <= NAMES
    recorded = {
        rule["record"]
        for path in RULES
        for f in documents(path)
        for g in f["groups"]
        for rule in g["rules"]
        if "record" in rule
    }
    assert set(re.findall(r"\w+:deltamem_\w+:\w+", expression)) <= recorded


def test_links_of_alerts_can_be_moved() -> None:
    for path in RULES:
        rules = path.read_text(encoding="utf-8")
        assert relinked(rules, "docs/operations.md") == rules
        moved = relinked(rules, "https://docs.example.org/operations/")
        assert moved.count("https://docs.example.org/operations/#deltamem") == rules.count("- alert:")
    assert "https://docs.example.org/#deltamemdegraded" in text("store", "https://docs.example.org/")


@pytest.mark.parametrize("name", DASHBOARDS)
def test_a_dashboard_is_what_its_code_makes(name: str) -> None:
    assert text(name) == (FOLDER / f"{name}.json").read_text(encoding="utf-8"), "run python -m deploy.grafana.generate"


def test_no_other_dashboard_is_shipped() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {f"{name}.json" for name in DASHBOARDS}


@pytest.mark.parametrize("name", DASHBOARDS)
def test_panels_ask_for_what_there_is_and_lead_to_alerts(name: str) -> None:
    panels = [panel for panel in shipped(name)["panels"] if panel["type"] != "row"]
    assert len({panel["title"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["description"]
        assert panel["targets"]
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
        for target in panel["targets"]:
            assert metrics_in(target["expr"]) <= NAMES
            assert target["datasource"]["uid"] == "${datasource}"
            assert 'job=~"$job"' in target["expr"]
        for link in panel.get("links", []):
            assert link["title"] in ALERTS
            assert link["url"] == f"docs/operations.md#{link['title'].lower()}"


def test_every_metric_and_every_alert_is_on_a_dashboard() -> None:
    panels = [panel for name in DASHBOARDS for panel in shipped(name)["panels"] if panel["type"] != "row"]
    shown = {metric for panel in panels for target in panel["targets"] for metric in metrics_in(target["expr"])}
    recorded = {"deltamem_up"}  # the variables ask for it, too
    assert NAMES - shown == set(), "no panel shows these"
    assert recorded <= shown
    assert set(ALERTS) == {link["title"] for panel in panels for link in panel.get("links", [])}


def test_heat_maps_have_buckets_and_nothing_else_has() -> None:
    for name in DASHBOARDS:
        for panel in shipped(name)["panels"]:
            for target in panel.get("targets", []):
                bare = re.match(r"sum by \([a-z, ]*le\)", target["expr"]) is not None
                assert (panel["type"] == "heatmap") == bare, panel["title"]
                assert (target.get("format") == "heatmap") == bare, panel["title"]
