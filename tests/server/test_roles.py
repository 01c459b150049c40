"""Write policies, and the mask they make of a conversation, with chat templates that behave and that do not."""

import asyncio
import itertools
import random
from collections.abc import Sequence
from typing import Any

import jinja2
import pytest

from deltamem_vllm.errors import SessionError
from deltamem_vllm.policy import ALL, parse_policy
from deltamem_vllm.server.roles import is_written, mask_of, plain_messages, requested, unwritten
from deltamem_vllm.sessions.masks import OPEN, Spans

PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}{% if gen %}<assistant>{% endif %}"
#: What a message renders to depends on what comes after it, as where reasoning is stripped from earlier turns.
DRIFTS = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% if loop.last %}{{ m.content }}{% else %}{{ m.content.split('|')[-1] }}{% endif %}</>{% endfor %}"
    "{% if gen %}<assistant>{% endif %}"
)
#: Refuses a conversation that does not end with the user's or a tool's message.
STRICT = (
    "{% if messages and messages[-1].role not in ('user', 'tool') %}{{ 1 / 0 }}{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}{% if gen %}<assistant>{% endif %}"
)
#: Gathers what tools said into one message.
GATHERS = (
    "{% for m in messages if m.role != 'tool' %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    "<tools>{% for m in messages if m.role == 'tool' %}{{ m.content }};{% endfor %}</>"
    "{% if gen %}<assistant>{% endif %}"
)
TEMPLATES = {"plain": PLAIN, "drifts": DRIFTS, "strict": STRICT, "gathers": GATHERS}


def render(template: str, messages: list[Any], gen: bool = False) -> list[int]:
    """One token per character."""
    try:
        return [ord(c) for c in jinja2.Template(template).render(messages=messages, gen=gen)]
    except ZeroDivisionError as e:
        raise ValueError(str(e)) from None


def mask(template: str, messages: list[Any], written: Sequence[bool], reply: bool = True) -> tuple[str, Spans]:
    """The whole prompt and its spans."""

    async def beginning(some: list[Any]) -> list[int]:
        return render(template, some)

    prompt = render(template, messages, gen=True)
    return "".join(map(chr, prompt)), asyncio.run(unwritten(messages, written, prompt, beginning, reply))


def message(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


TALK = [
    message("system", "be kind"),
    message("user", "thought|question"),
    message("assistant", "musing|call"),
    message("tool", "raw|OUTPUT"),
    message("assistant", "more|answer"),
    message("user", "again"),
]


def test_only_the_masked_messages_are_masked() -> None:
    prompt, spans = mask(PLAIN, TALK, [m["role"] != "tool" for m in TALK])
    assert [prompt[start:stop] for start, stop in spans] == ["<tool>raw|OUTPUT</>"]
    prompt, spans = mask(PLAIN, TALK, [m["role"] == "user" for m in TALK])
    assert "".join(c for i, c in enumerate(prompt) if not any(a <= i < b for a, b in spans)) == (
        "<user>thought|question</><user>again</><assistant>"
    )


def test_a_masked_last_message_ends_before_the_generation_prompt() -> None:
    """So that the next turn, which has the reply there, masks the same tokens."""
    talk = TALK[:4]
    prompt, spans = mask(PLAIN, talk, [True, True, True, False])
    assert prompt[spans[0][0] : spans[0][1]] == "<tool>raw|OUTPUT</>"
    longer, later = mask(PLAIN, TALK, [True, True, True, False, True, True])
    assert later == spans
    assert longer.startswith(prompt[: spans[0][1]])


def test_a_reply_that_is_not_written_begins_where_its_turn_does() -> None:
    """What the template puts before it is masked, too, as it is when the reply is resent as a message."""
    talk = TALK[:2]
    for written in ([True, True], [True, False], [False, False]):
        prompt, spans = mask(PLAIN, talk, written, reply=False)
        assert prompt[spans[-1][0] : spans[-1][1]].endswith("<assistant>")
        longer, later = mask(PLAIN, TALK[:3], [*written, False], reply=False)
        stop = len(prompt)
        assert longer.startswith(prompt)
        assert [(start, min(end, stop)) for start, end in later if start < stop] == list(spans)
    assert mask(PLAIN, talk, [True, True])[1] == ()


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("seed", range(25))
def test_nothing_of_a_masked_message_is_ever_written(name: str, seed: int) -> None:
    """Whatever the template does. Each message's content is a letter of its own."""
    rng = random.Random(seed)
    talk = [
        message(rng.choice(["user", "assistant", "tool"]), f"x|{letter * rng.randint(1, 5)}")
        for letter in "ABCDEFGHIJ"[: rng.randint(1, 10)]
    ]
    if name == "strict":
        talk.append(message("user", "K"))
    written = [rng.random() < 0.6 for _ in talk]
    prompt, spans = mask(TEMPLATES[name], talk, written)
    masked = [any(start <= i < stop for start, stop in spans) for i in range(len(prompt))]
    for m, write in zip(talk, written, strict=True):
        letter = m["content"][-1]
        places = [i for i, c in enumerate(prompt) if c == letter]
        if not write:
            assert all(masked[i] for i in places), f"{letter} would be written"
        elif name == "plain":
            assert not any(masked[i] for i in places), f"{letter} would be lost"


def test_a_mask_that_trusts_the_template_is_caught() -> None:
    """PLANTED BUG: the end of a span is where the shorter rendering stops matching, whole or not."""
    prompt = render(DRIFTS, TALK, gen=True)
    start, stop = (_common(render(DRIFTS, TALK[:n]), prompt) for n in (3, 4))
    assert "OUTPUT" not in "".join(map(chr, prompt[start:stop])), "the template does not drift: the test shows nothing"


def _common(one: list[int], other: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def test_policies() -> None:
    assert parse_policy("all") == ALL == {"system", "user", "assistant", "tool"}
    assert parse_policy("none") == frozenset()
    assert parse_policy(" User, tool") == {"user", "tool"}
    for bad in ("", "users", "all,user", "user,,tool", "x" * 1000):
        with pytest.raises(SessionError, match=r"invalid X-DeltaMem-Write.*system, user, assistant, tool") as refused:
            requested(bad)
        assert (refused.value.status, refused.value.parameter) == (400, "X-DeltaMem-Write")
        assert len(str(refused.value)) < 250


def test_roles_and_flags() -> None:
    policy = parse_policy("system,user,assistant")
    roles = ["system", "developer", "user", "assistant", "tool", "function", "stranger"]
    assert [is_written(message(r, ""), policy) for r in roles] == [True, True, True, True, False, False, False]
    assert is_written(message("tool", "", deltamem={"write": True}), policy)
    assert not is_written(message("user", "", deltamem={"write": False}), policy)
    assert is_written(message("user", "", deltamem={"pin": True}), policy)
    for bad in (True, {}, {"write": 1}, {"pin": None}, {"write": True, "more": 1}, {"write": True, "pin": 1}, "x"):
        with pytest.raises(SessionError, match='"deltamem" must be') as refused:
            is_written(message("user", "", deltamem=bad), policy)
        assert refused.value.status == 400
    assert plain_messages([message("user", "a", deltamem={"write": True}), "raw"]) == [message("user", "a"), "raw"]
    assert plain_messages([{"role": "user", "content": iter([{"type": "text"}])}])[0]["content"] == [{"type": "text"}]


def test_masks_of_prompts_and_replies() -> None:
    no_reply = parse_policy("user")
    assert mask_of((), 10, ALL) == ()
    assert mask_of(((2, 4),), 10, ALL) == ((2, 4),)
    assert mask_of(((2, 4),), 10, no_reply) == ((2, 4), (10, OPEN))
    assert mask_of(((8, 10),), 10, no_reply) == ((8, OPEN),)
    assert mask_of(None, 10, no_reply) == ((10, OPEN),)
    assert mask_of(None, 10, parse_policy("assistant")) == ((0, 10),)
    assert mask_of(None, 10, frozenset()) == ((0, OPEN),)
    assert [*itertools.chain(*mask_of(None, 10, ALL))] == []
