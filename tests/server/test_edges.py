"""The rough edges of vLLM's HTTP API with a session: each answers what it should and commits exactly what was fed."""

import json
import re
import statistics
import time
from typing import Any

import httpx
import numpy as np
import pytest

from deltamem_vllm.demo.server import VllmServer
from deltamem_vllm.store.protocol import Record, SessionKey
from deltamem_vllm.store.sqlite import SQLiteStore
from tests.server.talk import (
    TENANT,
    Talk,
    chat,
    chunks,
    closing,
    completion,
    distance,
    logprobs,
    memory_headers,
    new_session,
    ok,
    outcome,
    refused,
    token_ids,
)
from tests.tolerances import ENGINE_STATE, SAME_MEMORY

FACT = list(range(64, 96))
OTHER = list(range(10, 50))
POSITIONS = 32


class Kept:
    """What the server has committed, read from its store's file."""

    def __init__(self, server: VllmServer) -> None:
        self.path = server.log.with_name("sessions.db")

    def __call__(self, session: str) -> Record:
        store = SQLiteStore(self.path)
        try:
            record = store.get(SessionKey(TENANT, session))
        finally:
            store.close()
        assert record is not None, f"{session} has no record"
        return record


@pytest.fixture
def kept(server: VllmServer) -> Kept:
    return Kept(server)


def same_memory(a: Record, b: Record) -> None:
    """Two sessions that were fed the same tokens: the same window, and states that differ by rounding at most."""
    assert (a.window, a.tokens, a.windows) == (b.window, b.tokens, b.windows)
    assert np.abs(a.end - b.end).max() <= ENGINE_STATE
    assert np.abs(a.base - b.base).max() <= ENGINE_STATE


def twins(talk: Talk, count: int = 2, *turns: list[int]) -> list[str]:
    """Sessions with equal memories: of a fact, and of further prompts."""
    made = [new_session() for _ in range(count)]
    for session in made:
        for prompt in (FACT, *turns):
            ok(talk.complete(prompt, session))
    return made


# --- clients that leave -----------------------------------------------------------------------------------------------


def test_a_client_that_leaves_at_any_token_commits_nothing(talk: Talk, kept: Kept) -> None:
    """By HTTP the engine runs on until the disconnect reaches it; test_aborts has every position exactly."""
    s, t = twins(talk)
    before, seconds = kept(s), []
    for read in range(1, POSITIONS + 1):
        with talk.streamed([*OTHER, read], s, n=900, logprobs=None) as response:
            lines = response.iter_lines()
            seen = 0
            while seen < read:
                seen += next(lines).startswith("data: ")
        left = time.monotonic()
        while ok(talk.get(f"/v1/sessions/{s}"))["busy"]:
            assert time.monotonic() - left < 20, f"after {read} tokens the session stays taken"
        seconds.append(time.monotonic() - left)
        assert kept(s) == before or _same_record(kept(s), before), f"after {read} tokens something was committed"
    print(f"disconnect to free: median {statistics.median(seconds):.3f} s, most {max(seconds):.3f} s")
    assert distance(logprobs(talk.complete(OTHER, s)), logprobs(talk.complete(OTHER, t))) <= SAME_MEMORY
    assert kept(s).version == 2
    same_memory(kept(s), kept(t))


def _same_record(a: Record, b: Record) -> bool:
    fields = ("version", "window", "tokens", "windows", "updated_at", "request_id")
    return all(getattr(a, f) == getattr(b, f) for f in fields) and (a.end.tobytes(), a.base.tobytes()) == (
        b.end.tobytes(),
        b.base.tobytes(),
    )


# --- log-probabilities of the prompt ----------------------------------------------------------------------------------


@pytest.mark.parametrize("window", ["new", "extended"])
def test_echo(talk: Talk, kept: Kept, window: str) -> None:
    """vLLM computes the whole prompt again for its log-probabilities: from the window's base, each token once."""
    before = list(range(150, 170)) if window == "extended" else []
    turns = [before] if before else []
    s, t = twins(talk, 2, *turns)
    prompt = [*before, *OTHER]
    echoed = talk.complete(prompt, s, n=4, echo=True)
    plain = talk.complete(prompt, t, n=4)
    assert outcome(echoed) == (s, f"{len(turns) + 2}", "committed")
    assert token_ids(echoed) == [*prompt, *token_ids(plain)]
    found = ok(echoed)["choices"][0]["logprobs"]["top_logprobs"]
    assert found[0] is None
    assert distance(_numbers(found[len(prompt) :]), logprobs(plain)) <= SAME_MEMORY
    same_memory(kept(s), kept(t))
    for position in (len(before) + 1, len(before) + 17, len(prompt) - 1):  # each as the next token of a shorter prompt
        [another] = twins(talk, 1, *turns)
        ahead = logprobs(talk.complete(prompt[:position], another, n=1))
        assert distance(_numbers(found[position : position + 1]), ahead) <= SAME_MEMORY, position
    without = _numbers(ok(talk.complete(prompt, n=4, echo=True))["choices"][0]["logprobs"]["top_logprobs"][1:])
    assert distance(_numbers(found[1:]), without) > 0.05, "the memory changes nothing, so this test shows nothing"


def _numbers(found: list[dict[str, float]]) -> list[dict[int, float]]:
    return [{int(k.split(":")[1]): v for k, v in each.items()} for each in found]


def test_echo_without_an_answer_writes_the_prompt(talk: Talk, kept: Kept) -> None:
    s, t = twins(talk)
    echoed = talk.complete(OTHER, s, n=0, echo=True)
    assert outcome(echoed) == (s, "2", "committed")
    assert token_ids(echoed) == OTHER
    ok(talk.complete(OTHER, t, n=1))
    same_memory(kept(s), kept(t))
    assert kept(s).tokens == len(FACT) + 7 + len(OTHER)


def test_prompt_logprobs_of_a_chat(talk: Talk, kept: Kept) -> None:
    s, t, u = twins(talk, 3)
    asked = talk.chat("Bo is a cat.", s, n=4, prompt_logprobs=20, return_token_ids=True)
    assert outcome(asked) == (s, "2", "committed")
    ok(talk.chat("Bo is a cat.", t, n=4))
    same_memory(kept(s), kept(t))
    body = ok(asked)
    prompt = body["prompt_token_ids"]
    mine = [{int(k): v["logprob"] for k, v in each.items()} for each in body["prompt_logprobs"][1:]]
    assert len(mine) == len(prompt) - 1
    echoed = ok(talk.complete(prompt, u, n=1, echo=True))["choices"][0]["logprobs"]["top_logprobs"]
    assert distance(mine, _numbers(echoed[1 : len(prompt)])) <= SAME_MEMORY


def test_prompt_logprobs_cannot_be_streamed_and_hold_nothing(talk: Talk, kept: Kept) -> None:
    [s] = twins(talk, 1)
    refused(talk.chat("Bo is a cat.", s, n=4, prompt_logprobs=5, stream=True), 400, "prompt_logprobs")
    assert not ok(talk.get(f"/v1/sessions/{s}"))["busy"]
    assert kept(s).version == 1


# --- structured output and tools --------------------------------------------------------------------------------------

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Rome", "Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": SCHEMA}}
CALL = r'\[weather\(city="(Rome|Oslo)"\)\]'
SHAPED: dict[str, dict[str, Any]] = {
    "choice": {"structured_outputs": {"choice": ["a small cat", "a large dog"]}},
    "regex": {"structured_outputs": {"regex": r"[a-c]{3}-[0-9]{4}"}},
    "json": {"structured_outputs": {"json": SCHEMA}},
    "response_format": {
        "response_format": {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA, "strict": True}}
    },
    "forced tool": {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "weather"}}},
    "automatic tool": {"tools": [TOOL], "tool_choice": "auto", "structured_outputs": {"regex": CALL}},
    "no tool called": {"tools": [TOOL], "tool_choice": "auto"},
}


def check_shape(kind: str, text: str | None, calls: list[dict[str, Any]]) -> None:
    """The answer is what was asked for."""
    match kind:
        case "choice":
            assert text in ("a small cat", "a large dog")
        case "regex":
            assert re.fullmatch(r"[a-c]{3}-[0-9]{4}", text or "")
        case "json" | "response_format":
            assert json.loads(text or "")["city"] in ("Rome", "Oslo")
        case "no tool called":
            assert text
            assert not calls
        case _:
            assert [c["function"]["name"] for c in calls] == ["weather"], (text, calls)
            assert json.loads(calls[0]["function"]["arguments"])["city"] in ("Rome", "Oslo")


def assembled(stream: str) -> tuple[str, list[dict[str, Any]]]:
    """Text and tool calls of a streamed chat."""
    text, calls = "", dict[int, dict[str, Any]]()
    for event in chunks(stream):
        for choice in event["choices"]:
            text += choice["delta"].get("content") or ""
            for part in choice["delta"].get("tool_calls") or ():
                call = calls.setdefault(part["index"], {"function": {"name": "", "arguments": ""}})
                for name in ("name", "arguments"):
                    call["function"][name] += part["function"].get(name) or ""
    return text, list(calls.values())


@pytest.mark.parametrize("kind", SHAPED)
def test_shaped_answers_commit_exactly_what_was_fed(talk: Talk, kept: Kept, kind: str) -> None:
    s, t, u = twins(talk, 3)
    body = {**SHAPED[kind], "ignore_eos": kind == "no tool called"}
    n = 12 if kind == "no tool called" else 200
    answer = talk.chat("Bo is a cat.", s, n=n, return_token_ids=True, **body)
    made = ok(answer)
    assert outcome(answer) == (s, "2", "committed")
    message = made["choices"][0]["message"]
    assert made["choices"][0]["finish_reason"] != "length" or kind == "no tool called", made
    check_shape(kind, message["content"], message.get("tool_calls") or [])
    streamed = talk.chat("Bo is a cat.", t, n=n, stream=True, **body)
    assert streamed.status_code == 200, streamed.text
    assert closing(streamed.text)["x-deltamem-commit"] == "committed"
    check_shape(kind, *assembled(streamed.text))
    same_memory(kept(s), kept(t))
    # By the tokens themselves: all but the last one have been fed.
    fed = [*made["prompt_token_ids"], *made["choices"][0]["token_ids"][:-1]]
    ok(talk.complete(fed, u, n=1))
    assert np.abs(kept(s).end - kept(u).end).max() <= ENGINE_STATE
    assert kept(s).tokens == kept(u).tokens


def test_a_conversation_with_a_tool_call_goes_on(talk: Talk, kept: Kept) -> None:
    """The client resends the call and the tool's answer, as OpenAI's clients do."""
    s = new_session()
    messages: list[dict[str, Any]] = [{"role": "user", "content": "Bo is a cat."}]
    first = ok(talk.chat(messages, s, n=200, ignore_eos=False, **SHAPED["forced tool"]))["choices"][0]["message"]
    messages.append({"role": "assistant", "content": "", "tool_calls": first["tool_calls"]})
    messages.append({"role": "tool", "tool_call_id": first["tool_calls"][0]["id"], "content": "rain"})
    assert outcome(talk.chat(messages, s, n=8)) == (s, "2", "committed")
    t = new_session()
    ok(talk.chat(messages, t, n=8))
    assert kept(s).windows == 1, "the same window: its question was matched, what followed was replaced"
    assert np.abs(kept(s).end - kept(t).end).max() <= ENGINE_STATE


@pytest.mark.parametrize("bad", [{"structured_outputs": {"regex": "("}}, {"structured_outputs": {"json": "{"}}])
def test_a_bad_grammar_is_refused_and_holds_nothing(talk: Talk, kept: Kept, bad: dict[str, Any]) -> None:
    [s] = twins(talk, 1)
    for stream in (False, True):
        body = {**completion(OTHER, 4, stream=stream), **bad}
        response = talk.post("/v1/completions", json=body, headers=memory_headers(s, None))
        assert response.status_code == (200 if stream else 400), response.text  # vLLM begins a stream before it looks
        [error] = re.findall(r'\{"error".*\}', response.text)
        assert json.loads(error)["error"]["code"] == 400
    assert not ok(talk.get(f"/v1/sessions/{s}"))["busy"]
    assert outcome(talk.complete(OTHER, s)) == (s, "2", "committed")


def test_a_structured_stream_that_is_left_commits_nothing(talk: Talk, kept: Kept) -> None:
    s, t = twins(talk)
    body = {**chat("Bo is a cat.", 900, stream=True), "structured_outputs": {"regex": "[a-z]{900}"}}
    with talk.stream("POST", "/v1/chat/completions", json=body, headers=memory_headers(s, None)) as response:
        lines = response.iter_lines()
        for _ in range(9):
            next(lines)
    left = time.monotonic()
    while ok(talk.get(f"/v1/sessions/{s}"))["busy"]:
        assert time.monotonic() - left < 20
    assert kept(s).version == 1
    assert kept(s).end.tobytes() == kept(t).end.tobytes()
    assert isinstance(response, httpx.Response)
