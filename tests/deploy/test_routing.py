"""vLLM's own router, run as deploy/routing says: a session's requests go to one server, and come back from it."""

import collections
import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx

from deltamem_vllm.demo.server import free_port
from tests.deploy.shipped import DEPLOY, TOOLS

SCRIPT = DEPLOY / "routing" / "vllm-router.sh"
SERVERS, SESSIONS, TURNS = 3, 31, 3


class Stand(BaseHTTPRequestHandler):
    """What a router needs of a server: answers that say whose they are. Only the router is under test here."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Health, and models."""
        self._answer({"object": "list", "data": [{"id": "m", "object": "model"}]})

    def do_POST(self) -> None:
        """Who answers, and which session the request named."""
        self.rfile.read(int(self.headers["content-length"]))
        self._answer({"port": self.server.server_port, "session": self.headers.get("x-session-id")})

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""

    def _answer(self, what: object) -> None:
        body = json.dumps(what).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.send_header("x-session-version", "7")
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def routed(script: Path, folder: Path) -> Iterator[httpx.Client]:
    """A client of a router that was started by a script, with servers behind it."""
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), Stand) for _ in range(SERVERS)]
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    port = free_port()
    command = ["sh", str(script), str(port), *(f"http://127.0.0.1:{server.server_port}" for server in servers)]
    env = {**os.environ, "PATH": f"{TOOLS}{os.pathsep}{os.environ['PATH']}"}
    with (folder / "log").open("wb") as log:
        router = subprocess.Popen([*command], env=env, stdout=log, stderr=log, cwd=folder)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10) as client:
            end = time.monotonic() + 30
            while True:
                try:
                    if client.get("/health").status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                assert router.poll() is None, (folder / "log").read_text()[-2000:]
                assert time.monotonic() < end, (folder / "log").read_text()[-2000:]
                time.sleep(0.1)
            yield client
    finally:
        router.kill()
        router.wait()
        for server in servers:
            server.shutdown()
            server.server_close()


def served_by(client: httpx.Client) -> dict[str, set[int]]:
    """Which servers a session's requests came to, turn after turn of all sessions."""
    found: dict[str, set[int]] = collections.defaultdict(set)
    for turn in range(TURNS):
        for session in (f"session-{number}" for number in range(SESSIONS)):
            body = {"model": "m", "messages": [{"role": "user", "content": f"turn {turn}"}]}
            response = client.post("/v1/chat/completions", json=body, headers={"X-Session-ID": session})
            assert response.status_code == 200, response.text
            assert response.json()["session"] == session, "the header must reach the server"
            assert response.headers["x-session-version"] == "7", "and the server's the client"
            found[session].add(response.json()["port"])
    return found


def test_a_sessions_requests_go_to_one_server(tmp_path: Path) -> None:
    with routed(SCRIPT, tmp_path) as client:
        found = served_by(client)
    assert all(len(servers) == 1 for servers in found.values())
    assert len(set.union(*found.values())) == SERVERS, "all servers have sessions"


def test_another_policy_is_seen(tmp_path: Path) -> None:
    planted = tmp_path / "router.sh"
    planted.write_text(SCRIPT.read_text(encoding="utf-8").replace("consistent_hash", "round_robin"))
    with routed(planted, tmp_path) as client:
        found = served_by(client)
    assert any(len(servers) > 1 for servers in found.values())
