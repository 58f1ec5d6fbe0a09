"""What a task is: streams from a seed, what is known about each, and one solver that is both oracle and floor.

A stream is whole segments of tokens. Some tokens have labels: the answers. A model sees one segment at a time, so what
it answers right beyond the floors has come through its memory.

A task has one solver, `guess`, which is told what part of the stream it may look at. It sees everything: that is the
oracle, and it is always right. It sees the last segment only, the last few, or an unbiased sample: those are floors,
what a memory of that kind reaches with nothing learned. No score is worth anything without them.

Everything is drawn from a seed, in the same way on every machine. Seeds of training, validation and test never meet.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from mnemic.training import Batch
from mnemic.unrolling import IGNORED

TASKS: dict[str, type[Task]] = {}
"""Every task by its name; a subclass of `Task` that has a `name` enters by being defined."""

TEST_SEEDS = 1_000_000_000
"""Seeds of test streams begin here."""

FIRST_SEED = {"train": 0, "validation": TEST_SEEDS // 2, "test": TEST_SEEDS}
"""Where each split's seeds begin."""


UNBOUND = "best guess without binding"
"""The floor of somebody who knows which values were told, and not whose they are."""


def seed_of(split: str, number: int) -> int:
    """The seed of batch `number` of a split: "train", "validation" or "test". Half a billion seeds each.

    Raises:
        ValueError: another split, or a number outside `0 .. 499_999_999`.
    """
    if split not in FIRST_SEED:
        raise ValueError(f"split is {split!r}; choose one of {', '.join(FIRST_SEED)}")
    if not 0 <= number < TEST_SEEDS // 2:
        raise ValueError(f"number is {number}; a split has the batches 0 .. {TEST_SEEDS // 2 - 1}")
    return FIRST_SEED[split] + number


def generator(seed: int) -> Generator:
    """A new source of randomness on the CPU."""
    return Generator().manual_seed(seed)


def shuffled(rows: int, count: int, generator: Generator) -> Int[Tensor, "b n"]:
    """A random order of `0 .. count - 1` in each row."""
    # stable, so that equal numbers, which single precision has now and then, come out the same everywhere
    return torch.rand(rows, count, generator=generator).argsort(dim=1, stable=True)


def below(count: int, generator: Generator) -> int:
    """One of `0 .. count - 1`, each as likely as another."""
    return int(torch.randint(count, (), generator=generator))


@dataclass(frozen=True)
class TaskCard:
    """What `mnemic tasks` and the documentation say of a task."""

    title: str
    asks: str
    """What a memory must do, in a sentence."""
    paper: str
    """Title or name, and address."""


@dataclass
class Examples(Batch):
    """Streams `input_ids` and `labels` `[b, t]`, int64, `t` a multiple of the segment, and what is known of them.

    `labels` are as in Hugging Face: the token itself where it is part of an answer, -100 elsewhere. `answer [b, t]`
    numbers the answer that a labelled token belongs to, from 0 in each row, -1 elsewhere. `evidence [b, n, e]` are the
    positions where the evidence for each of `n` answers stands (first token of each piece), -1 where there is no more.
    `facts [b]` is the number of facts in a stream. `extra` holds more numbers for each answer, `[b, n]` each, such as
    how often a value was rewritten.
    """

    answer: Int[Tensor, "b t"]
    evidence: Int[Tensor, "b n e"]
    facts: Int[Tensor, " b"]
    extra: dict[str, Tensor] = field(default_factory=dict)

    @property
    def asked(self) -> Bool[Tensor, "b t"]:
        """Where answers stand."""
        return self.labels != IGNORED

    @property
    def place(self) -> Int[Tensor, "b n"]:
        """Where each answer begins; -1 for answers that a row does not have."""
        count, length = self.evidence.shape[1], self.answer.shape[1]
        here = self.answer[:, None, :] == torch.arange(count)[:, None]
        return torch.where(here.any(2), here.long().argmax(2), -1) if length else self.answer.new_zeros(0, count)

    @property
    def lag(self) -> Int[Tensor, "b n"]:
        """Tokens from the last piece of evidence to the answer; -1 for answers that a row does not have."""
        place = self.place
        return torch.where(place >= 0, place - self.evidence.amax(2), -1)

    def take(self, rows: slice | Tensor) -> Examples:
        """Some of the streams."""
        extra = {name: tensor[rows] for name, tensor in self.extra.items()}
        return Examples(
            input_ids=self.input_ids[rows],
            labels=self.labels[rows],
            answer=self.answer[rows],
            evidence=self.evidence[rows],
            facts=self.facts[rows],
            extra=extra,
        )


@dataclass
class Candidates:
    """What each of `n` answers could be for somebody who does not know whose a value is, in the order of `Task.right`:
    the `values [n, k]` that the stream told before, as numbers, the newest first, -1 where there is no more or where it
    is known not to be meant; and which of them, `asked [n]`, is the right one.
    """

    values: Int[Tensor, "n k"]
    asked: Int[Tensor, " n"]

    def ages(self) -> Float[Tensor, " k"]:
        """How often the value of each age is the one that is asked for."""
        return self.asked.bincount(minlength=self.values.shape[1]).double() / max(len(self.asked), 1)

    def guessed(self, ages: Float[Tensor, " j"]) -> Float[Tensor, " n"]:
        """The chance that the best guess is right: the value with the highest sum of chances `ages` over the places at
        which it was told, any of those with equally high ones.
        """
        known = self.values >= 0
        weight = F.pad(ages, (0, max(0, self.values.shape[1] - len(ages))))[: self.values.shape[1]]
        # the sum for each place; what is not there is below all
        same = (self.values[:, :, None] == self.values[:, None]) & known[:, None]
        votes = (same * weight).sum(2).masked_fill(~known, -1)
        first = known & ~(same.tril(-1).any(2))
        best = first & (votes >= votes.amax(1, keepdim=True) - 1e-9)
        right = self.values == self.values.gather(1, self.asked[:, None])
        return (best & right).double().sum(1) / best.sum(1).clamp(min=1)


class Task(ABC):
    """A generator with its solver. Subclasses are frozen dataclasses whose fields are plain settings, so that a task is
    made by name and settings from a file, and written to a record.

    A subclass with a `name` is registered. `axis` is the setting along which it becomes harder: what a suite's lengths
    go over. `by_answer` is True where an answer counts only as a whole, False where every labelled token counts.
    """

    name: ClassVar[str]
    card: ClassVar[TaskCard]
    axis: ClassVar[str]
    by_answer: ClassVar[bool] = True
    metric: ClassVar[str] = "%"
    """The unit of `result`; "%" stands for shares in [0, 1]."""
    lower_is_better: ClassVar[bool] = False
    solvable: ClassVar[bool] = True
    """False for tasks on real data that nobody can answer always: they have no oracle."""

    segment_length: int
    """Tokens of a segment."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:
            TASKS[cls.name] = cls

    @property
    @abstractmethod
    def vocabulary(self) -> int:
        """Token ids are 0 .. vocabulary - 1."""

    @property
    @abstractmethod
    def uniform(self) -> float:
        """Score of a uniform guess among the possible answers, in closed form."""

    @abstractmethod
    def draw(self, rows: int, generator: Generator, split: str = "train") -> Examples:
        """`rows` new streams. `split` matters only where streams are made from given texts, which are divided too."""

    @abstractmethod
    def guess(
        self,
        ids: Int[Tensor, "b t"],
        asked: Bool[Tensor, "b t"],
        seen: Bool[Tensor, "b t"],
        generator: Generator,
    ) -> Int[Tensor, "b t"]:
        """The best answers that need nothing but the tokens that are `seen`; anything where `asked` is False.

        What no seen token tells is guessed at random among what is possible. `ids` may have any token in the answers'
        place and must not be read there. With everything seen this is the oracle.
        """

    @property
    def unit(self) -> int:
        """How many tokens that follow each other belong together: an unbiased sample is drawn in such pieces."""
        return 1

    def text(self, ids: Sequence[int]) -> list[str]:
        """Tokens as a person reads them."""
        return [str(token) for token in ids]

    def settings(self) -> dict[str, Any]:
        """The task's settings as plain values; what is not one (a tokenizer) by its class."""
        values = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}  # pyright: ignore[reportArgumentType]
        plain = (str, int, float, bool, type(None), list, tuple)
        return {name: value if isinstance(value, plain) else type(value).__name__ for name, value in values.items()}

    def examples(self, rows: int, split: str = "train", number: int = 0) -> Examples:
        """Batch `number` of a split: "train", "validation" or "test". The same whenever it is asked for, anywhere."""
        return self.draw(rows, generator(seed_of(split, number)), split)

    # --- scoring -----------------------------------------------------------------------------------------------------

    def right(self, predicted: Int[Tensor, "b t"], examples: Examples) -> Bool[Tensor, " n"]:
        """What counts, one by one in row-major order: whether each answer (or each of its tokens) is right."""
        correct = (predicted == examples.labels) | ~examples.asked
        if not self.by_answer:
            return correct[examples.asked]
        count = examples.evidence.shape[1]
        # an answer is right when none of its tokens is wrong; slot 0 takes what is no answer
        wrong = torch.zeros(len(predicted), count + 1, dtype=torch.long)
        wrong.scatter_add_(1, examples.answer + 1, (~correct).long())
        return (wrong[:, 1:] == 0)[examples.place >= 0]

    def score(self, predicted: Int[Tensor, "b t"], examples: Examples) -> float:
        """The task's metric, a share in [0, 1], for a token predicted at every labelled place.

        With `by_answer` this is exact match: greedy decoding writes an answer exactly when every token of it is the
        most probable one behind the right ones before.
        """
        return self.right(predicted, examples).double().mean().item()

    def result(self, predicted: Int[Tensor, "b t"], nats: Float[Tensor, "b t"], examples: Examples) -> float:
        """What a run is judged by: `score`, unless the task is about probabilities. `nats` are the negative
        log-likelihoods of the right tokens at labelled places.
        """
        return self.score(predicted, examples)

    def measures(self, predicted: Int[Tensor, "b t"], examples: Examples) -> dict[str, float]:
        """What else is worth knowing, by name, such as the age of the values that were said instead."""
        return {}

    def right_by(
        self, predicted: Int[Tensor, "b t"], examples: Examples, name: str = "age"
    ) -> dict[int, tuple[float, int]]:
        """Share of right answers for each value of `examples.extra[name]`, and how many answers have it, in order.

        Raises:
            ValueError: a task that counts tokens, or a name that it does not note.
        """
        if not self.by_answer:
            raise ValueError(f"{self.name} counts tokens, not answers; there is no {name} of a token")
        if name not in examples.extra:
            known = ", ".join(sorted(examples.extra)) or "nothing"
            raise ValueError(f"{self.name} does not note {name!r}; it notes {known}")
        value, right = examples.extra[name][examples.place >= 0], self.right(predicted, examples)
        shares = {each: right[value == each] for each in value.unique().tolist()}
        return {each: (share.double().mean().item(), len(share)) for each, share in shares.items()}

    def floors(self, rows: int = 200, number: int = 0) -> dict[str, float]:
        """Scores without anything learned, on test streams: a uniform guess, the most frequent answers, and the solver
        that sees of the stream only the segment that asks, one or two segments more, or a segment's worth of tokens
        drawn evenly from everything before. "oracle" sees everything.

        Where several segments ask, each is answered from what lies before its own end. The right answers of earlier
        segments are part of the stream there, as they are when a model reads it. `more_floors` are in between.
        """
        examples = self.examples(rows, "test", number)
        luck = generator(seed_of("test", number) + 1)
        views: dict[str, Callable[[Examples], Tensor]] = {
            "own segment": lambda part: self.last(part, 0),
            "last segment": lambda part: self.last(part, 1),
            "last 2 segments": lambda part: self.last(part, 2),
            f"sample of {self.segment_length} tokens": lambda part: self.sample(part, luck),
        }
        scored = {name: self.score(self.answered(examples, view), examples) for name, view in views.items()}
        scored |= self.more_floors(examples, generator(seed_of("test", number) + 2))
        scored |= self.unbound()
        scored |= {"oracle": self.score(self.solve(examples), examples)} if self.solvable else {}
        return {"uniform": self.uniform, "majority": self.majority(examples), **scored}

    def more_floors(self, examples: Examples, luck: Generator) -> dict[str, float]:
        """What else is reached without a memory, or by one that lacks something, by name: floors of this task alone."""
        return {}

    def candidates(self, examples: Examples) -> Candidates | None:
        """The values among which an answer is, where a stream tells several; None where there is nothing to bind."""
        return None

    def unbound(self, most: int = 2**18) -> dict[str, float]:
        """The floor `UNBOUND`: the best guess of somebody who knows all values that were told and when, and not whose
        they are. Nothing where there is nothing to bind.

        It is the value with the most votes, where a told value counts as often as that of its age is asked for in
        training streams: the most frequent value where all are asked alike, the most recent one where that is asked
        for. What it is worth is counted over validation streams, of `most` tokens together, so that it is the same for
        all seeds of a test.
        """
        if type(self).candidates is Task.candidates:
            return {}
        rows = max(16, min(4096, most // self.examples(1).input_ids.shape[1]))
        train, counted = (self.candidates(self.examples(rows, split)) for split in ("train", "validation"))
        if train is None or counted is None:
            return {}
        return {UNBOUND: counted.guessed(train.ages()).mean().item()}

    def asking(self, examples: Examples) -> Iterator[tuple[slice, Examples]]:
        """Each segment that asks in any row: where it stands, and the streams up to its end with its labels alone."""
        size = self.segment_length
        for first in range(0, examples.asked.shape[1], size):
            here, end = slice(first, first + size), first + size
            if not bool(examples.asked[:, here].any()):
                continue
            labels, answer = examples.labels[:, :end].clone(), examples.answer[:, :end].clone()
            labels[:, :first], answer[:, :first] = IGNORED, -1
            yield here, replace(examples, input_ids=examples.input_ids[:, :end], labels=labels, answer=answer)

    def answered(self, examples: Examples, view: Callable[[Examples], Tensor]) -> Int[Tensor, "b t"]:
        """The solver's answers where the questions of each segment may use what `view` shows of the stream so far."""
        predicted = torch.zeros_like(examples.input_ids)
        for here, part in self.asking(examples):
            predicted[:, here] = self.solve(part, view(part))[:, here]
        return predicted

    def solve(self, examples: Examples, seen: Bool[Tensor, "b t"] | None = None, seed: int = 0) -> Int[Tensor, "b t"]:
        """The solver's answers for what it sees, everything by default; the answers themselves are taken away first."""
        hidden = examples.input_ids.masked_fill(examples.asked, 0)
        seen = torch.ones_like(examples.asked) if seen is None else seen
        return self.guess(hidden, examples.asked, seen & ~examples.asked, generator(seed))

    def last(self, examples: Examples, segments: int) -> Bool[Tensor, "b t"]:
        """What a memory of that many segments has seen when the last answer is asked for."""
        segment = torch.arange(examples.asked.shape[1]) // self.segment_length
        asks = torch.where(examples.asked, segment, -1).amax(1, keepdim=True)
        return (segment >= asks - segments).expand_as(examples.asked)

    def sample(self, examples: Examples, generator: Generator) -> Bool[Tensor, "b t"]:
        """A segment's worth of tokens, in pieces of `unit`, drawn evenly from all before the segment that asks."""
        rows, length = examples.asked.shape
        own = self.last(examples, 0)
        pieces = -(-length // self.unit)
        luck = torch.rand(rows, pieces, generator=generator, dtype=torch.float64)
        luck = luck.repeat_interleave(self.unit, 1)[:, :length].masked_fill(own, -1)
        count = min(self.segment_length // self.unit * self.unit, length)
        chosen = luck >= luck.topk(count, 1).values[:, -1:]
        return own | (chosen & (luck >= 0))

    def majority(self, examples: Examples, rows: int = 500) -> float:
        """Score of always giving the answer that is most frequent in training: token by token of an answer."""
        train = self.examples(rows, "train", 0)
        offset = _offsets(train.answer)
        said = _offsets(examples.answer)
        predicted = torch.zeros_like(examples.labels)
        for place in offset[train.asked].unique().tolist():
            tokens = train.labels[train.asked & (offset == place)]
            predicted[examples.asked & (said == place)] = int(tokens.bincount().argmax())
        return self.score(predicted, examples)


def _offsets(answer: Int[Tensor, "b t"]) -> Int[Tensor, "b t"]:
    """How many tokens of the same answer stand before each; an answer's tokens follow each other."""
    place = torch.arange(answer.shape[1]).expand_as(answer)
    begins = F.pad(answer[:, :-1], (1, 0), value=-1) != answer
    return place - torch.where(begins, place, 0).cummax(1).values
