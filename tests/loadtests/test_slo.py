"""The load's trace and its figures, without servers; `test_campaigns` replays one on a server."""

import asyncio
import dataclasses
from collections import Counter
from itertools import pairwise
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from loadtests.slo import picture, summary, trace
from loadtests.slo.arms import MEMORY, VANILLA, Arm
from loadtests.slo.replay import Answer, Sending, messages, replay


def test_a_seed_makes_one_trace() -> None:
    assert trace.make(3, 60, 5) == trace.make(3, 60, 5) != trace.make(4, 60, 5)


def test_arrivals_are_open_loop_and_of_every_pattern() -> None:
    made = trace.make(7, 400, 5)
    times = [arrival.at for arrival in made.arrivals]
    assert times == sorted(times)
    distinct = len(set(times))
    assert distinct == pytest.approx(5 * 400, rel=0.1)
    counts = Counter(arrival.pattern for arrival in made.arrivals)
    assert set(counts) == set(trace.PATTERNS)
    bursts = Counter(a.at for a in made.arrivals if a.pattern == "burst")
    assert min(bursts.values()) >= trace.BURST[0]
    assert max(bursts.values()) > 9, "none is longer than a session's queue"


def test_histories_are_what_was_said() -> None:
    """Each request has all that was said in its session before, whether its server is sent it or not."""
    made = trace.make(8, 120, 5)
    assert not set(made.idle) & set(made.regular)
    by_session: dict[str, list[trace.Arrival]] = {}
    for arrival in made.arrivals:
        if arrival.session is None:
            assert (arrival.pattern, arrival.history) == ("no session", ())
        else:
            by_session.setdefault(arrival.session, []).append(arrival)
    for session, arrivals in by_session.items():
        first = arrivals[0]
        assert first.history == {**made.regular, **made.idle}.get(session, ())
        assert (first.pattern == "new") == (first.history == ())
        assert (first.pattern == "long idle") == (session in made.idle)
        for before, after in pairwise(arrivals):
            assert after.history[: len(before.history)] == before.history
            assert len(after.history) < trace.LONGEST
            if before.pattern == after.pattern == "burst" and before.at == after.at:
                assert after.history == before.history
            elif before.pattern not in ("read only", "burst"):
                assert [user for user, _ in after.history[len(before.history) :]] == [before.user]
            if after.pattern == "returning":
                written = [each.at for each in arrivals if each.at < after.at and each.pattern != "read only"]
                assert after.at - max(written, default=0.0) >= trace.IDLE


@pytest.mark.parametrize(
    ("pattern", "whole", "headers"),
    [
        ("new turn only", False, {"X-Session-ID": "s"}),
        ("long idle", False, {"X-Session-ID": "s"}),
        ("full resend", True, {"X-Session-ID": "s"}),
        ("elided", True, {"X-Session-ID": "s", "X-DeltaMem-History": "elide"}),
        ("read only", False, {"X-Session-ID": "s", "X-DeltaMem-Mode": "read"}),
    ],
)
def test_what_users_send(pattern: trace.Pattern, whole: bool, headers: dict[str, str]) -> None:
    """vLLM's users resend everything; those of the memory only where the pattern says so."""
    arrival = trace.Arrival(1.0, pattern, "s", (("a", "b"), ("c", "d")), "e")
    vanilla, memory = (Arm(name, None, None).sending(arrival) for name in (VANILLA, MEMORY))  # type: ignore[arg-type]
    assert [m["content"] for m in vanilla.body["messages"]] == ["a", "b", "c", "d", "e"]
    assert vanilla.headers == {}
    assert memory.body["messages"] == messages(arrival, whole)
    assert len(memory.body["messages"]) == (5 if whole else 1)
    assert memory.headers == headers


def answers() -> list[Answer]:
    """A hundred with times to the first token of 1 to 100 ms, ten that were told to come later, one that failed."""
    good = [
        Answer("new", "ok", ttft=n / 1000, tpot=0.002, commit=0.01 if n <= 50 else 0.5, status="committed", tokens=4)
        for n in range(1, 101)
    ]
    return [*good, *[Answer("burst", "409")] * 10, Answer("elided", "ServerDisconnectedError")]


def test_figures() -> None:
    rows = summary.rows({"a": [answers()[:60], answers()[60:]]}, summary.Objectives(ttft=0.08, tpot=0.05, commit=0.25))
    of_new = next(row for row in rows if row["pattern"] == "new")
    assert of_new["ttft p50"] == pytest.approx(50.5)
    assert of_new["ttft p99"] == pytest.approx(99.01)
    assert of_new["commit p95"] == pytest.approx(500)
    assert of_new["good %"] == 50, "a late commit is not good"
    everything = next(row for row in rows if row["pattern"] == summary.ALL)
    assert (everything["requests"], everything["409"], everything["errors"]) == (111, 10, 1)
    assert everything["good %"] == pytest.approx(100 * 50 / 111), "who was told to come later was not served well"
    only_ttft = summary.Objectives(ttft=0.08, tpot=0.05, commit=1)
    assert next(r for r in summary.rows({"a": [answers()]}, only_ttft) if r["pattern"] == "new")["good %"] == 80
    kinds = {row["outcome"]: row["requests"] for row in summary.errors({"a": [answers()]})}
    assert kinds == {"409": 10, "ServerDisconnectedError": 1}
    by_round = summary.by_round({"a": [answers(), answers()]}, 10.0, only_ttft)
    assert [row["good per s"] for row in by_round] == [8.0, 8.0]


def test_tables_and_a_picture(tmp_path: Path) -> None:
    rounds = {"a": [answers()], "b": [[dataclasses.replace(each, commit=None) for each in answers()]]}
    rows = summary.rows(rounds, summary.Objectives())
    text = summary.markdown("of all", rows)
    assert text.count("\n| ") == len(rows) + 1
    assert "| burst | a | 10 | 10 | 0 |" in text
    assert "none" in summary.markdown("of nothing", [])
    picture.draw(rounds, rows, tmp_path / "some.png", "a machine")
    assert (tmp_path / "some.png").read_bytes().startswith(b"\x89PNG")


def test_arrivals_never_wait_for_answers() -> None:
    """A server that takes half a second for each answer gets all requests when they are due, and is charged for it."""
    came: list[float] = []

    async def slow(request: web.Request) -> web.StreamResponse:
        came.append(asyncio.get_running_loop().time())
        if request.headers.get("X-Session-ID") == "busy":
            return web.json_response({"error": {}}, status=409, headers={"Retry-After": "1"})
        response = web.StreamResponse()
        await response.prepare(request)
        await asyncio.sleep(0.5)
        for n in range(3):
            await response.write(b'data: {"choices": [{"delta": {"content": "x"}}]}\n\n')
            await asyncio.sleep(0.02 if n < 2 else 0)
        await response.write(b'data: {"choices": [], "usage": {"completion_tokens": 3, "prompt_tokens": 7}}\n\n')
        await asyncio.sleep(0.1)
        await response.write(b": x-deltamem-commit: committed\n\ndata: [DONE]\n\n")
        return response

    async def scenario() -> list[Answer]:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", slow)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        sendings = [Sending(0.05 * n, "new", {}, {}) for n in range(8)] + [
            Sending(0.0, "burst", {}, {"X-Session-ID": "busy"})
        ]
        async with aiohttp.ClientSession() as http:
            found = await replay(http, f"http://127.0.0.1:{port}", sendings)
        await runner.cleanup()
        return found

    found = asyncio.run(scenario())
    assert max(came) - min(came) < 0.5, "somebody waited"
    assert found.pop().outcome == "409"
    for answer in found:
        assert (answer.outcome, answer.prompt, answer.tokens) == ("ok", 7, 3)
        assert 0.5 <= (answer.ttft or 0) < 1
        assert 0.015 <= (answer.tpot or 0) < 0.2
        assert answer.commit is not None
        assert 0.1 <= answer.commit + (answer.tpot or 0) < 0.4, "the last token came with its pause before the end"
