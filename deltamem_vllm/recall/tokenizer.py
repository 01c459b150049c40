"""The word-level tokenizer of the recall model and its ChatML template."""

from __future__ import annotations

import re
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .facts import ATTRIBUTES, EXTRA_WORDS, NOTED, OPENERS, SMALL_TALK, UNKNOWN

UNK, PAD, START, END = "<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"

CHAT_TEMPLATE = (
    "{%- for message in messages -%}\n"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}\n"
    "{%- endfor -%}\n"
    "{%- if add_generation_prompt -%}\n"
    "{{- '<|im_start|>assistant\\n' -}}\n"
    "{%- endif -%}\n"
)


def vocabulary() -> list[str]:
    """Every token, special ones first; the order is fixed by the fact tables."""
    texts = [t.format(v=" ") for a in ATTRIBUTES for t in (*a.statements, *a.questions, *a.values)]
    texts += [t for pair in SMALL_TALK for t in pair]
    texts += [*OPENERS, NOTED, UNKNOWN, EXTRA_WORDS, ". , ? !"]
    words = dict.fromkeys(w for t in texts for w in re.findall(r"\w+|[^\w\s]", t))
    return [UNK, PAD, START, END, "user", "assistant", "\n", *words]


def build() -> PreTrainedTokenizerFast:
    """Lower-cases, splits on blanks and punctuation, keeps line breaks, maps strangers to <unk>."""
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary())}, unk_token=UNK))
    core.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n"), "isolated"),
            pre_tokenizers.Split(Regex(r"[^\S\n]+"), "removed"),
            pre_tokenizers.Punctuation("isolated"),
        ]
    )
    core.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token=UNK,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[START],
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def save(folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    build().save_pretrained(folder)
