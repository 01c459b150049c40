"""The store, what waits for it, and the audit log."""

from grafana_foundation_sdk.builders import dashboard

from deltamem_vllm import metrics as m
from deploy.grafana.panels import Book, Query, frame, row
from deploy.grafana.queries import quantile, rate, series, share, total


def make(book: Book) -> dashboard.Dashboard:
    """The dashboard."""
    made = frame("store", "δ-mem: store", "Whether versions are saved, how fast, and what waits.")
    return _audit(book, _content(book, _calls(book, _waiting(book, made))))


def _waiting(book: Book, made: dashboard.Dashboard) -> dashboard.Dashboard:
    made = made.with_row(row("What waits"))
    made = made.with_panel(
        book.graph(
            "unsaved versions",
            "Clients were told of them, and a kill would lose them.",
            "none",
            Query(total(m.BACKLOG_VERSIONS, "instance"), "{{instance}}"),
            alerts=("DeltamemDegraded",),
        )
    )
    made = made.with_panel(
        book.graph(
            "age of the oldest",
            "An alert comes at 30 seconds.",
            "s",
            Query(total(m.BACKLOG_AGE, "instance", how="max"), "{{instance}}"),
            alerts=("DeltamemBacklogOld",),
            limit=30,
        )
    )
    made = made.with_panel(
        book.graph(
            "memory of what waits",
            "As a share of --deltamem-host-bytes; at 100 % requests of sessions get 503.",
            "percentunit",
            Query(f"max by (instance) ({series(m.BACKLOG_BYTES)} / {series(m.HOST_LIMIT)})", "{{instance}}"),
            alerts=("DeltamemBacklogLarge",),
            limit=0.5,
        )
    )
    made = made.with_panel(
        book.graph(
            "cannot save",
            "1: the store does not take versions, and requests go on without it.",
            "none",
            Query(total(m.DEGRADED, "instance", how="max"), "{{instance}}"),
            alerts=("DeltamemDegraded",),
            limit=1,
        )
    )
    made = made.with_panel(
        book.graph(
            "lost versions",
            "The store refused them after clients were told of them.",
            "ops",
            Query(rate(m.LOST_VERSIONS, "instance"), "{{instance}}"),
            alerts=("DeltamemLostVersions",),
        )
    )
    return made.with_panel(
        book.graph(
            "records at the store's writer",
            "Handed over and not answered.",
            "none",
            Query(total(m.STORE_QUEUE, "instance"), "{{instance}}"),
        )
    )


def _calls(book: Book, made: dashboard.Dashboard) -> dashboard.Dashboard:
    made = made.with_row(row("Calls"))
    each = f"sum by (operation) (rate({series(m.STORE_SECONDS, '_count')}[$__rate_interval]))"
    made = made.with_panel(
        book.graph(
            "calls by operation", "put is a group of commits in one transaction.", "ops", Query(each, "{{operation}}")
        )
    )
    made = made.with_panel(
        book.graph(
            "time of a call",
            "One in 20 takes longer. An alert comes at 1 second for get and put together.",
            "s",
            Query(quantile(0.95, m.STORE_SECONDS, "operation"), "{{operation}} p95"),
            alerts=("DeltamemStoreSlow",),
            limit=1,
        )
    )
    made = made.with_panel(
        book.graph(
            "errors",
            "corrupt: what is stored does not verify.",
            "ops",
            Query(rate(m.STORE_ERRORS, "operation", "kind"), "{{operation}}: {{kind}}"),
            alerts=("DeltamemStoreErrors", "DeltamemStoreCorrupt"),
        )
    )
    made = made.with_panel(
        book.graph(
            "records saved",
            "By the store's writer, in groups.",
            "ops",
            Query(rate(m.STORE_RECORDS), "records"),
            Query(rate(m.STORE_BATCHES), "groups"),
        )
    )
    made = made.with_panel(
        book.graph(
            "records in a group",
            "More under load: that is what makes it fast.",
            "short",
            Query(share(rate(m.STORE_RECORDS), rate(m.STORE_BATCHES)), "records"),
        )
    )
    return made.with_panel(
        book.graph(
            "leases held",
            "On sessions, in a store that servers share.",
            "none",
            Query(total(m.LEASES, "instance"), "{{instance}}"),
        )
    )


def _content(book: Book, made: dashboard.Dashboard) -> dashboard.Dashboard:
    made = made.with_row(row("Content"))
    made = made.with_panel(
        book.graph(
            "sessions stored",
            "Of all tenants and servers.",
            "none",
            Query(total(m.STORE_SESSIONS, "job", how="max"), "{{job}}"),
            width=12,
        )
    )
    return made.with_panel(
        book.graph(
            "bytes stored",
            "Records with all kept versions, as the store counts them.",
            "bytes",
            Query(total(m.STORE_BYTES, "job", how="max"), "{{job}}"),
            width=12,
        )
    )


def _audit(book: Book, made: dashboard.Dashboard) -> dashboard.Dashboard:
    made = made.with_row(row("Audit log"))
    made = made.with_panel(
        book.graph(
            "failed tries to write it",
            "It is tried again every second.",
            "ops",
            Query(rate(m.AUDIT_FAILURES, "instance"), "{{instance}}"),
            alerts=("DeltamemAuditFailing",),
            width=12,
        )
    )
    return made.with_panel(
        book.graph(
            "entries dropped",
            "The log says how many, and where.",
            "ops",
            Query(rate(m.AUDIT_LOST, "instance"), "{{instance}}"),
            alerts=("DeltamemAuditLost",),
            width=12,
        )
    )
