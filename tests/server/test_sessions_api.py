"""The session API on a real server: what can be done with a session beside talking to it."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np

from deltamem_vllm.demo.server import VllmServer
from deltamem_vllm.store import codec
from deltamem_vllm.store.protocol import Record
from tests.server.talk import (
    Talk,
    completion,
    distance,
    memory_headers,
    new_session,
    ok,
    outcome,
    refused,
    token_ids,
)
from tests.tolerances import SAME_MEMORY

FACT = list(range(64, 96))
HOSTILE = list(range(100, 140))
ROOT = "/v1/sessions"


def made(response: httpx.Response) -> dict[str, Any]:
    """The body of a response that must have created something."""
    assert response.status_code == 201, f"{response.status_code} {response.text[:500]}"
    body: dict[str, Any] = response.json()
    assert response.headers["ETag"] == f'"{body["version"]}"'
    assert response.headers["Location"] == f"{ROOT}/{body['id']}"
    return body


def exported(talk: Talk, session: str, version: int | None = None) -> Record:
    """What a session's export says."""
    response = talk.get(f"{ROOT}/{session}/export", params={} if version is None else {"version": version})
    assert response.status_code == 200, response.text
    return codec.decode(response.content)


def memory_of(record: Record) -> tuple[bytes, bytes, bytes]:
    return record.base.tobytes(), record.end.tobytes(), record.window


def post(talk: Talk, session: str, what: str, body: Any = None, **headers: str) -> httpx.Response:
    return talk.post(
        f"{ROOT}/{session}/{what}", json=body, headers={k.replace("_", "-"): v for k, v in headers.items()}
    )


# --- creating, listing, changing --------------------------------------------------------------------------------------


def test_a_sessions_own_write_policy(talk: Talk) -> None:
    """Raw prompts are the user's; a request's header overrules the session's policy, which overrules the server's."""
    question = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Bo is a cat."}]
    for own, header in (("none", "none"), ("user", "user"), ("system,assistant", "system,assistant")):
        session, alone = new_session(), new_session()
        made(talk.post(ROOT, json={"id": session, "write": own}))
        made(talk.post(ROOT, json={"id": alone}))
        for body in ({"messages": question}, {"prompt": FACT}):
            path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
            asked = {"model": "m", "max_tokens": 4, "temperature": 0, **body}
            ok(talk.post(path, json=asked, headers={"X-Session-ID": session}))
            ok(talk.post(path, json=asked, headers={"X-Session-ID": alone, "X-DeltaMem-Write": header}))
        mine, other = exported(talk, session), exported(talk, alone)
        assert mine.end.any() == (own != "none")
        assert memory_of(mine) == memory_of(other)
    ok(talk.post("/v1/completions", json=asked, headers={"X-Session-ID": session, "X-DeltaMem-Write": "user"}))
    ok(talk.post("/v1/completions", json=asked, headers={"X-Session-ID": alone}))
    assert exported(talk, session).tokens == exported(talk, alone).tokens
    assert not np.array_equal(exported(talk, session).end, exported(talk, alone).end), "one wrote no reply"


def test_a_sessions_own_ttl(talk: Talk) -> None:
    s = new_session()
    made(talk.post(ROOT, json={"id": s, "ttl": 1.0}))
    assert outcome(talk.complete(FACT, s)) == (s, "2", "committed")
    time.sleep(1.1)
    refused(talk.get(f"{ROOT}/{s}"), 404, "not found")
    assert outcome(talk.complete(FACT, s)) == (s, "1", "committed")
    assert ok(talk.get(f"{ROOT}/{s}"))["ttl"] is None


def test_create_change_and_read(talk: Talk) -> None:
    s = new_session()
    body = {"id": s, "metadata": {"user": "bo"}, "ttl": 60, "write": "system,user"}
    created = made(talk.post(ROOT, json=body))
    assert {k: created[k] for k in body} == body
    assert (created["version"], created["tokens"], created["facts"]) == (1, 0, 0)
    assert {layer["norm"] for layer in created["state"]} == {0.0}
    refused(talk.post(ROOT, json=body), 409, "exists")
    assert outcome(talk.complete(FACT, s)) == (s, "2", "committed")
    found = ok(talk.get(f"{ROOT}/{s}"))
    assert {k: found[k] for k in body} == body
    assert all(0 < layer["max"] <= layer["norm"] for layer in found["state"])
    changed = ok(talk.patch(f"{ROOT}/{s}", json={"ttl": None, "metadata": {"user": "al"}}))
    assert (changed["version"], changed["ttl"], changed["metadata"]) == (3, None, {"user": "al"})
    assert changed["write"] == "system,user", "what was not named stays"
    assert ok(talk.patch(f"{ROOT}/{s}", json={}))["version"] == 3, "nothing to change"
    kept = ok(talk.get(f"{ROOT}/{s}/versions"))["data"]
    assert [each["version"] for each in kept] == [3, 2, 1]


def test_a_server_made_id_and_an_idempotency_key(talk: Talk) -> None:
    ids = [made(talk.post(ROOT, json={}))["id"] for _ in range(2)]
    assert len(set(ids)) == 2
    key = {"Idempotency-Key": new_session()}
    first = made(talk.post(ROOT, json={"metadata": {"a": "b"}}, headers=key))
    again = made(talk.post(ROOT, json={"metadata": {"a": "b"}}, headers=key))
    assert again == first
    refused(talk.post(ROOT, json={"metadata": {"a": "c"}}, headers=key), 409, "exists")
    ok(talk.complete(FACT, first["id"]))
    assert made(talk.post(ROOT, json={"metadata": {"a": "b"}}, headers=key))["version"] == 2, "as it is now"
    for _ in range(2):
        assert ok(post(talk, first["id"], "reset", **key))["version"] == 3
    forks = {made(post(talk, first["id"], "fork", **key))["id"] for _ in range(2)}
    assert len(forks) == 1


def test_the_list_has_pages_and_prefixes(talk: Talk) -> None:
    stem = new_session()
    names = [f"{stem}.{i:02}" for i in range(5)]
    for name in names:
        made(talk.post(ROOT, json={"id": name}))
    seen: list[str] = []
    page: dict[str, Any] = {"has_more": True, "last_id": None}
    while page["has_more"]:
        after = {} if page["last_id"] is None else {"after": page["last_id"]}
        page = ok(talk.get(ROOT, params={"prefix": f"{stem}.", "limit": 2, **after}))
        assert len(page["data"]) <= 2
        seen += [each["id"] for each in page["data"]]
    assert seen == names
    assert names[0] in [each["id"] for each in ok(talk.get(ROOT, params={"limit": 100, "prefix": stem}))["data"]]
    for bad in ({"limit": 0}, {"limit": 101}, {"limit": "x"}, {"prefix": "a b"}):
        refused(talk.get(ROOT, params=bad), 400)


def test_what_is_not_valid_is_refused(talk: Talk) -> None:
    s = new_session()
    bodies: list[dict[str, Any]] = [
        {"id": "a b"},
        {"metadata": {str(i): "" for i in range(17)}},
        {"metadata": {"": "x"}},
        {"metadata": {"k": "x" * 513}},
        {"metadata": {"k": 1}},
        {"ttl": 0},
        {"ttl": "60"},
        {"write": "user,everybody"},
        {"unknown": 1},
    ]
    for body in bodies:
        refused(talk.post(ROOT, json={"id": s, **body}), 400)
        if "id" not in body:
            refused(talk.patch(f"{ROOT}/{s}", json=body), 400)
    refused(talk.get(f"{ROOT}/{s}"), 404)
    refused(talk.post(ROOT, json={}, headers={"Idempotency-Key": "x" * 256}), 400, "Idempotency-Key")
    for what, body in (("fork", {}), ("reset", None), ("rollback", {"version": 1})):
        refused(post(talk, s, what, body), 404, "not found")
    for path in (f"{ROOT}/{s}/export", f"{ROOT}/{s}/versions"):
        refused(talk.get(path), 404, "not found")
    refused(talk.patch(f"{ROOT}/{s}", json={"ttl": 1}), 404, "not found")


# --- the memory: rollback, reset, fork, export ------------------------------------------------------------------------


def test_a_hostile_turn_is_rolled_back_to_the_last_bit(talk: Talk) -> None:
    s = new_session()
    ok(talk.complete(FACT, s))
    before, answers = exported(talk, s), talk.probe(s)
    ok(talk.complete(HOSTILE, s))
    assert distance(talk.probe(s), answers) > 0.05, "the hostile turn did nothing: the test means nothing"
    back = ok(post(talk, s, "rollback", {"version": 1}))
    assert back["version"] == 3
    assert memory_of(exported(talk, s)) == memory_of(before)
    assert memory_of(exported(talk, s, 2)) != memory_of(before)
    assert distance(talk.probe(s), answers) <= SAME_MEMORY
    assert outcome(talk.complete(FACT, s))[1] == "4", "the window is the old one too"
    refused(post(talk, s, "rollback", {"version": 99}), 404, "does not keep version 99")
    refused(talk.get(f"{ROOT}/{s}/export", params={"version": 99}), 404, "does not keep version 99")


def test_reset_gives_the_empty_memory_and_keeps_the_rest(talk: Talk) -> None:
    s = new_session()
    empty = talk.probe(new_session())
    made(talk.post(ROOT, json={"id": s, "metadata": {"user": "bo"}}))
    ok(talk.complete(FACT, s))
    assert distance(talk.probe(s), empty) > 0.05
    reset = ok(post(talk, s, "reset"))
    assert (reset["version"], reset["tokens"], reset["windows"], reset["metadata"]) == (3, 0, 0, {"user": "bo"})
    assert not exported(talk, s).end.any()
    assert distance(talk.probe(s), empty) <= SAME_MEMORY
    assert ok(post(talk, s, "rollback", {"version": 2}))["tokens"] > 0


def test_a_fork_and_its_source_are_independent(talk: Talk) -> None:
    s, fork = new_session(), new_session()
    ok(talk.complete(FACT, s))
    copy = made(post(talk, s, "fork", {"id": fork}))
    assert (copy["version"], copy["forked_from"]) == (1, f"{s}@1")
    assert memory_of(exported(talk, fork)) == memory_of(exported(talk, s))
    before = talk.probe(s)
    assert distance(talk.probe(fork), before) <= SAME_MEMORY
    ok(talk.complete(HOSTILE, fork))
    assert distance(talk.probe(s), before) <= SAME_MEMORY
    assert distance(talk.probe(fork), before) > 0.05
    ok(talk.delete(f"{ROOT}/{s}"))
    assert talk.version(fork) == 2
    old = made(post(talk, fork, "fork", {"version": 1}))
    assert distance(talk.probe(old["id"]), before) <= SAME_MEMORY
    refused(post(talk, fork, "fork", {"id": old["id"]}), 409, "exists")


def test_export_delete_import_gives_the_same_answers(talk: Talk) -> None:
    s, there = new_session(), new_session()
    made(talk.post(ROOT, json={"id": s, "metadata": {"user": "bo"}, "ttl": 60}))
    said = token_ids(talk.complete(FACT, s))
    data, answers = talk.get(f"{ROOT}/{s}/export").content, talk.probe(s)
    receipt = ok(talk.delete(f"{ROOT}/{s}"))
    assert receipt["erased"] == {
        "store_versions": 2,
        "unsaved_versions": 0,
        "host_memory": True,
        "device": "zeroing ordered",
        "prefix_cache": "unreachable",
    }
    refused(talk.get(f"{ROOT}/{s}"), 404)
    back = made(talk.post(f"{ROOT}/import", params={"id": there}, content=data))
    assert (back["version"], back["metadata"], back["ttl"]) == (1, {"user": "bo"}, 60)
    assert distance(talk.probe(there), answers) <= SAME_MEMORY
    assert memory_of(exported(talk, there)) == memory_of(codec.decode(data))
    ok(talk.complete([*FACT, *said, 7], there))
    assert ok(talk.get(f"{ROOT}/{there}"))["windows"] == 1, "the conversation goes on"
    refused(talk.post(f"{ROOT}/import", params={"id": there}, content=data), 409, "exists")


def test_an_import_is_trusted_in_nothing(talk: Talk) -> None:
    s = new_session()
    ok(talk.complete(FACT, s))
    record = exported(talk, s)
    good = codec.encode(record)

    def altered(**fields: Any) -> bytes:
        from msgspec.structs import replace

        return codec.encode(replace(record, **fields))

    huge = record.end.copy()
    huge.flat[0] = 5e5
    layout = {"layout": "L1H1r2", "base": record.base[:1, :1, :2, :2], "end": record.end[:1, :1, :2, :2]}
    cases = [
        (b"", "no exported session"),
        (b"\0" * 200, "no exported session"),
        (good[:-1], "no exported session"),
        (good[:300] + bytes([good[300] ^ 1]) + good[301:], "checksum"),
        (altered(adapter="another"), "adapter"),
        (altered(model="another"), "model"),
        (altered(**layout), "layout"),
        (altered(end=huge), "norm"),
        (altered(window=b"x" * 40), "window"),
        (altered(attributes=b"\x81\xa1x\x01"), "attributes"),
    ]
    t = new_session()
    for data, word in cases:
        refused(talk.post(f"{ROOT}/import", params={"id": t}, content=data), 422, word)
    refused(talk.post(f"{ROOT}/import", params={"id": t}, content=b"\0" * (1 << 20)), 413, "up to")
    refused(talk.post(f"{ROOT}/import", params={"id": t}, content=iter([b"\0" * 65536] * 16)), 413, "up to")
    refused(talk.post(f"{ROOT}/import", params={"id": "a b"}, content=good), 400)
    refused(talk.get(f"{ROOT}/{t}"), 404)


# --- If-Match ---------------------------------------------------------------------------------------------------------


def test_if_match_everywhere(talk: Talk) -> None:
    s = new_session()
    ok(talk.complete(FACT, s))
    stale, now = {"If-Match": '"7"'}, {"If-Match": '"1"'}
    tries = [
        talk.patch(f"{ROOT}/{s}", json={"ttl": 5}, headers=stale),
        talk.delete(f"{ROOT}/{s}", headers=stale),
        talk.get(f"{ROOT}/{s}/export", headers=stale),
        *(
            talk.post(f"{ROOT}/{s}/{what}", json=body, headers=stale)
            for what, body in (("fork", {}), ("reset", None), ("rollback", {"version": 1}))
        ),
        talk.post("/v1/completions", json=completion(FACT, 4), headers={**memory_headers(s, None), **stale}),
        talk.post("/v1/completions", json=completion(FACT, 4), headers={**memory_headers(s, "read"), **stale}),
        talk.post(
            "/v1/completions", json=completion(FACT, 4, stream=True), headers={**memory_headers(s, None), **stale}
        ),
    ]
    for response in tries:
        assert refused(response, 412, "version 1")["type"] == "PreconditionFailedError"
        assert response.headers["ETag"] == '"1"'
    assert talk.version(s) == 1
    refused(talk.patch(f"{ROOT}/{s}", json={"ttl": 5}, headers={"If-Match": "abc"}), 400, "If-Match")
    assert ok(talk.patch(f"{ROOT}/{s}", json={"ttl": 5}, headers=now))["version"] == 2
    assert ok(talk.patch(f"{ROOT}/{s}", json={"ttl": 6}, headers={"If-Match": "*"}))["version"] == 3
    said = talk.post(
        "/v1/completions", json=completion(FACT, 4), headers={**memory_headers(s, None), "If-Match": '"3"'}
    )
    assert outcome(said)[1] == "4"
    missing = {**memory_headers(new_session(), None), "If-Match": "*"}
    refused(talk.post("/v1/completions", json=completion(FACT, 4), headers=missing), 412, "does not exist")
    ok(talk.delete(f"{ROOT}/{s}", headers={"If-Match": '"4"'}))
    assert talk.version(s) == 0


def test_of_sixteen_at_once_exactly_one_wins(talk: Talk, server: VllmServer) -> None:
    s = new_session()
    made(talk.post(ROOT, json={"id": s}))
    ready = threading.Barrier(16)

    def attempt(i: int) -> int:
        ready.wait(60)
        with Talk(server.base_url) as mine:
            while True:  # the queue takes two; who is told to come later does
                headers = {"If-Match": '"1"'}
                status = mine.patch(f"{ROOT}/{s}", json={"metadata": {"winner": str(i)}}, headers=headers).status_code
                if status != 409:
                    return status

    with ThreadPoolExecutor(16) as pool:
        statuses = list(pool.map(attempt, range(16)))
    assert sorted(statuses) == [200, *[412] * 15]
    found = ok(talk.get(f"{ROOT}/{s}"))
    assert (found["version"], found["metadata"]) == (2, {"winner": str(statuses.index(200))})


def test_the_whole_api_needs_the_key(talk: Talk, server: VllmServer) -> None:
    s = new_session()
    made(talk.post(ROOT, json={"id": s}))
    with Talk(server.base_url, None) as stranger:
        for method, path in (
            ("GET", ""),
            ("POST", ""),
            ("POST", "/import"),
            ("PATCH", f"/{s}"),
            ("GET", f"/{s}/versions"),
            ("GET", f"/{s}/export"),
            ("POST", f"/{s}/fork"),
            ("POST", f"/{s}/reset"),
            ("POST", f"/{s}/rollback"),
        ):
            assert stranger.request(method, ROOT + path, json={}).status_code == 401
    assert talk.version(s) == 1
