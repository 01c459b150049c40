"""The page's own middleware: what it answers, where it stands, and what its policy lets run."""

import asyncio
import base64
import hashlib
import re
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

from deltamem_vllm.compat import outermost
from deltamem_vllm.server.middleware import SessionMiddleware
from deltamem_vllm.server.page import FILE, PATH, Page, policy_of
from deltamem_vllm.server.tenants import Tenant

HTML = FILE.read_text(encoding="utf-8")


class Strict:
    """Knows one key, and lets nobody through without it."""

    guard_everything = True

    def of(self, key: str | None) -> Tenant | None:
        return Tenant("t") if key == "k" else None


async def _inside(request: Request) -> PlainTextResponse:
    return PlainTextResponse("inside")


@pytest.fixture(params=["vllm", "key file"])
def client(request: pytest.FixtureRequest) -> TestClient:
    """An application with the page, put together in the order in which vLLM does it."""
    app = Starlette()
    app.add_route("/{path:path}", _inside, methods=["GET", "HEAD", "DELETE", "OPTIONS"])
    app.add_middleware(SessionMiddleware, tenants=Strict())
    outermost(app, Page)
    if request.param == "vllm":
        app.add_middleware(AuthenticationMiddleware, tokens=["k"])
    return TestClient(app)


def test_the_page_is_outside_of_what_asks_for_a_key(client: TestClient) -> None:
    assert client.get(PATH).text == HTML
    head = client.head(PATH)
    assert (head.status_code, head.content, head.headers["content-length"]) == (200, b"", str(len(HTML.encode())))
    for method, path in (
        ("DELETE", PATH),
        ("GET", "/v1/sessions"),
        ("GET", f"{PATH}/"),
        ("GET", f"{PATH}x"),
        ("GET", f"/{PATH}"),
        ("GET", f"{PATH}/versions"),
        ("GET", f"/x{PATH}"),
    ):
        assert client.request(method, f"http://testserver{path}").status_code == 401, (method, path)
        found = client.request(method, f"http://testserver{path}", headers={"Authorization": "Bearer k"})
        assert found.text == "inside", (method, path)


def test_it_says_what_browsers_are_to_heed(client: TestClient) -> None:
    headers = client.get(PATH).headers
    assert headers["content-security-policy"] == policy_of(HTML)
    for name, value in {
        "x-content-type-options": "nosniff",
        "x-frame-options": "DENY",
        "referrer-policy": "no-referrer",
        "cache-control": "no-store",
        "cross-origin-resource-policy": "same-origin",
    }.items():
        assert headers[name] == value
    assert "access-control-allow-origin" not in headers


async def _at(root_path: str, path: str) -> Any:
    sent: list[Any] = []

    async def inside(scope: Any, receive: Any, send: Any) -> None:
        sent.append("inside")

    async def send(message: Any) -> None:
        sent.append(message["type"])

    await Page(inside)({"type": "http", "method": "GET", "path": path, "root_path": root_path}, None, send)
    return sent[0]


def test_a_path_in_front_of_all_others_is_left_out() -> None:
    assert asyncio.run(_at("/base", f"/base{PATH}")) == "http.response.start"
    assert asyncio.run(_at("/base", PATH)) == "http.response.start"
    assert asyncio.run(_at("", f"/base{PATH}")) == "inside"


def test_the_policy_allows_the_pages_own_blocks_and_nothing_inline_else() -> None:
    policy = dict(rule.split(" ", 1) for rule in policy_of(HTML).split("; "))
    for tag, rule in (("script", "script-src"), ("style", "style-src")):
        [block] = re.findall(rf"<{tag}>(.*?)</{tag}>", HTML, re.DOTALL)
        assert policy[rule] == f"'sha256-{base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()}'"
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert "unsafe" not in str(policy)
    assert policy_of(HTML.replace("</script>", "x</script>")) != policy_of(HTML)


def test_the_file_asks_nobody_else_for_anything() -> None:
    assert set(re.findall(r"https?://[^\s\"']+", HTML)) <= {"http://www.w3.org/2000/svg"}  # a name, not a request
    markup = HTML.partition("<script>")[0]
    assert not re.findall(r"\s(?:on\w+|style|src|srcdoc)=", markup)
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", HTML)
