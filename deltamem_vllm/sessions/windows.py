"""Windows: the rule by which every token of a conversation is written exactly once.

A *window* is the stretch of one conversation that is still in the prompt. Chat clients send their whole
history with every request, others send only the new turn, and all of them retry, abort and regenerate. What
makes each of them right is to know how much of a prompt has already been written, and from which state to
write the rest:

* a prompt that begins with everything the window has been fed **extends** it: it runs from the window's
  base state;
* a prompt that begins with an earlier boundary of the window and then differs **replaces** what followed
  (regenerate, edited reply, verbatim retry): it runs from the same base;
* anything else opens a **new** window, whose base is the session's latest state.

Nothing here knows about states, stores or vLLM: the module is pure, and takes and gives values only. An
edited *first* message cannot be told from a new conversation, so it opens a new window and the old turn
stays in the memory. A client that sends only new turns and sends the very same prompt twice in a row is
taken for a retry.
"""

import hashlib
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from deltamem_vllm.errors import CorruptRecord

DIGEST_BYTES = 16
MAX_BOUNDARIES = 512
WRITE_ALL = 2**31 - 1
"""Write limit that no position reaches: every token is written."""

Kind = Literal["extend", "replace", "new"]
Mode = Literal["readwrite", "read", "off"]
Tokens = Sequence[int] | NDArray[np.int32]

_PERSON = b"deltamem-win"
_TOKEN = np.dtype("<i4")
_HEAD = struct.Struct("<BxH")  # format, number of boundaries
_FORMAT = 1
MAX_PACKED_BYTES = _HEAD.size + MAX_BOUNDARIES * (4 + DIGEST_BYTES)


@dataclass(frozen=True, slots=True)
class Boundary:
    """A point that the window has passed.

    Attributes:
        count: tokens fed up to here, 1 to 2**31-1.
        digest: 16 bytes, blake2b-128 (person ``deltamem-win``) of those token ids as little-endian int32; a token that
            was not written stands as its complement ``~id``.
    """

    count: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class Window:
    """The boundaries of one window, strictly increasing in count; the last one is its end (everything fed
    so far).

    Raises:
        ValueError: no boundary, more than 512, counts not increasing, a digest of another size.
    """

    boundaries: tuple[Boundary, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.boundaries) <= MAX_BOUNDARIES:
            raise ValueError(f"a window has 1 to {MAX_BOUNDARIES} boundaries, not {len(self.boundaries)}")
        last = 0
        for boundary in self.boundaries:
            if not last < boundary.count < 2**31:
                raise ValueError(f"boundary counts must increase from 1 and fit 31 bits: {boundary.count} after {last}")
            if len(boundary.digest) != DIGEST_BYTES:
                raise ValueError(f"a boundary digest has {DIGEST_BYTES} bytes, not {len(boundary.digest)}")
            last = boundary.count

    @property
    def end(self) -> Boundary:
        """Everything fed so far."""
        return self.boundaries[-1]


@dataclass(frozen=True, slots=True)
class Plan:
    """How a prompt relates to the session's window.

    Attributes:
        kind: ``extend`` and ``replace`` run from the window's base, ``new`` from the session's latest state.
        keep: the boundaries that stay true, up to and including the matched one; empty for ``new``.
        matched: tokens of the prompt that the window has already been fed; 0 for ``new``.
    """

    kind: Kind
    keep: tuple[Boundary, ...]
    matched: int


NEW = Plan("new", (), 0)


def prefix_digests(tokens: Tokens, counts: Iterable[int]) -> list[bytes]:
    """Digests of several prefixes of ``tokens`` in one pass.

    Args:
        tokens: token ids as ``masks.sign`` gives them.
        counts: prefix lengths, not decreasing, each in [0, len(tokens)].

    Returns:
        one 16-byte digest per count.
    """
    hasher = hashlib.blake2b(digest_size=DIGEST_BYTES, person=_PERSON)
    data = memoryview(np.asarray(tokens, dtype=_TOKEN).tobytes())
    digests = []
    done = 0
    for count in counts:
        hasher.update(data[done * _TOKEN.itemsize : count * _TOKEN.itemsize])
        done = count
        digests.append(hasher.copy().digest())
    return digests


def plan(window: Window | None, tokens: Tokens) -> Plan:
    """Match a prompt against a session's window.

    Args:
        window: the session's window; None for a session without one.
        tokens: the whole prompt's token ids, signed.

    Returns:
        the plan for the largest boundary whose tokens the prompt begins with.
    """
    if window is None:
        return NEW
    inside = [boundary for boundary in window.boundaries if boundary.count <= len(tokens)]
    digests = prefix_digests(tokens, [boundary.count for boundary in inside])
    for index in range(len(inside) - 1, -1, -1):
        if digests[index] == inside[index].digest:
            kind: Kind = "extend" if inside[index] is window.end else "replace"
            return Plan(kind, tuple(inside[: index + 1]), inside[index].count)
    return NEW


def plan_from_base(window: Window | None, tokens: Tokens) -> Plan:
    """As `plan`, for a prompt that is known to go on from the window's base, whatever of its tokens matches."""
    found = plan(window, tokens)
    return Plan("replace", (), 0) if found.kind == "new" and window is not None else found


def advance(plan: Plan, tokens_fed: Tokens, prompt_len: int) -> Window:
    """The window after a commit.

    Args:
        plan: what :func:`plan` said about the request's prompt.
        tokens_fed: every token, signed, that went through the model: the prompt and the generated ones except the
            last sampled one, which has not been fed yet. At least one.
        prompt_len: tokens of the prompt. Its end becomes a boundary, so that a regenerated reply finds it.

    Returns:
        kept boundaries, the prompt's end and the new end: the newest 512 of them.

    Raises:
        ValueError: nothing was fed, or ``tokens_fed`` does not begin with the tokens that the plan matched
            (the plan belongs to another request).
    """
    fed = len(tokens_fed)
    if fed < 1:
        raise ValueError("no token was fed: there is nothing to commit")
    keep = [boundary for boundary in plan.keep if boundary.count <= fed]
    counts = [keep[-1].count] if keep else []
    counts += [count for count in sorted({prompt_len, fed}) if (counts[-1] if counts else 0) < count <= fed]
    digests = prefix_digests(tokens_fed, counts)
    if keep and digests[0] != keep[-1].digest:
        raise ValueError(f"the {fed} tokens fed do not begin with the {keep[-1].count} tokens that the plan matched")
    made = [Boundary(count, digest) for count, digest in zip(counts, digests, strict=True)]
    return Window(tuple([*keep[:-1], *made][-MAX_BOUNDARIES:]))


def write_limit(plan: Plan, mode: Mode, n: int) -> int:
    """The position below which tokens are written to the memory.

    Args:
        plan: what :func:`plan` said about the prompt.
        mode: ``readwrite``, ``read`` or ``off``.
        n: tokens of the prompt.

    Returns:
        ``readwrite``: WRITE_ALL. ``read``: the matched tokens, at most ``n``; they belong to the window and
        are written again from its base, everything new is only read. ``off``: -1, the memory is neither
        written nor read.
    """
    match mode:
        case "readwrite":
            return WRITE_ALL
        case "read":
            return min(plan.matched, n)
        case "off":
            return -1
        case _:
            raise ValueError(f"mode {mode!r} is none of readwrite, read, off")


def pack(window: Window | None) -> bytes:
    """A window as bytes for a record: 4 bytes, then 20 per boundary. No window is ``b""``."""
    if window is None:
        return b""
    counts = np.array([boundary.count for boundary in window.boundaries], dtype="<u4").tobytes()
    digests = b"".join(boundary.digest for boundary in window.boundaries)
    return _HEAD.pack(_FORMAT, len(window.boundaries)) + counts + digests


def unpack(data: bytes) -> Window | None:
    """The inverse of :func:`pack`.

    Raises:
        CorruptRecord: another format, a wrong length, counts that do not increase.
    """
    if not data:
        return None
    if not _HEAD.size < len(data) <= MAX_PACKED_BYTES:
        raise CorruptRecord(f"a packed window has at most {MAX_PACKED_BYTES} bytes and a header, not {len(data)} bytes")
    version, boundaries = _HEAD.unpack_from(data)
    if version != _FORMAT or data[1] != 0:
        raise CorruptRecord(f"packed window of format {version}; this version reads format {_FORMAT}")
    if len(data) != _HEAD.size + boundaries * (4 + DIGEST_BYTES):
        raise CorruptRecord(f"a packed window of {boundaries} boundaries does not have {len(data)} bytes")
    counts = np.frombuffer(data, dtype="<u4", count=boundaries, offset=_HEAD.size).tolist()
    start = _HEAD.size + 4 * boundaries
    digests = (data[at : at + DIGEST_BYTES] for at in range(start, len(data), DIGEST_BYTES))
    try:
        return Window(tuple(Boundary(count, digest) for count, digest in zip(counts, digests, strict=True)))
    except ValueError as error:
        raise CorruptRecord(f"packed window: {error}") from None
