"""The middleware at the door: whose request it is, and what a stranger reaches."""

import asyncio
import json
from typing import Any

from deltamem_vllm.server.middleware import SessionMiddleware
from deltamem_vllm.server.scope import current
from deltamem_vllm.server.tenants import Tenant


class Keyed:
    """Knows one key."""

    def __init__(self, guard_everything: bool) -> None:
        self.guard_everything = guard_everything

    def of(self, key: str | None) -> Tenant | None:
        return Tenant("known") if key == "k" else None


async def knock(
    guard: bool, kind: str = "http", path: str = "/v1/x", key: str | None = None, **scope: Any
) -> list[Any]:
    """What a request through the middleware leads to: the tenant that the application saw, or what was sent instead."""
    found: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        ours = current.get()
        found.append(ours.tenant if ours is not None else "no scope")

    async def send(message: Any) -> None:
        found.append(message)

    headers = [(b"authorization", f"Bearer {key}".encode())] if key else []
    whole = {"type": kind, "method": "POST", "path": path, "headers": headers, **scope}
    await SessionMiddleware(app, tenants=Keyed(guard))(whole, None, send)
    return found


def test_a_key_makes_a_tenant() -> None:
    for guard in (True, False):
        assert asyncio.run(knock(guard, key="k")) == [Tenant("known")]
    assert asyncio.run(knock(False, key="other")) == [None], "vLLM guards its own paths, and the gateway the sessions"


def test_strangers_reach_nothing_but_open_paths() -> None:
    for key in (None, "other"):
        start, body = asyncio.run(knock(True, key=key))
        assert start["status"] == 401
        assert json.loads(body["body"])["error"]["type"] == "AuthenticationError"
        for path in ("/v1/x", "/invocations", "/", "//health", "/health/x", "/tokenize"):
            assert asyncio.run(knock(True, path=path, key=key))[0]["status"] == 401
        for path in ("/health", "/metrics", "/metrics/", "/version", "/ping"):
            assert asyncio.run(knock(True, path=path, key=key)) == [None]
    assert asyncio.run(knock(True, method="OPTIONS")) == [None], "a browser's preflight has no key"
    assert asyncio.run(knock(True, path="/base/health", root_path="/base")) == [None]
    assert asyncio.run(knock(True, path="/base/v1/x", root_path="/base"))[0]["status"] == 401


def test_websockets_need_a_key_too() -> None:
    assert asyncio.run(knock(True, "websocket")) == [{"type": "websocket.close", "code": 1008}]
    assert asyncio.run(knock(True, "websocket", key="k")) == ["no scope"]
    assert asyncio.run(knock(False, "websocket")) == ["no scope"]
