"""Expressions of the dashboards, made from the metrics' own names, so that none asks for what is not there."""

from deltamem_vllm.metrics import Metric

SELECTED = 'job=~"$job", instance=~"$instance"'
"""What every expression is limited to: the dashboards' variables."""
WINDOW = "$__rate_interval"


def series(metric: Metric, end: str = "", **labels: str) -> str:
    """A metric's series; ``end`` is ``_bucket``, ``_sum`` or ``_count`` of a histogram, labels are patterns."""
    assert (metric.kind == "histogram") == (end in ("_bucket", "_sum", "_count")), metric.name
    assert labels.keys() <= set(metric.labels), (metric.name, labels)
    more = "".join(f', {name}=~"{pattern}"' for name, pattern in labels.items())
    return f"{metric.name}{end}{{{SELECTED}{more}}}"


def total(metric: Metric, *by: str, how: str = "sum", **labels: str) -> str:
    """A gauge over engines and servers; ``how`` is the aggregation."""
    assert metric.kind == "gauge", metric.name
    return f"{how}{_by(by)} ({series(metric, **labels)})"


def rate(metric: Metric, *by: str, **labels: str) -> str:
    """A counter's events per second."""
    assert metric.kind == "counter", metric.name
    return f"sum{_by(by)} (rate({series(metric, **labels)}[{WINDOW}]))"


def grown(metric: Metric, window: str, *by: str) -> str:
    """By how much a counter grew within a time."""
    assert metric.kind == "counter", metric.name
    return f"sum{_by(by)} (increase({series(metric)}[{window}]))"


def buckets(metric: Metric, *by: str, **labels: str) -> str:
    """A histogram's events per second by bucket, as a heat map wants them."""
    return f"sum{_by((*by, 'le'))} (rate({series(metric, '_bucket', **labels)}[{WINDOW}]))"


def quantile(q: float, metric: Metric, *by: str, **labels: str) -> str:
    """A histogram's quantile."""
    return f"histogram_quantile({q:g}, {buckets(metric, *by, **labels)})"


def share(part: str, whole: str) -> str:
    """One expression as part of another that is not smaller; nothing where there is nothing."""
    return f"{part} / ({whole} > 0)"


def _by(labels: tuple[str, ...]) -> str:
    return f" by ({', '.join(labels)})" if labels else ""
