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

Everything is drawn from a seed, in the same way on every machine. Seeds of training, validation and test never meet:
see `seed_of`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Integer
from torch import Generator, Tensor

from mnemic.tasks.base import TEST_SEEDS, generator
from mnemic.training import IGNORED, Batch

SYMBOLS = 20
"""The symbols are the tokens 0 .. 19."""

SEPARATOR = 20
"""The token that asks."""

PAD = 21
"""The token behind the answer."""

VOCABULARY = 22


@dataclass
class SortingBatch(Batch):
    """Streams `input_ids` and `labels` `[b, t]`, int64, and what they are made of.

    `prompt [b, length]` are the symbols to count, `answer [b, 20]` the symbols in the order that is asked for.
    """

    prompt: Int[Tensor, "b length"]
    answer: Int[Tensor, "b symbols"]


@dataclass(frozen=True)
class SortingTask:
    """Sorting by frequency: prompts of `segments` segments with `length` tokens each.

    Raises:
        ValueError: a `length` or a number of `segments` below 1.
    """

    length: int = 1024
    segments: int = 4

    name = "sorting"
    vocabulary = VOCABULARY

    def __post_init__(self) -> None:
        if self.length < 1 or self.segments < 1:
            raise ValueError(f"length is {self.length} and segments is {self.segments}; use 1 or more of both")

    @property
    def tokens(self) -> int:
        """Length of a prompt."""
        return self.length * self.segments

    def draw(self, rows: int, generator: Generator) -> Int[Tensor, "rows length"]:
        """New prompts `[rows, tokens]`, int64. Fewer rows from an equal generator are the first of more."""
        return torch.stack([self._prompt(generator) for _ in range(rows)])

    def _prompt(self, generator: Generator) -> Tensor:
        # whole weights and a draw from 0 .. their sum: exact, and so the same everywhere
        edges = torch.randint(1, 10, (2, SYMBOLS), generator=generator).cumsum(1).double()
        place = torch.arange(1, self.tokens + 1, dtype=torch.float64) / self.tokens
        late = (torch.rand(self.tokens, generator=generator, dtype=torch.float64) < place).long()
        drawn = torch.rand(self.tokens, generator=generator, dtype=torch.float64)
        both = torch.stack([torch.searchsorted(edge, drawn * edge[-1], right=True) for edge in edges])
        return both.gather(0, late[None])[0]

    def batch(self, rows: int, seed: int, segment_length: int | None = None) -> SortingBatch:
        """`rows` streams from a seed, as whole segments of `segment_length` tokens, that of the task by default.

        Returns:
            `input_ids` and `labels` `[rows, tokens + segment_length]`; labels stand where the symbols of the answer
            stand and are -100 elsewhere.

        Raises:
            ValueError: the prompt is not whole segments of that length, or the answer does not fit into one.
        """
        segment_length = self.length if segment_length is None else segment_length
        if segment_length < SYMBOLS + 1:
            raise ValueError(
                f"segment_length is {segment_length}; separator and answer need segments of {SYMBOLS + 1} tokens"
            )
        if self.tokens % segment_length:
            raise ValueError(
                f"{self.tokens} tokens of prompt are not whole segments of {segment_length}; choose a divisor"
            )
        prompt = self.draw(rows, generator(seed))
        answer = right_order(prompt)
        last = torch.full((rows, segment_length), PAD)
        last[:, 0], last[:, 1 : SYMBOLS + 1] = SEPARATOR, answer
        labels = torch.full((rows, self.tokens + segment_length), IGNORED)
        labels[:, self.tokens + 1 : self.tokens + SYMBOLS + 1] = answer
        return SortingBatch(torch.cat([prompt, last], 1), labels, prompt, answer)

    def floors(self, rows: int = 200, seed: int = TEST_SEEDS) -> dict[str, float]:
        """Teacher-forced token accuracy without a trained memory, as shares, over the same prompts as `batch`.

        "uniform" is in closed form; the others rank by counts: over the last segment, the last two, `length` tokens
        drawn evenly from the whole prompt, everything with a decay of 0.95 a segment, everything. "all tokens" lacks
        only the order of first appearance; with it the answer is right by definition ("oracle").
        """
        prompt, source = self.draw(rows, generator(seed)), generator(seed + 1)
        answer = right_order(prompt)
        counted = {
            "last segment": last_counts(prompt, self.length),
            "last 2 segments": last_counts(prompt, 2 * self.length),
            f"sample of {self.length} tokens": sample_counts(prompt, self.length, source),
            "decay 0.95 a segment": decayed_counts(prompt, 0.95, self.length),
            "all tokens": counts(prompt),
        }
        scored = {name: teacher_forced(rank(each), answer) for name, each in counted.items()}
        return {"uniform": uniform_floor(), **scored, "oracle": teacher_forced(right_order(prompt), answer)}


# --- counting and ranking --------------------------------------------------------------------------------------------


def counts(prompt: Integer[Tensor, "b t"]) -> Float[Tensor, "b symbols"]:
    """How often each symbol came: `[b, 20]`, float64. Tokens must be symbols, 0 .. 19."""
    ones = torch.ones(prompt.shape, dtype=torch.float64)
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
