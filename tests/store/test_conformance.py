"""One suite for all stores, and proof that it catches planted bugs."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from deltamem_vllm.errors import StaleVersion, StoreError
from deltamem_vllm.store import ledger, protocol, redis_scripts
from deltamem_vllm.store.memory import MemoryStore
from deltamem_vllm.store.postgres import PostgresStore
from deltamem_vllm.store.protocol import Expect, Record, StateStore
from deltamem_vllm.store.redis import RedisStore
from deltamem_vllm.store.sqlite import SQLiteStore
from tests.store import conformance, conformance_kept


class Reopened:
    """Opens the same store again each time, and closes everything at the end."""

    def __init__(self, make: Callable[..., StateStore]) -> None:
        self.make = make
        self.opened: list[StateStore] = []

    def __call__(self, **options: Any) -> StateStore:
        self.opened.append(self.make(**options))
        return self.opened[-1]


class Kept:
    """The same memory again each time, with new options."""

    def __init__(self) -> None:
        self.first = MemoryStore()

    def __call__(self, **options: Any) -> StateStore:
        store = MemoryStore(**options)
        for name in ("_sessions", "_usage", "_lock"):
            setattr(store, name, getattr(self.first, name))
        return store


@pytest.fixture(params=["sqlite", "memory", "postgres", "redis"])
def open_(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[conformance.Open]:
    match request.param:
        case "memory":
            reopened = Reopened(Kept())
        case "postgres":
            reopened = Reopened(partial(PostgresStore, request.getfixturevalue("postgres_url"), retry_seconds=1.0))
        case "redis":
            url, namespace = request.getfixturevalue("redis_place")
            reopened = Reopened(partial(RedisStore, url, namespace=namespace))
        case _:
            reopened = Reopened(partial(SQLiteStore, tmp_path / "s.db"))
    yield reopened
    for opened in reopened.opened:
        opened.close()


CHECKS = [*conformance.CHECKS, *conformance_kept.CHECKS]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_store(check: conformance.Check, open_: conformance.Open) -> None:
    check(open_)


# --- planted bugs -------------------------------------------------------------------------------------------

Stored = tuple[int, str, str] | None
Admit = Callable[[Record, Expect | None, Stored, str | None], bool]
real_admit: Admit = protocol.admit


def no_predicate(record: Record, expect: Expect | None, stored: Stored, kept: str | None) -> bool:
    return True


def no_incarnation(record: Record, expect: Expect | None, stored: Stored, kept: str | None) -> bool:
    return real_admit(record, expect, stored and (stored[0], record.incarnation, stored[2]), kept)


def no_request_id(record: Record, expect: Expect | None, stored: Stored, kept: str | None) -> bool:
    if stored and stored == (record.version, record.incarnation, record.request_id):
        raise StaleVersion("exists")
    return real_admit(record, expect, stored, None)


def any_request_id(record: Record, expect: Expect | None, stored: Stored, kept: str | None) -> bool:
    return real_admit(record, expect, stored and (*stored[:2], record.request_id), kept)


MUTANTS = {  # the rule in Python, and in Redis' script what to replace by what
    "no_predicate": (no_predicate, ("stored[1] == seen and stored[2] == life", "stored[1]")),
    "no_incarnation": (no_incarnation, ("stored[2] == life", "true"), ("stored[2] == incarnation", "stored[2]")),
    "no_request_id": (no_request_id, ("local same =", "local same = false and")),
    "any_request_id": (any_request_id, (" and stored[3] == request", "")),
}


@pytest.mark.parametrize(
    ("mutant", "check"),
    [
        ("no_predicate", conformance.moves_only_from_the_expected_version),
        ("no_predicate", conformance.eight_threads_lose_no_update),
        ("no_incarnation", conformance.a_recreated_session_has_another_life),
        ("no_request_id", conformance.the_same_request_again_succeeds),
        ("any_request_id", conformance.the_same_request_again_succeeds),
    ],
)
def test_suite_catches_a_changed_rule(
    mutant: str, check: conformance.Check, open_: conformance.Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule, *edits = MUTANTS[mutant]
    script = redis_scripts.PUT
    for old, new in edits:
        assert old in script
        script = script.replace(old, new)
    monkeypatch.setattr(redis_scripts, "PUT", script)
    monkeypatch.setattr(ledger, "admit", rule)
    with pytest.raises((AssertionError, pytest.fail.Exception, StoreError)):
        check(open_)
