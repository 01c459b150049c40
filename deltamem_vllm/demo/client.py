"""What the demo asks of the server, with nothing but HTTP: any OpenAI client does the same."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import Any

import httpx


@dataclass(frozen=True)
class Reply:
    """One answer.

    Attributes:
        text: what the model said.
        prompt_tokens: tokens of the prompt, as the server counted them.
        version: the session's version after the turn; None without a session.
        commit: what became of the turn (``committed``, ``unchanged``, …); None without a session.
    """

    text: str
    prompt_tokens: int
    version: int | None
    commit: str | None


class Client:
    """Talks to one server.

    Args:
        base_url: of the server, without ``/v1``.
        model: the served model's name.
    """

    def __init__(self, base_url: str, model: str) -> None:
        self.model = model
        self._http = httpx.Client(base_url=base_url, timeout=60.0, trust_env=False)

    def chat(self, message: str, session: str | None = None, mode: str | None = None) -> Reply:
        """Send one user message, and nothing of what was said before.

        Raises:
            httpx.HTTPError: no answer, or not 200.
        """
        headers = {"X-Session-ID": session, "X-DeltaMem-Mode": mode}
        answer = self._http.post(
            "/v1/chat/completions",
            headers={name: value for name, value in headers.items() if value is not None},
            json={
                "model": self.model,
                "messages": [{"role": "user", "content": message}],
                "temperature": 0,
                "max_tokens": 16,
            },
        )
        answer.raise_for_status()
        body = answer.json()
        version = answer.headers.get("X-Session-Version")
        return Reply(
            text=(body["choices"][0]["message"]["content"] or "").strip(),
            prompt_tokens=body["usage"]["prompt_tokens"],
            version=None if version is None else int(version),
            commit=answer.headers.get("X-DeltaMem-Commit"),
        )

    def session(self, session: str) -> dict[str, Any] | None:
        """``GET /v1/sessions/{id}``; None is 404."""
        return self._found(self._http.get(f"/v1/sessions/{session}"))

    def delete(self, session: str) -> dict[str, Any] | None:
        """``DELETE /v1/sessions/{id}``: the receipt; None is 404."""
        return self._found(self._http.delete(f"/v1/sessions/{session}"))

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @staticmethod
    def _found(answer: httpx.Response) -> dict[str, Any] | None:
        if answer.status_code == 404:
            return None
        answer.raise_for_status()
        return dict(answer.json())
