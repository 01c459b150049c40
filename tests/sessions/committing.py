"""A process that serves sessions until it is killed: ``python -m tests.sessions.committing STORE FOLDER BUG``.

The real SessionService, CommitWriter and SQLite behind the real control socket at ``ipc://FOLDER/control``. The engine
is a toy: it takes ``(ticket, tokens)`` from ``ipc://FOLDER/engine`` and commits `harness.memory`. BUG plants one:
``early`` tells an outcome before its commit is durable.
"""

import sys
from concurrent.futures import Future
from typing import Any

import msgspec
import zmq

from deltamem_vllm.sessions.control import serve
from deltamem_vllm.store.protocol import Expect, Record
from deltamem_vllm.store.writer import CommitWriter
from tests.sessions.harness import make_service, memory


class EarlyWriter(CommitWriter):
    """PLANTED BUG: says of each commit that it is durable, and begins it when the next ones come."""

    late: "tuple[tuple[Record, Expect | None], ...]" = ()

    def submit(self, record: Record, expect: Expect | None) -> "Future[None]":
        self.late = (*self.late, (record, expect))
        if len(self.late) > 4:
            super().submit(*self.late[0])
            self.late = self.late[1:]
        done: Future[None] = Future()
        done.set_result(None)
        return done


def main(store: str, folder: str, bug: str) -> None:
    service = make_service(store, queue_depth=64)
    if bug == "early":
        service.writer.close()
        service.writer = service.commits._writer = EarlyWriter(service.store)
    socket: Any = zmq.Context().socket(zmq.PULL)
    socket.bind(f"ipc://{folder}/engine")
    service.start(lambda started: serve(started, f"ipc://{folder}/control"))
    print("ready", flush=True)
    while True:
        ticket, tokens = msgspec.msgpack.decode(socket.recv())
        grant = service.claim(ticket)
        if grant is not None:
            service.commit(ticket, tokens, memory(grant.base, tokens))


if __name__ == "__main__":
    main(*sys.argv[1:])
