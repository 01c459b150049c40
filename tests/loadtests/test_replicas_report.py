"""What a campaign says of the time from a kill to the next answer: how much of it is the machine's."""

from loadtests.chaos.ledger import Told
from loadtests.chaos.replicas import AFTERMATH, RESUME, Kill, Report, Size, undisturbed

KILL = 100.0


def told(sent: float, took: float) -> Told:
    return Told("s", 1, 1, "committed", 0, sent, sent + took)


def report(wait: float, others: list[Told]) -> Report:
    kill = Kill(0, KILL, waits=[0.1], probes=[wait])
    return Report(
        size=Size(), kills=[kill], seconds=1.0, acknowledged=1, unknown=0, answers={}, problems=[], faults=[],
        resumed=1, undisturbed=undisturbed(others, [KILL]),
    )  # fmt: skip


def test_answers_near_a_kill_say_nothing_of_how_long_one_takes() -> None:
    before, behind = told(KILL - 1, 0.5), told(KILL + AFTERMATH + 1, 0.7)
    near = [told(KILL - 1, 3.0), told(KILL + 1, 4.0), told(KILL + AFTERMATH - 1, 5.0), told(KILL - 1, AFTERMATH + 5)]
    assert undisturbed([before, *near], [KILL]) == 0.5
    assert round(undisturbed([before, behind, *near], [KILL]), 9) == 0.7
    assert undisturbed([before, behind], [KILL, KILL + 5]) == 0.5
    assert undisturbed([], [KILL]) == 0.0


def test_a_slow_machine_is_not_a_late_answer() -> None:
    assert report(2.7, [told(KILL - 1, 0.8)]).late(RESUME) == []
    assert report(2.7, [told(KILL - 1, 0.2)]).late(RESUME) == [2.7]
    assert report(2.7, []).late(RESUME) == [2.7]


def test_what_holds_up_everybody_after_a_kill_is_late() -> None:
    for stall in (2.5, 5.0, AFTERMATH, 3 * AFTERMATH):
        sent = [KILL - 20 + 0.25 * n for n in range(400)]  # nobody is answered until the stall is over
        others = [told(at, max(0.2, KILL + stall - at if at > KILL - 0.2 else 0.2)) for at in sent]
        assert report(stall + 0.2, others).late(RESUME) == [stall + 0.2]
