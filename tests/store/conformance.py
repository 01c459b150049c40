"""What every store must do. A test module for a store gives ``open_`` and calls these; a mutant must fail
them.

Each check takes a factory: it opens the same store again each time, as another process or a restart would.
The factory takes the options ``keep`` and ``quota`` of the store's constructor. A store of your own is
checked by::

    @pytest.mark.parametrize("check", [*conformance.CHECKS, *conformance_kept.CHECKS], ids=lambda check: check.__name__)
    def test_store(check, tmp_path):
        check(lambda **options: MyStore(tmp_path, **options))

A store may have an attribute ``codec``; sizes are then compared with what it encodes to. Kept versions, expiry
and quotas are in ``conformance_kept``.
"""

import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from msgspec import structs

from deltamem_vllm.errors import CorruptRecord, StaleVersion, StoreError, StoreUnavailable
from deltamem_vllm.store.codec import PLAIN, encode
from deltamem_vllm.store.protocol import Expect, Record, SessionKey, StateStore, WouldWait, new_incarnation
from tests.store.records import KEY, record

Open = Callable[..., StateStore]
Check = Callable[[Open], None]


def same(left: Record | None, right: Record) -> bool:
    return left is not None and encode(left) == encode(right)


def size_in(store: StateStore, made: Record) -> int:
    """Bytes of a record as this store keeps it."""
    return len(getattr(store, "codec", PLAIN).encode(made))


def refused(store: StateStore, made: Record, expect: Expect | None, kind: type[StoreError] = StaleVersion) -> None:
    """``put`` raises ``kind`` and leaves the store as it was."""
    before = store.get(made.key)
    with pytest.raises(StoreError) as caught:
        store.put(made, expect)
    assert type(caught.value) is kind, caught.value
    after = store.get(made.key)
    assert (after is None and before is None) or (before is not None and same(after, before))


def is_a_store(open_: Open) -> None:
    assert isinstance(open_(), StateStore)


def reads_what_was_written(open_: Open) -> None:
    store = open_()
    assert store.get(KEY) is None
    first = record(1)
    store.put(first, None)
    assert same(store.get(KEY), first)
    second = record(2, end=np.full((3, 1, 8, 8), -1e6, np.float32), window=b"", attributes=bytes(range(256)) * 256)
    store.put(second, first.expect)
    assert same(store.get(KEY), second)
    back = store.get(KEY)
    assert back is not None
    back.end[...] = 7.0  # what a reader does to its arrays is its own affair
    assert same(store.get(KEY), second)


def keys_do_not_mix(open_: Open) -> None:
    store = open_()
    keys = [SessionKey(t, s) for t in ("a", "ab", "A", "ä") for s in ("b", "", "bc", "'; --", "%") if s] + [
        SessionKey("a", "bb"),
        SessionKey("abb"[:2], "b" * 256),
    ]
    for seed, key in enumerate(keys):
        store.put(record(1, key, seed=seed), None)
    for seed, key in enumerate(keys):
        assert same(store.get(key), record(1, key, seed=seed))
    assert store.delete(keys[0])
    assert [key for key in keys if store.get(key) is None] == keys[:1]


def moves_only_from_the_expected_version(open_: Open) -> None:
    store = open_()
    refused(store, record(2), record(1).expect)  # nothing there
    store.put(record(1), None)
    refused(store, record(1, seed=1), None)  # exists
    store.put(record(2), record(1).expect)
    refused(store, record(2, seed=1), record(1).expect)  # somebody was faster
    refused(store, record(4), record(3).expect)  # a version that never was
    refused(store, record(4), record(2).expect, StoreError)  # does not follow from what was expected
    refused(store, record(3, incarnation=new_incarnation()), record(2).expect, StoreError)
    store.put(record(3), record(2).expect)
    assert same(store.get(KEY), record(3))


def a_recreated_session_has_another_life(open_: Open) -> None:
    """ABA: the erased session reached version 2, the new one does too; the old owner must not write version
    3."""
    store = open_()
    old, new = new_incarnation(), new_incarnation()
    for life in (old, new):
        store.delete(KEY)
        store.put(record(1, incarnation=life), None)
        store.put(record(2, incarnation=life), Expect(1, life))
    refused(store, record(3, incarnation=old), Expect(2, old))
    refused(store, record(2, incarnation=old), Expect(1, old))  # the same request id too
    store.put(record(3, incarnation=new), Expect(2, new))


def the_same_request_again_succeeds(open_: Open) -> None:
    store = open_()
    for made, expect in ((record(1), None), (record(2), record(1).expect)):
        for _ in range(3):
            store.put(made, expect)
            assert same(store.get(KEY), made)
    again = record(2, updated_at=5.0)
    store.put(again, record(1).expect)
    assert same(store.get(KEY), record(2)), "a retry must not change what is stored"
    store.put(record(1), None)  # a later version is there, and version 1 is kept: its outcome can be told
    refused(store, record(1, request_id="another"), None)
    refused(store, record(1, incarnation=new_incarnation()), None)
    assert same(store.get(KEY), record(2))
    refused(store, record(2, request_id="another"), record(1).expect)
    outcomes = store.put_many([(record(3), record(2).expect)] * 2)
    assert outcomes == [None, None]
    group = [(record(v), record(v - 1).expect) for v in (2, 3, 4, 5)]
    assert store.put_many(group) == store.put_many(group) == [None] * 4  # a whole group, sent again
    assert same(store.get(KEY), record(5))


def a_group_answers_per_item(open_: Open) -> None:
    store = open_()
    keys = [SessionKey("tenant", f"s{index}") for index in range(5)]
    store.put(record(1, keys[1]), None)
    nan = np.full((3, 1, 8, 8), np.nan, np.float32)
    outcomes = store.put_many(
        [
            (record(1, keys[0]), None),
            (record(1, keys[1], seed=9), None),  # exists
            (record(1, keys[2], end=nan), None),  # not valid
            (record(1, keys[3]), None),
            (record(2, keys[3]), record(1).expect),  # follows inside the group
            (record(2, keys[3], seed=9), record(1).expect),  # loses inside the group
            (record(3, keys[4]), record(1).expect),  # a mistake of the caller
        ]
    )
    kinds = [type(outcome) for outcome in outcomes]
    assert kinds == [
        type(None),
        StaleVersion,
        CorruptRecord,
        type(None),
        type(None),
        StaleVersion,
        StoreError,
    ]
    assert store.put_many([]) == []
    store = open_()
    assert same(store.get(keys[0]), record(1, keys[0]))
    assert same(store.get(keys[1]), record(1, keys[1]))
    assert store.get(keys[2]) is None
    assert same(store.get(keys[3]), record(2, keys[3]))
    assert store.get(keys[4]) is None


def deletes(open_: Open) -> None:
    store = open_()
    assert not store.delete(KEY)
    store.put(record(1), None)
    assert store.delete(KEY)
    assert store.get(KEY) is None
    assert not store.delete(KEY)
    assert store.history(KEY) == []
    assert store.get_version(KEY, 1) is None
    refused(store, record(2), record(1).expect)


def says_where_a_session_is(open_: Open) -> None:
    """By ``head`` and, where the store has it, by ``glance``: after every change, whoever made it."""
    store, other = open_(), open_()
    glances = [each.glance for each in (store, other) if getattr(each, "glance", None) is not None]  # type: ignore[attr-defined]

    def where() -> Expect | None:
        seen = [look(KEY) for look in (store.head, other.head, *glances)]
        assert seen == seen[:1] * len(seen)
        return seen[0]

    assert where() is None
    other.put(record(1, SessionKey("tenant", "sessions")), None)
    other.put(record(1, SessionKey("tenants", "session")), None)
    assert where() is None
    for version in range(1, 8):
        (store, other)[version % 2].put(record(version), record(version - 1).expect if version > 1 else None)
        assert where() == record(version).expect
    with pytest.raises(StaleVersion):
        other.put(record(3, request_id="late"), record(2).expect)
    assert where() == record(7).expect
    assert other.delete(KEY)
    assert where() is None
    other.put(record(1, incarnation="ab" * 16), None)
    assert where() == Expect(1, "ab" * 16)


def lists_by_tenant_in_pages(open_: Open) -> None:
    store = open_()
    assert store.list("tenant") == []
    names = sorted(["a", "b", "ab", "Z", "ü", "z", "10", "9", "\U0001f600", "\uffff"])
    for name in reversed(names):
        store.put(record(1, SessionKey("tenant", name)), None)
        store.put(record(1, SessionKey("tenan", name)), None)
    made = record(2, SessionKey("tenant", "a"))
    store.put(made, Expect(1, made.incarnation))
    paged: list[str] = []
    while page := store.list("tenant", after=paged[-1] if paged else None, limit=3):
        assert len(page) <= 3
        assert {info.key.tenant for info in page} == {"tenant"}
        paged += [info.key.session for info in page]
    assert paged == names
    info = next(info for info in store.list("tenant") if info.key.session == "a")
    for name in ("key", "version", "incarnation", "created_at", "updated_at", "tokens", "windows"):
        assert getattr(info, name) == getattr(made, name)
    assert info.bytes == size_in(store, made)
    assert store.list("tenant", limit=0) == store.list("tenant", limit=-1) == store.list("nobody") == []


def lists_by_prefix(open_: Open) -> None:
    """The ids that begin with the prefix, whatever characters it is made of, in pages."""
    store = open_()
    names = ["a", "a%", "a%b", "a_", "a_b", "ab", "abc", "a*", "a[b]", "a?", "a\\", "a\\%", "A%", "b", "'; --", "\x01"]
    names += [
        "ü",
        "üb",
        "u",
        "\ud7ff",
        "\ud7ffx",
        "\ue000",
        "\uffff",
        "\U00010000",
        "\U0010ffff",
        "\U0010ffff\U0010ffff",
    ]
    names += ["a\U0010ffff", "a\U0010ffffb", "\U0010ffff" * 64, "x" * 256, "a\x01"]
    assert store.put_many([(record(1, SessionKey("tenant", name), layout="L1H1r2"), None) for name in names]) == [
        None
    ] * len(names)
    store.put(record(1, SessionKey("tenan", "a%c")), None)
    for prefix in ("", *names, "a%%", "%", "_", "*", "a\U0010ffffbb", "nothing", "\U0010fffe", "x" * 300):
        wanted = sorted(name for name in names if name.startswith(prefix))
        assert [info.key.session for info in store.list("tenant", prefix=prefix)] == wanted, prefix
        paged: list[str] = []
        while page := store.list("tenant", after=paged[-1] if paged else None, limit=2, prefix=prefix):
            assert len(page) <= 2
            paged += [info.key.session for info in page]
        assert paged == wanted, prefix
        assert store.list("tenant", limit=0, prefix=prefix) == store.list("nobody", prefix=prefix) == []
    inside = sorted(name for name in names if name.startswith("a") and name > "a\U0010fffe")
    assert [info.key.session for info in store.list("tenant", after="a\U0010fffe", prefix="a")] == inside
    assert [info.key.session for info in store.list("tenant", after="A", prefix="ab")] == ["ab", "abc"]
    assert store.list("tenant", after="b", prefix="ab") == []
    for bad in ("\ud800", "a\0"):
        with pytest.raises(ValueError, match="prefix"):
            store.list("tenant", prefix=bad)
        with pytest.raises(ValueError, match="after"):
            store.list("tenant", after=bad)


def refuses_bad_keys(open_: Open) -> None:
    del open_
    for tenant, session in (
        ("", "s"),
        ("t", ""),
        ("t", "x" * 257),
        ("t", "ü" * 129),
        ("t", "\0"),
        ("t", "\ud800"),
    ):
        with pytest.raises(ValueError, match=r"tenant|session"):
            SessionKey(tenant, session)


def a_closed_store_says_so(open_: Open) -> None:
    store = open_()
    store.put(record(1), None)
    store.close()
    store.close()
    for action in (
        lambda: store.get(KEY),
        lambda: store.put(record(2), record(1).expect),
        lambda: store.delete(KEY),
        lambda: store.list("tenant"),
        lambda: store.head(KEY),
        lambda: store.history(KEY),
        lambda: store.get_version(KEY, 1),
        lambda: store.rollback(KEY, 1, record(1).expect, "r"),
        lambda: store.expire(1e9, 1.0),
        lambda: store.usage("tenant"),
        lambda: store.tenants(),
        lambda: store.idle(1e9),
        lambda: store.delete_idle([KEY], 1e9),
        lambda: store.reencrypt(),
    ):
        with pytest.raises(StoreUnavailable, match="closed"):
            action()
    if getattr(store, "glance", None) is not None:
        with pytest.raises(WouldWait):
            store.glance(KEY)  # type: ignore[attr-defined]
    assert [type(outcome) for outcome in store.put_many([(record(2), record(1).expect)])] == [StoreUnavailable]


def race(store: StateStore, writer: int, wins_wanted: int) -> list[int]:
    """Commit to one session until ``wins_wanted`` have succeeded; returns the versions this writer was given.

    ``tokens`` counts every win of every writer: a lost update would make it fall behind the version.
    """
    won: list[int] = []
    while len(won) < wins_wanted:
        seen = store.get(KEY)
        assert seen is not None
        made = structs.replace(
            seen, version=seen.version + 1, tokens=seen.tokens + 1, request_id=f"w{writer}-{seen.version + 1}"
        )
        time.sleep(0.0005)  # let the others in between, so that a store without the comparison is sure to fail
        try:
            store.put(made, seen.expect)
        except StaleVersion:
            continue
        won.append(made.version)
    return won


def check_race(store: StateStore, won: Sequence[Sequence[int]]) -> None:
    """No version given twice, none skipped, no update lost."""
    versions = sorted(version for each in won for version in each)
    assert versions == list(range(2, len(versions) + 2)), "a version was given to two writers, or lost"
    last = store.get(KEY)
    assert last is not None
    assert (last.version, last.tokens) == (versions[-1], len(versions))


def eight_threads_lose_no_update(open_: Open) -> None:
    store = open_()
    store.put(record(1, tokens=0), None)
    won: list[list[int]] = [[] for _ in range(8)]
    errors: list[BaseException] = []

    def work(index: int) -> None:
        try:
            won[index] = race(store, index, 12)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors, errors
    check_race(store, won)


CHECKS: list[Check] = [
    is_a_store,
    reads_what_was_written,
    keys_do_not_mix,
    moves_only_from_the_expected_version,
    a_recreated_session_has_another_life,
    the_same_request_again_succeeds,
    a_group_answers_per_item,
    deletes,
    says_where_a_session_is,
    lists_by_tenant_in_pages,
    lists_by_prefix,
    refuses_bad_keys,
    a_closed_store_says_so,
    eight_threads_lose_no_update,
]
