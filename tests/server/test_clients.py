"""Other people's clients against a session: OpenAI's JavaScript one, LangChain's, and curl.

OpenAI's Python client has tests of its own (`test_openai_client`).
"""

import json
import subprocess
from pathlib import Path

import pytest
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langchain_openai import ChatOpenAI
from pydantic import SecretStr

from deltamem_vllm.demo.server import VllmServer
from tests.server.talk import API_KEY, Talk, chat, distance, new_session, ok
from tests.tolerances import SAME_MEMORY

JAVASCRIPT = Path(__file__).parent / "javascript"
QUESTION = "Bo is a cat."


def test_openais_javascript_client(server: VllmServer, talk: Talk) -> None:
    session, alone = new_session(), new_session()
    command = ["node", "converse.mjs", f"{server.base_url}/v1", API_KEY, session]
    ran = subprocess.run(command, cwd=JAVASCRIPT, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    seen = json.loads(ran.stdout)
    answers = [ok(talk.chat(QUESTION, alone, ignore_eos=False))["choices"][0]["message"]["content"] for _ in range(3)]
    assert seen["versions"] == ["1", "2"]
    assert (seen["answered"], seen["streamed"]) == (answers[1], answers[2])
    assert seen["commitOfRead"] == "unchanged"
    assert seen["refused"][0] == 400
    assert "X-DeltaMem-Mode: read" in seen["refused"][1]
    assert (seen["session"]["id"], seen["session"]["version"]) == (session, 3)
    assert distance(talk.probe(session), talk.probe(alone)) <= SAME_MEMORY


@pytest.mark.parametrize("resends", [True, False], ids=["history", "new turns"])
def test_langchain(server: VllmServer, talk: Talk, resends: bool) -> None:
    session, alone = new_session(), new_session()
    model = ChatOpenAI(
        model="m",
        base_url=f"{server.base_url}/v1",
        api_key=SecretStr(API_KEY),
        default_headers={"X-Session-ID": session},
        max_completion_tokens=8,
        temperature=0,
        max_retries=0,
        include_response_headers=True,
    )
    history: list[BaseMessage] = []
    plain: list[dict[str, str]] = []
    for turn in range(1, 4):
        new = HumanMessage(f"{QUESTION} {turn}")
        asked = [*history, new] if resends else [new]
        answer = model.invoke(asked)
        assert answer.response_metadata["headers"]["x-session-version"] == str(turn)
        said = [{"role": "user", "content": str(new.content)}]
        body = chat([*plain, *said] if resends else said, 8, ignore_eos=False)
        expected = ok(talk.post("/v1/chat/completions", json=body, headers={"X-Session-ID": alone}))
        assert answer.content == expected["choices"][0]["message"]["content"]
        history += [new, AIMessage(answer.content)]
        plain += [*said, {"role": "assistant", "content": str(answer.content)}]
    streamed = "".join(str(chunk.content) for chunk in model.stream([HumanMessage("Who is Bo?")]))
    body = chat("Who is Bo?", 8, ignore_eos=False)
    expected = ok(talk.post("/v1/chat/completions", json=body, headers={"X-Session-ID": alone}))
    assert streamed == expected["choices"][0]["message"]["content"]
    assert talk.version(session) == 4
    assert distance(talk.probe(session), talk.probe(alone)) <= SAME_MEMORY


def test_curl(server: VllmServer, talk: Talk) -> None:
    session = new_session()
    body = json.dumps(chat(QUESTION, 8))
    ask = ["curl", "-sS", "-i", f"{server.base_url}/v1/chat/completions", "-H", f"Authorization: Bearer {API_KEY}"]
    ask += ["-H", "Content-Type: application/json", "-H", f"X-Session-ID: {session}", "-d", body]
    for version in (1, 2):
        said = subprocess.run(ask, capture_output=True, text=True, check=True, timeout=60).stdout.lower()
        assert f"x-session-version: {version}\n" in said
        assert "x-deltamem-commit: committed\n" in said
    assert talk.version(session) == 2
