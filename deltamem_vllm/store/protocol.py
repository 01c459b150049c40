"""What every store promises: verified reads, compare-and-set writes, one durable transaction per group.

Rules that hold for all stores, and that one conformance suite checks:

* A session moves only by compare-and-set on (version, incarnation). Nothing merges, the last writer never
  wins.
* The **incarnation** is a random id given when a session is created. A session that is deleted and created
  again starts at version 1 with another incarnation, so that a stale owner of the erased one cannot pass
  the comparison.
* A write is **idempotent by request id**: putting a (version, incarnation, request_id) that is stored
  already, as the newest version or as a kept one, succeeds and changes nothing. A writer that does not know
  whether its commit was applied (connection cut, I/O error at COMMIT) sends it again and learns the outcome.
* A write that returned is durable. A write that raised was not applied, or its outcome is resolved by
  sending it again. How durable each store is, and what it may lose: docs/stores.md.
* A read is verified (see ``codec`` and ``verify``); damaged bytes raise ``CorruptRecord`` and are never
  shown as an empty memory.
* A store keeps the newest ``keep`` versions of each session. ``rollback`` commits the memory of an older one
  again, as a new version; nothing moves backwards. **Attributes are not rolled back**: what belongs to the
  session besides its memory (facts, client metadata) stays as the newest version has it, so that what was
  erased there does not come back with an older memory. A kept version still holds the attributes it was
  committed with until it is kept no more; ``delete`` erases all of them.
* A tenant's sessions and bytes (all kept versions) are counted, and its quota checked, inside the
  transaction that writes.
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import msgspec
import numpy as np
from numpy.typing import NDArray

from deltamem_vllm.errors import StaleVersion, StoreError

Array = NDArray[np.float32]
MAX_KEY_BYTES = 256
MAX_ATTRIBUTES_BYTES = 64 * 1024
_PAST_ALL = "\U0010ffff" * (MAX_KEY_BYTES // 4 + 1)  # behind every id: the last character, once too often


def new_incarnation() -> str:
    """A fresh random incarnation: 32 hex digits."""
    return secrets.token_hex(16)


class SessionKey(msgspec.Struct, frozen=True, order=True, cache_hash=True, gc=False):
    """Names a session. The tenant is part of the key, so that no query can leave it out.

    Attributes:
        tenant: whose session it is, 1 to 256 bytes of UTF-8.
        session: the id within the tenant, 1 to 256 bytes of UTF-8.

    Raises:
        ValueError: empty, too long, not encodable, or containing NUL.
    """

    tenant: str
    session: str

    def __post_init__(self) -> None:
        for name, value in (("tenant", self.tenant), ("session", self.session)):
            try:
                size = len(value.encode())
            except UnicodeEncodeError:
                raise ValueError(f"{name} is not valid Unicode: {value!r}") from None
            if not 1 <= size <= MAX_KEY_BYTES or "\0" in value:
                shown = f"{value[:64]!r} ({size} bytes)"
                raise ValueError(f"{name} must have 1 to {MAX_KEY_BYTES} bytes and no NUL, not {shown}")


class Expect(msgspec.Struct, frozen=True, gc=False):
    """What a writer saw when it started: the comparison of compare-and-set."""

    version: int
    incarnation: str


class Record(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """One version of one session. Two records are the same when ``codec.encode`` gives the same bytes.

    Attributes:
        key: whose memory it is.
        version: 1 at creation, one more with each commit.
        incarnation: 8 to 64 lower-case hex digits, the same through the session's life.
        request_id: who committed this version, 1 to 256 characters.
        adapter: fingerprint of the δ-mem weights, up to 256 characters.
        model: fingerprint of the base model, up to 256 characters.
        layout: ``L<layers>H<heads>r<rank>``, for example ``L36H1r8``.
        base: [L, H, r, r] fp32, the state before the window's first token; S[value, key].
        end: [L, H, r, r] fp32, the state after everything fed so far.
        window: ``sessions.windows.pack`` of the window, up to 16 KiB; ``b""`` without one.
        created_at: seconds since the epoch, of version 1.
        updated_at: seconds since the epoch, of this version.
        tokens: tokens written since creation.
        windows: windows opened since creation.
        attributes: what belongs to the session besides its memory, up to 64 KiB. Opaque to the store, and
            sealed with the memory where there is a key: it may hold personal data.
    """

    key: SessionKey
    version: int
    incarnation: str
    request_id: str
    adapter: str
    model: str
    layout: str
    base: Array
    end: Array
    window: bytes
    created_at: float
    updated_at: float
    tokens: int
    windows: int
    attributes: bytes = b""

    @property
    def expect(self) -> Expect:
        """What the writer of the next version must pass."""
        return Expect(self.version, self.incarnation)


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """A session without its memory, for listings: read from the row, not verified against the record.

    Attributes:
        bytes: size of the stored record.
        created_at, updated_at: seconds since the epoch.
    """

    key: SessionKey
    version: int
    incarnation: str
    created_at: float
    updated_at: float
    tokens: int
    windows: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Usage:
    """What a tenant has stored.

    Attributes:
        sessions: how many.
        bytes: of records, all kept versions together, as stored.
    """

    sessions: int = 0
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class Quota:
    """What each tenant may store; None: no limit.

    Raises:
        ValueError: a limit below 1.
    """

    sessions: int | None = None
    bytes: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("sessions", self.sessions), ("bytes", self.bytes)):
            if value is not None and value < 1:
                raise ValueError(f"a quota of {value} {name}: it must be at least 1, or None")


Outcome = StoreError | None
Outcomes = list[Outcome]
Listing = list[SessionInfo]
Keys = list[SessionKey]
Names = list[str]
Put = tuple[Record, Expect | None]


class WouldWait(Exception):
    """A store cannot say without waiting for something: ask it again where waiting harms nobody."""


@runtime_checkable
class StateStore(Protocol):
    """A store of sessions. Every method is safe to call from any thread and raises ``StoreUnavailable``
    when the store cannot be reached, is full, read-only or closed.

    A store that lies in this process or in a local file may also have ``glance(key)``: what ``head`` says, for an event
    loop's own thread. It waits for no lock and no network, and raises nothing but :class:`WouldWait`, for whatever
    keeps it from answering; ``head`` then says what that is.

    Attributes:
        keep: versions kept of each session.
        quota: what each tenant may store.
    """

    keep: int
    quota: Quota

    def get(self, key: SessionKey) -> Record | None:
        """The newest version, verified; None if the session does not exist.

        Raises:
            CorruptRecord: the stored bytes failed verification.
        """

    def put(self, record: Record, expect: Expect | None) -> None:
        """Store one version, durably. ``expect`` None: the session must not exist. See :func:`admit` for
        the rule.

        Raises:
            StaleVersion: the session is not where ``expect`` says; nothing was written.
            QuotaExceeded: the tenant has no room; nothing was written.
            CorruptRecord: the record itself is not valid (non-finite state, wrong shape); nothing was
            written.
        """

    def put_many(self, puts: Sequence[Put]) -> Outcomes:
        """Store a group in one durable transaction, in order, each item by the rule of ``put``.

        An item that is stale or not valid does not keep the others from being stored. If the transaction
        fails, every item that was part of it gets the error. Never raises a ``StoreError``.

        Returns:
            per item None (stored, durable) or the error that ``put`` would have raised.
        """

    def get_version(self, key: SessionKey, version: int) -> Record | None:
        """One kept version, verified; None if the session or this version of it is not there.

        Raises:
            CorruptRecord: the stored bytes failed verification.
        """

    def head(self, key: SessionKey) -> Expect | None:
        """Where the session is, as its row says: version and incarnation of the newest version; None if it does not
        exist. One look-up in an index, cheap enough for every request."""

    def history(self, key: SessionKey, limit: int = 100) -> Listing:
        """The kept versions, newest first, the current one included; empty without a session."""

    def rollback(self, key: SessionKey, version: int, expect: Expect, request_id: str) -> Record:
        """Commit the memory of a kept version again (base, end, window and what describes them), as the version
        after ``expect``. The attributes are those of the newest version, never those of the kept one.

        Returns:
            the new record. The same call again returns it again and changes nothing.

        Raises:
            StaleVersion: the session is not where ``expect`` says; nothing was written.
            VersionNotKept: there is no such session or version; nothing was written.
            QuotaExceeded, CorruptRecord: as ``put`` and ``get``.
        """

    def delete(self, key: SessionKey) -> bool:
        """Erase a session with all its versions. SQLite keeps no byte of it in its files; for the others
        see docs/stores.md.

        Returns:
            whether it existed. To call it again after an error is right, and finishes the erasure.
        """

    def expire(self, now: float, idle_seconds: float, limit: int = 1000) -> int:
        """Delete up to ``limit`` sessions whose last commit (``updated_at``) is ``idle_seconds`` or more
        before ``now``, the longest idle first.

        Returns:
            how many were deleted; fewer than ``limit``: none are left.
        """

    def idle(self, until: float, limit: int = 1000) -> Keys:
        """Up to ``limit`` sessions whose last commit was at ``until`` (seconds since the epoch) or before, the
        longest idle first."""

    def delete_idle(self, keys: Sequence[SessionKey], until: float) -> Keys:
        """Delete those of the sessions that have no commit after ``until``; returns them. Erases as ``delete``."""

    def tenants(self, after: str | None = None, limit: int = 100) -> Names:
        """Up to ``limit`` tenants that have sessions, in the order of their names, from the one behind ``after``."""

    def usage(self, tenant: str) -> Usage:
        """What a tenant has stored; zeros for one that has nothing."""

    def reencrypt(self, batch: int = 100) -> int:
        """Store every version that is of an older format, or not sealed with the codec's newest key, again as
        the codec writes now: by groups, beside running commits. Content and versions stay as they are.

        Returns:
            how many were stored again. After an error, call it again.

        Raises:
            CorruptRecord: a version cannot be read (its key is missing, it is damaged); those before it are
            done.
        """

    def list(self, tenant: str, after: str | None = None, limit: int = 100, *, prefix: str | None = None) -> Listing:
        """Up to ``limit`` sessions of a tenant in the order of their ids (by code points), from the one behind
        ``after``.

        Args:
            after: an id, which need not exist; None starts at the first.
            prefix: only ids that begin with it, every character taken literally; None or "": all.

        Raises:
            ValueError: ``after`` or ``prefix`` is not valid Unicode or holds a NUL.
        """

    def close(self) -> None:
        """Release files and connections. A second call does nothing."""


def id_range(after: str | None, prefix: str | None) -> tuple[str, str]:
    """The ids that a page of ``list`` may hold, as one range that an index can seek.

    Args:
        after, prefix: as in ``StateStore.list``.

    Returns:
        (start, stop): ids with start <= id < stop, compared by code points, which is the order of their UTF-8
        too. Neither need be an id.

    Raises:
        ValueError: as ``StateStore.list``.
    """
    for name, value in (("after", after), ("prefix", prefix)):
        try:
            (value or "").encode()
        except UnicodeEncodeError:
            raise ValueError(f"{name} is not valid Unicode: {value!r}") from None
        if "\0" in (value or ""):
            raise ValueError(f"{name} must hold no NUL, not {value!r}")
    start = max(prefix or "", "" if after is None else after + "\x01")  # ids hold no NUL: nothing lies between
    stem = (prefix or "").rstrip("\U0010ffff")
    if not stem:
        return start, _PAST_ALL
    last = ord(stem[-1]) + 1
    return start, stem[:-1] + chr(0xE000 if last == 0xD800 else last)  # surrogates are no characters


def admit(record: Record, expect: Expect | None, stored: tuple[int, str, str] | None, kept: str | None = None) -> bool:
    """The compare-and-set rule, the same for every store.

    Args:
        record: what is to be written.
        expect: what the writer saw; None: no session.
        stored: (version, incarnation, request_id) of the stored row; None: no row.
        kept: request id of the kept version that has the record's number, if the row is further on.

    Returns:
        True: write it. False: exactly this commit is there already; nothing is to be done.

    Raises:
        StaleVersion: the row is not where ``expect`` says.
        StoreError: the record does not follow from ``expect`` (a mistake of the caller).
    """
    name = f"session {record.key.session!r}"
    if stored == (record.version, record.incarnation, record.request_id):
        return False
    if stored is not None and stored[1] == record.incarnation and kept == record.request_id:
        return False
    if expect is None:
        if stored is not None:
            raise StaleVersion(f"{name} exists at version {stored[0]}; it was to be created. Read it and try again")
        return True
    if (record.version, record.incarnation) != (expect.version + 1, expect.incarnation):
        raise StoreError(
            f"{name}: version {record.version} of {record.incarnation} does not follow"
            f" version {expect.version} of {expect.incarnation}"
        )
    if stored is None:
        raise StaleVersion(f"{name} does not exist; version {expect.version} was expected. Start a new one")
    if stored[:2] != (expect.version, expect.incarnation):
        life = "" if stored[1] == expect.incarnation else " of another incarnation"
        raise StaleVersion(
            f"{name} is at version {stored[0]}{life}; version {expect.version} was expected. Read it and try again"
        )
    return True
