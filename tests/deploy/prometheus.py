"""A real Prometheus with the shipped rules, which scrapes real servers.

Rules wait for minutes and hours, tests cannot: for them time runs `FACTOR` times as fast. `compressed` divides every
duration in the rules by it, scrapes and evaluations are as many times as frequent, and nothing else is changed;
`test_only_durations_are_compressed` holds it to that.
"""

import math
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import yaml

from tests.deploy.shipped import DEPLOY, program
from tests.store.services import free_port

RULES = sorted((DEPLOY / "prometheus" / "rules").glob("*.yml"))
FACTOR = 60
DURATIONS = re.compile(r"(?<=\[)(\d+)([smh])(?=\])|(?<=for: )(\d+)([smh])$", re.MULTILINE)
"""Windows and ``for``."""
AGES = re.compile(r"(?<=_age_seconds\) > )(\d+)$", re.MULTILINE)
"""What else grows with time alone. How long a request or a call of the store takes does not: buckets of histograms
are where they are."""
_SECONDS = {"s": 1, "m": 60, "h": 3600}


def compressed(rules: str) -> str:
    """The text of rules for a time that runs `FACTOR` times as fast."""

    def duration(found: re.Match[str]) -> str:
        number, unit = found[1] or found[3], found[2] or found[4]
        return f"{int(number) * _SECONDS[unit] * 1000 // FACTOR}ms"

    return AGES.sub(lambda found: f"{int(found[1]) / FACTOR:g}", DURATIONS.sub(duration, rules))


def intervals() -> dict[str, str]:
    """Those of the shipped configuration, compressed: of scrapes and of evaluations."""
    shipped = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text(encoding="utf-8"))["global"]
    return {name: compressed(f"for: {value}").removeprefix("for: ") for name, value in shipped.items()}


def alerts() -> list[dict[str, Any]]:
    """All alerts that are shipped."""
    files = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in RULES]
    rules = [rule for file in files for group in file["groups"] for rule in group["rules"]]
    return [rule for rule in rules if "alert" in rule]


class Prometheus:
    """A context manager.

    Args:
        folder: empty, for its files.
        servers: ``host:port`` of those to scrape.
        further: text of rules beside the shipped ones.
    """

    def __init__(self, folder: Path, servers: Sequence[str], further: str) -> None:
        self.folder, self.servers = folder, list(servers)
        port = free_port()
        self._client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20)
        self._rules = {path.name: path.read_text(encoding="utf-8") for path in RULES} | {"further.yml": further}
        for name, rules in self._rules.items():
            (folder / name).write_text(compressed(rules), encoding="utf-8")
        self._configure(intervals())
        binary = program("prometheus", remedy="run deploy/ci/install-services.sh as root")
        self._command = [binary, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
        self._command += [f"--web.listen-address=127.0.0.1:{port}", "--web.enable-lifecycle"]

    def __enter__(self) -> "Prometheus":
        with (self.folder / "log").open("wb") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        self.until(self._ready, 60, "Prometheus does not start")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.wait(30)
        self._client.close()

    def watch(self, server: str) -> None:
        """Scrape this one, too."""
        self.servers.append(server)
        self.reload(intervals())

    def reload(self, settings: dict[str, str]) -> None:
        """Go on with these global settings."""
        self._configure(settings)
        assert self._client.post("/-/reload").status_code == 200

    def ask(self, query: str) -> list[float]:
        """Values of an expression's series, now."""
        response = self._client.get("/api/v1/query", params={"query": query})
        assert response.status_code == 200, f"{query}: {response.text}"
        return [float(each["value"][1]) for each in response.json()["data"]["result"]]

    def firing(self) -> set[str]:
        """Names of the alerts that fire."""
        found = self._client.get("/api/v1/alerts").json()["data"]["alerts"]
        return {each["labels"]["alertname"] for each in found if each["state"] == "firing"}

    def explain(self, alert: str, seconds: float) -> str:
        """What each comparison of an alert's expression had to compare, within the last ``seconds``."""
        groups = self._client.get("/api/v1/rules").json()["data"]["groups"]
        [rule] = [rule for group in groups for rule in group["rules"] if rule["name"] == alert]
        now = time.time()
        lines = [f"{alert}, whose expression has to hold for {rule['duration']:g} s:"]
        for part in re.split(r"\s+and\s+", rule["query"]):
            value, comparison = re.fullmatch(r"(.+?)\s*((?:[=!<>]=|[<>])\s*[\d.]+)", part, re.DOTALL).groups()  # type: ignore[union-attr]
            response = self._client.get(
                "/api/v1/query_range", params={"query": value, "start": now - seconds, "end": now, "step": 0.5}
            )
            assert response.status_code == 200, f"{value}: {response.text}"
            series = [[float(number) for _, number in each["values"]] for each in response.json()["data"]["result"]]
            numbers = [number for each in series for number in each if not math.isnan(number)]
            was = f"{min(numbers):g} to {max(numbers):g}, lastly {[each[-1] for each in series]}" if numbers else "none"
            lines.append(f"  {comparison}? values: {was}; of {' '.join(value.split())}")
        return "\n".join(lines)

    def until(self, holds: Callable[[], bool], seconds: float, what: str) -> None:
        """Wait for something."""
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, what
            time.sleep(0.2)

    def _ready(self) -> bool:
        try:
            return self._client.get("/-/ready").status_code == 200
        except httpx.TransportError:
            return False

    def _configure(self, settings: dict[str, str]) -> None:
        config = {
            "global": {"scrape_timeout": settings["scrape_interval"], **settings},
            "rule_files": [str(self.folder / name) for name in self._rules],
            "scrape_configs": [{"job_name": "deltamem", "static_configs": [{"targets": self.servers}]}],
        }
        (self.folder / "prometheus.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
