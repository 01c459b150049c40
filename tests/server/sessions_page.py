"""The page of sessions in a browser, before a real server with the bundled model and sessions made by real requests.

``python -m tests.server.sessions_page`` makes the picture of docs/ui.md again.
"""

import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
from PIL import Image

from deltamem_vllm.demo.script import ASKED, TOLD
from deltamem_vllm.demo.server import ONE_WORKER, SMALL, VllmServer
from deltamem_vllm.recall import ADAPTER_DIR, MODEL_DIR
from tests.server.browser import Browser, browser
from tests.server.conftest import HERE, ROOT
from tests.server.talk import API_KEY, Talk, memory_headers, ok

PICTURE = ROOT / "docs" / "images" / "sessions-page.png"
PATH = "/v1/sessions/ui"
WIDTH, HEIGHT = 1280, 1280


def say(talk: Talk, session: str, *messages: str) -> None:
    """Send messages to a session, each alone."""
    for message in messages:
        body = {"model": "m", "messages": [{"role": "user", "content": message}], "temperature": 0, "max_tokens": 16}
        ok(talk.post("/v1/chat/completions", json=body, headers=memory_headers(session, None)))


class SessionsPage:
    """The page, in a browser that has opened it."""

    def __init__(self, b: Browser, base_url: str) -> None:
        self.browser, self.url = b, f"{base_url}{PATH}"

    def enter(self, key: str = API_KEY) -> None:
        """Open the page anew and give it a key."""
        self.browser.open(self.url)
        self.browser.type(key, into="#key")
        self.browser.press("Enter")
        self.browser.wait("!document.querySelector('#list').hidden || !document.querySelector('#error').hidden")

    def choose(self, session: str) -> None:
        """Look at a session of the list."""
        self.browser.click(f'#rows button[data-id="{session}"]')
        self.settled(session)

    def settled(self, session: str, version: int | None = None) -> None:
        """Wait until a session is shown, at a version if it is given."""
        at = "" if version is None else f"&& shown.state.version === {version} && shown.info.version >= {version}"
        self.browser.wait(f"shown?.id === '{session}' {at} && document.querySelector('#name').innerText === shown.id")

    def confirm(self, button: str, text: str | None = None) -> None:
        """Click a button that asks before it does something, answer with a text if it wants one, and confirm."""
        self.browser.click(button)
        self.browser.wait("document.querySelector('#ask').open")
        if text is not None:
            self.browser.type(text, into="#ask-id")
        self.browser.click("#yes")
        self.browser.wait("!document.querySelector('#ask').open")

    def error(self) -> str:
        """Wait for an error, and what it says."""
        self.browser.wait("!document.querySelector('#error').hidden")
        return self.browser.text("#error")


@contextmanager
def served(folder: Path, *flags: str) -> Iterator[VllmServer]:
    """A server with the bundled model and the page, that is ready."""
    arguments = [*SMALL, *ONE_WORKER, "--served-model-name", "m", "--api-key", API_KEY, "--deltamem-ui", *flags]
    store = f"sqlite:///{folder}/sessions.db"
    with VllmServer(MODEL_DIR, ADAPTER_DIR, store, *arguments, env=HERE, log=folder / "server.log") as server:
        server.wait_ready()
        yield server


def main(arguments: Sequence[str]) -> int:
    """Make the picture; a file may be named."""
    file = Path(arguments[0]) if arguments else PICTURE
    with tempfile.TemporaryDirectory(prefix="deltamem-page-") as name, served(Path(name)) as server:
        with Talk(server.base_url) as talk:
            for number, fact in enumerate(TOLD, 1):
                say(talk, f"visitor-{number}", fact)
            say(talk, "clara", *TOLD[:3], ASKED[1].text)
            ok(talk.post("/v1/sessions/clara/facts", json={"text": "Badge number 7731.", "source": "front desk"}))
            ok(talk.patch("/v1/sessions/clara", json={"metadata": {"team": "blue"}}))
            say(talk, "clara", TOLD[3])
        with browser(Path(name)) as b:
            page = SessionsPage(b, server.base_url)
            b.ask("Emulation.setDeviceMetricsOverride", width=WIDTH, height=HEIGHT, deviceScaleFactor=1, mobile=False)
            b.scheme("light")
            page.enter()
            page.choose("clara")
            file.parent.mkdir(parents=True, exist_ok=True)
            b.picture(file, WIDTH, HEIGHT)
            Image.open(file).quantize(256).save(file, optimize=True)  # a page has few colours
    print(f"{file}: {file.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except httpx.HTTPError as e:
        sys.exit(f"the server could not be asked: {e}")
