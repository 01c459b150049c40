"""Adds our metrics to vLLM's own ``/metrics`` page.

Each scrape asks every engine's session service, so that an idle server's gauges are true and each engine is counted
once, whichever API process is asked and however many there are. What an engine does not answer in time is left out, and
its ``up`` is 0: an old value would make counters go backwards when the next scrape reaches another API process.
"""

import asyncio
import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, product
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from deltamem_vllm.metrics import ENGINE, TABLE, UP, Metric
from deltamem_vllm.sessions.control import ControlClient

logger = logging.getLogger("vllm.deltamem")

PATH = "/metrics"
ANSWER_SECONDS = 3.0
"""How long a scrape waits for an engine; Prometheus waits 10 seconds for all of it."""

Samples = dict[str, dict[tuple[str, ...], Any]]
"""By metric, by its labels' values."""


class MetricsPage:
    """ASGI middleware: passes everything on, and lengthens the metrics page.

    Args:
        app: the application inside.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        gateway = getattr(getattr(scope.get("app"), "state", None), "deltamem", None)
        if scope["type"] != "http" or scope["method"] != "GET" or path.rstrip("/") != PATH or gateway is None:
            await self.app(scope, receive, send)
            return
        held: list[dict[str, Any]] = []

        async def hold(message: dict[str, Any]) -> None:
            held.append(message)

        await self.app(scope, receive, hold)
        try:
            held = _with(held, await page(gateway.clients))
        except Exception:
            logger.exception("our metrics could not be shown; vLLM's are")
        for message in held:
            await send(message)


def _with(held: list[dict[str, Any]], ours: bytes) -> list[dict[str, Any]]:
    """A response with our part at its end, if it is a page in the text format that a part can be added to."""
    start, body = held[0], b"".join(each.get("body", b"") for each in held[1:])
    headers = [(k.lower(), v) for k, v in start["headers"]]
    types = [v for k, v in headers if k == b"content-type"]
    if start["status"] != 200 or not types or not types[0].startswith(b"text/plain"):
        return held
    if any(k == b"content-encoding" for k, _ in headers):
        return held
    body += ours
    headers = [(k, v) for k, v in headers if k != b"content-length"] + [(b"content-length", b"%d" % len(body))]
    return [{**start, "headers": headers}, {"type": "http.response.body", "body": body}]


async def page(clients: Sequence[ControlClient]) -> bytes:
    """All of our metrics in Prometheus' text format.

    Args:
        clients: of the engines, by data-parallel rank.
    """
    answers = await asyncio.gather(*(_ask(client, rank) for rank, client in enumerate(clients)))
    registry = CollectorRegistry()
    registry.register(_Answers(answers))
    return generate_latest(registry)


async def _ask(client: ControlClient, rank: int) -> Samples:
    try:
        answer = await client.ask("metrics", timeout=ANSWER_SECONDS, store=rank == 0)
    except Exception as error:
        logger.warning("engine %d did not tell its metrics: %s", rank, error)
        return {UP.name: {(): 0.0}}
    found: Samples = {UP.name: {(): 1.0}}
    for name, labels, value in answer["samples"]:
        found.setdefault(name, {})[tuple(labels)] = value
    return found


class _Answers(Collector):
    """What engines answered, as a library's collector. It lives for one page, so no file holds any of it."""

    def __init__(self, answers: Sequence[Samples]) -> None:
        self._answers = answers

    def describe(self) -> Iterable[Any]:
        return ()

    def collect(self) -> Iterator[Any]:
        for metric in TABLE:
            yield from self._family(metric)

    def _family(self, metric: Metric) -> Iterator[Any]:
        labels = [ENGINE, *metric.labels]
        families = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily, "histogram": HistogramMetricFamily}
        family: Any = families[metric.kind](metric.name, metric.help, labels=labels)
        for rank, answer in enumerate(self._answers):
            for values, value in sorted(_complete(metric, answer).items()):
                if metric.kind == "histogram":
                    *buckets, total = value
                    bounds = [*map(str, metric.buckets), "+Inf"]
                    pairs = list(zip(bounds, accumulate(buckets), strict=True))
                    family.add_metric([str(rank), *values], buckets=pairs, sum_value=total)
                else:
                    family.add_metric([str(rank), *values], value)
        if family.samples:
            yield family


def _complete(metric: Metric, answer: Samples) -> dict[tuple[str, ...], Any]:
    """An engine's values, with zeros for what it has not counted yet: a rate needs a beginning."""
    known = answer.get(metric.name, {})
    if metric.kind == "gauge" or answer[UP.name][()] == 0 or not all(metric.values):
        return known
    zero: Any = [0.0] * (len(metric.buckets) + 2) if metric.kind == "histogram" else 0.0
    return {**dict.fromkeys(product(*metric.values), zero), **known}
