"""What a write changes, decided from what is stored: the one rule book of all stores.

A store reads a :class:`View` of the session and the tenant's :class:`Usage` inside its transaction, asks
:func:`decide`, and carries out the :class:`Change`. (Redis decides in its own script, by the same rules; the
conformance suite compares.)
"""

import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from msgspec import structs

from deltamem_vllm.errors import CorruptRecord, QuotaExceeded, StaleVersion, StoreError, VersionNotKept
from deltamem_vllm.store.codec import RecordCodec
from deltamem_vllm.store.leases import fenced
from deltamem_vllm.store.protocol import (
    Expect,
    Outcome,
    Outcomes,
    Put,
    Quota,
    Record,
    SessionKey,
    StateStore,
    Usage,
    admit,
)

Encoded = dict[int, tuple[Record, Expect | None, bytes]]
"""By the caller's index: record, what its writer saw, encoded record."""


class View(NamedTuple):
    """A session as stored, without its bytes.

    Attributes:
        head: (version, incarnation, request_id) of the newest version; None: no session.
        kept: version -> (request_id, bytes) of each kept version, the newest included; a store may leave out those
            that a write concerns in no way, which are neither of its number nor kept no more with it.
    """

    head: tuple[int, str, str] | None = None
    kept: Mapping[int, tuple[str, int]] = MappingProxyType({})

    def after(self, record: Record, size: int, change: "Change") -> "View":
        """The view once ``record`` of ``size`` bytes is written."""
        kept = {version: each for version, each in self.kept.items() if version not in change.trim}
        kept[record.version] = (record.request_id, size)
        return View((record.version, record.incarnation, record.request_id), kept)


class Change(NamedTuple):
    """What one write does beside storing its record.

    Attributes:
        created: whether the session is new.
        trim: versions that are kept no more, oldest first.
        grown: bytes added to the tenant's usage; may be negative.
    """

    created: bool
    trim: tuple[int, ...]
    grown: int

    def applied(self, usage: Usage) -> Usage:
        """The tenant's usage afterwards."""
        return Usage(usage.sessions + self.created, usage.bytes + self.grown)


def decide(
    record: Record, expect: Expect | None, size: int, view: View, usage: Usage, quota: Quota, keep: int
) -> Change | None:
    """What writing ``record`` of ``size`` bytes changes; None: exactly this commit is there already.

    Raises:
        StaleVersion, StoreError: as :func:`admit`.
        QuotaExceeded: the session or the bytes it adds do not fit.
    """
    earlier = view.kept.get(record.version)
    if not admit(record, expect, view.head, earlier and earlier[0]):
        return None
    trim = tuple(sorted(version for version in view.kept if version <= record.version - keep))
    change = Change(view.head is None, trim, size - sum(view.kept[version][1] for version in trim))
    check_quota(change, usage, quota, record.key)
    return change


class Write(NamedTuple):
    """One record that a group stores."""

    record: Record
    expect: Expect | None
    blob: bytes
    change: Change


def encoded(puts: Sequence[Put], codec: RecordCodec) -> tuple[Encoded, Outcomes]:
    """A group as :func:`plan` takes it, and the outcome of each item so far: a record that is not valid has one."""
    made: Encoded = {}
    outcomes: Outcomes = [None] * len(puts)
    for index, (record, expect) in enumerate(puts):
        try:
            made[index] = (record, expect, codec.encode(record))
        except CorruptRecord as error:
            outcomes[index] = error
    return made, outcomes


def plan(
    puts: Encoded,
    views: dict[SessionKey, View],
    usages: dict[str, Usage],
    quota: Quota,
    keep: int,
    fences: Mapping[SessionKey, float],
) -> tuple[dict[int, Outcome], list[Write]]:
    """What a group writes, in order, each item seeing those before it.

    Args:
        puts: see :func:`encoded`.
        views: of every session of the group that exists; brought up to date.
        usages: of every tenant of the group that has one; brought up to date.
        fences: sessions on which another holder has a live lease, with its seconds left.

    Returns:
        the outcome of each index, and what is to be written.
    """
    outcomes: dict[int, Outcome] = {}
    writes: list[Write] = []
    for index, (record, expect, blob) in puts.items():
        key = record.key
        view, usage = views.get(key, View()), usages.get(key.tenant, Usage())
        try:
            change = decide(record, expect, len(blob), view, usage, quota, keep)
        except StoreError as error:
            outcomes[index] = error
            continue
        if change is not None and key in fences:
            outcomes[index] = fenced(key, fences[key])
            continue
        outcomes[index] = None
        if change is not None:
            views[key] = view.after(record, len(blob), change)
            usages[key.tenant] = change.applied(usage)
            writes.append(Write(record, expect, blob, change))
    return outcomes, writes


def check_quota(change: Change, usage: Usage, quota: Quota, key: SessionKey, whose: str = "the store's") -> None:
    """Refuse what a tenant has no room for. A write that adds nothing is never refused.

    Args:
        whose: limit it is, for the remedy.

    Raises:
        QuotaExceeded: with what is used, what is allowed and the remedy.
    """
    after = change.applied(usage)
    if change.created and quota.sessions is not None and after.sessions > quota.sessions:
        raise QuotaExceeded(
            f"session {key.session!r} cannot be created: {usage.sessions} of {quota.sessions} sessions are used."
            f" Delete one, or raise {whose} max_sessions"
        )
    if change.grown > 0 and quota.bytes is not None and after.bytes > quota.bytes:
        raise QuotaExceeded(
            f"session {key.session!r} needs {change.grown} bytes more: {usage.bytes} of {quota.bytes} are used."
            f" Delete a session, or raise {whose} max_bytes"
        )


def check_keep(keep: int) -> int:
    """``keep`` if it is a number of versions to keep.

    Raises:
        ValueError: below 1 or above 1000.
    """
    if not 1 <= keep <= 1000:
        raise ValueError(f"keep {keep}: a store keeps 1 to 1000 versions of a session")
    return keep


def restored(old: Record, newest: Record, request_id: str) -> Record:
    """What a rollback commits: the memory of ``old`` with the attributes of ``newest``, one version on."""
    return structs.replace(
        old,
        version=newest.version + 1,
        request_id=request_id,
        updated_at=time.time(),
        attributes=newest.attributes,
    )


def roll_back(store: StateStore, key: SessionKey, version: int, expect: Expect, request_id: str) -> Record:
    """``StateStore.rollback`` by ``get``, ``get_version`` and ``put``. Whoever writes in between wins, and
    ``put`` says so. So the attributes taken are the newest ones at the moment of the commit too."""
    name = f"session {key.session!r}"
    newest = store.get(key)
    if newest is None:
        raise VersionNotKept(f"{name} does not exist; there is nothing to roll back")
    if (newest.version, newest.incarnation, newest.request_id) == (
        expect.version + 1,
        expect.incarnation,
        request_id,
    ):
        return newest  # done before; the version it came from may be kept no more
    if newest.expect != expect:
        raise StaleVersion(
            f"{name} is at version {newest.version}; version {expect.version} was expected. Read it and try again"
        )
    old = store.get_version(key, version)
    if old is None or old.incarnation != expect.incarnation:
        kept = ", ".join(str(info.version) for info in store.history(key)) or "none"
        raise VersionNotKept(f"{name} does not keep version {version}; kept are {kept}")
    made = restored(old, newest, request_id)
    store.put(made, expect)
    return made
