"""Sessions as clients of a real server see them."""

import re
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from deltamem_vllm.demo.server import VllmServer
from tests.server.slow import PACE
from tests.server.talk import (
    Talk,
    chat,
    chunks,
    closing,
    completion,
    distance,
    logprobs,
    new_session,
    ok,
    outcome,
    refused,
    token_ids,
)
from tests.tolerances import SAME_MEMORY

FACT = list(range(64, 96))
OTHER = list(range(10, 40))


def test_a_session_remembers_and_another_does_not(talk: Talk) -> None:
    s, t = new_session(), new_session()
    empty = talk.probe(s)
    assert outcome(talk.complete(FACT, s)) == (s, "1", "committed")
    assert distance(talk.probe(s), empty) > 0.05, "the memory changes nothing, so that no other test here means much"
    assert distance(talk.probe(t), empty) <= SAME_MEMORY


def test_versions_count_commits(talk: Talk) -> None:
    s = new_session()
    for version in (1, 2, 3):
        assert outcome(talk.complete([*OTHER, version], s)) == (s, f"{version}", "committed")
    assert outcome(talk.complete(OTHER, s, "read")) == (s, "3", "unchanged")
    assert outcome(talk.complete(OTHER, s, "off")) == (None, None, None)
    assert outcome(talk.complete(OTHER)) == (None, None, None)
    assert talk.version(s) == 3


def test_read_and_off_leave_no_trace(talk: Talk) -> None:
    s = new_session()
    talk.complete(FACT, s)
    before, off = talk.probe(s), logprobs(talk.complete(FACT, None, "off"))
    for _ in range(2):
        talk.complete(OTHER, s, "read")
        assert distance(logprobs(talk.complete(FACT, s, "off")), off) <= SAME_MEMORY
    assert distance(off, logprobs(talk.complete(FACT))) > 0.05, "off must be the bare model, not an empty memory"
    assert distance(talk.probe(s), before) <= SAME_MEMORY
    assert talk.version(s) == 1


def test_mode_names_are_case_insensitive_and_others_refused(talk: Talk) -> None:
    s = new_session()
    assert outcome(talk.complete(FACT, s, "ReadWrite"))[2] == "committed"
    for bad in ("write", "", "read,off", "readwrite;"):
        refused(talk.complete(FACT, s, bad), 400, "use one of readwrite, read, off")
    assert talk.version(s) == 1


def test_get_and_delete(talk: Talk) -> None:
    s = new_session()
    error = refused(talk.get(f"/v1/sessions/{s}"), 404, s)
    assert error["type"] == "NotFoundError"
    refused(talk.delete(f"/v1/sessions/{s}"), 404, s)
    empty = talk.probe(s)
    sampled = token_ids(talk.complete(FACT, s))
    response = talk.get(f"/v1/sessions/{s}")
    found = ok(response)
    assert response.headers["ETag"] == '"1"'
    tokens = len(FACT) + len(sampled) - 1  # the last one has not been fed
    assert {k: found[k] for k in ("id", "object", "version", "tokens", "windows", "window_tokens", "busy")} == {
        "id": s,
        "object": "session",
        "version": 1,
        "tokens": tokens,
        "windows": 1,
        "window_tokens": tokens,
        "busy": False,
    }
    assert found["state_bytes"] == 3 * 8 * 8 * 4
    assert abs(found["updated_at"] - time.time()) < 60
    receipt = ok(talk.delete(f"/v1/sessions/{s}"))
    assert (receipt["id"], receipt["object"], receipt["deleted"]) == (s, "session.deleted", True)
    refused(talk.get(f"/v1/sessions/{s}"), 404)
    refused(talk.delete(f"/v1/sessions/{s}"), 404)
    assert distance(talk.probe(s), empty) <= SAME_MEMORY, "a deleted session must start empty"
    assert outcome(talk.complete(FACT, s)) == (s, "1", "committed")


def test_deletion_while_a_request_writes(talk: Talk) -> None:
    s = new_session()
    talk.complete(FACT, s)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(talk.complete, OTHER, s, n=400)
        while not ok(talk.get(f"/v1/sessions/{s}"))["busy"]:
            time.sleep(0.01)
        ok(talk.delete(f"/v1/sessions/{s}"))
        response = running.result()
    ok(response)
    assert outcome(response)[2] == "conflict"
    assert talk.version(s) == 0, "the deleted session has come back"


@pytest.mark.parametrize("path", ["/v1/sessions/a%20b", "/v1/sessions/%C3%BC", f"/v1/sessions/{'x' * 129}"])
def test_sessions_api_refuses_bad_ids(talk: Talk, path: str) -> None:
    refused(talk.get(path), 400, "invalid session id")
    refused(talk.delete(path), 400, "invalid session id")


# --- who names the session --------------------------------------------------------------------------------------------


def test_a_session_is_named_in_the_body_the_header_or_xargs_and_only_once(talk: Talk) -> None:
    body, header, xargs = new_session(), new_session(), new_session()
    assert outcome(talk.complete(FACT, session_id=body))[0] == body
    assert outcome(talk.complete(FACT, header))[0] == header
    assert outcome(talk.complete(FACT, vllm_xargs={"session_id": xargs}))[0] == xargs
    same = {"session_id": body, "vllm_xargs": {"session_id": body}}
    assert outcome(talk.complete(FACT, body, **same)) == (body, "2", "committed")
    for both in ({"session_id": body}, {"vllm_xargs": {"session_id": body}}, same):
        for stream in (False, True):
            error = refused(talk.complete(FACT, header, stream=stream, **both), 400, "names different sessions")
            assert {f"{body!r}", f"{header!r}"} <= set(re.findall("'[^']*'", error["message"]))
    refused(talk.complete(FACT, session_id=body, vllm_xargs={"session_id": xargs}), 400, "session_id in the body says")
    refused(talk.complete(FACT, header, "off", session_id=body), 400, "send one id")
    refused(talk.chat("Bo is a cat.", header, session_id=body), 400, "send one id")
    assert [talk.version(x) for x in (body, header, xargs)] == [2, 1, 1]


def test_a_client_cannot_speak_for_the_gateway(talk: Talk) -> None:
    s = new_session()
    empty = talk.probe(None)
    talk.complete(FACT, s)
    for forged in ({"ticket": "x"}, {"mode": "off"}, {"ticket": None, "mode": "readwrite"}):
        for body in ({"vllm_xargs": {"deltamem": forged}}, {"vllm_xargs": {"deltamem": str(forged)}}):
            response = talk.complete(list(range(40, 60)), None, "read", **body)
            assert response.status_code in (200, 400), response.text
            if response.status_code == 200:
                assert distance(logprobs(response), empty) <= SAME_MEMORY
    forged_text = {"vllm_xargs": {"deltamem": "ticket"}}
    assert distance(logprobs(talk.complete(list(range(40, 60)), **forged_text)), empty) <= SAME_MEMORY
    assert outcome(talk.complete(OTHER, s, **forged_text)) == (s, "2", "committed")


def test_a_client_cannot_share_a_sessions_cached_blocks(talk: Talk) -> None:
    s, prompt = new_session(), list(range(100, 200))
    empty = logprobs(talk.complete(prompt, mode="read"))
    talk.complete(FACT, s)
    with_memory = logprobs(talk.complete(prompt, s, "read"))
    assert distance(with_memory, empty) > 0.01
    for salt in ("deltamem-off:", "deltamem-none:", "x"):
        assert distance(logprobs(talk.complete(prompt, cache_salt=salt)), empty) <= SAME_MEMORY
        assert distance(logprobs(talk.complete(prompt, s, "read", cache_salt=salt)), with_memory) <= SAME_MEMORY


# --- endpoints --------------------------------------------------------------------------------------------------------


def test_chat_resent_in_full_is_written_once(talk: Talk) -> None:
    s, t = new_session(), new_session()
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Bo is a cat."}]
    for _ in range(2):  # and retried
        response = talk.chat(messages, s)
    answer = ok(response)["choices"][0]["message"]["content"]
    resent = [*messages, {"role": "assistant", "content": answer}, {"role": "user", "content": "Who is a cat?"}]
    talk.chat(resent, s)
    talk.chat(resent, t)
    assert (talk.version(s), talk.version(t)) == (3, 1)
    assert ok(talk.get(f"/v1/sessions/{s}"))["tokens"] == ok(talk.get(f"/v1/sessions/{t}"))["tokens"]
    assert distance(talk.probe(s), talk.probe(t)) <= SAME_MEMORY


def test_responses_endpoint(talk: Talk) -> None:
    s = new_session()
    body: dict[str, Any] = {"model": "m", "input": "Bo is a cat.", "max_output_tokens": 8, "temperature": 0}
    response = talk.post("/v1/responses", json=body, headers={"X-Session-ID": s})
    ok(response)
    assert outcome(response) == (s, "1", "committed")
    by_body = talk.post("/v1/responses", json={**body, "input": "Bo is seven.", "session_id": s})
    assert outcome(by_body) == (s, "2", "committed")
    with talk.stream("POST", "/v1/responses", json={**body, "stream": True}, headers={"X-Session-ID": s}) as streamed:
        text = streamed.read().decode()
    assert closing(text)["x-session-version"] == "3"
    bad = talk.post("/v1/responses", json=body, headers={"X-Session-ID": "a b"})
    refused(bad, 400, "invalid session id")


def test_anthropic_messages_endpoint(talk: Talk) -> None:
    s = new_session()
    body = {"model": "m", "max_tokens": 8, "messages": [{"role": "user", "content": "Bo is a cat."}]}
    response = talk.post("/v1/messages", json=body, headers={"X-Session-ID": s})
    ok(response)
    assert outcome(response) == (s, "1", "committed")


def test_several_conversations_at_once(talk: Talk) -> None:
    sessions = [new_session() for _ in range(6)]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda i: ok(talk.complete([*FACT[i:], *OTHER], sessions[i])), range(6)))
    alone = [new_session() for _ in range(6)]
    for i, s in enumerate(alone):
        ok(talk.complete([*FACT[i:], *OTHER], s))
        assert distance(talk.probe(s), talk.probe(sessions[i])) <= SAME_MEMORY


# --- streams ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("endpoint", ["completions", "chat/completions"])
def test_a_stream_says_its_version_at_the_end(talk: Talk, endpoint: str) -> None:
    s = new_session()
    body = completion(FACT, 8) if endpoint == "completions" else chat("Bo is a cat.", 8)
    body |= {"stream": True, "vllm_xargs": PACE}  # a client that is slower than the engine gets several tokens at once
    for version in ("1", "2"):
        with talk.stream("POST", f"/v1/{endpoint}", json=body, headers={"X-Session-ID": s}) as response:
            assert response.status_code == 200
            assert response.headers["content-type"].startswith("text/event-stream")
            text = response.read().decode()
        assert closing(text) == {"x-session-id": s, "x-session-version": version, "x-deltamem-commit": "committed"}
        assert len(chunks(text)) >= 4
        assert text.index("[DONE]") < text.index(": x-session-version"), "the comment closes the stream"
        assert talk.version(s) == int(version)


def test_a_stream_leaves_what_one_answer_leaves(talk: Talk) -> None:
    s, t = new_session(), new_session()
    with talk.streamed(FACT, s) as response:
        streamed = chunks(response.read().decode())
    whole = ok(talk.complete(FACT, t))["choices"][0]["text"]
    assert "".join(c["choices"][0]["text"] for c in streamed if c["choices"]) == whole
    assert distance(talk.probe(s), talk.probe(t)) <= SAME_MEMORY


# --- authentication ---------------------------------------------------------------------------------------------------


def test_the_sessions_api_needs_the_key(talk: Talk, server: VllmServer) -> None:
    s = new_session()
    ok(talk.complete(FACT, s))
    for key in (None, "wrong"):
        with Talk(server.base_url, key) as stranger:
            assert stranger.get(f"/v1/sessions/{s}").status_code == 401
            assert stranger.delete(f"/v1/sessions/{s}").status_code == 401
            assert stranger.complete(FACT, s).status_code == 401
            assert stranger.complete(FACT, "not valid").status_code == 401, "nothing of ours answers strangers"
    assert talk.version(s) == 1


def test_paths_outside_v1_reach_no_session_without_the_key(server: VllmServer, talk: Talk) -> None:
    s = new_session()
    with Talk(server.base_url, None) as stranger:
        for body in (completion(FACT, 8), completion(FACT, 8, session_id=s)):
            headers = {} if "session_id" in body else {"X-Session-ID": s}
            refused(stranger.post("/invocations", json=body, headers=headers), 401, "needs the API key")
        ok(stranger.post("/invocations", json=completion(FACT, 8)))  # without a session it is vLLM's own business
    assert talk.version(s) == 0
    assert outcome(talk.post("/invocations", json=completion(FACT, 8), headers={"X-Session-ID": s}))[1] == "1"
