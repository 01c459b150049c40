"""The slot table against what it stands for: a pool in which each slot holds the last state put there."""

import random

import pytest

from deltamem_vllm.sessions.slots import SlotTable


def test_least_recently_used_goes_first() -> None:
    table = SlotTable(3)
    slots = {name: table.take(name) for name in "abc"}
    assert sorted(slots.values()) == [0, 1, 2]
    assert table.find("a") == slots["a"]
    assert table.take("d") == slots["b"]
    assert table.find("b") is None
    assert table.take("e") == slots["c"]
    assert table.find("a") == slots["a"]


def test_taking_a_name_again_overwrites_in_place() -> None:
    table = SlotTable(2)
    first = table.take("a")
    assert table.take("a") == first
    assert len(table) == 1


def test_rename() -> None:
    table = SlotTable(2)
    slot = table.take("request")
    table.rename("request", "digest")
    assert table.find("request") is None
    assert table.find("digest") == slot
    table.rename("never heard of", "x")
    assert table.find("x") is None


def test_rename_to_a_state_that_is_there_frees_the_second_slot() -> None:
    table = SlotTable(2)
    slot = table.take("digest")
    second = table.take("request")
    table.rename("request", "digest")
    assert table.find("digest") == slot
    assert table.take("next") == second, "the doubled slot must be free again"
    assert table.find("digest") == slot


def test_drop_says_which_slot_to_zero() -> None:
    table = SlotTable(2)
    slot = table.take("a")
    assert table.drop("a") == slot
    assert table.drop("a") is None
    assert table.find("a") is None
    assert len(table) == 0


def test_a_pool_of_one_serves_everybody() -> None:
    table = SlotTable(1)
    for i in range(10):
        assert table.take(f"{i}") == 0
        assert table.find(f"{i}") == 0
        assert table.find(f"{i - 1}") is None
    table.rename("9", "digest")
    assert table.take("10") == 0
    table.rename("9", "digest")
    assert table.find("digest") is None


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_any_history_never_shows_a_foreign_state(slots: int) -> None:
    rng = random.Random(slots)
    table, pool = SlotTable(slots), ["nothing"] * slots
    for _ in range(3000):
        name = f"{rng.randrange(8)}"
        match rng.choice(["find", "take", "rename", "drop"]):
            case "find":
                slot = table.find(name)
                assert slot is None or pool[slot] == name
            case "take":
                pool[table.take(name)] = name
            case "rename":
                new = f"{rng.randrange(8)}"
                if new != name:
                    slot, taken = table.find(name), table.find(new)
                    table.rename(name, new)
                    if slot is not None and taken is None:
                        pool[slot] = new  # it turned out to be this state
            case "drop":
                slot = table.drop(name)
                if slot is not None:
                    assert pool[slot] == name
                    pool[slot] = "nothing"
        held = list(table._by_digest.values())
        assert len(set(held)) == len(held)
        assert sorted(held + table._free) == list(range(slots)), "a slot was lost or given out twice"
