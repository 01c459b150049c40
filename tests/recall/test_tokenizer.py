"""The tokenizer as a server loads it."""

import itertools

import pytest
from transformers import AutoTokenizer

from deltamem_vllm.recall import MODEL_DIR
from deltamem_vllm.recall.data import Shape, dialogues
from deltamem_vllm.recall.tokenizer import END, UNK, build, vocabulary
from deltamem_vllm.recall.windows import lay_out


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_DIR)


def test_shipped_tokenizer_is_the_one_that_is_built(tokenizer):
    assert tokenizer.get_vocab() == build().get_vocab()
    assert len(vocabulary()) == len(set(vocabulary())) == len(tokenizer)
    assert tokenizer.eos_token == END


def test_generated_text_has_no_strangers_and_reads_back(tokenizer):
    for dialogue in itertools.islice(dialogues(5, Shape(), "heldout"), 50):
        for message in dialogue.messages():
            ids = tokenizer(message["content"])["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == message["content"]


def test_resent_history_gives_the_same_ids(tokenizer):
    """prompt + reply + closing of one request is a prefix of the next request's prompt."""
    dialogue = next(dialogues(6, Shape(), "train"))
    messages, fed = dialogue.messages(), []
    for at in range(0, len(messages), 2):
        prompt = tokenizer.apply_chat_template(messages[: at + 1], add_generation_prompt=True)["input_ids"]
        assert prompt[: len(fed)] == fed
        fed = prompt + tokenizer(messages[at + 1]["content"] + "<|im_end|>\n")["input_ids"]


def test_training_rows_are_the_rendered_chat(tokenizer):
    dialogue = next(dialogues(7, Shape(), "train"))
    rendered = tokenizer.apply_chat_template(dialogue.messages())["input_ids"]
    assert lay_out(dialogue, "chat").ids == rendered[:-2]
    windows = lay_out(dialogue, "turns")
    assert max(windows.windows) + 1 == len(dialogue.turns)
    before = [-1, *windows.windows[:-1]]
    starts = [p for p, w, b in zip(windows.positions, windows.windows, before, strict=True) if w != b]
    assert starts == [0] * len(dialogue.turns)


def test_typing_is_forgiven(tokenizer):
    assert tokenizer("My  favorite color is RED.")["input_ids"] == tokenizer("my favorite color is red .")["input_ids"]
    assert tokenizer("zebra")["input_ids"] == [tokenizer.convert_tokens_to_ids(UNK)]
