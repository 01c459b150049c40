"""What the demo says of its own conversation."""

from deltamem_vllm.demo.script import ASKED, TOLD
from deltamem_vllm.recall.data import Fact, belongs_to


def test_every_question_is_about_something_told_and_no_question_says_the_answer() -> None:
    told = " ".join(TOLD).lower()
    for question in ASKED:
        assert question.answer in told
        assert not any(other.answer in question.text.lower() for other in ASKED)


def test_the_facts_never_met_in_a_training_dialogue() -> None:
    facts: list[Fact] = [("name", "clara"), ("city", "rome"), ("pet", "turtle"), ("drink", "tea")]
    assert sorted(value for _, value in facts) == sorted(question.answer for question in ASKED)
    assert belongs_to(facts, "heldout")
    assert not belongs_to(facts, "train")
