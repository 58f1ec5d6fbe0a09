"""Short associative retrieval, as in RMT (Bulatov et al. 2022, https://arxiv.org/abs/2207.06881, section 4), after a
task of Ba et al. 2016 (https://arxiv.org/abs/1610.06258).

A stream tells `pairs` pairs of a letter and a digit (published: 4), then asks for the digit of one of the letters:

    c 9 k 8 | j 3 f 1 | c ? [9] _

Letters are drawn without replacement from 26, digits with replacement from 10, the asked pair evenly. As published,
digits are the tokens 0 .. 9, the separator that asks is 10, letters are 11 .. 36. Only the digit has a label.

Ours: pairs fill segments one after another and are never cut; the question has a segment of its own, so nothing that
is told can be read there. `fillers` segments lie between the last pair and the question. What is neither pair nor
question is the blank 37, or in front of the question one of `noise` tokens from 38 on, which no pair can have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Generator, Tensor

from mnemic.tasks.base import Candidates, Examples, Task, TaskCard
from mnemic.unrolling import IGNORED

DIGITS = 10
"""The digits are the tokens 0 .. 9."""

SEPARATOR = 10
"""The token that asks."""

FIRST_LETTER, LETTERS = 11, 26
"""The letters are the tokens 11 .. 36."""

BLANK = 37
"""The token where nothing is told; also the padding at the end."""

FIRST_NOISE = 38
"""Tokens of a random filler begin here."""


@dataclass(frozen=True)
class Retrieval(Task):
    """`pairs` pairs in segments of `segment_length` tokens, `fillers` segments without any, and a segment that asks.

    `noise` is the number of tokens that a random filler is drawn from; 0 leaves it blank.

    Raises:
        ValueError: more pairs than letters, an odd segment or one too short for a question, a negative number.
    """

    name = "retrieval"
    card = TaskCard(
        title="Short associative retrieval",
        asks="Keep pairs of letter and digit, and give the digit of one letter.",
        paper="Recurrent Memory Transformer, https://arxiv.org/abs/2207.06881",
    )
    axis = "pairs"

    pairs: int = 4
    segment_length: int = 4
    fillers: int = 0
    noise: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.pairs <= LETTERS:
            raise ValueError(f"pairs is {self.pairs}; there are {LETTERS} letters, use 1 .. {LETTERS}")
        if self.segment_length < 4 or self.segment_length % 2:
            raise ValueError(
                f"segment_length is {self.segment_length}; a question takes 3 tokens and pairs of 2 must not be cut, "
                "use 4 or a higher even number"
            )
        if self.fillers < 0 or self.noise < 0:
            raise ValueError(f"fillers is {self.fillers} and noise is {self.noise}; neither may be below 0")

    @property
    def told(self) -> int:
        """Segments with pairs."""
        return -(-2 * self.pairs // self.segment_length)

    @property
    def vocabulary(self) -> int:
        """Digits, separator, letters, blank, and the filler's tokens."""
        return FIRST_NOISE + self.noise

    @property
    def uniform(self) -> float:
        """One of ten digits."""
        return 1 / DIGITS

    @property
    def unit(self) -> int:
        """A pair."""
        return 2

    def draw(self, rows: int, generator: Generator, split: str = "train") -> Examples:
        """`[rows, (told + fillers + 1) * segment_length]` tokens with one answer each."""
        luck = torch.rand(rows, LETTERS, generator=generator, dtype=torch.float64)
        letters = luck.topk(self.pairs, 1).indices + FIRST_LETTER
        digits = torch.randint(DIGITS, (rows, self.pairs), generator=generator)
        wanted = torch.randint(self.pairs, (rows, 1), generator=generator)
        asks = (self.told + self.fillers) * self.segment_length
        ids = torch.full((rows, asks + self.segment_length), BLANK)
        if self.noise:
            ids[:, :asks] = torch.randint(FIRST_NOISE, self.vocabulary, (rows, asks), generator=generator)
        ids[:, : 2 * self.pairs] = torch.stack([letters, digits], 2).flatten(1)
        ids[:, asks : asks + 1] = letters.gather(1, wanted)
        ids[:, asks + 1] = SEPARATOR
        ids[:, asks + 2 : asks + 3] = digits.gather(1, wanted)
        labels, answer = torch.full_like(ids, IGNORED), torch.full_like(ids, -1)
        labels[:, asks + 2], answer[:, asks + 2] = ids[:, asks + 2], 0
        return Examples(
            input_ids=ids,
            labels=labels,
            answer=answer,
            evidence=2 * wanted[..., None],
            facts=torch.full((rows,), self.pairs),
        )

    def guess(
        self,
        ids: Int[Tensor, "b t"],
        asked: Bool[Tensor, "b t"],
        seen: Bool[Tensor, "b t"],
        generator: Generator,
    ) -> Int[Tensor, "b t"]:
        """The digit of the pair with the asked letter, where it is seen; any digit elsewhere."""
        two, shown = (each.unflatten(1, (-1, 2)) for each in (ids, seen))
        letter, digit = two[..., 0], two[..., 1]
        told = shown.all(2) & (letter >= FIRST_LETTER) & (letter < FIRST_LETTER + LETTERS) & (digit < DIGITS)
        predicted = torch.randint(DIGITS, ids.shape, generator=generator)
        place = asked.long().argmax(1, keepdim=True)
        # letter, separator, answer
        queried = (place - 2).clamp(min=0)
        same = told & (letter == ids.gather(1, queried)) & seen.gather(1, queried)
        found = digit.gather(1, same.long().argmax(1, keepdim=True))
        return torch.where(asked & same.any(1, keepdim=True), found, predicted)

    def candidates(self, examples: Examples) -> Candidates | None:
        """The digits of all pairs."""
        if self.pairs == 1:
            return None
        digits = examples.input_ids[:, 1 : 2 * self.pairs : 2]
        return Candidates(digits.flip(1), self.pairs - 1 - examples.evidence[:, 0, 0] // 2)

    def more_floors(self, examples: Examples, luck: Generator) -> dict[str, float]:
        """ "a told digit at random": a memory that has the digits and not whose they are."""
        return {"a told digit at random": 1 / self.pairs + (1 - 1 / self.pairs) / DIGITS}

    def text(self, ids: Sequence[int]) -> list[str]:
        """Digits, letters, "?" for the separator, "_" for a blank, "." for noise."""
        signs = "0123456789?abcdefghijklmnopqrstuvwxyz_"
        return [signs[token] if token < len(signs) else "." for token in ids]
