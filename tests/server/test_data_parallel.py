"""One server with two engines (data parallel) and two API processes: a session lives on one rank, always the same."""

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deltamem_vllm import metrics
from deltamem_vllm.demo.server import VllmServer
from tests.pages import Page, at
from tests.server.conftest import FLAGS, HERE, MODEL
from tests.server.streams import Stream, prompt
from tests.server.talk import Talk, new_session, ok, outcome, refused

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(900)]
_SERVED = re.compile(r'^vllm:prompt_tokens_total\{.*engine="(\d)".*\} (\S+)$', re.MULTILINE)


@pytest.fixture(scope="module")
def ranks(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    folder = tmp_path_factory.mktemp("ranks")
    many = ("--data-parallel-size", "2", "--api-server-count", "2")
    store = f"sqlite:///{folder}/sessions.db"
    made = VllmServer(MODEL, adapter, store, *FLAGS, *many, env=HERE, log=folder / "log")
    try:
        made.start().wait_ready(600)  # six processes to start
        yield made
    finally:
        made.kill()


def prompts_by_rank(talk: Talk) -> list[int]:
    """Prompt tokens that each engine has taken in so far."""
    served = [0, 0]
    for rank, tokens in _SERVED.findall(talk.get("/metrics").text):
        served[int(rank)] += int(float(tokens))
    return served


def taken_in(talk: Talk, before: list[int], tokens: int) -> list[int]:
    """What each engine took in since ``before``, once it is ``tokens`` together."""
    end = time.monotonic() + 30
    while True:
        after = prompts_by_rank(talk)
        new = [b - a for a, b in zip(before, after, strict=True)]
        if sum(new) >= tokens or time.monotonic() > end:
            return new
        time.sleep(0.1)


def rank_of(talk: Talk, before: list[int], tokens: int) -> int:
    """The only engine that took in anything since ``before``: all of the ``tokens``."""
    new = taken_in(talk, before, tokens)
    assert sorted(new) == [0, tokens], f"the ranks took in {new} of {tokens} tokens of one session"
    return new.index(tokens)


def test_a_session_stays_on_its_rank(ranks: VllmServer) -> None:
    of_rank: dict[int, str] = {}
    with Talk(ranks.base_url) as talk:
        for tried in range(30):
            session = new_session()
            before = prompts_by_rank(talk)
            for version in range(1, 4):
                with Talk(ranks.base_url) as fresh:  # a connection of its own: either API process may answer it
                    assert outcome(fresh.complete(prompt(version), session, n=2)) == (
                        session,
                        f"{version}",
                        "committed",
                    )
            of_rank[rank_of(talk, before, 3 * len(prompt(1)))] = session
            if len(of_rank) == 2 and tried >= 5:
                break
    assert len(of_rank) == 2, "30 sessions and all of them on one rank"
    assert "ApiServer_1" in ranks.log.read_text()


def test_questions_reach_the_right_rank(ranks: VllmServer) -> None:
    """Only the engine that serves a session knows that a request of it is running."""
    of_rank: dict[int, str] = {}
    with Talk(ranks.base_url) as talk:
        while len(of_rank) < 2:
            session, before = new_session(), prompts_by_rank(talk)
            ok(talk.complete(prompt(1), session, n=2))
            of_rank.setdefault(rank_of(talk, before, len(prompt(1))), session)
    for session in of_rank.values():
        with Talk(ranks.base_url) as talk:
            stream = Stream(talk, prompt(2), session, 300).start_writing()
            for _ in range(6):
                with Talk(ranks.base_url) as fresh:
                    info = ok(fresh.get(f"/v1/sessions/{session}"))
                assert (info["version"], info["busy"]) == (1, True)
            with Talk(ranks.base_url) as fresh:
                ok(fresh.delete(f"/v1/sessions/{session}"))
            assert stream.is_alive()
            assert stream.finish()["x-deltamem-commit"] == "conflict"
            for _ in range(4):
                with Talk(ranks.base_url) as fresh:
                    refused(fresh.get(f"/v1/sessions/{session}"), 404)
            assert outcome(talk.complete(prompt(3), session, n=2)) == (session, "1", "committed")
    assert ranks.healthy(), ranks.last_lines(40)


def test_a_session_is_copied_to_sessions_of_other_ranks(ranks: VllmServer) -> None:
    """Six copies, of forks and of an export, whichever rank and whichever API process they come to."""
    source, copies = new_session(), [new_session() for _ in range(6)]
    with Talk(ranks.base_url) as talk:
        ok(talk.complete(prompt(1), source, n=2))
        state = ok(talk.get(f"/v1/sessions/{source}"))["state"]
        data = talk.get(f"/v1/sessions/{source}/export").content
    for i, copy in enumerate(copies):
        with Talk(ranks.base_url) as fresh:
            if i % 2:
                made = fresh.post("/v1/sessions/import", params={"id": copy}, content=data)
            else:
                made = fresh.post(f"/v1/sessions/{source}/fork", json={"id": copy})
            assert made.status_code == 201, made.text
            taken = fresh.post(f"/v1/sessions/{source}/fork", json={"id": copy})
            refused(taken, 409, "exists")
    for copy in copies:
        with Talk(ranks.base_url) as fresh:
            assert ok(fresh.get(f"/v1/sessions/{copy}"))["state"] == state
            assert outcome(fresh.complete(prompt(2), copy, n=2)) == (copy, "2", "committed")
            listed = [each["id"] for each in ok(fresh.get("/v1/sessions", params={"limit": 100}))["data"]]
            assert {source, *copies} <= set(listed), "any engine lists the whole store"


def test_each_rank_is_counted_once_whichever_api_process_is_asked(ranks: VllmServer) -> None:
    def page() -> Page:
        with Talk(ranks.base_url) as fresh:
            return fresh.metrics()

    def committed(now: Page) -> list[float]:
        return [at(now, metrics.COMMITS, engine=rank, outcome="committed") for rank in "01"]

    before = page()
    for _ in range(8):
        with Talk(ranks.base_url) as fresh:
            ok(fresh.complete(prompt(1), new_session(), n=2))
    pages = [page() for _ in range(10)]  # connections of their own: of one API process or of the other
    assert {tuple(committed(each)) for each in pages} == {tuple(committed(pages[0]))}
    assert sum(committed(pages[0])) == sum(committed(before)) + 8
    for each in pages:
        assert [at(each, metrics.UP, engine=rank) for rank in "01"] == [1, 1]
        assert [labels for name, labels in each if name == metrics.STORE_SESSIONS.name] == ['engine="0"']
