"""A real Prometheus on real servers: under load every panel has data; alerts fire on their causes and cease with them.

Time runs faster for rules (`tests.deploy.prometheus`); other thresholds are as shipped. The causes are real
(`tests.deploy.causes`): a store that is cut, slowed or damaged, racing requests, little memory, an audit log that
cannot grow, a paused and a killed engine, a bad adapter. Two alerts that only a bug can cause have one planted.
"""

import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from deploy.grafana.generate import DASHBOARDS
from tests.conftest import NIGHTLY
from tests.deploy.bad_adapter import write_bad_adapter
from tests.deploy.campaign import Campaign
from tests.deploy.causes import CAUSES, OF_A_BAD_ADAPTER, OF_THE_OTHER, QUICK, Cause, no_cause
from tests.deploy.live import Live, another_server, live_server, load
from tests.deploy.prometheus import alerts
from tests.deploy.test_observing import shipped
from tests.server.conftest import ADAPTER

PLANTED = """
groups:
  - name: planted
    rules:
      - alert: NeverFires
        expr: max by (job, instance) (deltamem_degraded) == 2
        for: 1m
      - alert: AlwaysFires
        expr: max by (job, instance) (deltamem_degraded) >= 0
        for: 1m
      - alert: NeverCeases
        expr: max by (job, instance) (max_over_time(deltamem_degraded[1h])) == 1
        for: 1m
"""
"""`DeltamemDegraded` with another threshold, and with a window that is too long."""
pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live_server(ADAPTER, tmp_path_factory.mktemp("observed"), PLANTED) as made:
        yield made
        assert made.server.healthy(), made.server.last_lines(40)


def queries() -> list[tuple[str, str]]:
    """Dashboard and panel, and what it asks, with the variables as Grafana replaces them."""
    found = []
    for name in DASHBOARDS:
        for panel in shipped(name)["panels"]:
            for target in panel.get("targets", []):
                asked = target["expr"].replace("$__rate_interval", "8s")
                found.append(
                    (f"{name}: {panel['title']}", asked.replace("$job", "deltamem").replace("$instance", ".*"))
                )
    return found


def test_every_panel_has_data(live: Live) -> None:
    """Numbers, in at least one of its series: 0/0 is none."""
    empty = queries()
    assert len(empty) > 50
    end = time.monotonic() + 60
    with load(live):
        while empty and time.monotonic() < end:
            time.sleep(1)
            empty = [(panel, asked) for panel, asked in empty if not _numbers(live.prometheus.ask(asked))]
    assert empty == [], f"{live.statuses}"
    assert live.prometheus.ask("deltamem_no_such_metric") == []


def _numbers(values: Iterable[float]) -> list[float]:
    return [value for value in values if value == value]


def test_every_alert_has_a_cause() -> None:
    caused = [alert for cause in (*CAUSES.values(), *OF_A_BAD_ADAPTER.values()) for alert in cause.alerts]
    assert sorted(caused) == sorted(alert["alert"] for alert in alerts())


def test_wrong_rules_are_seen(live: Live) -> None:
    """Each is named with what its expression compared."""
    live.prometheus.until(lambda: "AlwaysFires" in live.prometheus.firing(), 60, "the planted rule is not there")
    campaign = Campaign(live.prometheus, patience=2)
    cut = Cause(CAUSES["store cut"].begin, ("AlwaysFires", "NeverCeases"))
    campaign.provoke(live, {"store cut": cut})
    well = "max(deltamem_degraded) == 0"
    live.prometheus.until(lambda: live.prometheus.ask(well) == [0.0], 60, "Prometheus has not seen the end of the cut")
    campaign.provoke(live, {"nothing": Cause(no_cause, ("NeverFires",), 1)})
    with pytest.raises(AssertionError) as seen:
        campaign.settle()
    for expected in (
        r"AlwaysFires fired before its cause, store cut\. .*\n  >= 0\? values: 0 to 0, lastly \[0.0\]",
        r"NeverFires did not fire within .*\n  == 2\? values: 0 to 0, lastly \[0.0\]",
        r"NeverCeases fires 2 s after .*\n  == 1\? values: 1 to 1, lastly \[1.0\]",
    ):
        assert re.search(expected, str(seen.value)), seen.value


@pytest.mark.skipif(NIGHTLY, reason="the full run has every cause")
def test_alerts_fire_and_cease(live: Live) -> None:
    """Three of them."""
    campaign = Campaign(live.prometheus)
    campaign.provoke(live, QUICK)
    campaign.settle()
    assert len(campaign.ceased) == 3
    print(campaign)


@pytest.mark.nightly
def test_every_alert_fires_and_ceases(live: Live, tmp_path: Path) -> None:
    campaign = Campaign(live.prometheus)
    live.turn(OF_THE_OTHER)
    with another_server(live, write_bad_adapter(tmp_path / "adapter"), tmp_path) as bad:  # starts meanwhile
        try:
            campaign.provoke(live, CAUSES)
            bad.server.wait_ready()
            live.prometheus.watch(f"127.0.0.1:{bad.server.port}")
            campaign.provoke(bad, OF_A_BAD_ADAPTER)
            campaign.settle()
        finally:
            print(campaign)
    assert campaign.ceased.keys() == {alert["alert"] for alert in alerts()}
