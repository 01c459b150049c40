"""Write masks: spans, what windows see of them, bits for the kernels, and hashes of blocks."""

import hashlib
import itertools
import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from deltamem_vllm.sessions import masks, windows
from deltamem_vllm.sessions.masks import OPEN, Spans, normal


def test_spans_are_joined_and_ordered() -> None:
    assert normal([[5, 9], (1, 3), (9, 12), (3, 3), (20, OPEN)]) == ((1, 3), (5, 12), (20, OPEN))
    assert normal([(0, 10), (2, 4)]) == ((0, 10),)
    assert normal([]) == ()


@pytest.mark.parametrize("bad", [[(1,)], [(3, 2)], [(-1, 2)], [(0, OPEN + 1)], [(0.5, 2)], [(0, 1, 2)]], ids=str)
def test_what_is_no_span_is_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match="a span is a pair"):
        normal(bad)
    with pytest.raises(ValueError, match="the limit is 4096"):
        normal((2 * i, 2 * i + 1) for i in range(4097))


def test_the_same_text_masked_otherwise_is_another_text() -> None:
    """What windows match is what was fed *and* whether it was written."""
    text = list(range(100, 120))
    first = windows.advance(windows.NEW, masks.sign(text, ()), 10)
    masked = masks.sign([*text, 7, 8], ((3, 5),))
    assert windows.plan(first, masks.sign([*text, 7, 8], ())).kind == "extend"
    assert windows.plan(first, masked).kind == "new"
    later = masks.sign([*text, 7, 8], ((20, 22),))  # a mask behind all that was fed
    assert windows.plan(first, later).kind == "extend"
    halfway = masks.sign([*text, 7, 8], ((12, 14),))  # in the part that the window's first boundary does not cover
    assert windows.plan(first, halfway) == windows.Plan("replace", first.boundaries[:1], 10)


def test_signed_ids_never_meet_unsigned_ones() -> None:
    ids = np.array([0, 1, 2**31 - 1], dtype=np.int32)
    assert (masks.sign(ids, ((0, OPEN),)) < 0).all()
    assert masks.sign(ids, ()).tolist() == ids.tolist()


def random_spans(rng: random.Random, tokens: int) -> Spans:
    edges = sorted(rng.sample(range(tokens + 1), 2 * rng.randint(0, 4)))
    spans = list(zip(edges[::2], edges[1::2], strict=True))
    if rng.random() < 0.3:
        spans.append((tokens, OPEN))
    return normal(spans)


@pytest.mark.parametrize("seed", range(20))
def test_bits_counts_and_marked_blocks_agree_with_the_spans(seed: int) -> None:
    rng = random.Random(seed)
    tokens, size = rng.randint(8, 400), rng.choice([16, 32, 64])
    spans, blocks = random_spans(rng, tokens), -(-tokens // size)
    masked = [any(start <= p < stop for start, stop in spans) for p in range(blocks * size)]
    bits = [masks.block_bits(spans, block, size).tolist() for block in range(blocks)]
    assert list(itertools.chain(*bits)) == masked
    first = rng.randint(0, blocks)
    assert masks.marked_blocks(spans, size, first, blocks) == [b for b in range(first, blocks) if any(bits[b])]
    count = rng.randint(0, tokens)
    assert masks.unwritten_before(spans, count) == sum(masked[:count])


# --- hashes of blocks -----------------------------------------------------------------------------------------------

SIZE = 4


def fold(value: Any) -> bytes:
    return hashlib.sha256(repr(value).encode()).digest()


@dataclass
class Request:
    """What the hasher looks at."""

    tokens: list[int]
    block_hashes: list[bytes] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)


def hasher(request: Any) -> list[bytes]:
    """Chained hashes of the full blocks that a request lacks, as vLLM makes them."""
    made: list[bytes] = []
    for block in range(len(request.block_hashes), request.num_tokens // SIZE):
        parent = made[-1] if made else request.block_hashes[-1] if request.block_hashes else b""
        made.append(fold((parent, request.tokens[block * SIZE : (block + 1) * SIZE])))
    return made


def hashes(tokens: list[int], spans: Spans, steps: list[int]) -> list[bytes]:
    """The hashes of a request that grows to the lengths in ``steps``."""
    request = Request([])
    for length in [*steps, len(tokens)]:
        request.tokens = tokens[:length]
        had = list(request.block_hashes)
        new = masks.hash_blocks(request, spans, SIZE, hasher, fold) if spans else hasher(request)
        assert request.block_hashes == had, "hashing changed the request"
        request.block_hashes.extend(new)
    return request.block_hashes


@pytest.mark.parametrize("seed", range(30))
def test_blocks_share_a_hash_only_with_the_same_mask_so_far(seed: int) -> None:
    """Any two masks of one text, hashed in any steps: a block's hashes are equal if and only if the tokens up to its
    end are masked alike."""
    rng = random.Random(seed)
    tokens = [rng.randrange(5) for _ in range(rng.randint(5, 40))]
    made = {}
    for spans in {(), *(random_spans(rng, len(tokens)) for _ in range(6))}:
        steps = sorted(rng.sample(range(len(tokens)), rng.randint(0, min(5, len(tokens)))))
        made[spans] = hashes(tokens, spans, steps)
        assert made[spans] == hashes(tokens, spans, []), "the steps of decoding changed a hash"
    for one, other in itertools.combinations(made, 2):
        for block in range(len(tokens) // SIZE):
            end = (block + 1) * SIZE
            alike = (masks.sign(tokens[:end], one) == masks.sign(tokens[:end], other)).all()
            assert (made[one][block] == made[other][block]) == alike, (one, other, block)
