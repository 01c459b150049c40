"""Message chains: which messages of a resent conversation the memory holds; and the attributes they lie in."""

import random
from typing import Any

import pytest

from deltamem_vllm.errors import CorruptRecord
from deltamem_vllm.sessions import attributes, chain
from deltamem_vllm.sessions.attributes import Attributes, Chain, Fact, Point
from deltamem_vllm.sessions.chain import Cut, advance, canonical, links, reply_digests


def _cut(known: Chain | None, messages: list[Any], reply: Any) -> Cut | None:
    return chain.cut(known, messages, links(messages), reply)


def said(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"b": 1, "a": 2}'}}


@pytest.mark.parametrize(
    "same",
    [
        (said("user", "hi"), said("user", [{"type": "text", "text": "hi"}])),
        (said("user", "hi"), said("user", "hi", name=None, refusal=None, annotations=[])),
        (
            said("assistant", None, tool_calls=[CALL]),
            said("assistant", "", tool_calls=[{**CALL, "function": {"name": "f", "arguments": {"a": 2, "b": 1}}}]),
        ),
    ],
)
def test_equal_messages_are_equal_however_written(same: tuple[Any, Any]) -> None:
    assert canonical(same[0]) == canonical(same[1])


def test_different_messages_differ() -> None:
    messages = [
        said("user", "hi"),
        said("system", "hi"),
        said("user", "hi "),
        said("user", "hi", name="mia"),
        said("tool", "hi", tool_call_id="c1"),
        said("tool", "hi", tool_call_id="c2"),
        said("assistant", "hi", tool_calls=[CALL]),
        said("assistant", "hi", tool_calls=[{**CALL, "function": {"name": "g", "arguments": "{}"}}]),
        said("user", [{"type": "image_url", "image_url": {"url": "x"}}]),
    ]
    assert len({canonical(m) for m in messages}) == len(messages)
    assert len(set(links(messages))) == len(messages) + 1


def turn(n: int) -> dict[str, Any]:
    return said("user", f"question {n}")


def answer(n: int, text: str = "") -> dict[str, Any]:
    return said("assistant", text or f"answer {n}")


def history(turns: int) -> list[dict[str, Any]]:
    """``turns`` questions; all but the last are answered."""
    made: list[dict[str, Any]] = [said("system", "be kind")]
    for n in range(turns):
        made += [turn(n), answer(n)]
    return made[:-1]


def after(turns: int, chain_: Chain | None = None) -> Chain:
    """The chain when ``turns`` turns were asked for one after the other, each resent and cut."""
    made = chain_
    for n in range(1, turns + 1):
        messages = history(n)
        at = _cut(made, messages, reply_digests(f"answer {n - 2}"))
        assert (at is None) == (n == 1)
        made = advance(made, at, len(messages), links(messages)[-1], 10, bytes(8))
    assert made is not None
    return made


def test_a_conversation_that_goes_on_is_cut_at_its_end() -> None:
    made = after(5)
    assert made.end == Point(10, links(history(5))[-1], 50)
    assert _cut(made, history(6), reply_digests("answer 4")) == Cut(11, "end", 50)
    assert _cut(made, history(6), None) == Cut(11, "end", 50)


def test_a_retry_or_an_edited_question_is_cut_where_its_window_began() -> None:
    made = after(5)
    edited = [*history(5)[:-1], said("user", "another question")]
    for messages in (history(5), edited):
        at = _cut(made, messages, reply_digests("answer 4"))
        assert at == Cut(9, "base", 40)
        again = advance(made, at, len(messages), links(messages)[-1], 10, bytes(8))
        assert (again.base, again.end.tokens) == (made.base, 50), "the turn is replaced, not added"


def test_an_edited_reply_is_noticed_while_its_text_is_known() -> None:
    made, edited = after(5), history(6)
    edited[-2] = answer(4, "no, something else")
    assert _cut(made, edited, reply_digests("answer 4")) == Cut(9, "base", 40)
    assert _cut(made, edited, reply_digests("<think>x</think>\n\nno, something else")) == Cut(11, "end", 50)
    tool = history(6)
    tool[-2] = said("assistant", None, tool_calls=[CALL])
    assert _cut(made, tool, reply_digests("what the model wrote")) == Cut(11, "end", 50)


@pytest.mark.parametrize("seed", range(20))
def test_other_conversations_are_not_cut(seed: int) -> None:
    """An edit, a loss, a swap anywhere before the window: all of it is sent."""
    rng, made = random.Random(seed), after(5)
    messages, place = history(6), rng.randrange(0, 8)
    match rng.choice(["edit", "drop", "double", "swap"]):
        case "edit":
            messages[place] = said(messages[place]["role"], "edited")
        case "drop":
            del messages[place]
        case "double":
            messages.insert(place, messages[place])
        case "swap":
            messages[place], messages[place + 1] = messages[place + 1], messages[place]
    assert _cut(made, messages, reply_digests("answer 4")) is None
    assert _cut(None, messages, None) is None
    assert _cut(made, history(3), None) is None, "an earlier branch of the conversation"


def test_attributes_are_reversible_and_deterministic() -> None:
    full = Attributes(
        metadata={"b": "1", "a": "ä" * 512},
        ttl=3600.0,
        write="user,assistant",
        facts=(Fact("f1", "The gate code is 4711.", "user", 1.5, 2.5), Fact("f2", "x" * 2000)),
        chain=after(3),
        forked_from="mia@7",
    )
    assert attributes.unpack(attributes.pack(full)) == full
    assert attributes.pack(full) == attributes.pack(attributes.unpack(attributes.pack(full)))
    assert attributes.pack(Attributes()) == b""
    assert attributes.unpack(b"") == Attributes()


@pytest.mark.parametrize("seed", range(50))
def test_damaged_attributes_are_refused(seed: int) -> None:
    rng = random.Random(seed)
    good = attributes.pack(Attributes(metadata={"a": "b"}, ttl=5.0, facts=(Fact("f", "text"),), chain=after(2)))
    for _ in range(200):
        bad = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            bad[rng.randrange(len(bad))] = rng.randrange(256)
        try:
            found = attributes.unpack(bytes(bad[: rng.randint(0, len(bad))] if rng.random() < 0.3 else bad))
        except CorruptRecord:
            continue
        assert isinstance(found, Attributes)


def test_attributes_of_a_later_version_are_refused() -> None:
    import msgspec

    with pytest.raises(CorruptRecord, match="unknown field"):
        attributes.unpack(msgspec.msgpack.encode({"mood": "good"}))


def test_reply_digests_know_reasoning() -> None:
    assert set(reply_digests("plain")) == set(reply_digests(" plain\n"))
    assert chain._reply_digest("said") in reply_digests("<think>thought</think>\n\nsaid")
