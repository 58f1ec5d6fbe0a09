"""Text as tokens for tasks that are made of sentences: closed vocabularies, bytes, or any Hugging Face tokenizer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from mnemic.tasks.base import Examples
from mnemic.unrolling import IGNORED

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
        # sentencepiece adds the space before a word itself, byte-level BPE wants it given
        bare, spaced = self._ids("dog"), self._ids(" dog")
        self.wants_space = spaced[-len(bare) :] != bare

    def encode(self, text: str) -> list[int]:
        """The tokens of a sentence inside a text."""
        return self._ids(f" {text}" if self.wants_space else text)

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` for many at once, which is quicker."""
        given = [f" {text}" if self.wants_space else text for text in texts]
        return self.tokenizer(given, add_special_tokens=False, verbose=False)["input_ids"] if given else []

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

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


# --- tokens and text -------------------------------------------------------------------------------------------------

UNSEEN = "\U0010ffff"
"""Stands for a token that is not seen, in a `string` of tokens."""


def word_list(text: str) -> tuple[str, ...]:
    """The words of a text with spaces between."""
    return tuple(text.split())


def string(tokens: Sequence[int]) -> str:
    """A character for each token: strings are searched faster than lists or tensors."""
    return "".join(map(chr, tokens))


def runs(flags: Sequence[bool]) -> list[tuple[int, int]]:
    """Where each run of true places begins and ends, such as the answers of a row, of which no two touch."""
    return [match.span() for match in re.finditer(b"\1+", bytes(flags))]


def write(into: Tensor, run: tuple[int, int], tokens: Sequence[int]) -> None:
    """Writes an answer into a row `[t]` where it is asked for. What does not fit is cut, what is missing stays."""
    said = list(tokens)[: run[1] - run[0]]
    into[run[0] : run[0] + len(said)] = torch.tensor(said, dtype=torch.long)


def decoded(encoder: Encoder, ids: Sequence[int]) -> str:
    """Tokens as running text."""
    if isinstance(encoder, Pretrained):
        return str(encoder.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))
    if isinstance(encoder, Bytes):
        return bytes(ids).decode(errors="replace")
    return (" " if isinstance(encoder, Words) else "").join(encoder.pieces(ids))


def readable(encoder: Encoder, ids: Sequence[int], seen: Sequence[bool]) -> str:
    """The seen tokens as text in lower case, with a line feed wherever tokens between them are not seen."""
    return "\n".join(decoded(encoder, ids[begin:end]) for begin, end in runs(seen)).lower()


def behind(encoder: Encoder, before: str, text: str, joint: str = " ") -> list[int] | None:
    """The tokens that a text has behind another; None where the tokenizer joins the two."""
    first, both = encoder.encode(before), encoder.encode(f"{before}{joint}{text}")
    return both[len(first) :] if both[: len(first)] == first and len(both) > len(first) else None


def continued(encoder: Encoder, text: str, value: str) -> list[int]:
    """The tokens of a value that follows a text.

    Raises:
        ValueError: a tokenizer that joins the two.
    """
    found = behind(encoder, text, value)
    if found is None:
        raise ValueError(f'this tokenizer joins {text!r} and {value!r}; use tokenizer="bytes" or another')
    return found


# --- streams of sentences --------------------------------------------------------------------------------------------


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
    names = sorted({name for story in stories for question in story.questions for name in question.extra})
    total = length + segment_length
    # lists, made tensors at the end: thousands of small assignments to tensors would take longer than the rest
    ids: list[list[int]] = []
    labels: list[list[int]] = []
    answer: list[list[int]] = []
    evidence: list[list[list[int]]] = []
    extra: dict[str, list[list[int]]] = {name: [] for name in names}
    for story in stories:
        said, wanted, number = list(story.context), [IGNORED] * length, [-1] * length
        for place, question in enumerate(story.questions):
            said += question.question + question.answer
            wanted += [IGNORED] * len(question.question) + question.answer
            number += [-1] * len(question.question) + [place] * len(question.answer)
        if len(said) > total:
            raise ValueError(
                f"questions and answers of {len(said) - length} tokens do not fit a segment of {segment_length}; "
                "use a longer segment_length"
            )
        left, missing = total - len(said), asked - len(story.questions)
        ids.append(said + [pad] * left)
        labels.append(wanted + [IGNORED] * left)
        answer.append(number + [-1] * left)
        found = [question.evidence + [-1] * (most - len(question.evidence)) for question in story.questions]
        evidence.append(found + [[-1] * most] * missing)
        for name, rows in extra.items():
            rows.append([question.extra.get(name, -1) for question in story.questions] + [-1] * missing)
    return Examples(
        *(torch.tensor(rows, dtype=torch.long) for rows in (ids, labels, answer)),
        evidence=torch.tensor(evidence, dtype=torch.long).view(len(stories), asked, most),
        facts=torch.tensor([story.facts for story in stories]),
        extra={name: torch.tensor(rows, dtype=torch.long) for name, rows in extra.items()},
    )
