"""A headless Chromium with an empty profile, driven over its DevTools protocol with real mouse and key events."""

import base64
import itertools
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

from tests.deploy.shipped import program

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
    "--remote-debugging-port=0",
)
WAIT = 30.0
_BEFORE = """
window.violations = [];
addEventListener("securitypolicyviolation", e => violations.push(`${e.effectiveDirective} ${e.blockedURI}`));
"""
_KEYS = {"Enter": (13, "\r"), "Tab": (9, ""), "Escape": (27, ""), "ArrowRight": (39, ""), "ArrowDown": (40, "")}


class Browser:
    """One page of a browser.

    Attributes:
        requested: addresses that the page has asked for, in their order.
        thrown: what scripts of the page have thrown and nobody caught.
    """

    def __init__(self, socket: ClientConnection) -> None:
        self._socket, self._numbers = socket, itertools.count(1)
        self._session: str | None = None
        self.requested: list[str] = []
        self.thrown: list[str] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network"):
            self.ask(f"{domain}.enable")
        self.ask("Page.addScriptToEvaluateOnNewDocument", source=_BEFORE)

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol and its result; events that come before it are noted."""
        number = next(self._numbers)
        session = {"sessionId": self._session} if self._session else {}
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters, **session}))
        while True:
            message = json.loads(self._socket.recv(timeout=WAIT))
            if message.get("id") == number:
                assert "error" not in message, f"{method}: {message['error']}"
                result: dict[str, Any] = message["result"]
                return result
            if message.get("method") == "Network.requestWillBeSent":
                self.requested.append(message["params"]["request"]["url"])
            if message.get("method") == "Runtime.exceptionThrown":
                self.thrown.append(json.dumps(message["params"]["exceptionDetails"])[:500])

    def open(self, url: str) -> None:
        """Navigate, and wait until the page is there."""
        self.ask("Page.navigate", url=url)
        self.wait(f"document.readyState === 'complete' && location.href === {json.dumps(url)}")

    def get(self, expression: str) -> Any:
        """What a JavaScript expression is; promises are awaited."""
        found = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, f"{expression}: {found['exceptionDetails']}"
        return found["result"].get("value")

    def wait(self, expression: str) -> Any:
        """Wait until an expression is true."""
        end = time.monotonic() + WAIT
        while not (found := self.get(expression)):
            assert time.monotonic() < end, f"{expression} did not come true; the page says: {self.text('body')[:2000]}"
            time.sleep(0.03)
        return found

    def text(self, selector: str) -> str:
        """What the first element that matches shows; empty where it is hidden."""
        found = f"document.querySelector({json.dumps(selector)})"
        return str(self.get(f"{found}?.checkVisibility() ? {found}.innerText : ''"))

    def texts(self, selector: str) -> list[str]:
        """What each element that matches shows."""
        return list(self.get(f"[...document.querySelectorAll({json.dumps(selector)})].map(each => each.innerText)"))

    def point(self, selector: str, right: float = 0.5, down: float = 0.5, click: bool = False) -> None:
        """Move the mouse to a place within an element, given as shares of its size; and click there."""
        x, y = self.get(f"""(() => {{
            const found = document.querySelector({json.dumps(selector)});
            found.scrollIntoView({{block: "center"}});
            const box = found.getBoundingClientRect();
            return [box.left + box.width * {right}, box.top + box.height * {down}];
        }})()""")
        self.ask("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        if click:
            for kind in ("mousePressed", "mouseReleased"):
                self.ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def click(self, selector: str) -> None:
        """Click into the middle of an element, as soon as there is one."""
        self.wait(f"document.querySelector({json.dumps(selector)})?.checkVisibility()")
        self.point(selector, click=True)

    def type(self, text: str, into: str | None = None) -> None:
        """Type a text where the focus is, or into a field in place of what it holds."""
        if into is not None:
            self.get(f"document.querySelector({json.dumps(into)}).select()")
        self.ask("Input.insertText", text=text)

    def press(self, key: str, times: int = 1) -> None:
        """Press a key."""
        code, text = _KEYS[key]
        for _ in range(times):
            for kind in ("keyDown", "keyUp"):
                self.ask("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, text=text)

    def scheme(self, name: str) -> None:
        """Prefer ``light`` or ``dark``. The page hears of it with its next frame."""
        self.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])
        self.get("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done())))")

    def picture(self, file: Path, width: int, height: int) -> None:
        """A PNG of the page's upper part."""
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.ask("Emulation.setScrollbarsHidden", hidden=True)
        self.get("window.scrollTo(0, 0)")
        file.write_bytes(base64.b64decode(self.ask("Page.captureScreenshot", format="png")["data"]))


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A browser that runs until the end of the block, with its profile in an empty folder."""
    remedy = "run deploy/ci/install-services.sh as root"
    command = [program("chromium", remedy=remedy), *FLAGS, f"--user-data-dir={folder}/profile"]
    with (folder / "log").open("wb") as log:
        command += ["--window-size=1280,900", "about:blank"]
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        port = folder / "profile" / "DevToolsActivePort"
        end = time.monotonic() + WAIT
        while not (port.exists() and port.read_text().count("\n")):
            said = (folder / "log").read_text(errors="replace")[-2000:]
            assert process.poll() is None and time.monotonic() < end, f"{command[0]} did not start: {said}"  # noqa: PT018
            time.sleep(0.05)
        number, path = port.read_text().split()[:2]
        with connect(f"ws://127.0.0.1:{number}{path}", max_size=None, compression=None) as socket:
            yield Browser(socket)
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # its helpers too; nothing of the profile is to be kept
        process.wait()
