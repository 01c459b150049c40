"""Tickets: grants on their way from an API process through the engine to an outcome.

An API process makes a ticket and asks admission for a grant under it; the request that carries it through the engine
claims it, once; its end settles it, and the outcome waits to be asked for.
"""

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from deltamem_vllm import metrics
from deltamem_vllm.sessions.grants import Grant
from deltamem_vllm.sessions.masks import place, unwritten_before
from deltamem_vllm.sessions.meters import Meters
from deltamem_vllm.store.protocol import SessionKey

CLAIM_SECONDS = 60.0
"""A grant that no request has claimed after this long is taken back: its API process is gone."""
MAX_OUTCOMES = 10_000
"""Outcomes that nobody has asked for yet and that are remembered, the latest; some 500 bytes each."""


@dataclass
class Ticket:
    """A grant on its way: claimed or not, its outcome, what the API process said of an aborted one.

    Attributes:
        deletions: how often the session had been deleted when the grant was made.
        version: the session's version then.
        awaited: somebody waits for its outcome.
        deleted: whether the session was deleted since.
    """

    grant: Grant
    deletions: int
    version: int
    outcome: "asyncio.Future[dict[str, Any]]"
    claimed: bool = False
    verdict: int | None = None
    verdict_given: bool = False
    awaited: bool = False
    deleted: bool = False
    timer: asyncio.TimerHandle | None = field(default=None, repr=False)


class Tickets:
    """The tickets of one engine. `claim`, `verdict` and `was_deleted` are for the scheduler's thread, the rest for the
    event loop.

    Args:
        release: called with every ticket that was settled.
    """

    def __init__(self, release: Callable[[Ticket], None]) -> None:
        self._release = release
        self._known: dict[str, Ticket] = {}
        self._outcomes: OrderedDict[str, dict[str, Any]] = OrderedDict()  # settled, with nobody waiting for them
        self._claims = threading.Lock()

    def get(self, ticket: str) -> Ticket | None:
        """A ticket that is not settled yet."""
        return self._known.get(ticket)

    def __contains__(self, ticket: str) -> bool:
        return ticket in self._known or ticket in self._outcomes

    def issue(self, grant: Grant, deletions: int, version: int) -> None:
        """A grant was made: wait for its request."""
        loop = asyncio.get_running_loop()
        entry = self._known[grant.ticket] = Ticket(grant, deletions, version, loop.create_future())
        entry.timer = loop.call_later(
            CLAIM_SECONDS, self._withdraw, grant.ticket, f"not claimed within {CLAIM_SECONDS:g} s"
        )

    def claim(self, ticket: str) -> Grant | None:
        """The grant of an arriving request; None if there is none (any more). Never blocks.

        A ticket that commits is claimed once. One that only reads serves all samples of its request.
        """
        with self._claims:
            entry = self._known.get(ticket)
            if entry is None or (entry.claimed and (entry.grant.commits or entry.outcome.done())):
                return None
            entry.claimed = True
        return entry.grant

    def verdict(self, ticket: str) -> tuple[bool, int | None]:
        """Whether the API process has spoken about a held request, and the token count to commit at."""
        entry = self._known.get(ticket)
        return (True, None) if entry is None else (entry.verdict_given, entry.verdict)

    def was_deleted(self, ticket: str) -> bool:
        """Whether the ticket's session was deleted after it was granted, or the ticket is not known any more."""
        entry = self._known.get(ticket)
        return entry is None or entry.deleted

    def note_deletion(self, key: SessionKey) -> None:
        """A session was deleted: its tickets still run, but nothing of theirs shall stay."""
        for entry in self._known.values():
            entry.deleted |= entry.grant.key == key

    def give_verdict(self, ticket: str, tokens: int | None) -> None:
        """The API process says of a request: commit it after ``tokens`` tokens (a held one), or (None) drop it."""
        entry = self._known.get(ticket)
        if entry is None:
            return
        entry.verdict, entry.verdict_given = tokens, True
        if tokens is None:  # where the engine refused the request it never claimed its ticket
            self._withdraw(ticket, "the request ended before it reached the engine")

    def settle(self, ticket: str, result: dict[str, Any]) -> None:
        """Make an outcome known; the first one stands."""
        entry = self._known.get(ticket)
        if entry is None or entry.outcome.done():
            return
        if entry.timer is not None:
            entry.timer.cancel()
        result = {"version": entry.version, **result, "session": entry.grant.key.session}
        entry.outcome.set_result(result)
        del self._known[ticket]  # and the grant, with its states
        if not entry.awaited:
            self._outcomes[ticket] = result
            if len(self._outcomes) > MAX_OUTCOMES:
                self._outcomes.popitem(last=False)
        self._release(entry)

    async def outcome(self, ticket: str) -> dict[str, Any]:
        """What became of a ticket: waits until it is known, and durable where it was a commit."""
        entry = self._known.get(ticket)
        if entry is None:
            unknown = {"status": "unknown", "error": "this ticket is not known (any more)"}
            return self._outcomes.pop(ticket, unknown)
        entry.awaited = True
        return await asyncio.shield(entry.outcome)

    def _withdraw(self, ticket: str, why: str) -> None:
        """Take back a ticket that no request has claimed."""
        with self._claims:
            entry = self._known.get(ticket)
            if entry is None or entry.claimed:
                return
            entry.claimed = True
        self.settle(ticket, {"status": "aborted", "error": why})


def count_tokens(meters: Meters, grant: Grant, fed: int) -> None:
    """Count what a request brought that its session had not been fed before.

    Args:
        fed: tokens that went through the model, its prompt's and its answer's.
    """
    start = place(grant.offered, grant.plan.matched)
    if not grant.commits:
        meters.add(metrics.TOKENS, "read_only", by=max(0, fed - start))
        return
    masked = unwritten_before(grant.spans, fed) - unwritten_before(grant.spans, start)
    meters.add(metrics.TOKENS, "masked", by=masked)
    meters.add(metrics.TOKENS, "written", by=max(0, fed - start - masked))
