"""What facts are hidden in: sentences of given texts or of a list, and letters of a Markov chain; and where in it."""

from __future__ import annotations

import itertools
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Generator

from mnemic.tasks.base import Task, below
from mnemic.tasks.documents import novels
from mnemic.tasks.text import Encoder, Pretrained, Words

SENTENCE_END = re.compile(r"([.!?][\"'\u201d\u2019)\]]*)\s+(?=[\"'\u201c\u2018(]?[A-Z])")
ABBREVIATED = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|St|Rev|Col|Capt|Esq|Hon|Prof|[A-Z])\.$")


def sentences(text: str) -> list[str]:
    """The sentences of a text. One ends at a full stop, question or exclamation mark before a capital, with exceptions
    for titles and initials, and at a blank line."""
    found = []
    for paragraph in re.split(r"\n\s*\n", text):
        flat, start = " ".join(paragraph.split()), 0
        for end in SENTENCE_END.finditer(flat):
            if not ABBREVIATED.search(flat[start : end.end(1)]):
                found.append(flat[start : end.end(1)])
                start = end.end()
        found += [flat[start:]] if flat[start:] else []
    return found


@lru_cache(maxsize=2)
def library(path: str) -> list[tuple[str, str]]:
    """`novels`, read once."""
    return novels(path)


@lru_cache(maxsize=8)
def pages(path: str, document: int) -> list[str]:
    """The sentences of one text, found once."""
    return sentences(library(path)[document][1])


class Book:
    """Sentences of given texts, read on from a random place.

    `path` is as in `novels`. Of every ten texts, by name, the last is for tests, the one before for validation, the
    others for training; with fewer the last is for tests, the one before for validation.
    Sentences of fewer than `shortest` tokens are left out, and so are those for which `barred` is true.

    Raises:
        ValueError: fewer than 3 texts, or texts without enough sentences that may be used.
    """

    def __init__(
        self, path: str, encoder: Encoder, shortest: int = 1, barred: Callable[[str], bool] | None = None
    ) -> None:
        self.path, self.encoder, self.shortest, self.barred = path, encoder, shortest, barred
        count = len(library(path))
        if count < 3:
            raise ValueError(f"{path} has {count} texts; training, validation and test need 3 or more, of their own")
        test = {place for place in range(count) if place % 10 == 9} or {count - 1}
        held = {place - 1 for place in test}
        self.shares = {"train": [place for place in range(count) if place not in test | held]}
        self.shares |= {"validation": sorted(held), "test": sorted(test)}

    def take(self, tokens: int, generator: Generator, split: str) -> list[list[int]]:
        """Sentences of `tokens` tokens or a little more."""
        taken, total, tries = [], 0, 0
        while total < tokens:
            tries += 1
            if tries > 1000:
                raise ValueError(f"{self.path} has too few sentences of {self.shortest} tokens or more")
            share = self.shares[split]
            text = pages(self.path, share[below(len(share), generator)])
            start = below(max(len(text), 1), generator)
            # a block of sentences at a time, since tokenizers are quicker so
            while start < len(text) and total < tokens:
                block = text[start : start + max(8, (tokens - total) // 20)]
                start += len(block)
                for each in self._tokens([each for each in block if not (self.barred and self.barred(each))]):
                    if len(each) >= self.shortest:
                        taken.append(each)
                        total += len(each)
        return taken

    def _tokens(self, block: list[str]) -> list[list[int]]:
        if isinstance(self.encoder, Pretrained):
            return self.encoder.encode_all(block)
        return [self.encoder.encode(each) for each in block]


class Drawn:
    """Sentences drawn one by one from a list, or with `cycle` the list again and again."""

    def __init__(self, sentences: Sequence[list[int]], cycle: bool = False) -> None:
        self.sentences, self.cycle = sentences, cycle
        self.shortest = min(map(len, sentences))

    def take(self, tokens: int, generator: Generator, split: str) -> list[list[int]]:
        """Sentences of `tokens` tokens or a little more."""
        if self.cycle:
            order = itertools.cycle(range(len(self.sentences)))
        else:
            most = -(-tokens // self.shortest)
            order = torch.randint(len(self.sentences), (most,), generator=generator).tolist()
        taken: list[list[int]] = []
        total = 0
        for place in order:
            if total >= tokens:
                break
            taken.append(self.sentences[place])
            total += len(taken[-1])
        return taken


class Characters:
    """Letters, digits, space and the marks `@=;`: a token each. 0 is padding."""

    pad = 0
    letters = "abcdefghijklmnopqrstuvwxyz "

    def __init__(self) -> None:
        self.signs = ["<pad>", *self.letters, *"0123456789@=;"]
        self.ids = {sign: place for place, sign in enumerate(self.signs)}
        self.vocabulary = len(self.signs)

    def encode(self, text: str) -> list[int]:
        """One token a character."""
        return [self.ids[sign] for sign in text]

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The characters."""
        return [self.signs[token] for token in ids]


class Markov:
    """Letters from a Markov chain of order 2, with the frequencies of a text; a sentence is one letter."""

    def __init__(self, text: str, encoder: Characters) -> None:
        self.encoder, self.size = encoder, len(encoder.letters)
        letters = [encoder.letters.index(each) for each in re.sub(r"[^a-z]+", " ", text.lower())]
        letters += letters[:2]
        # whole counts and a draw from 0 .. their sum: exact, and so the same everywhere
        self.counts = torch.zeros(self.size**2, self.size, dtype=torch.long)
        for first, second, third in zip(letters, letters[1:], letters[2:], strict=False):
            self.counts[first * self.size + second, third] += 1
        self.starts = self.counts.sum(1).nonzero()[:, 0]
        self.edges = [row.tolist() for row in self.counts.cumsum(1)]

    def take(self, tokens: int, generator: Generator, split: str) -> list[list[int]]:
        """`tokens` letters."""
        state = int(self.starts[below(len(self.starts), generator)])
        found = []
        for luck in torch.rand(tokens, generator=generator, dtype=torch.float64).tolist():
            edges = self.edges[state]
            letter = bisect_right(edges, int(luck * edges[-1]))
            found.append([letter + 1])
            state = state % self.size * self.size + letter
        return found


def trimmed(hay: list[list[int]], tokens: int) -> list[list[int]]:
    """Sentences of exactly so many tokens: the last one is cut."""
    kept, left = [], tokens
    for each in hay:
        if left <= 0:
            break
        kept.append(each[:left])
        left -= len(each)
    return kept


def woven(hay: list[list[int]], lines: list[list[int]], gaps: list[int]) -> tuple[list[int], list[int]]:
    """The hay as one list of tokens, with each line before sentence `gaps[i]` of it, and where each line begins.

    Lines of the same gap keep their order.
    """
    order = sorted(range(len(lines)), key=lambda line: gaps[line])
    context: list[int] = []
    begins, done = [0] * len(lines), 0
    for line in order:
        while done < gaps[line]:
            context += hay[done]
            done += 1
        begins[line] = len(context)
        context += lines[line]
    for each in hay[done:]:
        context += each
    return context, begins


# --- tasks that hide a line in it ------------------------------------------------------------------------------------

NOISE = (
    "The river is slow and the hills are far.",
    "A cart rolls by.",
    "Leaves fall on the path.",
    "We rest a while, then we walk on.",
    "Evening comes and morning comes.",
)
"""A haystack of the same sentences, over and over."""


def grid(lengths: Iterable[int], depths: Iterable[float] = range(0, 101, 10), **settings: Any) -> list[dict[str, Any]]:
    """Settings of one task for every length and depth (in per cent): the cells of a heat map, a row of depths after
    the other. `TASKS["passkey"](**cell)` is the task of a cell.
    """
    depths = list(depths)
    return [{**settings, "length": length, "depth": depth} for length in lengths for depth in depths]


def check_context(task: Any, least: int) -> None:
    """Raises `ValueError` unless the context is whole segments, `least` tokens at least, and depth lies in 0 .. 100."""
    if task.segment_length < 1 or task.length < 1 or task.length % task.segment_length:
        raise ValueError(
            f"length is {task.length} and segment_length {task.segment_length}; the context must be whole segments"
        )
    if task.length < least:
        raise ValueError(f"length is {task.length}; what is told needs {least} tokens, use more")
    if task.depth is not None and not 0 <= task.depth <= 100:
        raise ValueError(f"depth is {task.depth}; use None for any, or per cent, 0 .. 100")


def check_question(task: Task, tokens: int) -> None:
    """Raises `ValueError` unless question and answer fit in a segment."""
    if tokens > task.segment_length:
        raise ValueError(f"question and answer need {tokens} tokens, segment_length is {task.segment_length}; use more")


def gap(task: Any, hay: list[list[int]], generator: Generator) -> int:
    """Where a line goes: a gap drawn evenly, or the one that is nearest to the task's depth."""
    drawn = below(len(hay) + 1, generator)
    if task.depth is None:
        return drawn
    ends = torch.tensor([0, *(len(each) for each in hay)]).cumsum(0)
    return int((ends * 100 - task.depth * int(ends[-1])).abs().argmin())


def drawn_number(digits: int, generator: Generator) -> str:
    """A number of so many digits, all equally likely; the first is no 0."""
    least = 10 ** (digits - 1)
    return str(least + below(9 * least, generator))


def spelled(value: str, encoder: Encoder) -> str:
    """A value as the encoder must be given it: with "words" every digit is a token."""
    return " ".join(value) if isinstance(encoder, Words) and value.isdigit() else value


def shortest(task: Any) -> Any:
    """The same task with the least context that holds what is told."""
    for segments in range(1, task.length // task.segment_length):
        try:
            return replace(task, length=segments * task.segment_length)
        except ValueError:
            continue
    return task
