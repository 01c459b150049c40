"""The commit thread: groups, per-item answers, closing, crashes."""

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from deltamem_vllm.errors import StaleVersion, StoreUnavailable
from deltamem_vllm.store import writer as writer_module
from deltamem_vllm.store.memory import MemoryStore
from deltamem_vllm.store.protocol import Expect, Outcomes, Put, SessionKey
from deltamem_vllm.store.sqlite import SQLiteStore
from deltamem_vllm.store.writer import CommitWriter
from tests.store import conformance
from tests.store.records import INCARNATION, KEY, record

WAIT = 20


class Gated(MemoryStore):
    """Commits when told to, and remembers the size of each group."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.entered = threading.Event()
        self.groups: list[int] = []
        self.fault: BaseException | None = None

    def put_many(self, puts: Sequence[Put]) -> Outcomes:
        self.groups.append(len(puts))
        self.entered.set()
        assert self.gate.wait(WAIT)
        if self.fault is not None:
            raise self.fault
        return super().put_many(puts)


@pytest.fixture
def gated() -> Iterator[Gated]:
    store = Gated()
    yield store
    store.gate.set()


def key(index: int) -> SessionKey:
    return SessionKey("tenant", f"{index}")


def test_commits_are_durable_and_ordered(tmp_path: Path) -> None:
    store = SQLiteStore(tmp_path / "s.db")
    writer = CommitWriter(store)
    futures = [writer.submit(record(1), None)]
    futures += [writer.submit(record(v), Expect(v - 1, INCARNATION)) for v in range(2, 30)]
    assert [future.result(WAIT) for future in futures] == [None] * 29
    assert writer.close(WAIT)
    assert writer.close(WAIT)
    stats = writer.stats
    assert (stats.commits, stats.failures, stats.pending) == (29, 0, 0)
    assert 1 <= stats.batches <= 29
    assert stats.seconds > 0
    store.close()
    again = SQLiteStore(tmp_path / "s.db")
    assert conformance.same(again.get(KEY), record(29))
    again.close()


def test_what_arrives_during_a_commit_is_one_group(gated: Gated) -> None:
    writer = CommitWriter(gated, max_batch=8)
    futures = [writer.submit(record(1, key(0)), None)]
    assert gated.entered.wait(WAIT)
    futures += [writer.submit(record(1, key(index)), None) for index in range(1, 11)]
    assert writer.stats.pending == 11
    assert not any(future.done() for future in futures)
    gated.gate.set()
    for future in futures:
        future.result(WAIT)
    assert gated.groups == [1, 8, 2]
    assert writer.close(WAIT)


def test_each_future_gets_its_own_outcome() -> None:
    writer = CommitWriter(MemoryStore())
    good, stale, other = (writer.submit(record(1, k, seed=s), None) for k, s in ((KEY, 0), (KEY, 1), (key(1), 0)))
    assert good.result(WAIT) is None
    assert isinstance(stale.exception(WAIT), StaleVersion)
    assert other.result(WAIT) is None
    assert writer.close(WAIT)
    assert (writer.stats.commits, writer.stats.failures) == (2, 1)


def test_a_cancelled_commit_is_not_made(gated: Gated) -> None:
    writer = CommitWriter(gated)
    first = writer.submit(record(1, key(0)), None)
    assert gated.entered.wait(WAIT)
    second, third = (writer.submit(record(1, key(index)), None) for index in (1, 2))
    assert second.cancel()
    assert not first.cancel(), "a commit in progress cannot be cancelled"
    gated.gate.set()
    third.result(WAIT)
    assert gated.get(key(1)) is None
    assert writer.close(WAIT)


def test_a_group_of_large_states_is_small(gated: Gated, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [record(1, key(index)) for index in range(8)]
    monkeypatch.setattr(writer_module, "MAX_BATCH_BYTES", 2 * (made[0].base.nbytes + made[0].end.nbytes))
    writer = CommitWriter(gated)
    futures = [writer.submit(made[0], None)]
    assert gated.entered.wait(WAIT)
    futures += [writer.submit(each, None) for each in made[1:]]
    gated.gate.set()
    assert writer.close(WAIT)
    assert [future.result(0) for future in futures] == [None] * 8
    assert gated.groups == [1, 2, 2, 2, 1]


def test_a_state_beyond_all_bounds_is_a_group(gated: Gated, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "MAX_BATCH_BYTES", 1)
    gated.gate.set()
    writer = CommitWriter(gated)
    futures = [writer.submit(record(1, key(index)), None) for index in range(3)]
    assert [future.result(WAIT) for future in futures] == [None] * 3
    assert writer.close(WAIT)


def test_close_answers_everything_that_waits(gated: Gated) -> None:
    writer = CommitWriter(gated, max_batch=2)
    futures = [writer.submit(record(1, key(index)), None) for index in range(7)]
    threading.Timer(0.05, gated.gate.set).start()
    assert writer.close(WAIT)
    assert [future.result(0) for future in futures] == [None] * 7
    with pytest.raises(StoreUnavailable, match="closed"):
        writer.submit(record(1, key(9)), None)


def test_close_gives_up_on_a_store_that_hangs(gated: Gated) -> None:
    writer = CommitWriter(gated)
    first = writer.submit(record(1, key(0)), None)
    assert gated.entered.wait(WAIT)
    second = writer.submit(record(1, key(1)), None)
    assert not writer.close(0.05)
    assert isinstance(second.exception(WAIT), StoreUnavailable)
    assert not first.done(), "its outcome is not known yet"
    gated.gate.set()
    assert first.result(WAIT) is None
    assert gated.get(key(1)) is None


def test_too_many_that_wait_are_refused(gated: Gated) -> None:
    writer = CommitWriter(gated, max_pending=3)
    writer.submit(record(1, key(0)), None)
    assert gated.entered.wait(WAIT)
    for index in range(1, 4):
        writer.submit(record(1, key(index)), None)
    with pytest.raises(StoreUnavailable, match="3 commits wait"):
        writer.submit(record(1, key(4)), None)
    gated.gate.set()
    assert writer.close(WAIT)


def test_a_store_that_raises_its_own_error_does_not_end_the_thread(gated: Gated) -> None:
    gated.gate.set()
    gated.fault = StoreUnavailable("unplugged")
    writer = CommitWriter(gated)
    assert writer.submit(record(1), None).exception(WAIT) is gated.fault
    gated.fault = None
    assert writer.submit(record(1), None).result(WAIT) is None
    assert writer.close(WAIT)


@pytest.mark.parametrize("fault", [ZeroDivisionError("bug"), SystemExit(3)])
def test_a_bug_answers_its_group_and_does_not_end_the_thread(gated: Gated, fault: BaseException) -> None:
    gated.fault = fault
    writer = CommitWriter(gated, max_batch=2)
    futures = [writer.submit(record(1, key(index)), None) for index in range(3)]
    gated.gate.set()
    for future in futures:
        error = future.exception(WAIT)
        assert isinstance(error, StoreUnavailable)
        assert type(fault).__name__ in str(error)
    assert writer.stats.failures == 3
    gated.fault = None
    assert writer.submit(record(1, key(9)), None).result(WAIT) is None
    assert writer.close(WAIT)


def test_a_bug_hits_the_one_commit_that_the_store_stumbles_over(gated: Gated) -> None:
    class Stumbling(Gated):
        """PLANTED BUG."""

        def put_many(self, puts: Sequence[Put]) -> Outcomes:
            outcomes = super().put_many(puts)  # the others of the group are stored before it stumbles
            if any(record.key == key(3) for record, _ in puts):
                raise ZeroDivisionError("bug")
            return outcomes

    store = Stumbling()
    writer = CommitWriter(store)
    first = writer.submit(record(1, key(0)), None)
    assert store.entered.wait(WAIT)
    futures = [writer.submit(record(1, key(index)), None) for index in range(1, 6)]
    store.gate.set()
    assert first.result(WAIT) is None
    answers = [future.exception(WAIT) for future in futures]
    assert [index for index, error in enumerate(answers, 1) if error is not None] == [3]
    assert writer.close(WAIT)
