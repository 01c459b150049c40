"""The page to look at sessions with: ``GET /v1/sessions/ui``, with ``--deltamem-ui``.

There is no data in it, so anybody gets it, with or without a key: a browser cannot send one with what it navigates to.
Whoever opens it types the key, and the page sends that with each question to the session API.
"""

import base64
import hashlib
import re
from pathlib import Path
from typing import Any

PAGE_ID = "ui"
"""What no session can be called where there is the page."""
PATH = f"/v1/sessions/{PAGE_ID}"
FILE = Path(__file__).with_name("page.html")


def policy_of(html: str) -> str:
    """The Content-Security-Policy under which nothing runs but the page's own script, and nothing leaves but questions
    to its own server."""

    def hashes(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(each.encode()).digest()).decode() for each in found]
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    rules = {
        "default-src": "'none'",
        "script-src": hashes("script"),
        "style-src": hashes("style"),
        "connect-src": "'self'",
        "img-src": "data:",  # its empty icon: a browser would ask for one elsewhere
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())


class Page:
    """ASGI middleware that answers requests for the page and passes all others on.

    Args:
        app: the application inside.
    """

    def __init__(self, app: Any) -> None:
        self.app = app
        html = FILE.read_text(encoding="utf-8")
        self._body = html.encode()
        headers = {
            "content-type": "text/html; charset=utf-8",
            "content-length": str(len(self._body)),
            "content-security-policy": policy_of(html),
            "x-content-type-options": "nosniff",
            "x-frame-options": "DENY",
            "referrer-policy": "no-referrer",
            "cross-origin-opener-policy": "same-origin",
            "cross-origin-resource-policy": "same-origin",
            "cache-control": "no-store",
        }
        self._headers = [(name.encode(), value.encode()) for name, value in headers.items()]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if not self._asked_for(scope):
            await self.app(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 200, "headers": self._headers})
        await send({"type": "http.response.body", "body": self._body if scope["method"] == "GET" else b""})

    @staticmethod
    def _asked_for(scope: Any) -> bool:
        if scope["type"] != "http" or scope["method"] not in ("GET", "HEAD"):
            return False
        return bool(scope["path"].removeprefix(scope.get("root_path", "")) == PATH)
