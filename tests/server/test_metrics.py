"""What a real server shows of itself on its metrics page."""

import re
import subprocess
import time
from collections.abc import Callable

from deltamem_vllm import metrics
from deltamem_vllm.metrics import TABLE
from tests.pages import Page, at
from tests.server.talk import Talk, new_session, ok, outcome

PROMPT, OTHER = list(range(20, 90)), list(range(100, 170))
OURS = re.compile(r"^(?:# (?:HELP|TYPE) )?deltamem_.*$", re.MULTILINE)


def until(talk: Talk, holds: Callable[[Page], bool], seconds: float = 30) -> Page:
    """The first page that ``holds`` is true of."""
    end = time.monotonic() + seconds
    while not holds(found := talk.metrics()) and time.monotonic() < end:
        time.sleep(0.1)
    return found


def test_every_metric_is_there_and_counts_what_was_done(talk: Talk) -> None:
    first, second = new_session(), new_session()
    ok(talk.complete(PROMPT, new_session(), n=4))  # whatever has ratios has them from the first commit on
    before = until(talk, lambda now: any(name == metrics.STORE_SESSIONS.name for name, _ in now))
    for version in (1, 2, 3):  # the second and third are retries
        assert outcome(talk.complete(PROMPT, first, n=4))[1:] == (f"{version}", "committed")
    ok(talk.complete(PROMPT, second, n=4))
    ok(talk.complete(OTHER, second, "read", n=4))  # from what the second session's commit left
    ok(talk.complete(PROMPT, second, "off", n=4))
    ok(talk.complete(PROMPT, n=4))
    after = talk.metrics()

    missing = {m.name for m in TABLE} - {re.sub("_(bucket|sum|count)$", "", name) for name, _ in after}
    assert missing <= {metrics.GATE_MEAN.name}, "gates are those of one commit in 16"

    def grown(metric: metrics.Metric, end: str = "", **labels: str) -> float:
        return at(after, metric, end, **labels) - at(before, metric, end, **labels)

    for mode, count in {"readwrite": 4, "read": 1, "off": 1, "none": 1}.items():
        assert grown(metrics.REQUESTS, mode=mode) == count
    assert grown(metrics.COMMITS, outcome="committed") == 4
    assert grown(metrics.COMMIT_SECONDS, "_count") == grown(metrics.QUEUE_WAIT, "_count") == 4
    assert grown(metrics.ADMISSIONS, outcome="granted") == 5
    assert grown(metrics.EVENTS, event="create") == grown(metrics.EVENTS, event="commit") == 2
    assert grown(metrics.STORE_RECORDS) == grown(metrics.MEMORY_COMMITS, effect="live") == 4
    assert grown(metrics.TOKENS, kind="written") == 4 * (len(PROMPT) + 3) - 2 * len(PROMPT), "a retry brings its answer"
    assert grown(metrics.TOKENS, kind="read_only") == len(PROMPT) + 3
    assert grown(metrics.SESSION_PROMPT_TOKENS) == 5 * len(PROMPT)
    assert grown(metrics.SESSION_CACHED_TOKENS) == 2 * 64, "two whole blocks, of each retry"
    assert [grown(metrics.SEEDS, source=s) for s in ("empty", "cached", "device", "host")] == [2, 2, 1, 0]
    assert grown(metrics.STORE_SESSIONS) in (0, 2), "it may be some seconds old"
    assert at(after, metrics.SESSION_SLOTS, state="used") >= 1, "equal states share a slot"
    assert at(after, metrics.HOOK_ERRORS) == at(after, metrics.ORDERS_REFUSED) == at(after, metrics.LOST_VERSIONS) == 0
    ratios = [v for (name, _), v in after.items() if name == metrics.LAYER_CORRECTION_RATIO.name]
    assert ratios
    assert all(0 < each < 100 for each in ratios)


def test_an_idle_server_tells_of_a_deletion(talk: Talk) -> None:
    session = new_session()
    ok(talk.complete(list(range(7, 60)), session, n=4))  # a state that no other session has
    before = talk.metrics()
    ok(talk.delete(f"/v1/sessions/{session}"))

    def gone(now: Page) -> bool:
        return all(
            at(now, metrics.SESSIONS, tier=t) == at(before, metrics.SESSIONS, tier=t) - 1 for t in ("device", "host")
        )

    after = until(talk, gone)
    assert gone(after)
    assert at(after, metrics.SESSION_SLOTS, state="used") == at(before, metrics.SESSION_SLOTS, state="used") - 1
    assert at(after, metrics.EVENTS, event="delete") == at(before, metrics.EVENTS, event="delete") + 1
    assert at(after, metrics.REQUESTS, mode="readwrite") == at(before, metrics.REQUESTS, mode="readwrite")


def test_gates_are_seen_within_16_commits(talk: Talk) -> None:
    session = new_session()
    for turn in range(16):
        ok(talk.complete([*PROMPT, turn], session, n=2))
    gates = [v for (name, _), v in talk.metrics().items() if name == metrics.GATE_MEAN.name]
    assert gates
    assert all(0 < each < 1 for each in gates)


def test_promtool_finds_nothing_to_say(talk: Talk) -> None:
    """Of ours: vLLM's own names have colons, which it does not like."""
    text = talk.get("/metrics").text
    assert "vllm:prompt_tokens_total" in text
    ours = "\n".join(OURS.findall(text)) + "\n"
    checked = subprocess.run(["promtool", "check", "metrics"], input=ours.encode(), capture_output=True, timeout=60)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")
