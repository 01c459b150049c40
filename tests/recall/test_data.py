"""The dialogues: deterministic, split by combination, and right by construction."""

import itertools

from deltamem_vllm.recall.data import Shape, dialogues, is_heldout_pair
from deltamem_vllm.recall.facts import ATTRIBUTES, UNKNOWN
from deltamem_vllm.recall.sessions import heldout_sessions, is_right

SHAPE = Shape(facts=(2, 6), talk=(0, 4), early_ask=0.2, corrected=0.3)


def take(split, count=300, seed=3, shape=SHAPE):
    return list(itertools.islice(dialogues(seed, shape, split), count))


def pairs(dialogue):
    return {frozenset(p) for p in itertools.combinations(dialogue.facts(), 2)}


def test_same_seed_same_dialogues():
    assert take("train", 50) == take("train", 50)
    assert take("train", 50) != take("train", 50, seed=4)
    assert heldout_sessions(20) == heldout_sessions(20)


def test_training_never_holds_a_heldout_pair():
    for dialogue in take("train"):
        assert not any(is_heldout_pair(a, b) for a, b in map(tuple, pairs(dialogue)))


def test_every_heldout_fact_is_in_a_heldout_pair():
    for dialogue in take("heldout"):
        facts = dialogue.facts()
        assert all(any(is_heldout_pair(a, b) for b in facts) for a in facts)


def test_heldout_combinations_do_not_occur_in_training():
    trained = {frozenset(d.facts()) for d in take("train", 2000)}
    assert not trained & {frozenset(d.facts()) for d in take("heldout", 500)}


def test_every_single_fact_occurs_in_training():
    told = {f for d in take("train", 3000) for f in d.facts()}
    assert told == {(a.name, v) for a in ATTRIBUTES for v in a.values}


def test_replies_follow_from_what_was_told():
    for dialogue in take("train"):
        known = {}
        for turn in dialogue.turns:
            if turn.kind == "tell":
                known.update(turn.facts)
            if turn.kind == "ask":
                ((name, value),) = turn.facts
                assert known[name] == value
                assert is_right(turn.reply, value)
            if turn.kind == "ask_unknown":
                assert turn.facts[0][0] not in known
                assert turn.reply == UNKNOWN


def test_comparison_forgives_case_and_punctuation():
    assert is_right(" Red .\n", "red.")
    assert not is_right("red red.", "red.")
