"""Write masks: which tokens of a request are read but never written to the memory.

A mask is a tuple of *spans* ``(start, stop)`` of token positions, ascending, not touching each other. The reply that a
request will generate lies behind its prompt; where it is not to be written either, the last span ends at `OPEN`.

The same mask must mean the same everywhere, so all that depends on it is derived here: the bits that go to the
kernels, what the window's boundaries are hashed from, and where the chain of prefix-cache hashes must differ.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Spans = tuple[tuple[int, int], ...]
OPEN = 2**31 - 1
"""The end of a span that no token reaches."""
MAX_SPANS = 4096


def normal(spans: Iterable[Sequence[int]]) -> Spans:
    """Spans in ascending order, joined where they touch or overlap; empty ones left out.

    Raises:
        ValueError: a span that is no pair of positions in 0 … `OPEN`, or more than `MAX_SPANS`.
    """
    joined: list[tuple[int, int]] = []
    for span in sorted(tuple(span) for span in spans):
        if len(span) != 2 or not all(type(position) is int for position in span) or not 0 <= span[0] <= span[1] <= OPEN:
            raise ValueError(f"a span is a pair of token positions (start, stop), not {span!r}")
        start, stop = span
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        elif start < stop:
            joined.append((start, stop))
    if len(joined) > MAX_SPANS:
        raise ValueError(f"{len(joined)} spans in one request; the limit is {MAX_SPANS}")
    return tuple(joined)


def sign(tokens: Sequence[int] | NDArray[np.int32], spans: Spans) -> NDArray[np.int32]:
    """Token ids in which those that are not written stand as their complement ``~id``, which is negative.

    This is what windows are planned with: the same text, masked otherwise, is another text.
    """
    signed = np.array(tokens, dtype=np.int32)
    for start, stop in spans:
        signed[start:stop] = ~signed[start:stop]
    return signed


def conversation(tokens: Sequence[int] | NDArray[np.int32], spans: Spans, offered: Spans = ()) -> NDArray[np.int32]:
    """A conversation's own tokens, signed: without what the server has put between them for this one request.

    Windows are planned and advanced with these, so that a conversation that goes on is known as such, whatever it was
    offered with each turn.
    """
    signed = sign(tokens, spans)
    for start, stop in reversed(offered):
        signed = np.concatenate((signed[:start], signed[stop:]))
    return signed


def place(offered: Spans, count: int) -> int:
    """The least position in a prompt that ``count`` of the conversation's own tokens lie before; `OPEN` stays that."""
    if count == OPEN:  # every token: a position beyond it would not fit 32 bits
        return OPEN
    for start, stop in offered:
        if start < count:
            count += stop - start
    return count


def with_offer(spans: Spans, offer: tuple[int, int]) -> Spans:
    """The spans of a conversation, after something that is not written was put into it at ``offer``."""
    start, stop = offer
    moved: list[tuple[int, int]] = [(start, stop)]
    for begin, end in spans:
        if begin < start:
            moved.append((begin, min(end, start)))
        if end > start:
            moved.append((max(begin, start) + stop - start, end if end == OPEN else end + stop - start))
    return normal(moved)


def insertion(without: Sequence[int], within: Sequence[int]) -> tuple[int, int] | None:
    """Where one prompt has tokens that another has not: the only span whose removal leaves the other; None: there is
    no such span. Where several do (what was put in ends as what is before it does), the last."""
    extra = len(within) - len(without)
    ours, theirs = np.asarray(without, np.int32), np.asarray(within, np.int32)
    if extra <= 0:
        return None
    differ = np.flatnonzero(ours != theirs[: len(ours)])
    start = int(differ[0]) if len(differ) else len(ours)
    return (start, start + extra) if np.array_equal(ours[start:], theirs[start + extra :]) else None


def unwritten_before(spans: Spans, count: int) -> int:
    """How many of the first ``count`` tokens are not written."""
    return sum(min(stop, count) - start for start, stop in spans if start < count)


def block_bits(spans: Spans, block: int, size: int) -> NDArray[np.bool_]:
    """bool [size]: which tokens of the request's ``block``-th block are not written."""
    bits = np.zeros(size, dtype=np.bool_)
    first = block * size
    for start, stop in spans:
        if start >= first + size:
            break
        bits[max(start - first, 0) : max(stop - first, 0)] = True
    return bits


def marked_blocks(spans: Spans, size: int, first: int, stop: int) -> list[int]:
    """Which of a request's blocks ``first`` … ``stop`` − 1 hold tokens that are not written."""
    found: list[int] = []
    for begin, end in spans:
        least = max(first, begin // size, found[-1] + 1 if found else 0)
        found.extend(range(least, min(-(-end // size), stop)))
    return found


class _Shorter:
    """A request that seems to end earlier."""

    def __init__(self, request: Any, num_tokens: int) -> None:
        self._request, self.num_tokens = request, num_tokens

    def __getattr__(self, name: str) -> Any:
        return getattr(self._request, name)


def hash_blocks(
    request: Any, spans: Spans, size: int, hasher: Callable[[Any], list[bytes]], fold: Callable[[Any], bytes]
) -> list[bytes]:
    """The block hashes that a masked request still lacks.

    The hash of a block in which the mask changes is folded with where it changes. Hashes are chained, so that every
    later block differs from its unmasked twin as well, and blocks without a change need no more work than usual.

    Args:
        request: vLLM's, with ``block_hashes`` so far and ``num_tokens``.
        size: tokens per hashed block.
        hasher: vLLM's, unaware of masks; hashes all full blocks that a request lacks.
        fold: a hash of any value made of tuples, integers and bytes.

    Returns:
        what ``hasher`` would return, folded; ``request.block_hashes`` is as it was.
    """
    known: list[bytes] = request.block_hashes
    had, whole = len(known), request.num_tokens // size
    changes: dict[int, list[int]] = {}
    for edge in (position for span in spans for position in span):
        if had <= edge // size < whole:
            changes.setdefault(edge // size, []).append(edge % size)
    try:
        for block in sorted(changes):
            known.extend(hasher(_Shorter(request, (block + 1) * size)))
            known[-1] = type(known[-1])(fold((known[-1], tuple(changes[block]))))
        known.extend(hasher(request))
        return known[had:]
    finally:
        del known[had:]
