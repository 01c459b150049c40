"""A process that serves sessions until it is killed: ``python -m tests.sessions.committing STORE FOLDER BUG [BEHIND]``.

The real SessionService, CommitWriter and SQLite behind the real control socket at ``ipc://FOLDER/control``. The engine
is a toy: it takes ``(ticket, tokens)`` from ``ipc://FOLDER/engine`` and commits `harness.memory`. BUG plants one:
``early`` tells an outcome before its commit is durable, ``unbounded`` forgets the bounds of write-behind.
BEHIND (``seconds,versions``) switches write-behind on, over a store that is slow, so that versions have to wait.
"""

import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import msgspec
import zmq

from deltamem_vllm.sessions.control import serve
from deltamem_vllm.store.protocol import Expect, Outcomes, Put, Record
from deltamem_vllm.store.sqlite import SQLiteStore
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


class SlowStore(SQLiteStore):
    """Takes its time for a group."""

    def put_many(self, puts: Sequence[Put]) -> Outcomes:
        time.sleep(0.05)
        return super().put_many(puts)


def main(store: str, folder: str, bug: str, behind: str = "") -> None:
    if behind:
        seconds, versions = behind.split(",")
        slow = SlowStore(store.removeprefix("sqlite:///"))
        service = make_service(slow, queue_depth=64, write_behind=(float(seconds), int(versions)))
    else:
        service = make_service(store, queue_depth=64)
    if bug == "unbounded":  # PLANTED BUG
        service.commits._may_tell_ahead = lambda *_: True  # type: ignore[method-assign]
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
