"""Counts and timings of one engine, kept as plain numbers in its own process until a scrape asks for them.

No library's metrics are used here: with several API processes those would write files that all API processes add up.
"""

import asyncio
import threading
import time
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeAlias

from deltamem_vllm import metrics
from deltamem_vllm.errors import PreconditionFailed, SessionError, StoreUnavailable
from deltamem_vllm.metrics import Metric

Sample: TypeAlias = tuple[str, tuple[str, ...], float | list[float]]
"""A metric's name, its labels' values, its value: of a histogram how many fell into each bucket, the last one without
bound, and their sum."""


class Meters:
    """What has happened so far. Every method may be called from any thread, and only counts."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[tuple[Metric, tuple[str, ...]], float] = {}
        self._seen: dict[tuple[Metric, tuple[str, ...]], list[float]] = {}

    def add(self, metric: Metric, *labels: str, by: float = 1) -> None:
        """Count."""
        with self._lock:
            self._counts[metric, labels] = self._counts.get((metric, labels), 0) + by

    def observe(self, metric: Metric, value: float, *labels: str) -> None:
        """One more value of a histogram."""
        with self._lock:
            seen = self._seen.get((metric, labels))
            if seen is None:
                seen = self._seen[metric, labels] = [0.0] * (len(metric.buckets) + 2)
            seen[bisect_left(metric.buckets, value)] += 1
            seen[-1] += value

    def samples(self) -> list[Sample]:
        """All that was counted, as of one moment."""
        with self._lock:
            counts = [gauge(metric, value, *labels) for (metric, labels), value in self._counts.items()]
            return counts + [(metric.name, labels, list(seen)) for (metric, labels), seen in self._seen.items()]


def gauge(metric: Metric, value: float, *labels: str) -> Sample:
    """A value as it is now."""
    return metric.name, labels, float(value)


@contextmanager
def timed(meters: Meters, metric: Metric, *labels: str) -> Iterator[None]:
    """How long the block took, whether it failed or not."""
    start = time.perf_counter()
    try:
        yield
    finally:
        meters.observe(metric, time.perf_counter() - start, *labels)


@contextmanager
def conflicts(meters: Meters) -> Iterator[None]:
    """Count it if another writer gets in the way of what the block does."""
    try:
        yield
    except BaseException as error:
        _count_conflict(meters, _refusal(error))
        raise


@contextmanager
def turned_away(meters: Meters) -> Iterator[None]:
    """Count it if the block fails: the request that asks for it goes no further."""
    try:
        yield
    except BaseException as error:
        meters.add(metrics.ADMISSIONS, _refusal(error))
        raise


def count_refusal(meters: Meters, error: BaseException) -> None:
    """A request that asked for its turn did not get it."""
    reason = _refusal(error)
    meters.add(metrics.ADMISSIONS, reason)
    _count_conflict(meters, reason)


def count_admission(meters: Meters, elided: int, seconds: float) -> None:
    """A request got its turn.

    Args:
        elided: tokens of its conversation that its prompt does not have.
        seconds: since it asked.
    """
    meters.add(metrics.ADMISSIONS, "granted")
    meters.add(metrics.TOKENS_ELIDED, by=elided)
    meters.observe(metrics.ADMISSION_SECONDS, seconds)


def _count_conflict(meters: Meters, reason: str) -> None:
    if reason in ("busy", "precondition"):
        meters.add(metrics.CONFLICTS, reason)


def _refusal(error: BaseException) -> str:
    """Why a request was not admitted."""
    if isinstance(error, asyncio.CancelledError):
        return "cancelled"
    if isinstance(error, PreconditionFailed):
        return "precondition"
    status = getattr(error, "status", 503 if isinstance(error, StoreUnavailable) else 500)
    by_status = {409: "busy", 429: "quota", 503: "unavailable"}
    return by_status.get(status, "refused" if isinstance(error, SessionError) else "error")
