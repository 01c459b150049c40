"""A process that commits until it is killed: ``python -m tests.store.committer PATH SEED BUG``.

It prints ``session version digest`` for each commit that the real CommitWriter has acknowledged. BUG plants
one: ``early`` acknowledges a group before its COMMIT.
"""

import hashlib
import os
import random
import sys
from collections.abc import Sequence
from concurrent.futures import Future

from deltamem_vllm.store.codec import encode
from deltamem_vllm.store.protocol import Expect, Outcomes, Put, Record, SessionKey
from deltamem_vllm.store.sqlite import SQLiteStore
from deltamem_vllm.store.writer import CommitWriter
from tests.store.records import INCARNATION, record

SESSIONS = 6


def version_of(session: int, version: int) -> Record:
    """The one content that this version of this session can have, in every process."""
    return record(version, SessionKey("tenant", f"{session}"), seed=session)


def digest(made: Record) -> str:
    return hashlib.blake2b(encode(made), digest_size=16).hexdigest()


class EarlyStore(SQLiteStore):
    """PLANTED BUG: says that a group is durable, and commits it some groups later."""

    late: tuple[Sequence[Put], ...] = ()

    def put_many(self, puts: Sequence[Put]) -> Outcomes:
        self.late = (*self.late, list(puts))
        if len(self.late) > 8:
            super().put_many(self.late[0])
            self.late = self.late[1:]
        return [None] * len(puts)


def main(path: str, seed: str, bug: str) -> None:
    store = EarlyStore(path) if bug == "early" else SQLiteStore(path)
    writer = CommitWriter(store, max_batch=8)
    rng = random.Random(seed)
    versions = {}
    for session in range(SESSIONS):
        found = store.get(SessionKey("tenant", f"{session}"))
        versions[session] = found.version if found else 0

    def say(session: int, made: Record, future: "Future[None]") -> None:
        future.result()
        os.write(1, f"{session} {made.version} {digest(made)}\n".encode())

    while True:
        waiting = []
        for session in rng.sample(range(SESSIONS), rng.randint(1, SESSIONS)):
            for _ in range(rng.randint(1, 2)):
                versions[session] += 1
                made = version_of(session, versions[session])
                expect = Expect(made.version - 1, INCARNATION) if made.version > 1 else None
                waiting.append((session, made, writer.submit(made, expect)))
        for each in waiting:
            say(*each)


if __name__ == "__main__":
    main(*sys.argv[1:])
