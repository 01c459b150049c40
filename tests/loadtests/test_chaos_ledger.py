"""The check of what clients were told finds every planted fault, and nothing where there is none."""

import dataclasses

import pytest

from loadtests.chaos.ledger import Kind, Ledger, Told, Version, check
from loadtests.chaos.scripts import ANSWER, NEW, Script
from loadtests.chaos.soak import Report, Sample, Size, rise


def told(turn: int, version: int, status: str = "committed") -> Told:
    return Told("s", turn, version, status, 0, 0.0, 0.0)


def ledger(*entries: Told, unknown: int | None = None) -> Ledger:
    """A ledger of one session; ``unknown`` is a turn that was sent once more than it was answered."""
    made = Ledger()
    made.told["s"] = list(entries)
    if unknown is not None:
        made.unknown["s"][unknown] += 1
    return made


def version(number: int, turn: int | None, request: str = "", incarnation: str = "a") -> Version:
    return Version(number, incarnation, request or f"r{number}", turn)


WELL = ledger(told(1, 1), told(2, 2), told(3, 4), unknown=3)
"""Three turns; the third was sent twice, and both were applied, the second in place of the first."""
STORED = [version(1, 1), version(2, 2), version(3, 3), version(4, 3)]


def kinds(made: Ledger, there: list[Version]) -> set[Kind]:
    return {problem.kind for problem in check(made, {"s": there})}


def test_nothing_is_wrong_with_what_is_right() -> None:
    assert check(WELL, {"s": STORED}) == []
    assert check(ledger(told(1, 1), unknown=2), {"s": STORED[:1]}) == [], "a request that nobody was told of was lost"
    assert check(ledger(told(1, 1), unknown=2), {"s": STORED[:2]}) == [], "or was applied"
    assert check(Ledger(), {}) == []


@pytest.mark.parametrize(
    ("planted", "there", "kind"),
    [
        ("the newest version is gone", STORED[:3], "lost"),
        ("everything is gone", [], "lost"),
        ("a version in between is gone", [STORED[0], *STORED[2:]], "lost"),
        ("a version was overwritten by another turn's", [*STORED[:3], version(4, 2)], "lost"),
        ("the session began again", [*STORED[:3], version(4, 3, incarnation="b")], "fork"),
        ("a number was left out", [*STORED, version(6, 3)], "fork"),
        ("an older turn came over a later one", [*STORED, version(5, 2)], "fork"),
        ("a turn was applied once more than it was sent", [*STORED, version(5, 3)], "applied twice"),
        ("one request made two versions", [*STORED[:3], version(4, 3, "r3")], "applied twice"),
        ("the memory holds a turn twice", [*STORED[:3], version(4, None)], "unknown memory"),
    ],
)
def test_a_planted_fault_of_the_store_is_found(planted: str, there: list[Version], kind: Kind) -> None:
    assert kind in kinds(WELL, there), planted


def test_an_answer_that_was_forged_is_found() -> None:
    forged = [*WELL.told["s"][:2], told(3, 5)]
    assert kinds(ledger(*forged, unknown=3), STORED) == {"lost"}
    twice = [*WELL.told["s"], told(4, 4)]
    assert "fork" in kinds(ledger(*twice, unknown=3), STORED)


def test_a_degraded_version_counts_like_any_other() -> None:
    entries = [dataclasses.replace(each, status="degraded") for each in WELL.told["s"]]
    assert kinds(ledger(*entries, unknown=3), STORED[:3]) == {"lost"}


def test_a_script_says_the_same_each_time() -> None:
    new, resent = Script(2), Script(3)
    assert new.prompt(4) == new.new(4) != new.prompt(3)
    assert len(resent.prompt(4)) == 4 * NEW + 3 * ANSWER
    assert resent.prompt(4)[: len(resent.prompt(3))] == resent.prompt(3)
    assert resent.body(4, "m") == Script(3).body(4, "m")


@pytest.mark.parametrize(("leak", "handles", "flat"), [(0.0, 0.0, True), (0.1, 0.0, False), (0.0, 0.02, False)])
def test_what_grows_is_seen(leak: float, handles: float, flat: bool) -> None:
    """100 MiB that move up and down by 2, and a leak in every second; growth within the warm-up is none."""
    size = Size(seconds=600, warm=200)
    samples = [Sample(t, 100 + min(t, 150) + 2 * (t % 3) + leak * t, 50 + int(handles * t), 10 * t) for t in range(600)]
    report = Report(size, samples)
    assert report.flat == flat
    assert abs(rise(report.after, "rss") - 399 * leak) < 1
