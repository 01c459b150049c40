"""Where sessions are and how requests get to them: slots, host memory, queues, tokens."""

from grafana_foundation_sdk.builders import dashboard

from deltamem_vllm import metrics as m
from deploy.grafana.panels import Book, Query, frame, row
from deploy.grafana.queries import buckets, quantile, rate, share, total


def make(book: Book) -> dashboard.Dashboard:
    """The dashboard."""
    made = frame("sessions", "δ-mem: sessions", "Where sessions are, what they wait for, and what they bring.")
    return _tokens(book, _loads(book, _turns(book, _places(book, made))))


def _places(book: Book, made: dashboard.Dashboard) -> dashboard.Dashboard:
    made = made.with_row(row("Places"))
    made = made.with_panel(
        book.graph(
            "sessions by tier",
            "In the device's pool and in host memory; all others are in the store.",
            "none",
            Query(total(m.SESSIONS, "tier"), "{{tier}}"),
        )
    )
    made = made.with_panel(
        book.graph(
            "slots of the device's pool",
            "All used is the normal state of a busy server.",
            "none",
            Query(total(m.SESSION_SLOTS, "state"), "{{state}}"),
            alerts=("DeltamemSlotThrash",),
            stacked=True,
        )
    )
    made = made.with_panel(
        book.graph(
            "host memory",
            "Of sessions and their records, and the setting --deltamem-host-bytes.",
            "bytes",
            Query(total(m.HOST_BYTES, "instance"), "{{instance}}"),
            Query(total(m.HOST_LIMIT, "instance"), "limit of {{instance}}"),
            alerts=("DeltamemHostMemoryThrash",),
        )
    )
    made = made.with_panel(
        book.graph(
            "evictions",
            "To make room for others; what is evicted is in the tier below.",
            "ops",
            Query(rate(m.EVICTIONS, "tier"), "{{tier}}"),
            alerts=("DeltamemSlotThrash", "DeltamemHostMemoryThrash"),
        )
    )
    made = made.with_panel(
        book.graph(
            "first states by source",
            "cached: with prefix-cache blocks; device: the pool; host: copied to the device; empty: new sessions.",
            "reqps",
            Query(rate(m.SEEDS, "source"), "{{source}}"),
            alerts=("DeltamemSlotThrash",),
            stacked=True,
        )
    )
    return made.with_panel(
        book.graph(
            "what is done to sessions",
            "The events of the audit log.",
            "ops",
            Query(rate(m.EVENTS, "event"), "{{event}}"),
        )
    )


def _turns(book: Book, made: dashboard.Dashboard) -> dashboard.Dashboard:
    made = made.with_row(row("Turns"))
    made = made.with_panel(
        book.graph(
            "sessions in use, requests in line",
            "Sessions that are being written now, and requests that wait for one.",
            "none",
            Query(total(m.SESSIONS_BUSY), "busy sessions"),
            Query(total(m.REQUESTS_WAITING), "waiting requests"),
            Query(total(m.LEASES), "leases held"),
        )
    )
    made = made.with_panel(
        book.heat(
            "waits for a busy session",
            "Of requests that write a session.",
            "s",
            Query(buckets(m.QUEUE_WAIT)),
            alerts=("DeltamemQueueWaits",),
        )
    )
    made = made.with_panel(
        book.graph(
            "waits for a busy session, quantiles",
            "An alert comes at 5 seconds for one in 20.",
            "s",
            *(Query(quantile(q, m.QUEUE_WAIT), f"p{100 * q:g}") for q in (0.5, 0.95, 0.99)),
            alerts=("DeltamemQueueWaits",),
            limit=5,
        )
    )
    made = made.with_panel(
        book.graph(
            "other writers in the way",
            "busy: the turn did not come; precondition: If-Match; commit: generated in vain.",
            "reqps",
            Query(rate(m.CONFLICTS, "reason"), "{{reason}}"),
            alerts=("DeltamemQueueRefusals", "DeltamemCommitConflicts"),
            width=12,
        )
    )
    return made.with_panel(
        book.graph(
            "turns asked for, by answer",
            "Shares of each server's requests.",
            "percentunit",
            Query(
                'job_instance_outcome:deltamem_admissions:ratio_rate5m{job=~"$job", instance=~"$instance"}',
                "{{instance}} {{outcome}}",
            ),
            alerts=("DeltamemRequestsUnavailable", "DeltamemQueueRefusals"),
            width=12,
        )
    )


def _loads(book: Book, made: dashboard.Dashboard) -> dashboard.Dashboard:
    made = made.with_row(row("Loads"))
    made = made.with_panel(
        book.graph(
            "looks for a record",
            "In host memory, and in the store. absent: the session is new.",
            "ops",
            Query(rate(m.LOADS, "source", "outcome"), "{{source}}: {{outcome}}"),
            alerts=("DeltamemLoadErrors", "DeltamemLoadsRefused"),
        )
    )
    made = made.with_panel(
        book.graph(
            "time of a look",
            "One in 20 takes longer.",
            "s",
            Query(quantile(0.95, m.LOAD_SECONDS, "source"), "{{source}} p95"),
            alerts=("DeltamemStoreSlow",),
        )
    )
    read = rate(m.LOADS, source="store", outcome="found")
    return made.with_panel(
        book.graph(
            "records read from the store, per request",
            "Of a session that exists. Much of it, with evictions from host memory: that is too small.",
            "percentunit",
            Query(share(read, rate(m.ADMISSIONS, outcome="granted")), "read from the store"),
            alerts=("DeltamemHostMemoryThrash",),
        )
    )


def _tokens(book: Book, made: dashboard.Dashboard) -> dashboard.Dashboard:
    made = made.with_row(row("Tokens"))
    made = made.with_panel(
        book.graph(
            "tokens brought",
            "Beyond what sessions had been fed: written, masked by a write policy, or of requests that only read.",
            "cps",
            Query(rate(m.TOKENS, "kind"), "{{kind}}"),
            Query(rate(m.TOKENS_ELIDED), "left out of prompts"),
        )
    )
    made = made.with_panel(
        book.graph(
            "prompts of sessions",
            "Tokens, and those of them that were in the prefix cache.",
            "cps",
            Query(rate(m.SESSION_PROMPT_TOKENS), "all"),
            Query(rate(m.SESSION_CACHED_TOKENS), "cached"),
        )
    )
    return made.with_panel(
        book.graph(
            "prompts found in the prefix cache",
            "Shares of each server. Low, with returning sessions: routing does not keep them on one server.",
            "percentunit",
            Query(
                'job_instance:deltamem_session_cached_tokens:ratio_rate5m{job=~"$job", instance=~"$instance"}',
                "{{instance}}",
            ),
        )
    )
