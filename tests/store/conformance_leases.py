"""What leases must do in every store that has them; see ``conformance`` for how checks are called. Each store that the
factory opens is another holder. It takes the option ``lease_seconds`` of the store's constructor.
"""

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from deltamem_vllm.errors import LeaseLost, StaleVersion
from deltamem_vllm.store.leases import Lease
from deltamem_vllm.store.protocol import Record, SessionKey
from tests.store.conformance import same
from tests.store.records import KEY, record

Open = Callable[..., Any]
Check = Callable[[Open], None]
OTHER = SessionKey("tenant", "other")
LONG = 60.0


def until(what: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait for a condition."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def kept_out(store: Any, made: Record) -> None:
    """``put`` is refused by another's lease, alone and in a group, and writes nothing."""
    expect = record(made.version - 1).expect if made.version > 1 else None
    before = store.get(made.key)
    with pytest.raises(LeaseLost, match=r"being written by another server, whose lease runs for \d+\.\d s more"):
        store.put(made, expect)
    outcomes = store.put_many([(made, expect)])
    assert isinstance(outcomes[0], StaleVersion)
    after = store.get(made.key)
    assert (after is None and before is None) or same(after, before)


def has_one_holder(open_: Open) -> None:
    a, b = open_(lease_seconds=LONG).leases, open_(lease_seconds=LONG).leases
    assert a.holder != b.holder
    for _ in range(2):  # taking it again is renewing it
        lease = a.acquire(KEY)
        assert lease.ours
        assert LONG - 5 < lease.seconds <= LONG
        refused = b.acquire(KEY)
        assert not refused.ours
        assert LONG - 5 < refused.seconds <= LONG
    assert b.acquire(OTHER).ours, "another session is another lease"
    assert b.acquire(SessionKey("another tenant", KEY.session)).ours
    assert a.renew([KEY, OTHER]) == [OTHER]
    a.release([KEY, OTHER])
    assert b.acquire(KEY).ours
    assert not a.acquire(OTHER).ours


def leaves_others_alone(open_: Open) -> None:
    a, b = open_(lease_seconds=LONG).leases, open_(lease_seconds=LONG).leases
    a.acquire(KEY)
    b.release([KEY, OTHER])
    assert not b.acquire(KEY).ours, "a lease was released by somebody who does not hold it"
    assert b.renew([KEY]) == [KEY]
    assert a.renew([KEY]) == []
    a.release([])
    assert a.renew([]) == []


def ends_by_itself(open_: Open) -> None:
    a, b = open_(lease_seconds=0.4).leases, open_(lease_seconds=LONG).leases
    start = time.monotonic()
    a.acquire(KEY)
    until(lambda: b.acquire(KEY).ours)
    assert time.monotonic() - start > 0.39, "it ended early"
    assert not a.acquire(KEY).ours
    assert a.renew([KEY]) == [KEY]


def is_renewed(open_: Open) -> None:
    a, b = open_(lease_seconds=LONG).leases, open_(lease_seconds=LONG).leases
    a.acquire(KEY)
    until(lambda: b.acquire(KEY).seconds < LONG - 0.2)
    left = b.acquire(KEY).seconds
    assert a.renew([KEY, OTHER]) == []
    assert left < b.acquire(KEY).seconds <= LONG
    assert not b.acquire(OTHER).ours, "renewing takes what was lost"


def keeps_other_writers_out(open_: Open) -> None:
    a, b = open_(lease_seconds=LONG), open_(lease_seconds=LONG)
    assert a.leases.acquire(KEY).ours
    kept_out(b, record(1))
    a.put(record(1), None)
    kept_out(b, record(2))
    with pytest.raises(LeaseLost):
        b.rollback(KEY, 1, record(1).expect, "request")
    outcomes = b.put_many(
        [(record(1, OTHER), None), (record(2), record(1).expect), (record(2, OTHER), record(1).expect)]
    )
    assert [type(outcome) for outcome in outcomes] == [type(None), LeaseLost, type(None)]
    a.leases.release([KEY])
    b.put(record(2), record(1).expect)
    assert b.usage("tenant").sessions == 2


def keeps_a_paused_holder_out(open_: Open) -> None:
    """Its lease ran out while it did not run; another took over; and once that is done versions decide alone."""
    a, b = open_(lease_seconds=0.3), open_(lease_seconds=LONG)
    a.leases.acquire(KEY)
    until(lambda: bool(b.leases.acquire(KEY).ours))
    kept_out(a, record(1))
    b.leases.release([KEY])
    a.put(record(1), None)
    with pytest.raises(StaleVersion) as caught:
        b.put(record(1, seed=1), None)
    assert not isinstance(caught.value, LeaseLost)


def lets_a_holder_whose_lease_ran_out_commit(open_: Open) -> None:
    a, b = open_(lease_seconds=0.1), open_(lease_seconds=LONG)
    assert a.leases.acquire(KEY).ours
    time.sleep(0.2)  # nobody else wants it
    a.put(record(1), None)
    b.put(record(2), record(1).expect)


def recognises_what_is_stored(open_: Open) -> None:
    """A commit whose answer was lost is sent again, and is there, whoever holds the lease now."""
    a, b = open_(lease_seconds=LONG), open_(lease_seconds=LONG)
    a.put(record(1), None)
    assert b.leases.acquire(KEY).ours
    a.put(record(1), None)
    b.put(record(2), record(1).expect)
    a.put(record(1), None)
    assert same(a.get(KEY), record(2))


def does_not_hinder_a_deletion(open_: Open) -> None:
    a, b = open_(lease_seconds=LONG), open_(lease_seconds=LONG)
    a.put(record(1), None)
    assert a.leases.acquire(KEY).ours
    assert b.delete(KEY)
    with pytest.raises(StaleVersion, match="does not exist"):
        a.put(record(2), record(1).expect)
    assert b.leases.acquire(KEY).ours, "whoever starts the session anew waits for nobody"
    a.leases.release([KEY])
    assert not a.leases.acquire(KEY).ours


def says_who_waits(open_: Open) -> None:
    a, b = open_(lease_seconds=LONG).leases, open_(lease_seconds=LONG).leases
    assert a.acquire(KEY).wanted is False
    assert b.acquire(KEY).wanted is False
    assert a.acquire(KEY).wanted is True
    until(lambda: not a.acquire(KEY).wanted, 10)


def can_be_switched_off(open_: Open) -> None:
    a, off = open_(lease_seconds=LONG), open_(lease_seconds=0)
    assert off.leases is None
    off.put(record(1), None)
    a.leases.acquire(KEY)
    kept_out(off, record(2))


def knows_one_clock(open_: Open) -> None:
    """The second server's clock is an hour ahead, the third's an hour behind."""
    a = open_(lease_seconds=LONG).leases
    assert a.acquire(KEY).ours
    for skew in (3600.0, -3600.0):
        real = time.time
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(time, "time", lambda real=real, skew=skew: real() + skew)
            other = open_(lease_seconds=LONG).leases
            assert not other.acquire(KEY).ours
            assert other.acquire(OTHER).ours
        assert a.renew([KEY]) == []
        assert not a.acquire(OTHER).ours
        other.release([OTHER])


def excludes_eight_threads(open_: Open) -> None:
    stores = [open_(lease_seconds=LONG) for _ in range(8)]
    inside: list[int] = []
    done: list[int] = []
    wrong: list[Any] = []

    def work(index: int) -> None:
        leases = stores[index].leases
        try:
            for _ in range(10):
                until(lambda: bool(leases.acquire(KEY).ours), 60)
                inside.append(index)
                time.sleep(0.001)
                wrong.extend(inside[1:])
                inside.remove(index)
                leases.release([KEY])
            done.append(index)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(done) == 8


def does_not_deadlock(open_: Open) -> None:
    """Groups of leases in any order, beside groups of commits."""
    stores = [open_(lease_seconds=LONG) for _ in range(4)]
    keys = [SessionKey(f"t{index % 3}", f"s{index}") for index in range(8)]
    wrong: list[Any] = []

    def work(index: int) -> None:
        try:
            for turn in range(15):
                mine = [keys[(index + 3 * turn + 5 * each) % 8] for each in range(5)]
                start = time.monotonic()
                stores[index].leases.renew(mine)
                stores[index].put_many([(record(1, key, layout="L1H1r2", seed=index), None) for key in mine])
                stores[index].leases.release(mine[::-1])
                if time.monotonic() - start > 10:
                    wrong.append(f"it took {time.monotonic() - start:.1f} s")
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    leases = stores[0].leases
    assert leases.renew(keys) == [], "somebody kept a lease that was released"
    assert isinstance(leases.acquire(keys[0]), Lease)


CHECKS: tuple[Check, ...] = (
    has_one_holder,
    leaves_others_alone,
    ends_by_itself,
    is_renewed,
    keeps_other_writers_out,
    keeps_a_paused_holder_out,
    lets_a_holder_whose_lease_ran_out_commit,
    recognises_what_is_stored,
    does_not_hinder_a_deletion,
    says_who_waits,
    can_be_switched_off,
    knows_one_clock,
    excludes_eight_threads,
    does_not_deadlock,
)
