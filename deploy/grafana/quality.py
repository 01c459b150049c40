"""What the memory does to answers, by estimates from committed states: see docs/metrics.md."""

from grafana_foundation_sdk.builders import dashboard

from deltamem_vllm import metrics as m
from deploy.grafana.panels import Book, Query, frame, row
from deploy.grafana.queries import buckets, quantile, rate, share, total


def make(book: Book) -> dashboard.Dashboard:
    """The dashboard."""
    made = frame("quality", "δ-mem: quality", "What the memory does: corrections, sizes of states, gates.")
    return _states(book, _effect(book, made))


def _effect(book: Book, made: dashboard.Dashboard) -> dashboard.Dashboard:
    made = made.with_row(row("Effect on answers"))
    made = made.with_panel(
        book.number(
            "engines without effect",
            "The corrections of their last 16 commits change no answer.",
            "none",
            Query(total(m.INERT)),
            alerts=("DeltamemMemoryInert",),
            red=1,
        )
    )
    effects = Query(share(rate(m.MEMORY_COMMITS, effect="inert"), rate(m.MEMORY_COMMITS)))
    made = made.with_panel(
        book.number(
            "commits without effect", f"Correction ratio below {m.INERT_RATIO:g}.", "percentunit", effects, red=0.5
        )
    )
    made = made.with_panel(
        book.number(
            "median correction", "Beside the attention output.", "percentunit", Query(quantile(0.5, m.CORRECTION_RATIO))
        )
    )
    made = made.with_panel(
        book.number("median norm", "Of committed states.", "short", Query(quantile(0.5, m.STATE_NORM)))
    )
    gates = Query(total(m.GATE_MEAN, how="avg", gate="beta"))
    made = made.with_panel(book.number("write gate", "Mean over layers.", "percentunit", gates))
    made = made.with_panel(book.number("tokens written", "Per second.", "cps", Query(rate(m.TOKENS, kind="written"))))
    made = made.with_panel(
        book.heat(
            "correction ratio",
            "Of commits: δo beside o, root mean square over layers.",
            "percentunit",
            Query(buckets(m.CORRECTION_RATIO)),
            alerts=("DeltamemMemoryInert",),
        )
    )
    made = made.with_panel(
        book.graph(
            "correction ratio by layer",
            "Averages over commits, the largest of the engines.",
            "percentunit",
            Query(total(m.LAYER_CORRECTION_RATIO, "layer", how="max"), "layer {{layer}}"),
        )
    )
    return made.with_panel(
        book.graph(
            "commits by effect",
            f"inert: the correction ratio is below {m.INERT_RATIO:g}.",
            "ops",
            Query(rate(m.MEMORY_COMMITS, "effect"), "{{effect}}"),
            alerts=("DeltamemMemoryInert",),
            stacked=True,
        )
    )


def _states(book: Book, made: dashboard.Dashboard) -> dashboard.Dashboard:
    made = made.with_row(row("States"))
    made = made.with_panel(
        book.heat(
            "norm of states",
            "Frobenius norm at commits, root mean square over layers and heads.",
            "short",
            Query(buckets(m.STATE_NORM)),
            alerts=("DeltamemMemoryRunaway",),
        )
    )
    made = made.with_panel(
        book.graph(
            "norm of states, quantiles",
            "An alert comes where one in ten is above 30.",
            "short",
            *(Query(quantile(q, m.STATE_NORM), f"p{100 * q:g}") for q in (0.1, 0.5, 0.9)),
            alerts=("DeltamemMemoryRunaway",),
            limit=30,
        )
    )
    made = made.with_panel(
        book.graph(
            "norm by layer",
            "Averages over commits, the largest of the engines. Rising: it fills up. Falling: it fades.",
            "short",
            Query(total(m.LAYER_STATE_NORM, "layer", how="max"), "layer {{layer}}"),
            alerts=("DeltamemMemoryRunaway",),
        )
    )
    return made.with_panel(
        book.graph(
            "gates by layer",
            "beta: how much of a token is written; lambda, where the adapter has one: how much is kept. one in 16.",
            "percentunit",
            Query(total(m.GATE_MEAN, "gate", "layer", how="avg"), "{{gate}} layer {{layer}}"),
            width=24,
        )
    )
