"""Writes the dashboards: ``python -m deploy.grafana.generate``, from the root of the repository, after a change here.

Links of panels and alerts lead to ``docs/operations.md``, under the alert's name. Where the documents are served,
``--runbook https://docs.example.org/operations/`` puts their address into dashboards and rules alike.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from deploy.grafana import overview, quality, sessions, store
from deploy.grafana.panels import RUNBOOK, Book

DEPLOY = Path(__file__).parents[1]
DASHBOARDS = {"overview": overview, "sessions": sessions, "quality": quality, "store": store}


def text(name: str, runbook: str = RUNBOOK) -> str:
    """A dashboard as Grafana reads it."""
    made: dict[str, Any] = json.loads(JSONEncoder(sort_keys=True).encode(DASHBOARDS[name].make(Book(runbook)).build()))
    for number, panel in enumerate(made["panels"], 1):
        panel["id"] = number
    return json.dumps(made, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def relinked(rules: str, runbook: str) -> str:
    """A file of rules whose alerts link to ``runbook``."""
    return re.sub(r"(runbook_url: )\S*(#\w+)", rf"\g<1>{runbook}\g<2>", rules)


def main() -> None:
    """Write dashboards, and the links of alerts."""
    parser = argparse.ArgumentParser(prog="python -m deploy.grafana.generate", description="Write the dashboards.")
    parser.add_argument("--runbook", default=RUNBOOK, metavar="URL", help="where alerts link to (default: %(default)s)")
    runbook = parser.parse_args().runbook
    for name in DASHBOARDS:
        (DEPLOY / "grafana" / "dashboards" / f"{name}.json").write_text(text(name, runbook), encoding="utf-8")
    for path in (DEPLOY / "prometheus" / "rules").glob("*.yml"):
        path.write_text(relinked(path.read_text(encoding="utf-8"), runbook), encoding="utf-8")


if __name__ == "__main__":
    main()
