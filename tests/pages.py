"""Reading a metrics page."""

import re

from deltamem_vllm.metrics import Metric

Page = dict[tuple[str, str], float]
"""Values by name and labels, as they are written."""


def read(text: str) -> Page:
    found: Page = {}
    for name, labels, value in re.findall(r"^(\w+)(?:\{(.*)\})? (\S+)$", text, re.MULTILINE):
        assert (name, labels) not in found, f"{name} {labels} is there twice"
        found[name, labels] = float(value)
    return found


def at(page: Page, metric: Metric, end: str = "", engine: str = "0", **labels: str) -> float:
    wanted = {"engine": engine, **labels}
    found = [
        v
        for (n, had), v in page.items()
        if n == metric.name + end and dict(re.findall(r'(\w+)="(.*?)"', had)) == wanted
    ]
    assert len(found) == 1, f"{metric.name}{end} {wanted}: {found}"
    return found[0]
