"""Hypothesis drives every store against a model of a few lines: random commits, retries, stale writers,
deletions, rollbacks, expiry and restarts."""

import itertools
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from msgspec import structs

from deltamem_vllm.errors import QuotaExceeded, StaleVersion, StoreError, VersionNotKept
from deltamem_vllm.store import codec, ledger
from deltamem_vllm.store.codec import encode
from deltamem_vllm.store.crypto import SealedCodec
from deltamem_vllm.store.memory import MemoryStore
from deltamem_vllm.store.postgres import PostgresStore
from deltamem_vllm.store.protocol import Expect, Quota, Record, SessionKey, StateStore, Usage, new_incarnation
from deltamem_vllm.store.redis import RedisStore
from deltamem_vllm.store.sqlite import SQLiteStore
from tests.conftest import NIGHTLY
from tests.store import conformance
from tests.store.records import record
from tests.store.test_crypto import A

RUNS = 5000 if NIGHTLY else 15
STEPS = 25
KEEP = 3
QUOTA = Quota(sessions=2)
NAMES = ("a", "b", "c")
_tenants = itertools.count()

Make = Callable[[], StateStore]
names = st.sampled_from(NAMES)


class Machine(RuleBasedStateMachine):
    """The model: per session, all versions of its present life, oldest first."""

    make: Make

    def __init__(self) -> None:
        super().__init__()
        self.tenant = f"tenant-{os.getpid()}-{next(_tenants)}"
        self.store = self.make()
        self.model: dict[str, list[Record]] = {}
        self.dead: list[Record] = []
        self.clock = 1000.0
        self.requests = itertools.count()

    def teardown(self) -> None:
        for name in NAMES:
            self.store.delete(self.key(name))
        self.store.close()

    def key(self, name: str) -> SessionKey:
        return SessionKey(self.tenant, name)

    def next(self, name: str, seed: int) -> tuple[Record, Expect | None]:
        """What a right writer would commit now."""
        last = self.model[name][-1] if name in self.model else None
        self.clock += 1
        made = record(
            last.version + 1 if last else 1,
            self.key(name),
            seed=seed,
            layout="L1H1r2",
            incarnation=last.incarnation if last else new_incarnation(),
            request_id=f"r{next(self.requests)}",
            updated_at=self.clock,
        )
        return made, last.expect if last else None

    def fits(self, name: str) -> bool:
        return name in self.model or len(self.model) < 2

    @rule(name=names, seed=st.integers(0, 9), retries=st.integers(0, 2))
    def commit(self, name: str, seed: int, retries: int) -> None:
        made, expect = self.next(name, seed)
        if not self.fits(name):
            with pytest.raises(QuotaExceeded):
                self.store.put(made, expect)
            return
        for _ in range(retries + 1):
            self.store.put(made, expect)
        self.model.setdefault(name, []).append(made)

    @rule(chosen=st.lists(names, min_size=1, max_size=5), twice=st.booleans())
    def commit_group(self, chosen: list[str], twice: bool) -> None:
        puts, expected = [], []
        for name in chosen:
            puts.append(self.next(name, 1))
            expected.append(self.fits(name))
            if expected[-1]:
                self.model.setdefault(name, []).append(puts[-1][0])
        for _ in range(1 + (twice and len(chosen) <= KEEP)):
            kinds = [type(each) for each in self.store.put_many(puts)]
            # a name over the quota is new in each of its puts
            assert kinds == [type(None) if fits else QuotaExceeded for fits in expected]

    @precondition(lambda self: any(len(each) > 1 for each in self.model.values()))
    @rule(data=st.data())
    def stale_writer(self, data: Any) -> None:
        name = data.draw(st.sampled_from([each for each, made in self.model.items() if len(made) > 1]))
        old = data.draw(st.sampled_from(self.model[name][:-1]))
        made = structs.replace(old, version=old.version + 1, request_id=f"r{next(self.requests)}")
        with pytest.raises(StaleVersion):
            self.store.put(made, old.expect)

    @precondition(lambda self: bool(self.dead))
    @rule(data=st.data())
    def owner_of_an_erased_session(self, data: Any) -> None:
        old = data.draw(st.sampled_from(self.dead))
        made = structs.replace(old, version=old.version + 1, request_id=f"r{next(self.requests)}")
        with pytest.raises(StaleVersion):
            self.store.put(made, old.expect)

    @precondition(lambda self: bool(self.model))
    @rule(data=st.data())
    def late_retry(self, data: Any) -> None:
        made = data.draw(st.sampled_from(self.model[data.draw(st.sampled_from(sorted(self.model)))]))
        expect = Expect(made.version - 1, made.incarnation) if made.version > 1 else None
        if made in self.model[made.key.session][-KEEP:]:
            self.store.put(made, expect)
        else:
            with pytest.raises(StaleVersion):
                self.store.put(made, expect)

    @rule(name=names)
    def delete(self, name: str) -> None:
        assert self.store.delete(self.key(name)) == (name in self.model)
        self.dead += self.model.pop(name, [])[-1:]

    @precondition(lambda self: bool(self.model))
    @rule(data=st.data(), back=st.integers(0, 4))
    def roll_back(self, data: Any, back: int) -> None:
        name = data.draw(st.sampled_from(sorted(self.model)))
        versions = self.model[name]
        last = versions[-1]
        request = f"r{next(self.requests)}"
        if not 0 <= back < min(KEEP, len(versions)):
            with pytest.raises(VersionNotKept):
                self.store.rollback(last.key, last.version - back, last.expect, request)
            return
        made = self.store.rollback(last.key, last.version - back, last.expect, request)
        old = versions[-1 - back]
        new = {"version": last.version + 1, "request_id": request, "updated_at": made.updated_at}
        wanted = structs.replace(old, attributes=last.attributes, **new)
        assert encode(made) == encode(wanted)
        self.store.rollback(last.key, last.version - back, last.expect, request)
        versions.append(made)

    @rule(idle=st.integers(0, 5), limit=st.integers(0, 3))
    def expire(self, idle: int, limit: int) -> None:
        due = [name for name, made in self.model.items() if made[-1].updated_at <= self.clock - idle]
        due = sorted(due, key=lambda name: self.model[name][-1].updated_at)[:limit]
        assert self.store.expire(self.clock, float(idle), limit) == len(due)
        for name in due:
            self.dead += self.model.pop(name)[-1:]

    @rule()
    def restart(self) -> None:
        if not isinstance(self.store, MemoryStore):
            self.store.close()
            self.store = self.make()

    @invariant()
    def agrees(self) -> None:
        for name in NAMES:
            found, versions = self.store.get(self.key(name)), self.model.get(name, [])
            assert (found is None) == (not versions)
            assert found is None or conformance.same(found, versions[-1])
            kept = versions[-KEEP:][::-1]
            infos = self.store.history(self.key(name))
            assert [(i.version, i.incarnation) for i in infos] == [(r.version, r.incarnation) for r in kept]
            for each in kept:
                assert conformance.same(self.store.get_version(each.key, each.version), each)
        assert [info.key.session for info in self.store.list(self.tenant)] == sorted(self.model)
        sizes = [conformance.size_in(self.store, each) for made in self.model.values() for each in made[-KEEP:]]
        assert self.store.usage(self.tenant) == Usage(len(self.model), sum(sizes))


def run(make: Make, runs: int = RUNS, phases: tuple[Phase, ...] = tuple(Phase)) -> None:
    machine = type("Run", (Machine,), {"make": staticmethod(make)})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=runs,
            stateful_step_count=STEPS,
            deadline=None,
            derandomize=not NIGHTLY,
            database=None,
            phases=phases,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.timeout(20_000)
@pytest.mark.parametrize("kind", ["sqlite", "sealed", "memory", "postgres", "redis"])
def test_agrees_with_the_model(kind: str, memory_path: Path, request: pytest.FixtureRequest) -> None:
    options: dict[str, Any] = {"keep": KEEP, "quota": QUOTA}
    make: Make
    if kind == "postgres":
        make = partial(PostgresStore, request.getfixturevalue("postgres_url"), **options)
    elif kind == "redis":
        url, namespace = request.getfixturevalue("redis_place")
        make = partial(RedisStore, url, namespace=namespace, **options)
    elif kind == "memory":
        make = partial(MemoryStore, **options)
    else:
        sealed = SealedCodec(A) if kind == "sealed" else codec.PLAIN
        make = partial(SQLiteStore, memory_path / "s.db", codec=sealed, **options)
    run(make)
    print(f"{kind}: {RUNS} runs of up to {STEPS} steps agree with the model")


@pytest.mark.parametrize("bug", ["keep", "quota", "kept"])
def test_model_catches(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PLANTED BUGS: one version too many is kept; the quota is not enforced; a late retry is not known."""
    real = ledger.decide

    def wrong(record: Any, expect: Any, size: int, view: ledger.View, usage: Any, quota: Any, keep: int) -> Any:
        if bug == "kept":
            newest = view.head[0] if view.head else 0
            view = view._replace(kept={v: (r if v == newest else "?", s) for v, (r, s) in view.kept.items()})
        return real(record, expect, size, view, usage, Quota() if bug == "quota" else quota, keep + (bug == "keep"))

    monkeypatch.setattr("deltamem_vllm.store.memory.decide", wrong)
    with pytest.raises((AssertionError, StoreError, pytest.fail.Exception)):
        run(partial(MemoryStore, keep=KEEP, quota=QUOTA), 100, (Phase.generate,))
