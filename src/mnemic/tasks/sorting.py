"""Sorting by frequency while the distribution drifts (infinity-former, https://arxiv.org/abs/2109.00301, section 4.1;
Memoria, https://arxiv.org/abs/2310.03052, section 4.1).

A stream is a long prompt of 20 symbols and asks for the symbols in the order of how often they came. Each stream has
two distributions of its own, p0 and p1: 20 whole numbers of 1 .. 9 each, divided by their sum. The symbol at position
j = 1 .. L comes from (1 - j/L) p0 + (j/L) p1, so no part of the prompt stands for the whole: a memory must keep
counts. Symbols that came equally often are ordered by first appearance, symbols that never came follow in ascending
order.

The layout is ours: the prompt fills whole segments, the answer opens one more segment, the rest of which is padding:

    [prompt | ... | prompt | separator, 20 symbols, padding]

Only the 20 symbols have labels. The padding follows the answer, so nothing that counts can depend on it, in a base
that is causal, and it needs no attention mask.

The task has strong floors without a memory (`SortingTask.floors`); no result should be printed without them. They are
scored as models are trained and measured: teacher-forced, so the right symbols up to a place are known at that place,
and a ranking answers with the first symbol that is not among them.

Everything is drawn from a seed, in the same way on every machine. Seeds of training, validation and test never meet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Integer
from torch import Generator, Tensor

from mnemic.tasks.base import Examples, Task, TaskCard, generator, seed_of
from mnemic.unrolling import IGNORED

SYMBOLS = 20
"""The symbols are the tokens 0 .. 19."""

SEPARATOR = 20
"""The token that asks."""

PAD = 21
"""The token behind the answer."""

VOCABULARY = 22

HEAVIEST = 9
"""Weights are 1 .. 9."""


@dataclass(frozen=True)
class SortingTask(Task):
    """Sorting by frequency: prompts of `segments` segments with `length` tokens each.

    Raises:
        ValueError: a `length` that has no room for the answer, or a number of `segments` below 1.
    """

    length: int = 1024
    segments: int = 4

    name: ClassVar[str] = "sorting"
    axis: ClassVar[str] = "segments"
    by_answer: ClassVar[bool] = False
    card: ClassVar[TaskCard] = TaskCard(
        title="Sorting by frequency",
        asks="Name the symbols of a long prompt in the order of how often they came, while their distribution drifts.",
        paper="∞-former: Infinite Memory Transformer, https://arxiv.org/abs/2109.00301",
    )

    def __post_init__(self) -> None:
        if self.length < SYMBOLS + 1:
            raise ValueError(f"length is {self.length}; separator and answer need segments of {SYMBOLS + 1} tokens")
        if self.segments < 1:
            raise ValueError(f"segments is {self.segments}; use 1 or more")

    @property
    def segment_length(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Tokens of a segment: `length`."""
        return self.length

    @property
    def vocabulary(self) -> int:
        """20 symbols, separator and padding."""
        return VOCABULARY

    @property
    def uniform(self) -> float:
        """Teacher-forced: a guess among the symbols that have not been named yet."""
        return uniform_floor()

    @property
    def tokens(self) -> int:
        """Length of a prompt."""
        return self.length * self.segments

    def draw(self, rows: int, generator: Generator, split: str = "train") -> Examples:
        """`rows` streams of `tokens + length` tokens. Fewer rows from an equal generator are the first of more.

        A stream has one answer, the 20 symbols together; its evidence is the whole prompt, noted by the first token of
        each of its segments.
        """
        prompt = prompts(rows, self.tokens, generator)
        ids = torch.full((rows, self.tokens + self.length), PAD)
        ids[:, : self.tokens], ids[:, self.tokens], ids[:, self._named] = prompt, SEPARATOR, right_order(prompt)
        labels, answer = torch.full_like(ids, IGNORED), torch.full_like(ids, -1)
        labels[:, self._named], answer[:, self._named] = ids[:, self._named], 0
        evidence = torch.arange(0, self.tokens, self.length).expand(rows, 1, -1)
        return Examples(ids, labels, answer, evidence.clone(), torch.full((rows,), self.tokens))

    @property
    def _named(self) -> slice:
        return slice(self.tokens + 1, self.tokens + SYMBOLS + 1)

    def prompt(self, examples: Examples) -> Int[Tensor, "b tokens"]:
        """The symbols to count."""
        return examples.input_ids[:, : self.tokens]

    def order(self, examples: Examples) -> Int[Tensor, "b symbols"]:
        """The symbols in the order that is asked for, `[b, 20]`."""
        return examples.labels[:, self._named]

    def guess(
        self,
        ids: Int[Tensor, "b t"],
        asked: Bool[Tensor, "b t"],
        seen: Bool[Tensor, "b t"],
        generator: Generator,
    ) -> Int[Tensor, "b t"]:
        """Ranks by the counts of what is seen of the prompt. Equal counts are ordered by the rule where all of it is
        seen, at random where it is not.
        """
        known = seen[:, : self.tokens]
        prompt = ids[:, : self.tokens].masked_fill(~known, 0)
        luck = torch.rand(len(ids), SYMBOLS, generator=generator, dtype=torch.float64).argsort(1)
        tie = torch.where(known.all(1, keepdim=True), first_seen(prompt), luck)
        predicted = torch.zeros_like(ids)
        predicted[:, self._named] = rank(counts(prompt, known), tie)
        return predicted

    def text(self, ids: Sequence[int]) -> list[str]:
        """Symbols as numbers, the separator as "sort", padding as "-"."""
        return ["sort" if token == SEPARATOR else "-" if token == PAD else str(token) for token in ids]

    def measures(self, predicted: Int[Tensor, "b t"], examples: Examples) -> dict[str, float]:
        """Share of streams that are right at every place. That is the share that greedy decoding gets right, too;
        Kendall's tau is not here, since it is about an order that the model wrote by itself (`kendall_tau`).
        """
        return {"exact order": exact_order(predicted[:, self._named], self.order(examples))}

    def floors(self, rows: int = 200, number: int = 0) -> dict[str, float]:
        """Teacher-forced token accuracy without a trained memory, as shares, over test streams.

        "uniform" is in closed form; "majority" names the most frequent symbol of each place; the others rank by counts:
        over the last segment, the last two, `length` tokens drawn evenly from the whole prompt, everything with a decay
        of 0.95 a segment, everything. "all tokens" lacks only the order of first appearance; with it the answer is
        right by definition ("oracle").

        Prompts differ by 8 to 9.5 points from each other: the standard error of 200 rows is 0.7 points, of 2000 0.2.
        """
        # not those of `Task`, whose solver sees nothing of the answer: a model is told the symbols up to each place
        seed = seed_of("test", number)
        examples = self.draw(rows, generator(seed), "test")
        prompt, answer, source = self.prompt(examples), self.order(examples), generator(seed + 1)
        counted = {
            "last segment": last_counts(prompt, self.length),
            "last 2 segments": last_counts(prompt, 2 * self.length),
            f"sample of {self.length} tokens": sample_counts(prompt, self.length, source),
            "decay 0.95 a segment": decayed_counts(prompt, 0.95, self.length),
            "all tokens": counts(prompt),
        }
        scored = {name: teacher_forced(rank(each), answer) for name, each in counted.items()}
        oracle = self.score(self.solve(examples), examples)
        return {"uniform": self.uniform, "majority": self.majority(examples), **scored, "oracle": oracle}

    def majority(self, examples: Examples, rows: int = 500) -> float:
        """Score of always naming the symbol that is most frequent at each place in training, over fewer streams where
        they are long.
        """
        train = self.examples(min(rows, max(16, 2**20 // self.tokens)))
        often = F.one_hot(self.order(train), SYMBOLS).sum(0).argmax(1)
        return token_accuracy(often.expand(len(examples.labels), -1), self.order(examples))


def prompts(rows: int, tokens: int, generator: Generator) -> Int[Tensor, "rows tokens"]:
    """Prompts `[rows, tokens]`, int64. Fewer rows from an equal generator are the first of more."""
    place = torch.arange(1, tokens + 1, dtype=torch.float64) / tokens
    drawn, part = torch.empty(rows, tokens, dtype=torch.int64), max(1, 2**18 // tokens)
    for first in range(0, rows, part):
        chosen = drawn[first : first + part]
        # whole weights and a draw from 0 .. their sum: exact, and so the same everywhere
        weights = torch.empty(len(chosen), 2, SYMBOLS, dtype=torch.int64)
        luck = torch.empty(len(chosen), 2, tokens, dtype=torch.float64)
        for row in range(len(chosen)):
            weights[row] = torch.randint(1, HEAVIEST + 1, (2, SYMBOLS), generator=generator)
            for half in luck[row]:
                torch.rand(tokens, generator=generator, dtype=torch.float64, out=half)
        edges = weights.cumsum(2)
        # a row of tickets for each distribution: as many with a symbol as it has weight
        most = SYMBOLS * HEAVIEST
        ticket = torch.arange(most).expand(len(chosen), 2, most).contiguous()
        tickets = torch.searchsorted(edges, ticket, right=True)
        late = (luck[:, 0] < place).long()
        total = edges[:, :, -1].double().gather(1, late)
        chosen.copy_(tickets.flatten(1).gather(1, late * most + (luck[:, 1] * total).long()))
    return drawn


# --- counting and ranking --------------------------------------------------------------------------------------------


def counts(prompt: Integer[Tensor, "b t"], seen: Bool[Tensor, "b t"] | None = None) -> Float[Tensor, "b symbols"]:
    """How often each symbol came, where it was `seen`: `[b, 20]`, float64. Tokens must be symbols, 0 .. 19."""
    ones = torch.ones(prompt.shape, dtype=torch.float64) if seen is None else seen.double()
    return torch.zeros(len(prompt), SYMBOLS, dtype=torch.float64).scatter_add_(1, prompt.long(), ones)


def first_seen(prompt: Integer[Tensor, "b t"]) -> Int[Tensor, "b symbols"]:
    """Where each symbol came first, the length of the prompt for those that did not: `[b, 20]`, int64."""
    length = prompt.shape[1]
    place = torch.arange(length).expand_as(prompt)
    return torch.full((len(prompt), SYMBOLS), length).scatter_reduce_(1, prompt.long(), place, "amin")


def rank(
    amount: Float[Tensor, "b symbols"], tie: Integer[Tensor, "b symbols"] | None = None
) -> Int[Tensor, "b symbols"]:
    """The symbols by decreasing amount; equal ones by ascending `tie`, else by ascending symbol: `[b, 20]`, int64."""
    order = torch.arange(SYMBOLS).expand(amount.shape) if tie is None else torch.argsort(tie, dim=1, stable=True)
    return order.gather(1, torch.argsort(-amount.gather(1, order), dim=1, stable=True))


def right_order(prompt: Integer[Tensor, "b t"]) -> Int[Tensor, "b symbols"]:
    """The answer: by decreasing count, equal counts by first appearance, unseen symbols ascending: `[b, 20]`, int64."""
    return rank(counts(prompt), first_seen(prompt))


def last_counts(prompt: Integer[Tensor, "b t"], tokens: int) -> Float[Tensor, "b symbols"]:
    """Counts over the last `tokens` tokens: what a memory of finite reach can know. `[b, 20]`, float64."""
    return counts(prompt[:, max(0, prompt.shape[1] - tokens) :])


def sample_counts(prompt: Integer[Tensor, "b t"], tokens: int, generator: Generator) -> Float[Tensor, "b symbols"]:
    """Counts over `tokens` tokens drawn evenly from the prompt without putting back, for each row anew: an unbiased
    summary of that size, such as a reservoir. The whole prompt when it is not longer. `[b, 20]`, float64.
    """
    rows = [row[torch.randperm(len(row), generator=generator)[:tokens]] for row in prompt]
    return counts(torch.stack(rows))


def decayed_counts(prompt: Integer[Tensor, "b t"], gamma: float, length: int) -> Float[Tensor, "b symbols"]:
    """A running count, `c <- gamma * c + count of a segment`, segments of `length` tokens. `[b, 20]`, float64."""
    total = torch.zeros(len(prompt), SYMBOLS, dtype=torch.float64)
    for segment in prompt.split(length, 1):
        total = gamma * total + counts(segment)
    return total


# --- scoring ---------------------------------------------------------------------------------------------------------


def uniform_floor() -> float:
    """Token accuracy of a guess among the symbols that have not been named yet: H_20 / 20 = 0.180."""
    return sum(1 / left for left in range(1, SYMBOLS + 1)) / SYMBOLS


def teacher_forced(order: Integer[Tensor, "b symbols"], answer: Integer[Tensor, "b symbols"]) -> float:
    """Token accuracy of a ranking, `order [b, 20]`, that is told the right symbols up to each place: it answers with
    its first symbol that is not among them. A share in [0, 1].
    """
    place = torch.argsort(order, dim=1).gather(1, answer)
    return (place.flip(1).cummin(1).values.flip(1) == place).double().mean().item()


def token_accuracy(predicted: Integer[Tensor, "b symbols"], answer: Integer[Tensor, "b symbols"]) -> float:
    """Share of places with the right symbol. Teacher-forced where `predicted` comes from a pass over the answer."""
    return (predicted == answer).double().mean().item()


def exact_order(predicted: Integer[Tensor, "b symbols"], answer: Integer[Tensor, "b symbols"]) -> float:
    """Share of streams that are right at every place."""
    return (predicted == answer).all(1).double().mean().item()


def kendall_tau(predicted: Integer[Tensor, "b n"], answer: Integer[Tensor, "b symbols"]) -> float:
    """Kendall's tau between an order the model wrote and the right one, mean over streams: 1 equal, -1 reversed.

    tau = (pairs in the same order - pairs in the opposite order) / all pairs. `predicted [b, n]` may be anything a
    model wrote: the first time a symbol comes counts, other tokens do not, and symbols that never came share the last
    place; a pair that shares a place adds nothing.
    """
    written = predicted.shape[1]
    is_it = predicted[:, None, :] == answer[:, :, None]
    place = torch.where(is_it.any(2), is_it.long().argmax(2), written)
    agreement = (place[:, None, :] - place[:, :, None]).sign().triu(1).sum((1, 2))
    pairs = answer.shape[1] * (answer.shape[1] - 1) / 2
    return (agreement.double() / pairs).mean().item()
