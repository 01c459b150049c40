"""History elision on a real server: clients that resend everything, of which only what is new goes through the model.

The memory must be what plain torch makes of it, turn by turn: the context read and not written, the rest written once,
whatever the client retries, regenerates or edits.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deltamem_vllm.recall import ADAPTER_DIR, MODEL_DIR
from tests.engine.plain_model import PlainModel, States
from tests.server.conversations import (
    REPLY,
    TOKENIZER,
    Client,
    Message,
    Served,
    edit_message,
    prompt_ids,
    regenerate,
    retry,
    users,
    vanish,
)
from tests.server.fed_once import apart, check_same
from tests.server.talk import chat, ok, refused
from tests.tolerances import ENGINE_STATE

TURNS, KEEP = 12, 2
TEXTS = users(TURNS)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder: Path = tmp_path_factory.mktemp("elision")
    flags = ("--deltamem-history", "elide", "--deltamem-history-keep", str(KEEP), "--deltamem-write", "all")
    with Served(folder, *flags).running() as made:
        yield made


def conversation(served: Served, habit: Any = None, **options: Any) -> Client:
    client = Client(served, **options)
    for text in TEXTS:
        client.say(text, habit)
    return client


@pytest.fixture(scope="module")
def plain(served: Served) -> Client:
    """The conversation without any accident."""
    return conversation(served)


def shown(client: Client, turn: int) -> tuple[list[Message], int]:
    """What of a turn's request should be rendered, and how many of its messages are context."""
    whole = client.history[: 2 * turn + 1]
    context = whole[-1 - KEEP : -1] if turn else []
    return [*context, whole[-1]], len(context)


def test_each_turn_is_written_once_and_its_context_is_not(plain: Client) -> None:
    """In plain torch, window by window."""
    model, states = PlainModel(MODEL_DIR, ADAPTER_DIR), None
    for turn, left in enumerate(plain.left):
        messages, context = shown(plain, turn)
        ids = prompt_ids(messages)
        masked = range(len(plain_ids(messages[:context])))
        states = check_turn(model, [*ids, *left.answer.ids[:-1]], masked, states, left.record.end)
        assert left.record.windows == turn + 1


def plain_ids(messages: list[Message]) -> list[int]:
    if not messages:
        return []
    rendered: Any = TOKENIZER.apply_chat_template(messages, add_generation_prompt=False)
    return list(rendered["input_ids"])


def check_turn(model: PlainModel, fed: list[int], masked: range, states: States | None, end: np.ndarray) -> States:
    _, after = model.run(fed, states, masked)
    mine = np.stack([after[layer].numpy() for layer in sorted(after)])
    assert apart(mine, end.reshape(mine.shape)) <= ENGINE_STATE
    return after


def test_the_prompt_does_not_grow(served: Served, plain: Client) -> None:
    """By the response's own usage; the full history's, beside it, does."""
    elided, full = [], []
    client = Client(served)
    for turn, text in enumerate(TEXTS):
        body = chat(client.messages(text), REPLY, ignore_eos=False)
        response = served.talk.post("/v1/chat/completions", json=body, headers={"X-Session-ID": client.session})
        elided.append(ok(response)["usage"]["prompt_tokens"])
        full.append(len(prompt_ids(client.messages(text))))
        tokens = int(response.headers.get("x-deltamem-elided-tokens", 0))
        assert response.json()["usage"].get("deltamem_elided_tokens", 0) == tokens
        assert (tokens > 0) == (turn >= 2), "from the third turn on there is more than the context to leave out"
        reply = response.json()["choices"][0]["message"]["content"]
        client.history += [{"role": "user", "content": text}, {"role": "assistant", "content": reply}]
    bound = max(len(prompt_ids(shown(client, turn)[0])) for turn in range(TURNS))
    assert max(elided) <= bound < full[-1] / 3
    assert client.history == plain.history


@pytest.mark.parametrize("habit", [retry, regenerate, edit_message, vanish])
def test_accidents_leave_the_same_memory(served: Served, plain: Client, habit: Any) -> None:
    check_same(conversation(served, habit), plain)


def test_streams_leave_the_same_memory(served: Served, plain: Client) -> None:
    check_same(conversation(served, streams=True), plain)


def test_an_edited_reply_replaces_the_turn(served: Served, plain: Client) -> None:
    """The client says that the model answered otherwise: the memory of that turn goes, and what it says is written."""
    client = conversation(served)
    client.history[-1] = {"role": "assistant", "content": "no idea"}
    before = client.record()
    client.say("hello")
    after = client.record()
    assert np.array_equal(after.base, before.base), "it went on from a state that holds the old reply"
    assert after.windows == before.windows


def test_streams_and_other_endpoints_say_what_was_left_out(served: Served) -> None:
    client = Client(served)
    for text in TEXTS[:4]:
        client.say(text)
    messages = client.messages("hello")
    headers = {"X-Session-ID": client.session, "X-DeltaMem-Mode": "read", "X-DeltaMem-History": "elide"}
    body = chat(messages, REPLY, ignore_eos=False)
    whole = served.talk.post("/v1/chat/completions", json=body, headers=headers)
    tokens = ok(whole)["usage"]["deltamem_elided_tokens"]
    assert tokens > 0
    options = {"stream": True, "stream_options": {"include_usage": True}}
    stream = served.talk.post("/v1/chat/completions", json={**body, **options}, headers=headers)
    events = [json.loads(line[6:]) for line in stream.text.splitlines() if line.startswith("data: {")]
    assert [event["usage"]["deltamem_elided_tokens"] for event in events if event.get("usage")] == [tokens]
    assert (
        "".join(c["delta"].get("content") or "" for e in events for c in e["choices"])
        == ok(whole)["choices"][0]["message"]["content"]
    )
    body = {"model": "m", "messages": messages, "max_tokens": REPLY, "temperature": 0}
    assert ok(served.talk.post("/v1/messages", json=body, headers=headers))["usage"]["deltamem_elided_tokens"] == tokens
    body = {"model": "m", "input": messages, "max_output_tokens": REPLY, "temperature": 0}
    assert (
        ok(served.talk.post("/v1/responses", json=body, headers=headers))["usage"]["deltamem_elided_tokens"] == tokens
    )


def test_another_conversation_is_not_cut(served: Served) -> None:
    """Its first message is another one: everything is rendered, on top of what the session remembers."""
    client = conversation(served)
    before = client.record()
    client.history[0] = {"role": "user", "content": "something else"}
    body = chat(client.messages("hello"), REPLY, ignore_eos=False)
    response = served.talk.post("/v1/chat/completions", json=body, headers={"X-Session-ID": client.session})
    assert ok(response)["usage"]["prompt_tokens"] == len(prompt_ids(client.messages("hello")))
    assert "x-deltamem-elided-tokens" not in response.headers
    assert np.array_equal(client.record().base, before.end)


def test_a_request_can_ask_for_the_full_history(served: Served) -> None:
    client = Client(served)
    for text in TEXTS[:4]:
        client.say(text)
    alone = [client.messages("hello")[-1]]
    for header, expected in (
        ("full", client.messages("hello")),
        ("elide; keep=0", alone),
        ("elide; keep=0", alone),  # an answer that was only read is no message of the conversation
    ):
        headers = {"X-Session-ID": client.session, "X-DeltaMem-Mode": "read", "X-DeltaMem-History": header}
        body = chat(client.messages("hello"), REPLY, ignore_eos=False)
        response = served.talk.post("/v1/chat/completions", json=body, headers=headers)
        assert ok(response)["usage"]["prompt_tokens"] == len(prompt_ids(expected)), header
    for bad in ("none", "elide; keep=-1", "elide;keep=99999", "x" * 5000):
        body = chat("hello", 1)
        headers = {"X-Session-ID": client.session, "X-DeltaMem-History": bad}
        refused(served.talk.post("/v1/chat/completions", json=body, headers=headers), 400, "X-DeltaMem-History")


def test_without_a_session_nothing_is_left_out(served: Served) -> None:
    messages = [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(TEXTS)]
    response = served.talk.post("/v1/chat/completions", json=chat(messages, 1, ignore_eos=False))
    assert ok(response)["usage"]["prompt_tokens"] == len(prompt_ids(messages))
