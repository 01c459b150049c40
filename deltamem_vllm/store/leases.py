"""Leases: which engine may write a session now, among those that share a store.

Compare-and-set alone keeps a session whole, but decides a race when both answers have been generated, and one in
vain. A lease decides it before: an engine takes one before it starts a request that writes, and gives it back when
the outcome is known. The rules, which ``tests/store/conformance_leases.py`` checks:

* A lease belongs to a **holder**, the random id of one opened store, and ends ``seconds`` after it was last taken or
  renewed, by the clock of the store. The clocks of the servers mean nothing.
* A commit is **fenced**: ``put`` refuses it (``LeaseLost``) while another holder has a live lease, in the step that
  writes. An engine that was paused for longer than its lease cannot commit over its successor.
* Without a live lease compare-and-set decides alone. Leases may therefore be lost at any time (a restart, a failover,
  an administrator), and nothing else with them. A commit that is stored already is recognised whoever holds the lease.
* Deleting a session drops its lease: erasure waits for nobody.

A store that serves one machine has none: its ``leases`` is None.
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from deltamem_vllm.errors import LeaseLost
from deltamem_vllm.store.protocol import SessionKey

LEASE_SECONDS = 15.0
WANTED_SECONDS = 1.0
"""For how long a refused attempt counts as somebody who waits; who waits asks more often than that."""


@dataclass(frozen=True, slots=True)
class Lease:
    """What the store answers to an attempt.

    Attributes:
        ours: whether this holder has it.
        seconds: what is left of it, ours or another's.
        wanted: it is ours, and another holder has asked for it in the last ``WANTED_SECONDS``.
    """

    ours: bool
    seconds: float
    wanted: bool = False


class Leases(Protocol):
    """The leases of one opened store. Safe from any thread; every method raises ``StoreUnavailable``.

    Attributes:
        holder: who we are.
        seconds: how long a lease lasts.
    """

    holder: str
    seconds: float

    def acquire(self, key: SessionKey) -> Lease:
        """Take a session's lease, or take it again, unless another holder has a live one."""

    def renew(self, keys: Sequence[SessionKey]) -> list[SessionKey]:
        """Take several leases again, in one step.

        Returns:
            those that another holder has meanwhile.
        """

    def release(self, keys: Sequence[SessionKey]) -> None:
        """Give leases back; another holder's are left alone."""


def new_holder() -> str:
    """A fresh random holder: 32 hex digits."""
    return secrets.token_hex(16)


def check_lease_seconds(seconds: float) -> float:
    """``seconds`` if a lease can last so long; 0 switches leases off.

    Raises:
        ValueError: negative or above an hour.
    """
    if not 0 <= seconds <= 3600:
        raise ValueError(f"lease_seconds {seconds}: a lease lasts up to 3600 seconds; 0 switches leases off")
    return seconds


def fenced(key: SessionKey, seconds: float) -> LeaseLost:
    """The error of a commit that another holder's lease keeps out.

    Args:
        seconds: what is left of that lease.
    """
    return LeaseLost(
        f"session {key.session!r} is being written by another server, whose lease runs for {seconds:.1f} s more;"
        " nothing was written. Read it and try again"
    )
