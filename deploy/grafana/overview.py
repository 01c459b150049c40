"""The first one to look at: is the service well, and which part is not?"""

from grafana_foundation_sdk.builders import dashboard

from deltamem_vllm import metrics as m
from deploy.grafana.panels import Book, Query, frame, row
from deploy.grafana.queries import SELECTED, buckets, grown, quantile, rate, series, total

FIRING = f'count(ALERTS{{alertname=~"Deltamem.*", alertstate="firing", {SELECTED}}}) or vector(0)'


def make(book: Book) -> dashboard.Dashboard:
    """The dashboard."""
    made = frame("overview", "δ-mem: overview", "Whether sessions are served, saved and remembered.")
    return _commits(book, _requests(book, _now(book, made)))


def _now(book: Book, made: dashboard.Dashboard) -> dashboard.Dashboard:
    made = made.with_row(row("Now"))
    made = made.with_panel(
        book.number("alerts firing", "Of the rules shipped beside this.", "none", Query(FIRING), red=1, width=3)
    )
    made = made.with_panel(
        book.number(
            "engines that are silent",
            "Their session service did not answer the last scrape.",
            "none",
            Query(f"sum(1 - {series(m.UP)})"),
            alerts=("DeltamemEngineSilent", "DeltamemServerDown"),
            red=1,
            width=3,
        )
    )
    made = made.with_panel(
        book.number("engines", "Those that answered the last scrape.", "none", Query(total(m.UP)), width=3)
    )
    made = made.with_panel(
        book.number(
            "engines that cannot save",
            "Versions wait in memory for a store that does not take them.",
            "none",
            Query(total(m.DEGRADED)),
            alerts=("DeltamemDegraded",),
            red=1,
            width=3,
        )
    )
    made = made.with_panel(
        book.number(
            "unsaved versions",
            "Clients were told of them; a kill would lose them now.",
            "none",
            Query(total(m.BACKLOG_VERSIONS)),
            alerts=("DeltamemBacklogOld",),
            width=3,
        )
    )
    made = made.with_panel(
        book.number(
            "versions lost within an hour",
            "The store refused them after clients were told of them.",
            "none",
            Query(grown(m.LOST_VERSIONS, "1h")),
            alerts=("DeltamemLostVersions",),
            red=1,
            width=3,
        )
    )
    made = made.with_panel(
        book.number(
            "bugs contained within an hour",
            "Exceptions in hooks and orders that were refused.",
            "none",
            Query(f"{grown(m.HOOK_ERRORS, '1h')} + {grown(m.ORDERS_REFUSED, '1h')}"),
            alerts=("DeltamemHookErrors", "DeltamemOrdersRefused"),
            red=1,
            width=3,
        )
    )
    made = made.with_panel(
        book.number(
            "memory without effect",
            "Engines whose last 16 commits made corrections that change no answer.",
            "none",
            Query(total(m.INERT)),
            alerts=("DeltamemMemoryInert",),
            red=1,
            width=3,
        )
    )
    return made.with_panel(
        book.rows(
            "What runs",
            "Versions, fingerprints and settings.",
            Query(total(m.BUILD_INFO, "job", "instance", *m.BUILD_INFO.labels)),
        )
    )


def _requests(book: Book, made: dashboard.Dashboard) -> dashboard.Dashboard:
    made = made.with_row(row("Requests"))
    made = made.with_panel(
        book.graph(
            "requests by mode",
            "Those that reached the engine.",
            "reqps",
            Query(rate(m.REQUESTS, "mode"), "{{mode}}"),
            stacked=True,
        )
    )
    made = made.with_panel(
        book.graph(
            "turns asked for, by answer",
            "Of requests that named a session. busy: 409; precondition: 412; quota: 429; unavailable: 503.",
            "reqps",
            Query(rate(m.ADMISSIONS, "outcome"), "{{outcome}}"),
            alerts=("DeltamemRequestsUnavailable", "DeltamemQueueRefusals"),
            stacked=True,
        )
    )
    made = made.with_panel(
        book.graph(
            "time until granted",
            "The queue, the record, the plan: part of the time to the first token.",
            "s",
            *(Query(quantile(q, m.ADMISSION_SECONDS), f"p{100 * q:g}") for q in (0.5, 0.95, 0.99)),
        )
    )
    made = made.with_panel(
        book.heat(
            "waits for a busy session",
            "Of requests that write: how long others kept the session.",
            "s",
            Query(buckets(m.QUEUE_WAIT)),
            alerts=("DeltamemQueueWaits",),
        )
    )
    made = made.with_panel(
        book.graph(
            "requests that wait",
            "For the turn of their session, now.",
            "none",
            Query(total(m.REQUESTS_WAITING, "instance"), "{{instance}}"),
        )
    )
    return made.with_panel(
        book.graph(
            "time since the start",
            "Of the engines' session services; a line that falls to 0 is a restart.",
            "s",
            Query(f"time() - {series(m.START_TIME)}", "{{instance}} engine {{engine}}"),
        )
    )


def _commits(book: Book, made: dashboard.Dashboard) -> dashboard.Dashboard:
    made = made.with_row(row("Commits"))
    made = made.with_panel(
        book.graph(
            "commits by outcome",
            "As clients are told. failed: the answer is not remembered; aborted: the client left.",
            "reqps",
            Query(rate(m.COMMITS, "outcome"), "{{outcome}}"),
            alerts=("DeltamemCommitFailures", "DeltamemCommitConflicts"),
            stacked=True,
        )
    )
    made = made.with_panel(
        book.graph(
            "time to commit",
            "The last byte of an answer waits for it.",
            "s",
            *(Query(quantile(q, m.COMMIT_SECONDS), f"p{100 * q:g}") for q in (0.5, 0.95, 0.99)),
            alerts=("DeltamemCommitLatencyFast", "DeltamemCommitLatencySlow"),
            limit=0.25,
        )
    )
    return made.with_panel(
        book.graph(
            "commits slower than 250 ms",
            "The objective: at most 1 %. An alert comes at 14.4 % within 5 minutes, or 6 % within 30.",
            "percentunit",
            *(
                Query(f'job:deltamem_commits_slow:ratio_rate{w}{{job=~"$job"}}', f"{{{{job}}}} {w}")
                for w in ("5m", "1h", "6h")
            ),
            alerts=("DeltamemCommitLatencyFast", "DeltamemCommitLatencySlow"),
            limit=0.01,
        )
    )
