"""The slot table against what it stands for: a pool in which each slot holds the last state put there."""

import random
from collections import defaultdict

import pytest

from deltamem_vllm.sessions.slots import MAX_OWNERS, Place, SlotTable


def test_least_recently_used_goes_first() -> None:
    table = SlotTable(3)
    slots = {name: table.take(name, "mia").slot for name in "abc"}
    assert sorted(slots.values()) == [0, 1, 2]
    assert place_of(table, "a").slot == slots["a"]
    assert table.take("d", "mia").slot == slots["b"]
    assert table.find("b", "mia") is None
    assert table.take("e", "mia").slot == slots["c"]
    assert place_of(table, "a").slot == slots["a"]


def test_taking_a_name_again_overwrites_in_place() -> None:
    table = SlotTable(2)
    first, again = table.take("a", "mia"), table.take("a", "mia")
    assert again.slot == first.slot
    assert again.generation > first.generation, "its content changes"
    assert len(table) == 1


def test_rename_keeps_the_slot_and_its_generation() -> None:
    table = SlotTable(2)
    place = table.take("request", "mia")
    assert table.rename("request", "digest") is None
    assert table.find("request", "mia") is None
    assert table.find("digest", "mia") == place
    assert table.rename("never heard of", "x") is None
    assert table.find("x", "mia") is None


def test_rename_to_a_state_that_is_there_frees_the_second_slot() -> None:
    table = SlotTable(2)
    place = table.take("digest", "mia")
    second = table.take("request", "bo")
    freed = table.rename("request", "digest")
    assert freed is not None
    assert freed.slot == second.slot
    assert freed.generation > second.generation
    assert table.find("digest", "mia") == place
    assert table.take("next", "mia").slot == second.slot, "the doubled slot must be free again"
    assert table.find("digest", "mia") == place
    assert table.release("mia"), "the next state was hers alone"
    assert table.find("digest", "bo") == place, "it is his too"


def test_drop_says_which_slot_to_zero() -> None:
    table = SlotTable(2)
    place = table.take("a", "mia")
    freed = table.drop("a")
    assert freed is not None
    assert (freed.slot, freed.generation > place.generation) == (place.slot, True)
    assert table.drop("a") is None
    assert table.find("a", "mia") is None
    assert len(table) == 0
    assert table.release("mia") == []


def test_an_owner_that_goes_frees_every_slot_of_its_own() -> None:
    """Older versions, the window's base and the newest state; not what others own, not what was evicted."""
    table = SlotTable(4)
    places = {name: table.take(name, "mia") for name in ("v1", "v2", "base", "shared")}
    assert table.find("shared", "bo") == places["shared"]
    table.take("other", "bo")  # evicts v1
    freed = table.release("mia")
    assert {place.slot for place in freed} == {places["v2"].slot, places["base"].slot}
    assert table.find("v2", "mia") is None
    assert table.find("shared", "bo") == places["shared"]
    assert {place.slot for place in table.release("bo")} == {places["shared"].slot, places["v1"].slot}
    assert len(table) == 0
    assert not table._owners
    assert not table._names


def test_of_a_state_that_everybody_has_the_latest_owners_are_known() -> None:
    table = SlotTable(2)
    place = table.take("hello", 0)
    for owner in range(1, MAX_OWNERS + 1):
        assert table.find("hello", owner) == place
    assert table.owners == MAX_OWNERS
    assert table.find("hello", 1) == place, "known again, as the latest"
    assert table.release(0) == [], "the one that is not known any more takes nothing from the others"
    for owner in range(2, MAX_OWNERS + 1):
        assert table.release(owner) == []
    assert [freed.slot for freed in table.release(1)] == [place.slot]
    assert table.owners == 0


def test_a_pool_of_one_serves_everybody() -> None:
    table = SlotTable(1)
    for i in range(10):
        assert table.take(f"{i}", i).slot == 0
        assert place_of(table, f"{i}").slot == 0
        assert table.find(f"{i - 1}", "mia") is None
    table.rename("9", "digest")
    assert table.take("10", "mia").slot == 0
    table.rename("9", "digest")
    assert table.find("digest", "mia") is None


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_any_history_never_shows_a_foreign_state(slots: int) -> None:
    rng = random.Random(slots)
    table, pool = SlotTable(slots), ["nothing"] * slots
    owners: dict[str, set[str]] = defaultdict(set)
    generations: list[int] = [0] * slots
    last = 0

    def changed(place: Place, content: str) -> None:
        nonlocal last
        assert place.generation > last, "a generation must never come again, for no slot"
        last = generations[place.slot] = place.generation
        if pool[place.slot] != content:
            owners.pop(pool[place.slot], None)
        pool[place.slot] = content

    for _ in range(3000):
        name, owner = f"{rng.randrange(8)}", f"owner {rng.randrange(3)}"
        match rng.choice(["find", "take", "rename", "drop", "release"]):
            case "find":
                place = table.find(name, owner)
                assert (place is None) == (name not in pool)
                if place is not None:
                    assert (pool[place.slot], generations[place.slot]) == (name, place.generation)
                    owners[name].add(owner)
            case "take":
                changed(table.take(name, owner), name)
                owners[name].add(owner)
            case "rename":
                new = f"{rng.randrange(8)}"
                if new != name:
                    doubled, there = name in pool and new in pool, name in pool
                    freed = table.rename(name, new)
                    if there:
                        owners[new] |= owners.pop(name)
                    if there and not doubled:
                        pool[pool.index(name)] = new  # it turned out to be this state
                    assert (freed is not None) == doubled
                    if freed is not None:
                        assert pool[freed.slot] == name
                        changed(freed, "nothing")
            case "drop":
                freed = table.drop(name)
                assert (freed is None) == (name not in pool)
                if freed is not None:
                    assert pool[freed.slot] == name
                    changed(freed, "nothing")
            case "release":
                alone = {n for n in pool if owners.get(n) == {owner}}
                freed_names = set()
                for freed in table.release(owner):
                    freed_names.add(pool[freed.slot])
                    changed(freed, "nothing")
                assert freed_names == alone, "exactly what nobody else owns"
                for of_name in owners.values():
                    of_name.discard(owner)
        held = list(table._slots.values())
        assert len(set(held)) == len(held)
        assert sorted(held + table._free) == list(range(slots)), "a slot was lost or given out twice"
        assert {n: set(o) for n, o in table._owners.items()} == {n: o for n, o in owners.items() if n in pool}


def place_of(table: SlotTable, name: str) -> Place:
    place = table.find(name, "mia")
    assert place is not None
    return place
