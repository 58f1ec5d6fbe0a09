"""Copying and reversing (Recurrent Memory Transformer, https://arxiv.org/abs/2207.06881).

A stream is `count` symbols drawn evenly from 8, and the answer: the same symbols twice ("copy"), or once from the last
to the first ("reverse"). Every symbol of the answer counts on its own, teacher-forced: those before it are given.

As in the paper, prompt and answer follow each other and are cut into equal segments. That the prompt fills whole
segments is ours; the answer then does too, and no token between them need ask for it. A symbol at t is predicted at
t - 1, so the segment that is asked for it is the one that t - 1 lies in:

    reverse, 12 symbols, segments of 6:   [s1 .. s6 | s7 .. s12 | s12 .. s7 | s6 .. s1]
    copy, 8 symbols, segments of 8:       [s1 .. s8 | s1 .. s8  | s1 .. s8]

The first symbol of "reverse" is the one just read, which needs no memory; every other stands in another segment than
the one that is asked. Four segments of 6 tell recurrence from reach: the second half of the answer needs what was read
three segments before, or two where it is asked early. A memory of the previous segment alone is right for 6 of 12
symbols and guesses the others: 0.5625. In two segments of 12, or in "copy" with three of 8, the previous segment
answers everything.

Symbols are the tokens 2 .. 9, as in the paper; 0 and 1 do not occur.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Generator, Tensor

from mnemic.tasks.base import Examples, Task, TaskCard
from mnemic.unrolling import IGNORED

SYMBOLS = 8

FIRST = 2
"""The symbols are the tokens 2 .. 9."""

PAPER = "Recurrent Memory Transformer, https://arxiv.org/abs/2207.06881"


@dataclass(frozen=True)
class Copying(Task):
    """What "copy" and "reverse" share: `count` symbols that fill whole segments, then the answer.

    Raises:
        ValueError: a count or a segment below 1, or a count that is not whole segments.
    """

    count: int
    segment_length: int

    axis: ClassVar[str] = "count"
    by_answer: ClassVar[bool] = False
    copies: ClassVar[int]
    """How many symbols of answer there are for each of the prompt."""

    def __post_init__(self) -> None:
        if self.count < 1 or self.segment_length < 1:
            raise ValueError(f"count is {self.count} and segment_length {self.segment_length}; use 1 or more of both")
        if self.count % self.segment_length:
            divisors = [n for n in range(1, self.count + 1) if self.count % n == 0]
            raise ValueError(
                f"{self.count} symbols are not whole segments of {self.segment_length}; "
                f"choose a segment_length of {', '.join(map(str, divisors))}"
            )

    @abstractmethod
    def places(self) -> Int[Tensor, "n c"]:
        """Where each symbol of the answer stands before it: in the prompt, then in earlier copies; -1 for none."""

    @property
    def vocabulary(self) -> int:
        """Ten tokens, 8 of them symbols."""
        return FIRST + SYMBOLS

    @property
    def uniform(self) -> float:
        """One of 8 symbols."""
        return 1 / SYMBOLS

    @property
    def segments(self) -> int:
        """Segments of a stream, the answer's included."""
        return (1 + self.copies) * self.count // self.segment_length

    def text(self, ids: Sequence[int]) -> list[str]:
        """Symbols as letters, a .. h."""
        return [chr(ord("a") + token - FIRST) if token >= FIRST else "-" for token in ids]

    def draw(self, rows: int, generator: Generator, split: str = "train") -> Examples:
        """`rows` streams. Every symbol of the answer is an answer of its own, so that each has a lag. Its evidence is
        its place in the prompt; the first copy is not noted as evidence for the second.
        """
        prompt = torch.randint(FIRST, FIRST + SYMBOLS, (rows, self.count), generator=generator)
        source = self.places()[:, :1]
        ids = torch.cat([prompt, prompt[:, source[:, 0]]], 1)
        labels, answer = ids.clone(), torch.full_like(ids, -1)
        labels[:, : self.count], answer[:, self.count :] = IGNORED, torch.arange(len(source))
        return Examples(ids, labels, answer, source.repeat(rows, 1, 1), torch.full((rows,), self.count))

    def guess(
        self,
        ids: Int[Tensor, "b t"],
        asked: Bool[Tensor, "b t"],
        seen: Bool[Tensor, "b t"],
        generator: Generator,
    ) -> Int[Tensor, "b t"]:
        """Each symbol from wherever it stands before and is seen; any of the 8 where it is not."""
        predicted = torch.randint(FIRST, FIRST + SYMBOLS, ids.shape, generator=generator)
        for place in self.places().unbind(1):
            told = seen[:, place] & (place >= 0)
            predicted[:, self.count :] = torch.where(told, ids[:, place], predicted[:, self.count :])
        return predicted

    def measures(self, predicted: Int[Tensor, "b t"], examples: Examples) -> dict[str, float]:
        """Share of streams that are right at every place."""
        right = ((predicted == examples.labels) | ~examples.asked).all(1)
        return {"whole answers": right.double().mean().item()}

    def within(self, segments: int) -> Bool[Tensor, " n"]:
        """Which symbols of the answer stand in the segment that is asked for them, or in that many before it."""
        places = self.places()
        asks = (torch.arange(len(places)) + self.count - 1) // self.segment_length
        return (places >= ((asks - segments) * self.segment_length).clamp_min(0)[:, None]).any(1)

    def floors(self, rows: int = 200, number: int = 0) -> dict[str, float]:
        """Scores without anything learned. Labels lie in several segments, so "last segment" is for each of them the
        segment before the one that is asked for it, and the answer's symbols so far are seen as a model sees them.

        All but "majority" are in closed form: a symbol is within reach, or guessed. "no memory" has the segment that is
        asked alone, the sample besides it a segment's worth of the prompt's symbols.
        """
        examples = self.examples(rows, "test", number)
        reach = {"no memory": 0, "last segment": 1, "last 2 segments": 2}
        known = {name: self.within(segments).double() for name, segments in reach.items()}
        share = min(1.0, self.segment_length / self.count)
        known[f"sample of {self.segment_length} tokens"] = share + (1 - share) * known["no memory"]
        scored = {name: (each + (1 - each) * self.uniform).mean().item() for name, each in known.items()}
        oracle = self.score(self.solve(examples), examples)
        return {"uniform": self.uniform, "majority": self.majority(examples), **scored, "oracle": oracle}


@dataclass(frozen=True)
class Copy(Copying):
    """`count` symbols, then the same twice."""

    count: int = 8
    segment_length: int = 8

    name: ClassVar[str] = "copy"
    copies: ClassVar[int] = 2
    card: ClassVar[TaskCard] = TaskCard("Copying", "Write down twice the symbols that were read.", PAPER)

    def places(self) -> Int[Tensor, "n c"]:
        """In the prompt; for the second copy also in the first."""
        place = torch.arange(2 * self.count)
        return torch.stack([place % self.count, torch.where(place >= self.count, place, -1)], 1)


@dataclass(frozen=True)
class Reverse(Copying):
    """`count` symbols, then the same from the last to the first."""

    count: int = 12
    segment_length: int = 6

    name: ClassVar[str] = "reverse"
    copies: ClassVar[int] = 1
    card: ClassVar[TaskCard] = TaskCard(
        "Reversing", "Write down the symbols that were read, from last to first.", PAPER
    )

    def places(self) -> Int[Tensor, "n c"]:
        """In the prompt."""
        return torch.arange(self.count - 1, -1, -1)[:, None]
