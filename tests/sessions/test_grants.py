"""Salts: two requests may share cached blocks only if everything that made those blocks is equal."""

import itertools
from typing import Any

import numpy as np
import pytest

from deltamem_vllm.names import Names
from deltamem_vllm.sessions import histories
from deltamem_vllm.sessions.grants import ZERO, cache_salt, state_digest
from deltamem_vllm.sessions.windows import WRITE_ALL
from deltamem_vllm.store.protocol import SessionKey
from tests.sessions.harness import SECRET

BASE: dict[str, Any] = {
    "key": SessionKey("tenant", "session"),
    "incarnation": "00112233",
    "base_digest": ZERO,
    "limit": WRITE_ALL,
    "adapter": "adapter",
    "clients": None,
    "names": Names(SECRET),
}


@pytest.mark.parametrize(
    "change",
    [
        {"key": SessionKey("tenant2", "session")},
        {"key": SessionKey("tenant", "session2")},
        {"incarnation": "00112234"},
        {"base_digest": "00"},
        {"limit": 5},
        {"limit": 0},
        {"limit": -1},
        {"adapter": "adapter2"},
        {"clients": "mine"},
        {"names": Names(bytes(32))},
    ],
    ids=lambda change: next(iter(change)),
)
def test_each_part_changes_the_salt(change: dict[str, Any]) -> None:
    assert cache_salt(**BASE) == cache_salt(**BASE)
    assert cache_salt(**{**BASE, **change}) != cache_salt(**BASE)


def test_all_limits_differ() -> None:
    limits = [-1, 0, 1, 10, 100, WRITE_ALL - 1, WRITE_ALL]
    assert len({cache_salt(**{**BASE, "limit": n}) for n in limits}) == len(limits)


def test_parts_cannot_run_into_each_other() -> None:
    """Every way to cut one text into the five texts of a salt, and only one salt for each."""
    text = "deltamemdeltamem"
    salts = set()
    cuts = list(itertools.combinations(range(1, len(text)), 4))
    for a, b, c, d in cuts:
        salts.add(
            cache_salt(SessionKey(text[:a], text[a:b]), text[b:c], text[c:d], WRITE_ALL, text[d:], None, BASE["names"])
        )
    assert len(salts) == len(cuts)


def test_a_client_cannot_name_a_session_salt() -> None:
    """What a client sends as ``cache_salt`` is hashed with the server's secret; it never replaces it."""
    ours = cache_salt(**BASE)
    assert cache_salt(**{**BASE, "clients": ours}) != ours
    assert cache_salt(**{**BASE, "names": Names(bytes(32)), "clients": ours}) != ours


def test_digests_name_content() -> None:
    state = np.arange(8, dtype=np.float32).reshape(2, 1, 2, 2)
    assert state_digest(None) == ZERO
    assert state_digest(state) == state_digest(state.copy())
    assert state_digest(state) == state_digest(np.asfortranarray(state)), "the same numbers in another memory order"
    changed = state.copy()
    changed[1, 0, 1, 1] = np.nextafter(changed[1, 0, 1, 1], np.float32(np.inf))
    assert state_digest(changed) != state_digest(state)
    assert state_digest(state) != ZERO


def test_the_digest_in_stored_attributes_stays_as_it_is() -> None:
    """Earlier versions have written it into sessions: with another one clients would send a whole history again."""
    state = np.arange(16, dtype=np.float32).reshape(2, 2, 2, 2)
    assert histories.digest(state).hex() == "7eea301c14f5df2c"
