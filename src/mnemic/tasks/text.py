"""Text as tokens for tasks that are made of sentences: closed vocabularies, bytes, or any Hugging Face tokenizer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from mnemic.tasks.base import Examples
from mnemic.training import IGNORED

WORD = re.compile(r"\w+|[^\w\s]|\n")


class Encoder(Protocol):
    """What a task asks of a tokenizer."""

    vocabulary: int
    pad: int

    def encode(self, text: str) -> list[int]:
        """Token ids of a sentence that follows others, without special tokens."""
        ...

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """What each token stands for."""
        ...


class Words:
    """A closed vocabulary: every word and mark of the texts it is made of is a token. 0 is padding.

    Upper and lower case are one. Raises `ValueError` for a word it does not know.
    """

    pad = 0

    def __init__(self, texts: Sequence[str]) -> None:
        self.words = ["<pad>", *sorted({word for text in texts for word in WORD.findall(text.lower())})]
        self.ids = {word: place for place, word in enumerate(self.words)}
        self.vocabulary = len(self.words)

    def encode(self, text: str) -> list[int]:
        """One token a word or mark."""
        try:
            return [self.ids[word] for word in WORD.findall(text.lower())]
        except KeyError as error:
            raise ValueError(f"{error.args[0]!r} is not in this vocabulary of {self.vocabulary} words") from None

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The words."""
        return [self.words[token] for token in ids]


class Bytes:
    """UTF-8 bytes, 0 .. 255; sentences are joined by spaces. 0 is padding."""

    pad, vocabulary = 0, 256

    def encode(self, text: str) -> list[int]:
        """A space, then the bytes."""
        return list(f" {text}".encode())

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The characters; bytes of others as numbers."""
        return [chr(token) if 32 <= token < 127 else "\n" if token == 10 else f"<{token}>" for token in ids]


class Pretrained:
    """A Hugging Face tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.vocabulary = tokenizer, len(tokenizer)
        pad = tokenizer.pad_token_id
        self.pad = int(pad if pad is not None else tokenizer.eos_token_id or 0)

    def encode(self, text: str) -> list[int]:
        """The tokens of a sentence inside a text."""
        # sentencepiece adds the space before a word itself, byte-level BPE wants it given
        bare, spaced = (
            self.tokenizer(each, add_special_tokens=False, verbose=False)["input_ids"] for each in (text, f" {text}")
        )
        return bare if len(bare) < len(spaced) else spaced

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """What the tokenizer calls each, spaces as such."""
        names = self.tokenizer.convert_ids_to_tokens(list(ids))
        return [str(name).replace("\u2581", " ").replace("\u0120", " ").replace("\u010a", "\n") for name in names]


def encoder(tokenizer: Any, texts: Sequence[str]) -> Encoder:
    """The encoder that `tokenizer` names: "words" for a closed vocabulary made of `texts`, "bytes", or one of Hugging
    Face.

    Raises:
        ValueError: another string.
    """
    if tokenizer == "words":
        return Words(texts)
    if tokenizer == "bytes":
        return Bytes()
    if isinstance(tokenizer, str):
        raise ValueError(f'tokenizer is {tokenizer!r}; use "words", "bytes" or a Hugging Face tokenizer')
    return Pretrained(tokenizer)


@dataclass
class Question:
    """A question in tokens, its answer, and the positions in the context that it rests on."""

    question: list[int]
    answer: list[int]
    evidence: list[int]
    extra: dict[str, int] = field(default_factory=dict)


@dataclass
class Story:
    """One stream: a context of whole segments, and the questions that follow it in the last segment."""

    context: list[int]
    questions: list[Question]
    facts: int


def assemble(stories: Sequence[Story], segment_length: int, pad: int) -> Examples:
    """Streams from stories with contexts of equal length: the context, then all questions with their answers in one
    more segment, then padding.

    Raises:
        ValueError: a context that is not whole segments, or questions that do not fit into one.
    """
    length = len(stories[0].context)
    if any(len(story.context) != length for story in stories) or length % segment_length:
        raise ValueError(f"contexts must be equally long and whole segments of {segment_length}")
    asked = max(len(story.questions) for story in stories)
    most = max(len(question.evidence) for story in stories for question in story.questions)
    rows, total = len(stories), length + segment_length
    ids, labels = torch.full((rows, total), pad), torch.full((rows, total), IGNORED)
    answer, evidence = torch.full((rows, total), -1), torch.full((rows, asked, most), -1)
    names = sorted({name for story in stories for question in story.questions for name in question.extra})
    extra = {name: torch.full((rows, asked), -1) for name in names}
    for row, story in enumerate(stories):
        ids[row, :length] = torch.tensor(story.context, dtype=torch.long)
        at = length
        for number, question in enumerate(story.questions):
            first = at + len(question.question)
            last = first + len(question.answer)
            if last > total:
                raise ValueError(
                    f"questions and answers of {last - length} tokens or more do not fit a segment of "
                    f"{segment_length}; use a longer segment_length"
                )
            ids[row, at:first] = torch.tensor(question.question, dtype=torch.long)
            ids[row, first:last] = labels[row, first:last] = torch.tensor(question.answer, dtype=torch.long)
            answer[row, first:last] = number
            evidence[row, number, : len(question.evidence)] = torch.tensor(question.evidence, dtype=torch.long)
            for name, value in question.extra.items():
                extra[name][row, number] = value
            at = last
    facts = torch.tensor([story.facts for story in stories])
    return Examples(ids, labels, answer, evidence, facts, extra)
