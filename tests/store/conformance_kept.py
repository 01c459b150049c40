"""What every store must do with kept versions, idle sessions and quotas."""

import time

import numpy as np
import pytest
from msgspec import structs

from deltamem_vllm.errors import QuotaExceeded, StaleVersion, StoreError, VersionNotKept
from deltamem_vllm.store.codec import encode
from deltamem_vllm.store.protocol import Expect, Quota, Record, SessionKey, StateStore, Usage, new_incarnation
from tests.store.conformance import Check, Open, refused, same, size_in
from tests.store.records import KEY, record


def commit(store: StateStore, versions: int, key: SessionKey = KEY, **fields: object) -> list[Record]:
    """Versions 1 to ``versions`` of a session."""
    made = [record(version, key, **fields) for version in range(1, versions + 1)]
    for last, each in zip([None, *made], made, strict=False):
        store.put(each, last and last.expect)
    return made


def keeps_the_last_versions(open_: Open) -> None:
    store = open_(keep=3)
    assert store.history(KEY) == []
    assert store.get_version(KEY, 1) is None
    made = commit(store, 7)
    commit(store, 2, SessionKey("tenant", "sessio"), seed=4)
    store = open_(keep=3)
    infos = store.history(KEY)
    assert [info.version for info in infos] == [7, 6, 5]
    for info, each in zip(infos, made[:3:-1], strict=True):
        for name in ("key", "version", "incarnation", "created_at", "updated_at", "tokens", "windows"):
            assert getattr(info, name) == getattr(each, name)
        assert info.bytes == size_in(store, each)
    assert store.history(KEY, limit=2) == infos[:2]
    assert store.history(KEY, limit=0) == store.history(KEY, limit=-1) == []
    for version in range(10):
        found = store.get_version(KEY, version)
        assert same(found, made[version - 1]) if version in (5, 6, 7) else found is None
    assert store.usage("tenant").bytes == sum(info.bytes for info in infos) + 2 * infos[0].bytes - 2
    assert len(store.list("tenant")) == 2


def keeps_what_the_newest_writer_is_told_to(open_: Open) -> None:
    commit(open_(keep=5), 6)
    store = open_(keep=2)
    store.put(record(7), record(6).expect)
    assert [info.version for info in store.history(KEY)] == [7, 6]
    assert store.usage("tenant") == Usage(1, sum(info.bytes for info in store.history(KEY)))
    store = open_(keep=1)
    store.put(record(8), record(7).expect)
    assert [info.version for info in store.history(KEY)] == [8]
    store = open_(keep=3)
    store.put_many([(record(v), record(v - 1).expect) for v in (9, 10, 11, 12)])
    assert [info.version for info in store.history(KEY)] == [12, 11, 10]
    assert store.usage("tenant") == Usage(1, sum(info.bytes for info in store.history(KEY)))


def rolls_back_by_a_new_version(open_: Open) -> None:
    store = open_(keep=3)
    made = commit(store, 4)
    start = time.time()
    back = store.rollback(KEY, 2, made[3].expect, "undo")
    content = structs.replace(
        made[1], version=5, request_id="undo", updated_at=back.updated_at, attributes=made[3].attributes
    )
    assert encode(back) == encode(content)
    assert start <= back.updated_at <= time.time()
    assert same(store.get(KEY), back)
    assert [info.version for info in store.history(KEY)] == [5, 4, 3]
    again = store.rollback(KEY, 2, made[3].expect, "undo")  # version 2 is kept no more
    assert encode(again) == encode(back)
    assert store.usage("tenant").bytes == sum(info.bytes for info in store.history(KEY))
    store.put(record(6, tokens=1), back.expect)
    assert np.array_equal(store.rollback(KEY, 6, record(6).expect, "same").end, record(6).end)


def rolls_back_the_memory_and_not_the_attributes(open_: Open) -> None:
    """What was erased from the attributes must not come back with an older memory."""
    store = open_(keep=4)
    facts = b"The user is called Ada Lovelace."
    told = record(1, attributes=facts)
    store.put(told, None)
    erased = record(2, attributes=b"")
    store.put(erased, told.expect)
    back = store.rollback(KEY, 1, erased.expect, "undo")
    assert back.attributes == b""
    for name in ("base", "end"):
        assert np.array_equal(getattr(back, name), getattr(told, name))
    assert back.window == told.window
    store = open_(keep=4)
    assert same(store.get(KEY), back)
    said = record(4, attributes=b"The user likes tea.")
    store.put(said, back.expect)
    again = store.rollback(KEY, 2, said.expect, "redo")
    assert again.attributes == said.attributes, "what was added since stays too"
    assert np.array_equal(again.end, erased.end)
    kept = store.get_version(KEY, 2)
    assert kept is not None
    assert kept.attributes == b"", "a kept version has its own"


def rolls_back_only_from_the_expected_version(open_: Open) -> None:
    store = open_(keep=3)
    with pytest.raises(VersionNotKept, match="does not exist"):
        store.rollback(KEY, 1, Expect(1, new_incarnation()), "undo")
    made = commit(store, 5)
    for expect in (made[3].expect, Expect(5, new_incarnation()), Expect(6, made[0].incarnation)):
        with pytest.raises(StaleVersion):
            store.rollback(KEY, 4, expect, "undo")
    for version in (0, 1, 2, 6):
        with pytest.raises(VersionNotKept, match=f"keep version {version}; kept are 5, 4, 3") as caught:
            store.rollback(KEY, version, made[4].expect, "undo")
        assert caught.value.status == 404
    assert same(store.get(KEY), made[4])


def history_belongs_to_one_life(open_: Open) -> None:
    store = open_()
    old, new = new_incarnation(), new_incarnation()
    commit(store, 3, incarnation=old)
    store.delete(KEY)
    commit(store, 1, incarnation=new)
    assert [(info.version, info.incarnation) for info in store.history(KEY)] == [(1, new)]
    assert store.get_version(KEY, 3) is None
    with pytest.raises(StaleVersion):
        store.rollback(KEY, 2, Expect(3, old), "undo")


def expires_idle_sessions(open_: Open) -> None:
    store = open_()
    for index in range(6):
        key = SessionKey("a" if index % 2 else "b", f"{index}")
        store.put(record(1, key, updated_at=100.0), None)
        store.put(record(2, key, updated_at=1000.0 + index), record(1).expect)
    assert store.expire(1100.0, 101.0) == 0
    assert store.expire(1103.0, 100.0, limit=0) == store.expire(1103.0, 100.0, limit=-1) == 0
    assert store.expire(1103.0, 100.0, limit=2) == 2
    left = [info.key.session for tenant in "ab" for info in store.list(tenant)]
    assert sorted(left) == ["2", "3", "4", "5"], "the longest idle go first"
    assert store.expire(1103.0, 100.0, limit=10) == 2
    assert [info.key.session for tenant in "ab" for info in store.list(tenant)] == ["5", "4"]
    assert store.history(SessionKey("b", "0")) == []
    assert store.usage("a") == Usage(1, sum(info.bytes for info in store.history(SessionKey("a", "5"))))
    assert store.expire(1e9, 0.0) == 2
    assert store.usage("a") == store.usage("b") == Usage()
    refused(store, record(3, SessionKey("a", "5")), record(2).expect)


def deletes_only_what_is_still_idle(open_: Open) -> None:
    store = open_()
    keys = [SessionKey(tenant, f"{index}") for tenant in "ab" for index in range(3)]
    for index, key in enumerate(keys):
        store.put(record(1, key, updated_at=100.0 + index), None)
    assert store.idle(102.0) == keys[:3], "the longest idle first"
    assert store.idle(1e9, 2) == keys[:2]
    assert store.idle(99.0) == store.idle(1e9, 0) == []
    store.put(record(2, keys[1], updated_at=500.0), record(1).expect)  # written since it was listed
    missing = SessionKey("a", "missing")
    assert store.delete_idle([], 102.0) == []
    assert sorted(store.delete_idle([*keys[:3], missing], 102.0)) == [keys[0], keys[2]]
    assert [info.key for info in store.list("a")] == [keys[1]]
    assert store.usage("a") == Usage(1, sum(info.bytes for info in store.history(keys[1])))
    assert store.tenants() == ["a", "b"]
    assert store.tenants(limit=1) == ["a"]
    assert store.tenants("a") == ["b"]
    assert store.tenants("b") == store.tenants(limit=0) == []
    assert store.delete_idle(keys, 1e9) != []
    assert store.tenants() == []


def counts_what_a_tenant_uses(open_: Open) -> None:
    store = open_(keep=2)
    assert store.usage("tenant") == Usage()
    commit(store, 3)
    commit(store, 1, SessionKey("other", "session"))
    big = record(1, SessionKey("tenant", "big"), layout="L8H1r16")
    store.put(big, None)
    store.put(big, None)
    sizes = [size_in(store, each) for each in (record(2), record(3), big)]
    assert store.usage("tenant") == Usage(2, sum(sizes))
    refused(store, record(5), record(4).expect)
    assert store.usage("tenant") == Usage(2, sum(sizes))
    small = record(2, big.key, layout="L1H1r2")
    store.put(small, big.expect)
    store.put(record(3, big.key, layout="L1H1r2"), small.expect)  # the big one goes
    sizes = [*sizes[:2], 2 * size_in(store, small)]
    assert store.usage("tenant") == Usage(2, sum(sizes))
    assert store.delete(big.key)
    assert store.usage("tenant") == Usage(1, sum(sizes[:2]))
    assert store.delete(KEY)
    assert store.usage("tenant") == Usage()
    assert store.usage("other").sessions == 1


def enforces_quotas(open_: Open) -> None:
    store = open_(quota=Quota(sessions=2))
    keys = [SessionKey("tenant", f"{index}") for index in range(4)]
    outcomes = store.put_many([(record(1, key), None) for key in keys[:3]])
    assert [type(outcome) for outcome in outcomes] == [type(None), type(None), QuotaExceeded]
    assert isinstance(outcomes[2], QuotaExceeded)
    assert outcomes[2].status == 429
    assert "2 of 2 sessions" in str(outcomes[2])
    refused(store, record(1, keys[2]), None, QuotaExceeded)
    store.put(record(1, SessionKey("another", "0")), None)
    store.put(record(1, keys[0]), None)  # a retry
    store.put(record(2, keys[0]), record(1).expect)
    assert store.delete(keys[0])
    store.put(record(1, keys[3]), None)
    assert store.usage("tenant").sessions == 2

    size = store.list("tenant")[0].bytes
    store = open_(quota=Quota(bytes=3 * size + 10), keep=2)
    assert store.usage("tenant") == Usage(2, 2 * size)
    store.put(record(2, keys[1]), record(1).expect)
    refused(store, record(2, keys[3]), record(1).expect, QuotaExceeded)
    store.put(record(3, keys[1]), record(2).expect)  # takes the place of version 1
    assert store.usage("tenant").bytes <= 3 * size + 10
    with pytest.raises(QuotaExceeded, match="bytes"):
        store.rollback(keys[3], 1, record(1).expect, "undo")
    store = open_(quota=Quota(bytes=1), keep=2)
    store.put(record(4, keys[1]), record(3).expect)  # it adds nothing
    refused(store, record(1, SessionKey("new", "new")), None, QuotaExceeded)
    for bad in ({"sessions": 0}, {"bytes": -1}):
        with pytest.raises(ValueError, match="at least 1"):
            Quota(**bad)
    with pytest.raises((ValueError, StoreError), match="keep 0"):
        open_(keep=0)


CHECKS: list[Check] = [
    keeps_the_last_versions,
    keeps_what_the_newest_writer_is_told_to,
    rolls_back_by_a_new_version,
    rolls_back_the_memory_and_not_the_attributes,
    rolls_back_only_from_the_expected_version,
    history_belongs_to_one_life,
    expires_idle_sessions,
    deletes_only_what_is_still_idle,
    counts_what_a_tenant_uses,
    enforces_quotas,
]
