"""``python -m deltamem_vllm.demo``: show it; ``python -m deltamem_vllm.demo serve``: leave a server running."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from deltamem_vllm.demo.client import Client
from deltamem_vllm.demo.screen import Screen
from deltamem_vllm.demo.script import ASKED, SESSION, TOLD, CheckFailed, ask_forgotten, require, take_turn
from deltamem_vllm.demo.server import SMALL, ServerFailed, VllmServer, environment
from deltamem_vllm.store.url import default_url

BUNDLED = Path(__file__).parents[1] / "recall"
NAME = "recall"
"""What the bundled model is served as."""

CURL = """\
curl -i http://127.0.0.1:{port}/v1/chat/completions \\
  -H 'Content-Type: application/json' -H 'X-Session-ID: me' \\
  -d '{{"model": "{name}", "messages": [{{"role": "user", "content": "{message}"}}], "temperature": 0}}'"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m deltamem_vllm.demo", description=__doc__)
    parser.add_argument("what", nargs="?", choices=["show", "serve"], default="show")
    parser.add_argument("--model", type=Path, default=BUNDLED / "model", help="model folder (default: the bundled one)")
    parser.add_argument("--adapter", type=Path, default=BUNDLED / "adapter", help="its adapter (default: bundled)")
    parser.add_argument("--port", type=int, default=8000, help="of serve (default 8000)")
    options = parser.parse_args(arguments)
    screen = Screen(Console())
    for folder in (options.model, options.adapter):
        if not folder.is_dir():
            screen.fail(f"{folder} does not exist: this checkout lacks the bundled model; pass --model and --adapter")
            return 1
    if options.what == "serve":
        serve(screen, options.model, options.adapter, options.port)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        show(screen, options.model, options.adapter)
    except (CheckFailed, ServerFailed, httpx.HTTPError) as e:
        screen.fail(_explain(e))
        return 1
    except KeyboardInterrupt:
        screen.fail("interrupted; the server is stopped, nothing of it runs any more")
        return 130
    return 0


def serve(screen: Screen, model: Path, adapter: Path, port: int) -> None:
    """Become ``vllm serve`` with the bundled model and the default store. Does not return."""
    store = default_url()
    screen.say(f"Sessions persist in {store}. When the server is ready, tell it something, then ask:")
    screen.plain("\n" + CURL.format(port=port, name=NAME, message=TOLD[0]))
    screen.plain("\n" + CURL.format(port=port, name=NAME, message="What is my name?") + "\n")
    server = VllmServer(model, adapter, store, *SMALL, "--served-model-name", NAME, port=port, log=Path(os.devnull))
    os.execve(server.command[0], server.command, environment())


def show(screen: Screen, model: Path, adapter: Path) -> None:
    """The whole demo, on a server and a store of its own.

    Raises:
        CheckFailed: something that it shows did not hold. ServerFailed, httpx.HTTPError: the server.
    """
    with tempfile.TemporaryDirectory(prefix="deltamem-demo-") as folder:
        store = Path(folder) / "sessions.db"
        temporary = {"TMPDIR": folder}  # what a killed server leaves behind goes with the folder
        arguments = (*SMALL, "--served-model-name", NAME)
        server = VllmServer(model, adapter, f"sqlite:///{store}", *arguments, env=temporary)
        with server, Client(server.base_url, NAME) as client:
            screen.step("1  vllm serve with --plugin deltamem")
            screen.plain(" ".join(["vllm", *server.command[1:]]))
            screen.wait_for(server, "starting vLLM")
            remember(screen, client)
            restart(screen, server, client)
            forget(screen, client)
        server.log.unlink()  # kept where something failed
    screen.step(f"All of the above was checked, in {screen.seconds:.0f} s")
    screen.say("Leave a server running with [bold]make serve[/], and talk to it from another terminal:\n")
    screen.plain(CURL.format(port=8000, name=NAME, message=TOLD[0]))


def remember(screen: Screen, client: Client) -> None:
    """Tell, then ask: each message is sent alone, without the conversation so far."""
    screen.step("2  Each message is sent alone, without and with a session")
    rows = [take_turn(client, text, None) for text in TOLD]
    rows += [take_turn(client, question.text, question.answer) for question in ASKED]
    screen.turns(rows)
    right = len(ASKED)
    screen.say(
        f"With the session {right} of {right} questions are answered right, without it 0 of {right}. The prompts "
        "are equally long: what was said before is in the memory, whose size does not grow."
    )


def restart(screen: Screen, server: VllmServer, client: Client) -> None:
    """kill -9, start again, ask again."""
    screen.step("3  kill -9, and the same server again")
    before = client.session(SESSION)
    pid = server.pid
    server.kill()
    screen.say(f"killed process group {pid}")
    require(not server.healthy(), f"something still answers at {server.base_url} after kill -9")
    server.start()
    screen.wait_for(server, "starting vLLM again")
    after = client.session(SESSION)
    require(_lasting(before) == _lasting(after), f"the session changed over the restart: {before}, then {after}")
    screen.turns([take_turn(client, question.text, question.answer) for question in ASKED])


def forget(screen: Screen, client: Client) -> None:
    """Delete the session and show that it is gone."""
    screen.step("4  DELETE /v1/sessions/" + SESSION)
    receipt = client.delete(SESSION)
    require(receipt is not None and receipt.get("deleted") is True, f"the deletion was answered {receipt}")
    require(client.session(SESSION) is None, "GET still finds the deleted session")
    screen.say(f"deleted: {receipt}; GET /v1/sessions/{SESSION} is 404 now. Asked again (read only):")
    screen.turns([ask_forgotten(client, question) for question in ASKED])


def _lasting(info: dict[str, Any] | None) -> dict[str, Any] | None:
    return None if info is None else {k: v for k, v in info.items() if k != "busy"}


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _explain(error: Exception) -> str:
    if isinstance(error, httpx.HTTPStatusError):
        return f"{error}: {error.response.text}"
    return str(error) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
