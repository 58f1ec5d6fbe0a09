"""Quadratic equations, solved step by step, as in RMT (Bulatov et al. 2022, https://arxiv.org/abs/2207.06881).

Six fields, one a segment, in characters; each ends with ";" and is padded to the segment (published: 30 tokens):

    -2*x^2+2*x+12=0;                the problem: all three coefficients times a whole number
    x^2-x-6=0;                      the same with 1 in front
    D=1^2-4*1*-6=25=5^2;            discriminant
    x=(1-5)/2=-2;                   smaller root
    x=(1+5)/2=3;                    larger root
    -2,3;                           the roots

Rules of the paper. Four equations of five have whole roots, both trunc(U(-bound, bound)), bound = 100. The others have
no real root: b from 0 .. 2 bound - 1, c below bound^2. The multiplier is round(U(1, 10)) with a random sign. Monomials
leave out 0 and factors of 1. Equal roots are written once; without a real root there is no square behind the
discriminant, and the last three fields are empty. Tokens: 2 .. 11 the digits, 12 .. 21 "+-*/^=()xD", 22 ";", 23 ",",
0 padding, 1 nothing. The canonical form and the discriminant can be left out, each for itself.

Ours:

- Labels lie on the characters of each field behind the problem and on its ";", not on the padding, which every model
  learns at once and which would make most of a mean over tokens. The padding within a stream is a token like others.
- A label is predicted from the token before it, so the first character of a field comes at the end of the segment
  before, with the field there still in sight. The rest of the field does not.
- A field counts when every character is right (`by_answer`); `measures` has the share of characters and the last field.
- c of an equation without real root is above b^2 / 4, so that none has a discriminant of 0.
- Answers lie in all segments but the first. The floors go field by field (`Task.floors`): each sees the right text of
  the fields before it, as a model does that is trained or scored on given streams.

The problem is the evidence for every field. But nearly each step follows from the step before: see `floors`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt

import torch
from jaxtyping import Bool, Int
from torch import Generator, Tensor

from mnemic.tasks.base import Examples, Task, TaskCard
from mnemic.unrolling import IGNORED

SIGNS = "0123456789+-*/^=()xD;,"
"""What fields are written in: the tokens 2 .. 23, in this order."""

FIRST_SIGN, PAD, VOCABULARY = 2, 0, 24

TOKEN = {sign: FIRST_SIGN + place for place, sign in enumerate(SIGNS)}
"""The token of each character."""

END = ";"
"""The end of a field."""

MULTIPLIERS = 10
"""Equations are shown multiplied by 1 .. 10 or -10 .. -1."""

FIELDS = ("problem", "canonical", "discriminant", "smaller root", "larger root", "roots")
"""All fields in their order."""


@dataclass(frozen=True)
class Quadratic(Task):
    """Equations whose roots lie between `-bound` and `bound`; fields of `segment_length` tokens.

    `canonical` and `discriminant` say whether these steps are written.

    Raises:
        ValueError: a bound without room for equations, or fields that could be longer than a segment.
    """

    name = "quadratic"
    card = TaskCard(
        title="Quadratic equations",
        asks="Solve an equation step by step, each step in a segment of its own.",
        paper="Recurrent Memory Transformer, https://arxiv.org/abs/2207.06881",
    )
    axis = "bound"

    bound: int = 100
    segment_length: int = 30
    canonical: bool = True
    discriminant: bool = True

    def __post_init__(self) -> None:
        if self.bound < 2:
            raise ValueError(f"bound is {self.bound}; equations need at least 2")
        if self.segment_length < self.longest:
            raise ValueError(
                f"segment_length is {self.segment_length}; with a bound of {self.bound} a field may take "
                f"{self.longest} tokens, use as many"
            )

    @property
    def longest(self) -> int:
        """No field has more tokens, its end included."""
        b, root, c = 2 * self.bound - 1, self.bound - 1, self.bound**2 - 1
        problem = f"-{MULTIPLIERS}*x^2-{MULTIPLIERS * b}*x-{MULTIPLIERS * c}=0"
        square = f"D={b}^2-4*1*-{root**2}={4 * root**2}={2 * root}^2"
        return max(len(problem), len(square)) + 1

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that are written."""
        left_out = {"canonical": not self.canonical, "discriminant": not self.discriminant}
        return tuple(name for name in FIELDS if not left_out.get(name, False))

    @property
    def vocabulary(self) -> int:
        """24."""
        return VOCABULARY

    @property
    def uniform(self) -> float:
        """One of all texts that a field can have, on average over the fields that are asked."""
        solvable, unsolvable = self.bound * (2 * self.bound - 1), int(self._choices().sum())
        # equations with opposite signs of b share a discriminant, but for the `bound` with b = 0
        texts = {"canonical": solvable + unsolvable, "discriminant": (solvable + self.bound) // 2 + unsolvable}
        asked = self.fields[1:]
        return sum(1 / texts.get(name, solvable + 1) for name in asked) / len(asked)

    @property
    def unit(self) -> int:
        """A field: less of it does not tell an equation."""
        return self.segment_length

    def draw(self, rows: int, generator: Generator, split: str = "train") -> Examples:
        """`[rows, fields * segment_length]` tokens; the fields behind the problem are the answers 0, 1, .."""
        equations = self._equations(rows, generator)
        # whole numbers with the probabilities of round(U(1, 10)): the first and the last are half as frequent
        size = torch.randint(2 * MULTIPLIERS - 2, (rows,), generator=generator)
        sign = torch.randint(2, (rows,), generator=generator)
        multiplier = ((size + 1) // 2 + 1) * (1 - 2 * sign)
        texts = [self._texts(*each) for each in zip(*equations.T.tolist(), multiplier.tolist(), strict=True)]
        count, size = len(self.fields), self.segment_length
        ids = torch.tensor([[self.encode(text) for text in row] for row in texts]).view(rows, count * size)
        number = (torch.arange(count * size) // size - 1).expand(rows, -1)
        asked = (ids != PAD) & (number >= 0)
        b, c = equations.T
        square = b**2 - 4 * c
        return Examples(
            input_ids=ids,
            labels=ids.masked_fill(~asked, IGNORED),
            answer=number.masked_fill(~asked, -1),
            evidence=torch.zeros(rows, count - 1, 1, dtype=torch.long),
            facts=torch.ones(rows, dtype=torch.long),
            extra={"roots": (square.sign() + 1)[:, None].expand(-1, count - 1)},
        )

    def guess(
        self,
        ids: Int[Tensor, "b t"],
        asked: Bool[Tensor, "b t"],
        seen: Bool[Tensor, "b t"],
        generator: Generator,
    ) -> Int[Tensor, "b t"]:
        """Every field from the fields that are seen whole.

        The discriminant does not tell the sign of b, which is guessed. Where nothing is seen, "no real root" is the
        most frequent text of the last three fields; an equation of that kind is drawn for the others.
        """
        size = self.segment_length
        rows, count = len(ids), ids.shape[1] // size
        whole = seen.unflatten(1, (count, size)).all(2)
        wanted = asked.unflatten(1, (count, size)).any(2)
        signs = (1 - 2 * torch.randint(2, (rows,), generator=generator)).tolist()
        equations = self._unsolvable(rows, generator).tolist()
        pieces, shown = ids.unflatten(1, (count, size)).tolist(), whole.tolist()
        solved = []
        for row in range(rows):
            told = {name: self.decode(pieces[row][n]) for n, name in enumerate(self.fields[:count]) if shown[row][n]}
            b, c = self._solve(told, signs[row]) or equations[row]
            solved.append([self.encode(text) for text in self._texts(b, c, 1)[:count]])
        return torch.where(wanted[..., None], torch.tensor(solved), ids.unflatten(1, (count, size))).flatten(1)

    def majority(self, examples: Examples, rows: int = 500) -> float:
        """Score of always writing the text that each field has most often in training."""
        train, size = self.examples(rows, "train", 0), self.segment_length
        predicted = torch.zeros_like(examples.labels)
        for first in range(size, examples.labels.shape[1], size):
            texts, counts = train.labels[:, first : first + size].unique(dim=0, return_counts=True)
            predicted[:, first : first + size] = texts[counts.argmax()]
        return self.score(predicted, examples)

    def measures(self, predicted: Int[Tensor, "b t"], examples: Examples) -> dict[str, float]:
        """The share of "characters" that is right, and exact match of the last field and of the "whole solution"."""
        right = self.right(predicted, examples).view(len(predicted), -1)
        return {
            "characters": (predicted == examples.labels)[examples.asked].double().mean().item(),
            "roots": right[:, -1].double().mean().item(),
            "whole solution": right.all(1).double().mean().item(),
        }

    def encode(self, text: str) -> list[int]:
        """The tokens of a field, its end and the padding."""
        tokens = [TOKEN[sign] for sign in text + END]
        return tokens + [PAD] * (self.segment_length - len(tokens))

    def decode(self, ids: Sequence[int]) -> str:
        """A field's characters up to its end."""
        return "".join(self.text(ids)).split(END)[0]

    def text(self, ids: Sequence[int]) -> list[str]:
        """The characters, "_" for padding."""
        return [SIGNS[token - FIRST_SIGN] if token >= FIRST_SIGN else "_" for token in ids]

    def _equations(self, rows: int, generator: Generator) -> Int[Tensor, "b 2"]:
        # whole numbers 0, 0, 1, -1, 2, -2, ..: truncating brings twice as much to 0 as to any other
        roots = torch.randint(2 * self.bound, (rows, 2), generator=generator)
        roots = (roots // 2) * (1 - 2 * (roots % 2))
        solvable = torch.stack([-roots.sum(1), roots.prod(1)], 1)
        unsolvable = self._unsolvable(rows, generator)
        return torch.where(torch.randint(5, (rows, 1), generator=generator) > 0, solvable, unsolvable)

    def _unsolvable(self, rows: int, generator: Generator) -> Int[Tensor, "b 2"]:
        b = torch.randint(2 * self.bound, (rows,), generator=generator)
        luck = torch.rand(rows, generator=generator, dtype=torch.float64)
        return torch.stack([b, b**2 // 4 + 1 + (luck * self._choices()[b]).long()], 1)

    def _choices(self) -> Int[Tensor, " b"]:
        # how many c each b has: b^2 / 4 < c < bound^2
        return self.bound**2 - 1 - torch.arange(2 * self.bound) ** 2 // 4

    def _texts(self, b: int, c: int, multiplier: int) -> list[str]:
        # what each written field says of x^2 + bx + c = 0
        square = b * b - 4 * c
        says = {"problem": _equation(multiplier, multiplier * b, multiplier * c), "canonical": _equation(1, b, c)}
        says["discriminant"] = f"D={abs(b)}^2-4*1*{c}={square}"
        if square >= 0:
            root = isqrt(square)
            smaller, larger = (-b - root) // 2, (-b + root) // 2
            says["discriminant"] += f"={root}^2"
            says["smaller root"], says["larger root"] = f"x=({-b}-{root})/2={smaller}", f"x=({-b}+{root})/2={larger}"
            says["roots"] = f"{smaller},{larger}" if smaller < larger else f"{smaller}"
        return [says.get(name, "") for name in self.fields]

    def _solve(self, told: dict[str, str], sign: int) -> tuple[int, int] | None:
        # b and c as the fields tell them; None where they tell nothing, or just that there is no real root
        for name in ("problem", "canonical"):
            if name in told:
                a, b, c = _coefficients(told[name])
                return b // a, c // a
        for name in ("smaller root", "larger root"):
            if told.get(name):
                minus_b, root = map(int, re.findall(r"-?\d+", re.split(r"[()]", told[name])[1].replace("-", " -")))
                return -minus_b, (minus_b**2 - root**2) // 4
        if told.get("roots"):
            roots = [int(root) for root in told["roots"].split(",")]
            return -roots[0] - roots[-1], roots[0] * roots[-1]
        if "discriminant" in told:
            b, c, square = map(int, re.findall(r"=?D=(\d+)\^2-4\*1\*(-?\d+)=(-?\d+)", told["discriminant"])[0])
            return (b if square < 0 else sign * b), c
        return None


def _equation(a: int, b: int, c: int) -> str:
    # monomials without zeros and factors of one
    text = ""
    for factor, power in ((a, "x^2"), (b, "x"), (c, "")):
        if factor:
            bare = power if abs(factor) == 1 and power else f"{abs(factor)}*{power}" if power else f"{abs(factor)}"
            text += ("-" if factor < 0 else "+" if text else "") + bare
    return f"{text}=0"


def _coefficients(text: str) -> tuple[int, int, int]:
    found = {"x^2": 0, "x": 0, "": 0}
    for sign, factor, power in re.findall(r"([+-]?)(\d*)\*?(x\^2|x|)(?=[+\-=])", text.removesuffix("0")):
        if factor or power:
            found[power] += int(f"{sign}{factor or 1}")
    return found["x^2"], found["x"], found[""]
