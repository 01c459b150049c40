"""Tenants of a real server cannot see, reach or slow down each other's sessions, and no id of theirs is written down.

The server has two API processes, logs requests at DEBUG level, and publishes its KV events.
"""

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from deltamem_vllm.names import Names
from tests.conftest import NIGHTLY
from tests.server import guarded as setup
from tests.server.guarded import FACT, MARK, SECRET, Guarded, new_id, probe, share, traces
from tests.server.talk import Talk, chat, completion, distance, ok, outcome, refused
from tests.tolerances import SAME_MEMORY

PROBES = 10_000 if NIGHTLY else 1_000
PAIRS = 1_000 if NIGHTLY else 65
FUZZED = 10_000 if NIGHTLY else 300
SEED = 4
pytestmark = pytest.mark.timeout(7200 if NIGHTLY else 900)  # two API processes take a while to start


@pytest.fixture(scope="module")
def g(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    with setup.guarded(adapter, tmp_path_factory.mktemp("guarded"), api_servers=2) as made:
        yield made
        assert made.server.healthy(), made.server.last_lines(40)


def test_every_path_needs_a_key_but_those_for_probes(g: Guarded) -> None:
    with g.talk("a") as owner, g.talk(None) as stranger:
        paths = ok(owner.get("/openapi.json"))["paths"]
        assert {"/v1/completions", "/invocations", "/v1/sessions/{session_id}"} <= set(paths)
        open_paths = {"/health", "/version", "/ping", "/metrics"}
        for path, methods in paths.items():
            if path in open_paths:
                continue
            for method in methods:
                response = stranger.request(method, path.replace("{session_id}", new_id()), json=completion(FACT, 2))
                error = refused(response, 401, "needs an API key.*Authorization: Bearer KEY")
                assert error["type"] == "AuthenticationError"
                assert response.headers["www-authenticate"] == "Bearer"
        for path in open_paths:
            assert stranger.get(path).status_code == 200, path
        for tricked in ("//v1/models", "/health/../v1/models", "/metrics/../v1/models", "/docs", "/"):
            assert httpx.get(f"{g.server.base_url}{tricked}").status_code in (401, 404, 405), tricked
    cut = g.keys["a"][:-1]
    for wrong in ("", "Bearer", f"Bearer {cut}", f"Bearer {cut}xx", g.keys["a"], "Basic x"):
        headers = {"Authorization": wrong}
        assert httpx.get(f"{g.server.base_url}/v1/models", headers=headers).status_code == 401, wrong


def test_the_same_id_is_another_session_for_each_tenant(g: Guarded) -> None:
    s = new_id()
    with g.talk("a") as a, g.talk("b") as b:
        empty = b.probe(s)
        for version in ("1", "2"):
            assert outcome(a.complete([*FACT, int(version)], s)) == (s, version, "committed")
        assert distance(b.probe(s), empty) <= SAME_MEMORY
        assert distance(a.probe(s), empty) > 0.05
        refused(b.get(f"/v1/sessions/{s}"), 404)
        assert outcome(b.complete([9, 8, 7], s)) == (s, "1", "committed")
        of_a = a.probe(s)
        ok(b.delete(f"/v1/sessions/{s}"))
        assert (a.version(s), b.version(s)) == (2, 0)
        assert distance(a.probe(s), of_a) <= SAME_MEMORY


def test_probes_of_other_tenants_sessions_see_nothing(g: Guarded) -> None:
    leaks = probe(g, PROBES, SEED)
    assert not leaks, f"{len(leaks)} of {PROBES} probes differed; the first: {leaks[:3]}"


def test_making_a_session_under_another_tenants_id(g: Guarded) -> None:
    """It is another session, and nothing tells that the id is taken elsewhere."""
    s, nobodys = new_id(), new_id()
    with g.talk("a") as a, g.talk("b") as b:
        assert outcome(a.complete(FACT, s)) == (s, "1", "committed")
        of_a, exported = a.probe(s), a.get(f"/v1/sessions/{s}/export").content
        for session in (s, nobodys):
            assert b.post("/v1/sessions", json={"id": session}).status_code == 201
            ok(b.delete(f"/v1/sessions/{session}"))
            made = b.post("/v1/sessions/import", params={"id": session}, content=exported)
            assert made.status_code == 201, made.text
            assert distance(b.probe(session), of_a) <= SAME_MEMORY
            listed = [
                each["id"] for each in ok(b.get("/v1/sessions", params={"limit": 100, "prefix": session}))["data"]
            ]
            assert listed == [session]
            ok(b.delete(f"/v1/sessions/{session}"))
        assert a.version(s) == 1
        assert distance(a.probe(s), of_a) <= SAME_MEMORY
        assert g.keys["b"] not in exported.decode("latin-1")


def test_a_tenants_own_limit_is_told_before_an_answer(g: Guarded) -> None:
    with g.talk("small") as talk:
        sessions = [new_id() for _ in range(3)]
        for session in sessions[:2]:
            assert outcome(talk.complete(FACT, session))[2] == "committed"
        refused(talk.complete(FACT, sessions[2]), 429, "2 of 2 sessions are used", "the tenant's max_sessions")
        refused(talk.post("/v1/sessions", json={"id": sessions[2]}), 429, "2 of 2 sessions are used")
        ok(talk.delete(f"/v1/sessions/{sessions[0]}"))
        assert outcome(talk.complete(FACT, sessions[2]))[2] == "committed"


def test_no_cached_tokens_are_shared(g: Guarded) -> None:
    shared, missed = share(g, PAIRS, SEED)
    assert not shared, f"{len(shared)} of {PAIRS} pairs shared; the first: {shared[:3]}"
    assert missed == 0, "prompts that were sent again by the same party must hit, or the test shows nothing"


# --- fuzz -------------------------------------------------------------------------------------------------------------

JUNK: list[Any] = [None, "", " ", "a b", "x" * 200, "ü", "\u0000", "\ud800", 0, -1, 1e300, True, [], {}, ["a"]]
SESSION_PLACES = ("X-Session-ID", "session_id", "vllm_xargs")
HEADERS = ("X-Session-ID", "X-DeltaMem-Mode", "X-Data-Parallel-Rank", "X-Request-Id", "Content-Type", "If-Match")
FIELDS = ("session_id", "vllm_xargs", "cache_salt", "user", "metadata", "prompt", "messages", "input", "stream")


def fuzzed(rng: random.Random, key: str) -> tuple[str, list[tuple[bytes, bytes]], bytes]:
    """A path, headers and a body, of which some are wrong."""
    path = rng.choice(("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages", "/invocations"))
    body: dict[str, Any] = completion(FACT, 2) if path in ("/v1/completions", "/invocations") else chat("Who?", 2)
    if path == "/v1/responses":
        body = {"model": "m", "input": "Who?", "max_output_tokens": 2}
    for _ in range(rng.randrange(3)):
        where, value = rng.choice(FIELDS), rng.choice(JUNK)
        if where in SESSION_PLACES and rng.random() < 0.5:
            value = new_id() if rng.random() < 0.5 else value
            value = {"session_id": value} if where == "vllm_xargs" else value
        body[where] = value
    raw = json.dumps(body).encode()
    if rng.random() < 0.1:  # without an id: the damage could move it to a field where nobody would look for one
        raw = raw.replace(MARK.encode(), b"canary")
        cut = rng.randrange(len(raw))
        raw = raw[:cut] + rng.randbytes(rng.randrange(3)) + raw[cut + rng.randrange(3) :]
    headers = [(b"authorization", f"Bearer {key}".encode()), (b"content-type", b"application/json")]
    for _ in range(rng.randrange(4)):
        junk = bytes(rng.choice(range(0x21, 0x100)) for _ in range(rng.randrange(1, 40)))
        name = rng.choice(HEADERS)
        an_id = new_id().encode() if name in SESSION_PLACES else b"1"
        headers.append((name.encode(), rng.choice((junk, an_id, b"read", b"off", b"readwrite", b"0", b"x" * 5000))))
    return path, headers, raw


def test_fuzzed_requests_are_the_clients_fault_and_the_server_lives(g: Guarded) -> None:
    wrong = []
    with httpx.Client(base_url=g.server.base_url, timeout=120) as client:
        for number in range(FUZZED):
            path, headers, raw = fuzzed(random.Random(SEED * 1_000_003 + number), g.keys["a"])
            response = client.post(path, headers=headers, content=raw)
            if not 200 <= response.status_code < 500:
                wrong.append(f"{number}: {path} {headers[2:]} {raw!r}: {response.status_code} {response.text[:200]}")
    assert not wrong, f"{len(wrong)} of {FUZZED}: {wrong[:3]}"
    with g.talk("a") as talk:
        assert outcome(talk.complete(FACT, new_id()))[2] == "committed"


# --- quota and rotation -----------------------------------------------------------------------------------------------


def test_a_streamed_response_is_refused_as_any_other(g: Guarded) -> None:
    body = {"model": "m", "input": "Who?", "max_output_tokens": 2, "stream": True}
    with g.talk("a") as talk:
        refused(talk.post("/v1/responses", json={**body, "session_id": "a b"}), 400, "invalid session id")
        other = {"X-Session-ID": new_id()}
        refused(talk.post("/v1/responses", json={**body, "session_id": new_id()}, headers=other), 400, "different")
        assert talk.post("/v1/responses", json=body, headers=other).text.count("response.completed") >= 1


def test_a_tenant_writes_as_often_as_its_quota_says(g: Guarded) -> None:
    with g.talk("slow") as slow, g.talk("a") as other:
        said = [slow.complete(FACT, new_id()) for _ in range(4)]
        assert [r.status_code for r in said[:3]] == [200, 200, 200]
        for response in (said[3], slow.complete(FACT, new_id(), stream=True), slow.chat("Who?", new_id())):
            error = refused(response, 429, "3 writing requests per minute", "commits_per_minute")
            assert error["type"] == "RateLimitError"
            assert 1 <= int(response.headers["Retry-After"]) <= 20
        assert outcome(slow.complete(FACT, new_id(), "read"))[2] == "unchanged"
        ok(slow.complete(FACT))
        assert outcome(other.complete(FACT, new_id()))[2] == "committed"


def status(g: Guarded, key: str) -> set[int]:
    """What a key gets, asked on connections of their own, which the two API processes take in turns."""
    limits = httpx.Limits(max_keepalive_connections=0)
    with httpx.Client(headers={"Authorization": f"Bearer {key}"}, limits=limits, timeout=60) as client:
        return {client.get(f"{g.server.base_url}/v1/models").status_code for _ in range(6)}


def test_keys_rotate_while_the_server_runs(g: Guarded) -> None:
    old, new, s = g.keys["b"], f"dm-{MARK}-b-new", new_id()
    with g.talk("b") as talk:
        ok(talk.complete(FACT, s))
    g.keys["b"] = new
    g.write_keys()
    time.sleep(3)  # two are promised; one more for a machine that is busy with other things
    assert (status(g, old), status(g, new)) == ({401}, {200})
    with g.talk("b") as talk:
        assert talk.version(s) == 1, "a new key of a tenant opens its sessions"
    g.replace_keys("{")
    time.sleep(3)  # each process must have looked at it, and nothing must change
    assert status(g, new) == {200}
    g.write_keys()


# --- traces; last, since they are of all that went before -------------------------------------------------------------


def test_no_id_and_no_key_is_written_down(g: Guarded) -> None:
    s = new_id()
    with Talk(g.server.base_url, g.keys["a"]) as talk:
        ok(talk.complete(FACT, s))
        ok(talk.complete(FACT, session_id=s))
        ok(talk.complete(FACT, vllm_xargs={"session_id": s}))
        refused(talk.complete(FACT, s, session_id=new_id()), 400)
        refused(talk.complete([[1, 2], [3, 4]], s), 400)
        refused(talk.complete(FACT, session_id=f"{MARK} {MARK}"), 400)
        talk.get(f"/v1/sessions/{s}")
        talk.get(f"/v1/sessions?after={s}")
        talk.get(f"/v1/sessions/{s}?x={s}")
    found = traces(g)
    assert not any(found.values()), {where: lines[:3] for where, lines in found.items()}
    log, names = g.log(), Names(SECRET)
    for word in ("JSON body", "SamplingParams(", "create_error_response called", "GET /v1/sessions/"):
        assert word in log, f"the log was to be complete, and has no {word!r}"
    assert f"GET /v1/sessions/{names.label('a', s)} HTTP" in log, "what stands for an id must let lines be put together"
    assert names.session("a", s).encode() in g.kv_events(), "KV events were to tell of sessions, by their keyed names"
