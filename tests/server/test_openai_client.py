"""OpenAI's own Python client, with one header more."""

from collections.abc import Iterator

import openai
import pytest

from deltamem_vllm.demo.server import VllmServer
from tests.server.talk import API_KEY, Talk, distance, new_session, ok
from tests.tolerances import SAME_MEMORY

QUESTION = [{"role": "user", "content": "Bo is a cat."}]


@pytest.fixture
def session() -> str:
    return new_session()


@pytest.fixture
def client(server: VllmServer, session: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{server.base_url}/v1", api_key=API_KEY, default_headers={"X-Session-ID": session}, max_retries=0
    ) as made:
        yield made


def test_answers(client: openai.OpenAI, talk: Talk, session: str) -> None:
    for version in ("1", "2"):
        raw = client.chat.completions.with_raw_response.create(
            model="m",
            messages=QUESTION,
            max_tokens=8,
            temperature=0,  # type: ignore[arg-type]
        )
        assert raw.headers["X-Session-Version"] == version
        assert raw.parse().choices[0].message.content is not None
    assert talk.version(session) == 2


def test_streams(client: openai.OpenAI, talk: Talk, session: str) -> None:
    """The closing comment is one that the client's parser must pass over."""
    options = {"model": "m", "messages": QUESTION, "max_tokens": 8, "temperature": 0}
    text = ""
    for chunk in client.chat.completions.create(**options, stream=True):  # type: ignore[call-overload]
        text += chunk.choices[0].delta.content or "" if chunk.choices else ""
    assert talk.version(session) == 1
    once = new_session()
    whole = client.chat.completions.create(**options, extra_headers={"X-Session-ID": once})  # type: ignore[call-overload]
    assert text == whole.choices[0].message.content
    assert distance(talk.probe(session), talk.probe(once)) <= SAME_MEMORY


def test_a_stream_that_is_closed_commits_nothing(client: openai.OpenAI, talk: Talk, session: str) -> None:
    with client.completions.create(model="m", prompt="Bo is", max_tokens=900, stream=True) as stream:
        next(iter(stream))
    answer = client.completions.create(model="m", prompt="Bo is", max_tokens=4)
    assert answer.choices[0].text is not None
    assert talk.version(session) == 1


def test_responses_and_body_fields(client: openai.OpenAI, talk: Talk, session: str) -> None:
    other = new_session()
    client.responses.create(model="m", input="Bo is a cat.", max_output_tokens=8)
    with pytest.raises(openai.BadRequestError, match="different sessions"):
        client.completions.create(model="m", prompt="Bo is", max_tokens=4, extra_body={"session_id": other})
    alone = {"X-Session-ID": openai.Omit()}  # instead of the client's own
    client.completions.create(
        model="m", prompt="Bo is", max_tokens=4, extra_headers=alone, extra_body={"session_id": other}
    )
    assert (talk.version(session), talk.version(other)) == (1, 1)
    assert ok(talk.get(f"/v1/sessions/{other}"))["windows"] == 1


def test_refusals_are_the_clients_own_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="ask for one, or send X-DeltaMem-Mode: read") as several:
        client.completions.create(model="m", prompt="Bo is", max_tokens=4, n=2)
    assert several.value.param == "n"
    with pytest.raises(openai.BadRequestError, match="invalid session id"):
        client.completions.create(model="m", prompt="Bo is", extra_headers={"X-Session-ID": "a b"})
    with pytest.raises(openai.BadRequestError, match="invalid session id"):
        client.completions.create(model="m", prompt="Bo is", stream=True, extra_body={"session_id": "a b"})
