"""A pass key in a haystack (Landmark Attention, https://arxiv.org/abs/2305.16300, section 4.2).

An instruction opens the stream, five short sentences follow again and again, and somewhere among them one line tells a
number of five digits twice. The question asks for it.

Rules. The line stands between two sentences of the haystack. Where, is uniform over all gaps, or nearest to a fixed
`depth` in per cent, for a map of lengths and depths (`haystack.grid`). A pass key is one of 10000 .. 99999, where the
paper draws from 1 .. 50000, so that all have five digits. The sentences are our own; only the rules follow the paper.

The layout is ours: `length` tokens of context, in whole segments, then one segment that asks:

    [instruction, hay, line, hay | ... | hay | question, answer, padding]
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Generator, Tensor

from mnemic.tasks.base import Examples, Task, TaskCard
from mnemic.tasks.haystack import (
    NOISE,
    Drawn,
    check_context,
    check_question,
    drawn_number,
    gap,
    shortest,
    spelled,
    trimmed,
    woven,
)
from mnemic.tasks.text import Encoder, Question, Story, assemble, continued, encoder, readable, runs, write

INSTRUCTION = "Somewhere in this long text a secret is told. Find it and keep it in mind, for it is asked at the end."
PASSKEY = "The pass key is {0}. Keep it: {0} is the pass key."
PASSKEY_QUESTION = "Which pass key was told? It was"

DIGITS = 5


@dataclass(frozen=True)
class PasskeyTask(Task):
    """A pass key of five digits in `length` tokens of context.

    `depth` is where it is told, in per cent of the filler before it; None draws a place evenly. `tokenizer` is "words",
    where every digit is a token, "bytes", or one of Hugging Face. `extra["depth"]` is where it was told, rounded.

    Raises:
        ValueError: a length that is not whole segments, lines that do not fit, or a depth outside 0 .. 100.
    """

    length: int = 512
    segment_length: int = 128
    depth: float | None = None
    tokenizer: Any = "words"

    name = "passkey"
    axis = "length"
    card = TaskCard(
        title="Pass key",
        asks="Find one number, told once in a long text that says nothing else, and keep it.",
        paper="Landmark Attention, https://arxiv.org/abs/2305.16300",
    )

    def __post_init__(self) -> None:
        line, answer = self._line("10000")
        check_context(self, len(self._opening) + len(line) + 1)
        check_question(self, len(self._encoder.encode(PASSKEY_QUESTION)) + len(answer))

    @cached_property
    def _encoder(self) -> Encoder:
        return encoder(self.tokenizer, [*NOISE, INSTRUCTION, PASSKEY, PASSKEY_QUESTION, " ".join("0123456789")])

    @cached_property
    def _opening(self) -> list[int]:
        return self._encoder.encode(INSTRUCTION)

    @cached_property
    def _hay(self) -> Drawn:
        return Drawn([self._encoder.encode(each) for each in NOISE], cycle=True)

    @property
    def vocabulary(self) -> int:
        """Token ids are 0 .. vocabulary - 1."""
        return self._encoder.vocabulary

    @property
    def uniform(self) -> float:
        """One of the numbers 10000 .. 99999."""
        return 1 / 90_000

    @property
    def unit(self) -> int:
        """Tokens of the line that tells."""
        return min(len(self._line("10000")[0]), self.segment_length)

    def _line(self, number: str) -> tuple[list[int], list[int]]:
        """The line that tells a number, and the number as the answer, as tokens."""
        said = spelled(number, self._encoder)
        return self._encoder.encode(PASSKEY.format(said)), continued(self._encoder, PASSKEY_QUESTION, said)

    def draw(self, rows: int, generator: Generator, split: str = "train") -> Examples:
        """`rows` new streams. Evidence is the line that tells."""
        question = self._encoder.encode(PASSKEY_QUESTION)
        stories = []
        for _ in range(rows):
            line, value = self._line(drawn_number(DIGITS, generator))
            room = self.length - len(self._opening) - len(line)
            hay = trimmed(self._hay.take(room, generator, split), room)
            context, (begin,) = woven(hay, [line], [gap(self, hay, generator)])
            extra = {"depth": round(100 * begin / room)}
            asked = Question(question, value, [begin + len(self._opening)], extra)
            stories.append(Story(self._opening + context, [asked], facts=1))
        return assemble(stories, self.segment_length, self._encoder.pad)

    def guess(
        self, ids: Int[Tensor, "b t"], asked: Bool[Tensor, "b t"], seen: Bool[Tensor, "b t"], generator: Generator
    ) -> Int[Tensor, "b t"]:
        """The number as far as it is seen, behind "pass key is" or before "is the pass key"; other digits by luck."""
        said, count = torch.zeros_like(ids), DIGITS
        for row in range(len(ids)):
            text = readable(self._encoder, ids[row].tolist(), seen[row].tolist())
            number = list(drawn_number(count, generator))
            for found in re.finditer(r"pass key is ?([\d ]*)", text):
                for place, digit in enumerate(found[1].replace(" ", "")[:count]):
                    number[place] = digit
            for found in re.finditer(r"([\d ]*) is the pass key", text):
                for place, digit in enumerate(found[1].replace(" ", "")[::-1][:count]):
                    number[count - 1 - place] = digit
            for place in runs(asked[row].tolist()):
                write(said[row], place, self._line("".join(number))[1])
        return said

    def majority(self, examples: Examples, rows: int = 500) -> float:
        """As for every task, but counted over short streams: answers do not depend on the length."""
        return Task.majority(shortest(self), examples, rows)

    def text(self, ids: Sequence[int]) -> list[str]:
        """Tokens as a person reads them."""
        return self._encoder.pieces(ids)
