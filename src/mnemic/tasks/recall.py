"""Key-value recall under the contract of tasks: streams of facts, filler and one question (EMT whitepaper, section 5).
One only: with more in a row the first answers would give the last away.

The facts and their two forms, symbols and sentences, are `mnemic.tasks.facts`'.
"""

from __future__ import annotations

import copy
import itertools
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Generator, Tensor

from mnemic.tasks.base import Candidates, Examples, Task, TaskCard, generator
from mnemic.tasks.facts import NAMES, THINGS, Episode, LanguageRecall, RecallTask, SymbolRecall
from mnemic.tasks.text import Encoder, encoder
from mnemic.unrolling import IGNORED

# --- tasks -----------------------------------------------------------------------------------------------------------

PAPER = "EMT whitepaper, section 5"


@dataclass(frozen=True)
class RecallStreams(Task):
    """What both tasks share: a segment with `pairs` facts, `fillers` segments of filler, a segment that asks for one.

    Raises:
        ValueError: fewer than 0 fillers, or what `SymbolRecall` and `LanguageRecall` refuse.
    """

    fillers: int
    pairs: int
    segment_length: int

    axis: ClassVar[str] = "fillers"

    def __post_init__(self) -> None:
        if self.fillers < 0:
            raise ValueError(f"fillers is {self.fillers}; use 0 or more segments")
        # settings that do not go together are refused here and not at the first batch
        self.parts("train")

    @abstractmethod
    def parts(self, split: str) -> RecallTask:
        """What makes facts, filler and questions for a split."""

    @abstractmethod
    def told_at(self, episode: Episode, fact: Int[Tensor, "b 1"]) -> Int[Tensor, " b"]:
        """Where each stream tells one of its facts."""

    @property
    def uniform(self) -> float:
        """One of all values."""
        return 1 / len(self.parts("train").candidates)

    def draw(self, rows: int, generator: Generator, split: str = "train") -> Examples:
        """`rows` streams of `fillers + 2` segments, with one answer each."""
        parts = self.parts(split)
        episode = parts.tell(rows, generator)
        filler = parts.filler(rows, self.fillers, generator)
        fact = torch.randint(self.pairs, (rows, 1), generator=generator)
        question = parts.ask(episode, fact, generator)
        before = torch.full((rows, (self.fillers + 1) * self.segment_length), IGNORED)
        labels = torch.cat([before, question.labels], 1)
        return Examples(
            input_ids=torch.cat([episode.told[:, 0], filler, question.ids], 1),
            labels=labels,
            answer=torch.where(labels == IGNORED, -1, 0),
            evidence=self.told_at(episode, fact)[:, None, None],
            facts=torch.full((rows,), self.pairs),
        )

    def unbound(self, most: int = 2**18) -> dict[str, float]:
        """As for every task, but counted over streams without filler: what is told does not depend on it."""
        return Task.unbound(replace(self, fillers=0), most)

    def more_floors(self, examples: Examples, luck: Generator) -> dict[str, float]:
        """One of the stored values at random: the binding of key and value is lost."""
        return {"a stored value at random": 1 / self.pairs + (1 - 1 / self.pairs) * self.uniform}


@dataclass(frozen=True)
class SymbolStreams(RecallStreams):
    """Pairs of symbols among noise (`SymbolRecall`); one key is named again."""

    fillers: int = 4
    pairs: int = 4
    segment_length: int = 32

    name: ClassVar[str] = "recall-symbols"
    card: ClassVar[TaskCard] = TaskCard("Recall of symbols", "Name the value that was told with a key.", PAPER)

    @cached_property
    def _parts(self) -> SymbolRecall:
        return SymbolRecall(self.segment_length, self.pairs)

    def parts(self, split: str) -> SymbolRecall:
        """The same for every split."""
        return self._parts

    def told_at(self, episode: Episode, fact: Int[Tensor, "b 1"]) -> Int[Tensor, " b"]:
        """The key's place; its value follows."""
        key = episode.keys.gather(1, fact) + SymbolRecall.first_key
        return (episode.told[:, 0] == key).long().argmax(1)

    @property
    def vocabulary(self) -> int:
        """64 tokens."""
        return SymbolRecall.vocabulary

    @property
    def unit(self) -> int:
        """A key and its value; keys stand at even places."""
        return 2

    def text(self, ids: Sequence[int]) -> list[str]:
        """Keys as k0 .. k15, values as v0 .. v15, noise as a dot."""
        first_key, first_value, first_noise = SymbolRecall.first_key, SymbolRecall.first_value, SymbolRecall.first_noise
        kinds = ((first_noise, "."), (first_value, "v"), (first_key, "k"), (0, "?"))
        named = (next((kind, token - first) for first, kind in kinds if token >= first) for token in ids)
        return [kind if kind in ".?" else f"{kind}{number}" for kind, number in named]

    def candidates(self, examples: Examples) -> Candidates | None:
        """The values of all pairs."""
        if self.pairs == 1:
            return None
        first = examples.input_ids[:, : self.segment_length]
        value = (first >= SymbolRecall.first_value) & (first < SymbolRecall.first_noise)
        behind = (value & (torch.arange(self.segment_length) > examples.evidence[:, 0] + 1)).sum(1)
        return Candidates(first[value].view(len(first), self.pairs).flip(1), behind)

    def guess(
        self,
        ids: Int[Tensor, "b t"],
        asked: Bool[Tensor, "b t"],
        seen: Bool[Tensor, "b t"],
        generator: Generator,
    ) -> Int[Tensor, "b t"]:
        """The value that is seen behind the key asked for; any of the 16 where none is."""
        parts = self._parts
        predicted = torch.randint(parts.first_value, parts.first_noise, ids.shape, generator=generator)
        rows, places = asked.nonzero().unbind(1)
        behind = ids[:, 1:]
        value = (behind >= parts.first_value) & (behind < parts.first_noise) & seen[:, 1:] & seen[:, :-1]
        key = torch.where(seen[rows, places - 1], ids[rows, places - 1], -1)
        told = value[rows] & (ids[rows, :-1] == key[:, None])
        found = behind[rows].gather(1, told.long().argmax(1, keepdim=True))[:, 0]
        predicted[rows, places] = torch.where(told.any(1), found, predicted[rows, places])
        return predicted


@dataclass(frozen=True)
class SentenceStreams(RecallStreams):
    """Sentences about who has what within a text (`LanguageRecall`); one of the names is asked for.

    `tokenizer` is "words", "bytes" or one of Hugging Face. `filler` is the text, by default sentences of a small world
    of its own (`small_world`). Training has the first half of it, validation the third quarter, test the last.

    Raises:
        ValueError: also for a text that is too short, or that says of one of the names that it has something.
    """

    fillers: int = 4
    pairs: int = 2
    segment_length: int = 64
    tokenizer: Any = "words"
    filler: str | None = None

    name: ClassVar[str] = "recall-language"
    card: ClassVar[TaskCard] = TaskCard("Recall of sentences", "Say who has what, as a sentence told it.", PAPER)

    @cached_property
    def _filler(self) -> str:
        return small_world() if self.filler is None else self.filler

    @cached_property
    def _encoder(self) -> Encoder:
        return encoder(self.tokenizer, [self._filler, *NAMES, *THINGS, "has a."])

    @cached_property
    def _whole(self) -> LanguageRecall:
        tokenizer = _Called(self._encoder) if isinstance(self.tokenizer, str) else self.tokenizer
        return LanguageRecall(tokenizer, self._filler, self.segment_length, self.pairs)

    @cached_property
    def _splits(self) -> dict[str, LanguageRecall]:
        whole = self._whole
        _refuse_facts(whole)
        length, splits = len(whole.text), {}
        for split, first, last in (("train", 0, 2), ("validation", 2, 3), ("test", 3, 4)):
            splits[split] = copy.copy(whole)
            splits[split].text = whole.text[length * first // 4 : length * last // 4]
        shortest = min(len(part.text) for part in splits.values())
        if shortest < 4 * self.segment_length:
            raise ValueError(
                f"the filler has {length} tokens, of which validation and test get a quarter each; "
                f"give at least {16 * self.segment_length}"
            )
        return splits

    def parts(self, split: str) -> LanguageRecall:
        """With the part of the text that the split has."""
        return self._splits[split]

    def told_at(self, episode: Episode, fact: Int[Tensor, "b 1"]) -> Int[Tensor, " b"]:
        """The first token of the sentence."""
        keys, values = (each.gather(1, fact)[:, 0].tolist() for each in (episode.keys, episode.values))
        told = zip(episode.told[:, 0], keys, values, strict=True)
        return torch.tensor([int(_starts(row, self._whole.facts[key][value])[0]) for row, key, value in told])

    @property
    def vocabulary(self) -> int:
        """That of the tokenizer."""
        return self._encoder.vocabulary

    @property
    def unit(self) -> int:
        """A segment: sentences stand anywhere in one, and smaller pieces would cut them."""
        return self.segment_length

    def settings(self) -> dict[str, Any]:
        """Of a text only how long it is."""
        told = super().settings()
        return told if self.filler is None else {**told, "filler": f"{len(self.filler)} characters"}

    def text(self, ids: Sequence[int]) -> list[str]:
        """What the tokenizer calls each."""
        return self._encoder.pieces(ids)

    def candidates(self, examples: Examples) -> Candidates | None:
        """The things of all sentences."""
        if self.pairs == 1:
            return None
        first = examples.input_ids[:, : self.segment_length]
        found: list[tuple[int, int, int]] = []
        for question in self._whole.questions:
            starts = (first.unfold(1, len(question), 1) == torch.tensor(question)).all(2)
            for row, start in starts.nonzero().tolist():
                behind = first[row, start + len(question) :].tolist()
                things = enumerate(self._whole.candidates)
                found.append((row, -start, next(value for value, said in things if behind[: len(said)] == said)))
        # the newest of each row first
        _, place, value = torch.tensor(sorted(found)).view(len(first), self.pairs, 3).unbind(2)
        return Candidates(value, (-place == examples.evidence[:, 0]).long().argmax(1))

    def guess(
        self,
        ids: Int[Tensor, "b t"],
        asked: Bool[Tensor, "b t"],
        seen: Bool[Tensor, "b t"],
        generator: Generator,
    ) -> Int[Tensor, "b t"]:
        """The thing that is seen behind the words that also precede the answer; any thing where there is none."""
        candidates = self._whole.candidates
        luck = torch.randint(len(candidates), (len(ids),), generator=generator).tolist()
        predicted, known = torch.zeros_like(ids), torch.where(seen, ids, -1)
        for row in asked.any(1).nonzero().flatten().tolist():
            place = int(asked[row].long().argmax())
            value = self._told(known[row], place)
            said = candidates[luck[row] if value is None else value][: ids.shape[1] - place]
            predicted[row, place : place + len(said)] = torch.tensor(said)
        return predicted

    def _told(self, known_t: Int[Tensor, " t"], place: int) -> int | None:
        """Which thing is said to belong to whom the question before `place` names; unknown tokens are -1."""
        asked = known_t[:place].tolist()
        for question in self._whole.questions:
            if asked[-len(question) :] != question:
                continue
            for start in _starts(known_t[:place], question).tolist():
                behind = asked[start + len(question) :]
                for value, said in enumerate(self._whole.candidates):
                    if behind[: len(said)] == said:
                        return value
        return None


class _Called:
    """An encoder, called as a Hugging Face tokenizer is."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder

    def __call__(self, text: str, **ignored: Any) -> dict[str, list[int]]:
        return {"input_ids": self.encoder.encode(text)}


def _starts(row_t: Int[Tensor, " t"], part: list[int]) -> Int[Tensor, " n"]:
    """The places of a row where `part` begins."""
    if len(row_t) < len(part):
        return torch.empty(0, dtype=torch.long)
    return (row_t.unfold(0, len(part), 1) == torch.tensor(part)).all(1).nonzero().flatten()


def _refuse_facts(recall: LanguageRecall) -> None:
    """A filler that tells of the names would give wrong answers, or right ones."""
    for name, question in zip(recall.names, recall.questions, strict=True):
        # filler begins again at its end
        if len(_starts(torch.cat([recall.text, recall.text[: len(question)]]), question)):
            raise ValueError(f"the filler says {name + ' has a'!r}, as facts do; take such sentences out of it")


WHO = (
    *("the miller", "the baker", "a farmer", "the teacher", "a sailor", "the painter", "an old man", "a young woman"),
    *("the doctor", "the gardener", "a traveller", "the neighbour", "a shepherd", "the smith", "a soldier", "a child"),
)
DID = (
    *("walked to", "rested near", "waited behind", "looked at", "sang beside", "came back from", "hurried past"),
    *("slept close to", "worked around", "stopped before", "ran towards", "talked about", "thought of", "dreamed of"),
    *("turned away from", "went around"),
)
WHERE = (
    *("the river", "the mill", "the market", "a stone wall", "the harbour", "the green hill", "the church", "the lake"),
    *("the bridge", "a small garden", "the forest", "the wide field", "the tall tower", "a quiet village"),
    *("the old gate", "the narrow street"),
)


@cache
def small_world() -> str:
    """4096 different sentences such as "The miller walked to the river.", none of which names a person or a thing that
    facts are about.
    """
    said = [f"{who} {did} {where}.".capitalize() for who, did, where in itertools.product(WHO, DID, WHERE)]
    return " ".join(said[place] for place in torch.randperm(len(said), generator=generator(0)).tolist())
