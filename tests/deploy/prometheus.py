"""A real Prometheus with the shipped rules, which scrapes real servers every second.

Rules wait for minutes, tests cannot: `shortened` changes nothing but durations, each in the same way, and
`test_only_durations_are_shortened` holds it to that.
"""

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
_SECONDS = {"s": 1, "m": 60, "h": 3600}
WINDOW, WAIT = (8, 12), (1, 3)
"""Seconds, at least and at most, of a window and of ``for``."""


def shortened(rules: str) -> str:
    """Rules with each window ``[5m]`` a 40th as long, and each ``for: 5m`` a 300th, within `WINDOW` and `WAIT`."""

    def seconds(found: re.Match[str], divisor: int, bounds: tuple[int, int]) -> int:
        return min(max(int(found[2]) * _SECONDS[found[3]] // divisor, bounds[0]), bounds[1])

    rules = re.sub(r"(\[)(\d+)([smh])\]", lambda found: f"[{seconds(found, 40, WINDOW)}s]", rules)
    return re.sub(
        r"^( +for: )(\d+)([smh])$", lambda found: f"{found[1]}{seconds(found, 300, WAIT)}s", rules, flags=re.MULTILINE
    )


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
    """

    def __init__(self, folder: Path, servers: Sequence[str]) -> None:
        self.folder, self.servers = folder, list(servers)
        port = free_port()
        self._client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20)
        for path in RULES:
            (folder / path.name).write_text(shortened(path.read_text(encoding="utf-8")), encoding="utf-8")
        self._configure(1)
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

    def scrape_every(self, seconds: int, *further: str) -> None:
        """From now on, with ``further`` servers."""
        self.servers += further
        self._configure(seconds)
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

    def _configure(self, seconds: int) -> None:
        config = {
            "global": {"scrape_interval": f"{seconds}s", "scrape_timeout": f"{seconds}s", "evaluation_interval": "1s"},
            "rule_files": [str(self.folder / path.name) for path in RULES],
            "scrape_configs": [{"job_name": "deltamem", "static_configs": [{"targets": self.servers}]}],
        }
        (self.folder / "prometheus.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
