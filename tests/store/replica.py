"""A replica of the server, as far as its store goes: ``python -m tests.store.replica URL BUG``.

It prints its port and answers JSON lines on loopback, many clients at once: ``{"read": id}`` with the session's
state, ``{"commit": …}`` with what became of it. Commits go through the real CommitWriter. BUG plants one: ``blind``
compares with what is stored at the moment of the commit, so that the last writer wins.
"""

import hashlib
import json
import socketserver
import sys
from typing import Any

from deltamem_vllm.errors import StaleVersion
from deltamem_vllm.store.protocol import Expect, SessionKey
from deltamem_vllm.store.url import open_store
from deltamem_vllm.store.writer import CommitWriter
from tests.store.records import INCARNATION, record


def chain(before: bytes, request_id: str) -> bytes:
    """What a session holds after ``request_id``: a digest of every commit so far, in order."""
    return hashlib.blake2b(before + request_id.encode(), digest_size=16).digest()


def main(url: str, bug: str) -> None:
    store = open_store(url)
    writer = CommitWriter(store)

    def read(session: str) -> dict[str, Any]:
        found = store.get(SessionKey("tenant", session))
        if found is None:
            return {"version": 0, "tokens": 0, "window": "", "request": ""}
        window = found.window.hex()
        return {"version": found.version, "tokens": found.tokens, "window": window, "request": found.request_id}

    def commit(session: str, version: int, tokens: int, window: str, request: str) -> dict[str, Any]:
        if bug == "blind":
            version = read(session)["version"]
        made = record(
            version + 1,
            SessionKey("tenant", session),
            layout="L1H1r2",
            request_id=request,
            tokens=tokens + 1,
            window=chain(bytes.fromhex(window), request),
        )
        try:
            writer.submit(made, Expect(version, INCARNATION) if version else None).result(30)
        except StaleVersion:
            return {"won": False}
        return {"won": True, "version": made.version, "window": made.window.hex()}

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            for line in self.rfile:
                asked = json.loads(line)
                answer = read(asked["read"]) if "read" in asked else commit(**asked["commit"])
                self.wfile.write(json.dumps(answer).encode() + b"\n")

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        request_queue_size = 64

    with Server(("127.0.0.1", 0), Handler) as server:
        print(server.server_address[1], flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
