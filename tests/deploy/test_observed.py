"""A real Prometheus on a real server under load: every panel has data. Durations of rules are shortened."""

import time
from collections.abc import Iterable, Iterator

import pytest

from deploy.grafana.generate import DASHBOARDS
from tests.deploy.live import Live, live_server, load
from tests.deploy.test_observing import shipped
from tests.server.conftest import ADAPTER

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live_server(ADAPTER, tmp_path_factory.mktemp("observed")) as made:
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
