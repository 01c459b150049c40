"""Every metric that a server with δ-mem shows on ``/metrics``, named once; docs/metrics.md says what each is for.

All are facts about one engine (one data-parallel rank) and have the label ``engine``, its number, as vLLM's own have.
None has a label with as many values as there are sessions, tenants or clients. Counters and histograms count from the
engine's start; gauges are asked for at each scrape. Those about the store are facts about all that is in it, whoever
wrote it: only engine 0 of a server reports them, and servers that share a store report the same.
"""

import sys
from dataclasses import dataclass
from functools import partial
from typing import Literal

Kind = Literal["counter", "gauge", "histogram"]

ENGINE = "engine"
"""The label that every metric has."""

#: Upper bounds of buckets, in seconds: of what happens in memory, and of what may wait for a store or for others.
FAST = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
SLOW = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
NORMS = (0.001, 0.01, 0.03, 0.1, 0.3, 1.0, 2.0, 3.0, 5.0, 10.0, 30.0, 100.0, 1000.0)
RATIOS = (1e-6, 1e-5, 1e-4, 1e-3, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)

INERT_RATIO = 1e-4
"""A memory whose correction is expected to be smaller than this part of what it corrects is called inert."""


@dataclass(frozen=True, slots=True, eq=False)
class Metric:
    """One metric.

    Attributes:
        name: with its unit, and ``_total`` where it counts.
        kind: what Prometheus calls its type.
        unit: of its value.
        help: what it is, exactly.
        labels: beside `ENGINE`.
        values: per label its values, where they are a closed set; those of counters are there from the start, at 0.
        buckets: upper bounds, of a histogram.
    """

    name: str
    kind: Kind
    unit: str
    help: str
    labels: tuple[str, ...] = ()
    values: tuple[tuple[str, ...], ...] = ()
    buckets: tuple[float, ...] = ()


TABLE: list[Metric] = []
"""All of them, in the order of the documents. Nothing is added to it outside of this module."""


def _metric(kind: Kind, name: str, unit: str, help: str, buckets: tuple[float, ...] = (), /, **labels: str) -> Metric:
    """Add one to the table; a label's values are separated by blanks, none: an open set."""
    values = tuple(tuple(each.split()) for each in labels.values())
    made = Metric(name, kind, unit, help, tuple(labels), values, buckets)
    TABLE.append(made)
    return made


_counter, _gauge, _histogram = (partial(_metric, kind) for kind in ("counter", "gauge", "histogram"))

# --- the engine -------------------------------------------------------------------------------------------------------

UP = _gauge("deltamem_up", "0 or 1", "Whether the engine's session service answered this scrape.")
BUILD_INFO = _gauge(
    "deltamem_build_info",
    "1",
    "Always 1; what runs is in the labels: the package's version, the first 12 digits of the adapter's and the model's "
    "fingerprints, the state's layout, the kind of store, and durability.",
    version="",
    adapter="",
    model="",
    layout="",
    store="",
    durability="",
)
START_TIME = _gauge(
    "deltamem_start_time_seconds",
    "seconds since the epoch",
    "When the engine's session service started; counters count from then.",
)
HOOK_ERRORS = _counter(
    "deltamem_hook_errors_total",
    "errors",
    "Exceptions in the code that runs in the engine's own loop; each was contained, and is a bug: see the log.",
)

# --- sessions ---------------------------------------------------------------------------------------------------------

SESSIONS = _gauge(
    "deltamem_sessions",
    "sessions",
    "Sessions of which a state is in the device's pool, and sessions whose latest record is in host memory.",
    tier="device host",
)
SESSIONS_BUSY = _gauge("deltamem_sessions_busy", "sessions", "Sessions that a request or a change is writing now.")
SESSION_SLOTS = _gauge("deltamem_session_slots", "slots", "Slots of the device's session pool.", state="used free")
EVICTIONS = _counter(
    "deltamem_evictions_total",
    "evictions",
    "States overwritten in the device's pool, and sessions dropped from host memory, to make room for others. They are "
    "in the tier below.",
    tier="device host",
)
HOST_BYTES = _gauge(
    "deltamem_host_bytes", "bytes", "Host memory that sessions and their records take, by the server's count."
)
HOST_LIMIT = _gauge("deltamem_host_limit_bytes", "bytes", "The setting --deltamem-host-bytes.")
EVENTS = _counter(
    "deltamem_session_events_total",
    "events",
    "What was done to sessions and is in the store: the same events as in the audit log, whether there is one or not.",
    event="create commit export import rollback reset fork delete facts metadata expire",
)

# --- requests ---------------------------------------------------------------------------------------------------------

REQUESTS = _counter(
    "deltamem_requests_total",
    "requests",
    "Requests that reached the engine, by what they do with memory: readwrite and read name a session, none names none "
    "and runs from the empty memory, off runs the bare model.",
    mode="readwrite read none off",
)
ADMISSIONS = _counter(
    "deltamem_admissions_total",
    "requests",
    "Requests that named a session and asked for their turn: granted; busy (409: its turn did not come); precondition "
    "(412); quota (429); unavailable (503: the store, or too much waits for it); refused (what else is the client's to "
    "change: another adapter's session, say); cancelled (the client left); error.",
    outcome="granted busy precondition quota unavailable refused cancelled error",
)
ADMISSION_SECONDS = _histogram(
    "deltamem_admission_seconds",
    "seconds",
    "From the question for a turn until it was granted: the queue, the record, the plan. Part of the time to the first "
    "token.",
    FAST,
)
QUEUE_WAIT = _histogram(
    "deltamem_queue_wait_seconds",
    "seconds",
    "How long a request that writes a session waited for its turn, here and among servers, whether it came or not.",
    FAST,
)
REQUESTS_WAITING = _gauge(
    "deltamem_requests_waiting", "requests", "Requests that wait for the turn of their session in this engine."
)
CONFLICTS = _counter(
    "deltamem_conflicts_total",
    "requests",
    "Requests and changes that another writer of the session got in the way of: busy (its turn did not come), "
    "precondition (If-Match named another version), commit (another server had committed, or the session was deleted, "
    "meanwhile).",
    reason="busy precondition commit",
)
LEASES = _gauge("deltamem_leases", "leases", "Leases on sessions that the engine holds in a store that servers share.")

# --- loads and commits ------------------------------------------------------------------------------------------------

LOADS = _counter(
    "deltamem_loads_total",
    "loads",
    "Looks for a session's latest record, up to two for each request: source host, where host memory has the latest; "
    "source store, where it was read. Outcome absent: the session is new; refused: another adapter, model or shape "
    "wrote it; error: it cannot be read.",
    source="host store",
    outcome="found absent refused error",
)
LOAD_SECONDS = _histogram(
    "deltamem_load_seconds",
    "seconds",
    "How long such a look took; source host includes asking a store that servers share whether it is still the latest.",
    FAST,
    source="host store",
)
SEEDS = _counter(
    "deltamem_seeds_total",
    "requests",
    "Where requests of sessions got their first state from as they began to run, or began again: cached (with prefix "
    "cache blocks), device (the pool), host (copied to the device), empty (the empty memory).",
    source="cached device host empty",
)
COMMITS = _counter(
    "deltamem_commits_total",
    "requests",
    "Requests that were to write a session, by what became of that, as clients are told: see docs/sessions.md.",
    outcome="committed pending degraded conflict failed aborted",
)
COMMIT_SECONDS = _histogram(
    "deltamem_commit_seconds",
    "seconds",
    "From a request's final state arriving in host memory until its outcome was known; the last byte of the answer "
    "waits for it.",
    FAST,
)
LOST_VERSIONS = _counter(
    "deltamem_lost_versions_total",
    "versions",
    "Versions that clients were told of and that the store refused later: they are lost.",
)
ORDERS_REFUSED = _counter(
    "deltamem_orders_refused_total",
    "orders",
    "Orders that a worker refused because they named a slot's former content. 0, or a bug was contained.",
)
AUDIT_FAILURES = _counter("deltamem_audit_failures_total", "tries", "Tries to write the audit log that failed.")
AUDIT_LOST = _counter("deltamem_audit_lost_total", "entries", "Entries that the audit log had to drop.")

# --- the store --------------------------------------------------------------------------------------------------------

DEGRADED = _gauge(
    "deltamem_degraded",
    "0 or 1",
    "Whether versions wait for a store that could not take them: requests go on, and a kill would lose what waits.",
)
STORE_SECONDS = _histogram(
    "deltamem_store_operation_seconds",
    "seconds",
    "Calls of the store, failed ones too: put (a group of commits, in one transaction), get, head (where a session "
    "is), history, delete, list (a page of sessions, tenants or idle ones), usage.",
    FAST,
    operation="put get head history delete list usage",
)
STORE_ERRORS = _counter(
    "deltamem_store_errors_total",
    "errors",
    "Records and questions that the store failed: unavailable (unreachable, full, read-only), corrupt (what is stored "
    "does not verify), other. A stale version or a full quota is no error of the store.",
    operation="put get head history delete list usage",
    kind="unavailable corrupt other",
)
STORE_BATCHES = _counter(
    "deltamem_store_batches_total", "transactions", "Groups of commits that were sent to the store."
)
STORE_RECORDS = _counter("deltamem_store_records_total", "records", "Records in those groups that the store took.")
STORE_QUEUE = _gauge(
    "deltamem_store_queue_records", "records", "Records handed to the store's writer and not answered yet."
)
BACKLOG_VERSIONS = _gauge(
    "deltamem_store_backlog_versions",
    "versions",
    "Versions that clients were told of and that the store does not have yet: what a kill would lose now.",
)
BACKLOG_BYTES = _gauge(
    "deltamem_store_backlog_bytes",
    "bytes",
    "Host memory that those versions take; at --deltamem-host-bytes requests of sessions get 503.",
)
BACKLOG_AGE = _gauge(
    "deltamem_store_backlog_age_seconds",
    "seconds",
    "How long the oldest of those has waited; 0: there are none.",
)
STORE_SESSIONS = _gauge(
    "deltamem_store_sessions",
    "sessions",
    "Sessions in the store, of all tenants and servers, as counted within the last seconds. Engine 0 reports it.",
)
STORE_BYTES = _gauge(
    "deltamem_store_bytes",
    "bytes",
    "Records in the store, all kept versions of all tenants and servers, as counted within the last seconds. Engine 0 "
    "reports it.",
)

# --- tokens -----------------------------------------------------------------------------------------------------------

TOKENS = _counter(
    "deltamem_tokens_total",
    "tokens",
    "Tokens that requests of sessions brought beyond what their sessions had been fed already, prompts and answers: "
    "written by a commit; masked by a write policy in one; read_only by requests that only read.",
    kind="written masked read_only",
)
TOKENS_ELIDED = _counter(
    "deltamem_tokens_elided_total",
    "tokens",
    "Tokens of resent histories that were left out of prompts because the memory holds them.",
)
SESSION_PROMPT_TOKENS = _counter(
    "deltamem_session_prompt_tokens_total",
    "tokens",
    "Tokens in the prompts of requests of sessions, as they began to run.",
)
SESSION_CACHED_TOKENS = _counter(
    "deltamem_session_cached_tokens_total",
    "tokens",
    "Those of them that were found in the prefix cache.",
)

# --- what the memory does ---------------------------------------------------------------------------------------------

STATE_NORM = _histogram(
    "deltamem_state_norm",
    "1",
    "Frobenius norm of a committed state, the root of the mean square over layers and state heads.",
    NORMS,
)
LAYER_STATE_NORM = _gauge(
    "deltamem_layer_state_norm",
    "1",
    "The same of one layer of the model, averaged over commits; a commit's weight halves with every 11 further ones.",
    layer="",
)
CORRECTION_RATIO = _histogram(
    "deltamem_correction_ratio",
    "1",
    "An estimate of how large the correction of the attention output is beside that output, per commit: the root mean "
    "square of |δo|/|o| over layers. |δo| is what the committed state gives for a random query; |o| is what the "
    "layer's value and output projections give for a random input of normal size, from the weights alone.",
    RATIOS,
)
LAYER_CORRECTION_RATIO = _gauge(
    "deltamem_layer_correction_ratio",
    "1",
    "The same of one layer, averaged as the state norm is.",
    layer="",
)
GATE_MEAN = _gauge(
    "deltamem_gate_mean",
    "1",
    "Mean of a layer's write gate (beta) and of its keep gate (lambda, where the adapter has one) at the newest tokens "
    "of the last block of sampled commits, one in 16, averaged as the state norm is.",
    gate="beta lambda",
    layer="",
)
MEMORY_COMMITS = _counter(
    "deltamem_memory_commits_total",
    "commits",
    f"Commits by whether their memory matters: inert, where the correction ratio is below {INERT_RATIO:g}; else live.",
    effect="live inert",
)
INERT = _gauge(
    "deltamem_memory_inert",
    "0 or 1",
    "Whether the memory of each of the last 16 commits was inert: an adapter is loaded, and does nothing.",
)


def as_markdown() -> str:
    """The table as in docs/metrics.md: ``python -m deltamem_vllm.metrics`` prints it."""
    lines = ["| metric | type | labels | what it is |", "|---|---|---|---|"]
    for each in TABLE:
        sets = (f"`{n}`" + (f" ({', '.join(v)})" if v else "") for n, v in zip(each.labels, each.values, strict=True))
        unit = "" if each.unit == "1" else f", {each.unit}"
        said = each.help.replace("|", "\\|")
        lines.append(f"| `{each.name}` | {each.kind}{unit} | {'; '.join(sets)} | {said} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(as_markdown())
