"""What the tests of recall share: tokenizers, both forms of the task, and what stands in a row."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mnemic.tasks.facts import NAMES, THINGS, LanguageRecall, SymbolRecall

PROSE = "once there was a big red house and it stood near the old sea . "
WORDS = ["[UNK]", *PROSE.split(), *NAMES, *THINGS, "has"]
CONTROLS = {"zeroed", "other stream", "fresh", "no memory"}


def by_words():
    """A token a word."""
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def by_letters(*merges):
    """A token a letter, spaces too, but for these merges."""
    letters = sorted({letter for word in [*WORDS, " .", *"[]"] for letter in word})
    vocabulary = {token: index for index, token in enumerate([*letters, *("".join(pair) for pair in merges)])}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocabulary, list(merges))))


def language(tokenizer=None, segment_length=64, **more):
    return LanguageRecall(tokenizer or by_words(), PROSE * 40, segment_length, **more)


def tasks():
    return [SymbolRecall(), language(), language(by_letters())]


every_task = pytest.mark.parametrize("task", tasks(), ids=["symbols", "words", "letters"])


def contains(row, part):
    """At how many places `part` stands in `row`."""
    return sum(row[i : i + len(part)] == part for i in range(len(row) - len(part) + 1))


def pairs_of(task, row):
    """The facts a segment tells, in their order."""
    if isinstance(task, SymbolRecall):
        return [(row[i] - 4, row[i + 1] - 20) for i in range(len(row) - 1) if 4 <= row[i] < 20]
    sentences = [(k, v, fact) for k, facts in enumerate(task.facts) for v, fact in enumerate(facts)]
    places = [(i, k, v) for k, v, fact in sentences for i in range(len(row)) if row[i : i + len(fact)] == fact]
    return [(k, v) for _, k, v in sorted(places)]


def is_key(ids):
    return (ids >= 4) & (ids < 20)


def is_value(ids):
    return (ids >= 20) & (ids < 36)
