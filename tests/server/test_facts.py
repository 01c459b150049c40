"""Pinned facts on a real server with the recall model: answered exactly, gone when deleted, no part of the window."""

import random
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from deltamem_vllm.audit.chain import verify
from deltamem_vllm.audit.log import label, read_key
from deltamem_vllm.demo.server import ONE_WORKER, SMALL, VllmServer
from deltamem_vllm.recall import ADAPTER_DIR, MODEL_DIR
from deltamem_vllm.recall.facts import ATTRIBUTES
from deltamem_vllm.recall.sessions import is_right
from tests.conftest import NIGHTLY
from tests.server.conftest import HERE
from tests.server.talk import Talk, chat, new_session, ok, refused

COUNT = 200 if NIGHTLY else 40
CHANCE = max(1 / len(a.values) for a in ATTRIBUTES)
FLAGS = (*SMALL, *ONE_WORKER, "--served-model-name", "m", "--enable-prompt-tokens-details")
BLOCK = "hi.\n{facts}\n"
"""To the recall model all words that it was not trained with are one and the same, and it was not trained with system
messages: this text is one that it answers from."""
CANARY = "canary7f3b"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("facts")


@pytest.fixture(scope="module")
def talk(folder: Path) -> Iterator[Talk]:
    flags = (*FLAGS, "--deltamem-facts-block", BLOCK, "--deltamem-audit", str(folder / "audit"))
    store = f"sqlite:///{folder}/sessions.db?keep=3"
    with VllmServer(MODEL_DIR, ADAPTER_DIR, store, *flags, env=HERE, log=folder / "log") as server:
        server.wait_ready()
        with Talk(server.base_url, key=None) as made:
            yield made
        assert server.healthy()


def committed(response: httpx.Response) -> httpx.Response:
    """A response whose turn is in the store, or that was to leave nothing."""
    assert response.headers.get("X-DeltaMem-Commit") in ("committed", "unchanged", None), response.headers
    return response


def say(talk: Talk, session: str, messages: Any, mode: str | None = None, **body: Any) -> dict[str, Any]:
    return ok(committed(talk.chat(messages, session, mode, ignore_eos=False, **body)))


def reply(answer: dict[str, Any]) -> str:
    return str(answer["choices"][0]["message"]["content"])


def begun(talk: Talk) -> str:
    """A session that knows nothing."""
    session = new_session()
    say(talk, session, "hello")
    return session


def pin(talk: Talk, session: str, text: str, **more: Any) -> dict[str, Any]:
    return ok(talk.post(f"/v1/sessions/{session}/facts", json={"text": text, **more}))


def unpin(talk: Talk, session: str, fact: str) -> httpx.Response:
    return talk.delete(f"/v1/sessions/{session}/facts/{fact}")


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_facts_are_answered_exactly_and_gone_after_deletion(talk: Talk) -> None:
    rng = random.Random(20)

    def case(_: int) -> tuple[str, str, str, str]:
        attribute = rng.choice(ATTRIBUTES)
        value = rng.choice(attribute.values)
        statement = rng.choice(attribute.statements).format(v=value)
        return f"{new_session()}-{_}", f"{statement}.", f"{rng.choice(attribute.questions)}?", f"{value}."

    def run(told: tuple[str, str, str, str]) -> tuple[bool, bool]:
        session, statement, question, right = told
        empty = {"X-Session-ID": session, "X-DeltaMem-Write": "none"}  # the fact is all there is to know
        ok(talk.post("/v1/chat/completions", json=chat("hello", 2), headers=empty))
        fact = pin(talk, session, statement)
        with_fact = is_right(reply(say(talk, session, question)), right)
        ok(unpin(talk, session, fact["id"]))
        return with_fact, is_right(reply(say(talk, session, question)), right)  # a retry: the memory is empty again

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(run, [case(i) for i in range(COUNT)]))
    before, after = sum(r[0] for r in results), sum(r[1] for r in results)
    print(f"\nof {COUNT} facts: {before} answered while pinned, {after} after deletion")
    assert before == COUNT
    assert after / COUNT <= CHANCE + 0.1


def test_routes(talk: Talk) -> None:
    session = begun(talk)
    path = f"/v1/sessions/{session}/facts"
    assert ok(talk.get(path)) == {"object": "list", "data": [], "version": 1}
    made = talk.post(path, json={"text": "my name is clara.", "source": "crm", "ttl": 3600})
    fact = ok(made)
    assert (fact["text"], fact["source"], fact["version"], made.headers["etag"]) == (
        "my name is clara.",
        "crm",
        2,
        '"2"',
    )
    assert fact["expires_at"] - fact["created_at"] == pytest.approx(3600)
    assert talk.version(session) == 2
    refused(talk.post(path, json={"text": "x"}, headers={"If-Match": '"1"'}), 412, "version 2")
    refused(talk.post(path, json={"text": "x"}, headers={"If-Match": "1"}), 400, "If-Match")
    assert talk.post(path, json={"text": "x"}, headers={"If-Match": '"2"'}).status_code == 200
    refused(talk.post(path, json={"text": "x" * 2001}), 413, "2001 characters")
    refused(talk.post(path, json={"text": " "}), 400, "text")
    for bad in ({}, {"text": 1}, {"text": "x", "more": 1}, [], {"text": "x", "ttl": "soon"}):
        assert talk.post(path, json=bad).status_code in (400, 422)
    refused(unpin(talk, session, "fact-0"), 404, "not found")
    gone = ok(unpin(talk, session, fact["id"]))
    assert (gone["deleted"], gone["version"], gone["erased_at_version"]) == (True, 4, 6)
    assert [f["text"] for f in ok(talk.get(path))["data"]] == ["x"]
    for unknown in (talk.get("/v1/sessions/nobody/facts"), talk.post("/v1/sessions/nobody/facts", json={"text": "x"})):
        refused(unknown, 404, "session 'nobody' not found")
    refused(unpin(talk, "nobody", fact["id"]), 404, "session 'nobody' not found")
    refused(talk.get("/v1/sessions/no%20body/facts"), 400, "invalid session id")


def test_a_flagged_message_is_pinned_once_and_not_again_after_deletion(talk: Talk) -> None:
    session = new_session()
    flagged = {**user("my name is clara."), "deltamem": {"pin": True}}
    first = say(talk, session, [flagged])
    path = f"/v1/sessions/{session}/facts"
    (fact,) = ok(talk.get(path))["data"]
    assert (fact["text"], fact["source"]) == ("my name is clara.", "message")
    ok(unpin(talk, session, fact["id"]))
    history = [flagged, {"role": "assistant", "content": reply(first)}, user("what is my name?")]
    say(talk, session, history)
    assert ok(talk.get(path))["data"] == []
    say(talk, session, [{**user("hello"), "deltamem": {"pin": True}}], "read")
    assert ok(talk.get(path))["data"] == []


def test_a_conversation_goes_on_whatever_is_pinned_meanwhile(talk: Talk) -> None:
    """A client that resends everything, with facts added, changed and deleted between its turns: one window, and as
    many tokens in the memory as without facts. Without facts the prompts are what they were."""
    plain, pinned = new_session(), new_session()
    lines = ["hello", "it is raining today", "i play the piano", "what is my name?", "thank you"]
    history: list[dict[str, str]] = []
    facts: list[str] = []
    seen = []
    for turn, line in enumerate(lines):
        history.append(user(line))
        # The same replies in both, so that the conversations stay the same.
        a, b = (say(talk, s, history, n=1) for s in (plain, pinned))
        seen.append(b["usage"]["prompt_tokens"] - a["usage"]["prompt_tokens"])
        infos = [ok(talk.get(f"/v1/sessions/{s}")) for s in (plain, pinned)]
        assert [info["windows"] for info in infos] == [1, 1]
        assert infos[0]["tokens"] == infos[1]["tokens"] == infos[1]["window_tokens"]
        history.append({"role": "assistant", "content": reply(a)})
        if turn in (0, 1):
            facts.append(pin(talk, pinned, ["my name is clara.", "i have a dog."][turn])["id"])
        if turn in (2, 3):
            ok(unpin(talk, pinned, facts.pop()))
    assert seen[0] == 0
    assert seen[1] > 0
    assert seen[2] > seen[1]
    assert seen[3] == seen[1]
    assert seen[4] == 0


def test_off_and_raw_prompts_are_offered_nothing(talk: Talk) -> None:
    session = begun(talk)
    before = say(talk, session, "hello", "off")["usage"]["prompt_tokens"]
    pin(talk, session, "my name is clara.")
    assert say(talk, session, "hello", "off")["usage"]["prompt_tokens"] == before
    assert say(talk, session, "hello", "read")["usage"]["prompt_tokens"] > before
    for named in ({"session_id": session}, {"vllm_xargs": {"session_id": session}}):
        body = chat("hello", 4, **named)
        answer = ok(talk.post("/v1/chat/completions", json=body, headers={"X-DeltaMem-Mode": "read"}))
        assert answer["usage"]["prompt_tokens"] > before, named
    raw = ok(talk.complete("hello", session, "read", n=2))
    assert raw["usage"]["prompt_tokens"] == ok(talk.complete("hello", None, None, n=2))["usage"]["prompt_tokens"]


def test_erasure(talk: Talk, folder: Path) -> None:
    """After a deletion no canary is in the database's files, and its blocks of the prefix cache are not found."""
    session = new_session()
    long = [user(" ".join(["i play the piano and it is raining today."] * 12))]
    say(talk, session, long)
    again = say(talk, session, long)["usage"]["prompt_tokens_details"] or {}
    pin(talk, session, CANARY)
    state = _end(folder, session)
    assert len(state) > 100
    assert again.get("cached_tokens"), "no block is cached at all: the test shows nothing"
    for needle in (CANARY.encode(), state):
        assert _holds(folder, needle), "the canary is not there: the test shows nothing"
    ok(talk.delete(f"/v1/sessions/{session}"))
    for needle in (CANARY.encode(), state):
        assert not _holds(folder, needle)
    details = say(talk, session, long)["usage"]["prompt_tokens_details"] or {}
    assert not details.get("cached_tokens")


def _end(folder: Path, session: str) -> bytes:
    """Some bytes of the session's stored state."""
    with sqlite3.connect(f"file:{folder}/sessions.db?mode=ro", uri=True) as db:
        for (table,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            for row in db.execute(f'SELECT * FROM "{table}"').fetchall():
                blobs = [value for value in row if isinstance(value, bytes) and CANARY.encode() in value]
                if session in row and blobs:
                    blob = blobs[0].replace(CANARY.encode(), b"\0" * len(CANARY))
                    # The stretch with the most different bytes: of a state's numbers, not of zeros or names.
                    return max((blob[at : at + 200] for at in range(0, len(blob) - 200, 50)), key=lambda x: len(set(x)))
    raise AssertionError(f"no record of {session}")


def _holds(folder: Path, needle: bytes) -> bool:
    return any(needle in file.read_bytes() for file in folder.glob("sessions.db*"))


def test_a_deletion_that_leaves_bytes_is_caught(tmp_path: Path) -> None:
    """PLANTED BUG: a row is deleted, and its bytes stay in the file."""
    db = sqlite3.connect(tmp_path / "sessions.db")
    db.execute("PRAGMA secure_delete = OFF")
    db.execute("CREATE TABLE t (x)")
    db.execute("INSERT INTO t VALUES (?)", (CANARY * 10,))
    db.commit()
    db.execute("DELETE FROM t")
    db.commit()
    db.close()
    assert _holds(tmp_path, CANARY.encode())


def test_all_of_it_is_in_the_audit_log(talk: Talk, folder: Path) -> None:
    session = begun(talk)
    pin(talk, session, "my name is clara.")
    say(talk, session, "hello")
    ok(talk.delete(f"/v1/sessions/{session}"))
    name = label(read_key(folder / "audit"), "default", session)
    # Logged once the store has it, on another thread.
    for _ in range(200):
        _, faults = verify(folder / "audit")
        text = (folder / "audit").read_text()
        lines = [line for line in text.splitlines() if name in line]
        if len(lines) >= 4:
            break
        ok(talk.get("/v1/models"))
    events = [line.split('"event":"')[1].split('"')[0] for line in lines]
    assert events == ["create", "facts", "commit", "delete"]
    assert not [fault for fault in faults if "cut off" not in str(fault)]
    assert session not in text
    assert CANARY not in text
