"""The span that vLLM sends for a request, by OpenTelemetry's own library, and what it says of a session."""

import importlib
import time
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from deltamem_vllm.compat import on_request_span
from deltamem_vllm.server.scope import Scope
from deltamem_vllm.server.spans import RequestSpans, attributes_of

ID = "gen_ai.request.id"


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", lambda name: provider.get_tracer(name))
    return exporter


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> Any:
    module = importlib.import_module("vllm.v1.engine.output_processor")
    monkeypatch.setattr(module, "instrument_manual", importlib.import_module("vllm.tracing").instrument_manual)
    return module


def finished(processor: Any, request: str) -> None:
    """As `OutputProcessor.do_tracing` does."""
    processor.instrument_manual(
        span_name="llm_request",
        start_time=10**18,
        attributes={ID: request},
        context=None,
        kind=processor.SpanKind.SERVER,
    )


def test_the_span_of_a_session_waits_for_its_outcome_and_keeps_its_times(
    sent: InMemorySpanExporter, processor: Any
) -> None:
    spans = RequestSpans()
    on_request_span(spans.hold)
    spans.expect("r")
    finished(processor, "r")
    ended = time.time_ns()
    assert not sent.get_finished_spans()
    time.sleep(0.02)
    scope = Scope(header_id="a-secret-id", elided_tokens=7, outcome={"status": "committed", "version": 3})
    spans.finish("r", attributes_of(scope, {"window": "extend", "matched": 5, "salt": "s"}))
    (span,) = sent.get_finished_spans()
    assert dict(span.attributes or {}) == {
        ID: "r",
        "deltamem.session": True,
        "deltamem.mode": "readwrite",
        "deltamem.window": "extend",
        "deltamem.tokens.matched": 5,
        "deltamem.tokens.elided": 7,
        "deltamem.session.version": 3,
        "deltamem.commit": "committed",
    }
    assert span.start_time == 10**18
    assert span.end_time is not None
    assert span.end_time <= ended
    spans.finish("r", {})
    assert len(sent.get_finished_spans()) == 1


def test_other_spans_are_sent_at_once_as_they_are(sent: InMemorySpanExporter, processor: Any) -> None:
    on_request_span(RequestSpans().hold)
    finished(processor, "r")
    (span,) = sent.get_finished_spans()
    assert dict(span.attributes or {}) == {ID: "r"}


def test_a_span_that_cannot_be_sent_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    spans, sent = RequestSpans(), []

    def fails(attributes: dict[str, Any]) -> None:
        raise OSError("gone")

    spans.expect("r")
    assert spans.hold("r", fails)
    assert spans.hold("r", sent.append)
    spans.finish("r", {"a": 1})
    assert sent == [{"a": 1}]
    assert "could not be sent" in caplog.text
