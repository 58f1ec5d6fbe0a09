"""Key-value recall: facts somewhere in a long stream, the question at its end (EMT whitepaper, section 5).

A stream is whole segments: one or more that tell facts, filler before, between and after them, one that asks. A later
segment may correct a fact: the key again, with a new value, and the new one is asked for. The base sees one segment at
a time, so what it answers right beyond chance has come through the memory.

Two forms. *Symbols*: a tiny vocabulary, facts are pairs of key and value tokens among noise. *Language*: sentences
such as "Lily has a ball." within real text, for any tokenizer.

`SymbolRecall` and `LanguageRecall` make the parts of a stream. The tasks, whole streams that ask for one fact, are
`mnemic.tasks.recall`'s.

Everything is drawn from a generator seeded by the caller, so the same seed gives the same streams on every machine.
Training seeds lie below `TEST_SEEDS`, test seeds from there on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Int
from torch import Generator, Tensor

from mnemic.tasks.base import shuffled
from mnemic.unrolling import IGNORED


@dataclass
class Episode:
    """What a batch of streams was told: `keys` and `values` `[b, n]` by index, as they hold at the end.

    The segments that tell it are `told [b, k, t]`, their values `said [b, k, p]`. `since [b, n]` is which of them told
    a value that holds, `before [b, n]` the value that it corrects, -1 where it corrects none.
    """

    keys: Int[Tensor, "b n"]
    values: Int[Tensor, "b n"]
    told: Int[Tensor, "b k t"]
    said: Int[Tensor, "b k p"]
    since: Int[Tensor, "b n"]
    before: Int[Tensor, "b n"]

    def take(self, rows: slice | Tensor) -> Episode:
        """Some of the streams."""
        return Episode(*(getattr(self, field.name)[rows] for field in fields(self)))


@dataclass
class Question:
    """A segment that asks. `labels` are -100 except at the answers' tokens; `fact [b, t]` says which fact each of those
    answers (-1 elsewhere).
    """

    ids: Int[Tensor, "b t"]
    labels: Int[Tensor, "b t"]
    fact: Int[Tensor, "b t"]


def anywhere(rows: int, fillers: int, segments: int, generator: Generator) -> Int[Tensor, "b k"]:
    """Places for `segments` segments with facts among `fillers` others: ascending, all of them as likely."""
    return shuffled(rows, fillers + segments, generator)[:, :segments].sort(1).values


class RecallTask(ABC):
    """What both forms share. `pairs` facts a stream; segments of `segment_length` tokens."""

    name: str
    segment_length: int
    pairs: int
    keys: int
    most_asked: int
    """How many questions fit one segment."""
    candidates: list[list[int]]
    """Every possible answer as tokens."""

    @abstractmethod
    def write(self, keys: Int[Tensor, "b p"], values: Int[Tensor, "b p"], generator: Generator) -> Int[Tensor, "b t"]:
        """A segment that tells these facts."""

    @abstractmethod
    def filler(self, rows: int, segments: int, generator: Generator) -> Int[Tensor, "b t"]:
        """`segments` segments without a fact."""

    @abstractmethod
    def ask(self, episode: Episode, facts: Int[Tensor, "b n"], generator: Generator) -> Question:
        """A segment that asks for `n` of the facts, by index, in that order."""

    @abstractmethod
    def ask_in_window(self, rows: int, generator: Generator) -> Question:
        """Facts and questions in one segment: the ceiling, and what a base is trained on."""

    def tell(
        self, rows: int, generator: Generator, *, segments: int = 1, corrected: int = 0, keys: int | None = None
    ) -> Episode:
        """New facts for `rows` streams, `pairs` in each of `segments` segments. From the second on, `corrected` of them
        give another value to a key that was told before. With `keys`, of the first so many keys only.

        Raises:
            ValueError: more different keys than there are, or more corrections than facts in a segment.
        """
        fresh = self.pairs - corrected
        count, most = self.pairs + (segments - 1) * fresh, min(keys or self.keys, self.keys)
        if not 0 <= corrected <= self.pairs:
            raise ValueError(f"corrected is {corrected}; a segment tells {self.pairs} facts, use 0 .. {self.pairs}")
        if count > most:
            raise ValueError(f"{segments} segments tell of {count} keys; there are {most}, use fewer segments")
        key_bn = shuffled(rows, most, generator)[:, :count]
        value_bn = torch.randint(len(self.candidates), (rows, count), generator=generator)
        since, before = torch.zeros_like(key_bn), torch.full_like(key_bn, -1)
        told, said, known = [], [], 0
        for segment in range(segments):
            again = shuffled(rows, known, generator)[:, :corrected] if known else key_bn[:, :0]
            old = value_bn.gather(1, again)
            shift = torch.randint(1, len(self.candidates), again.shape, generator=generator)
            value_bn = value_bn.scatter(1, again, (old + shift) % len(self.candidates))
            new = torch.arange(known, known + self.pairs - again.shape[1]).expand(rows, -1)
            place = torch.cat([again, new], 1)
            if known:
                place = place.gather(1, shuffled(rows, self.pairs, generator))
            before.scatter_(1, again, old)
            since.scatter_(1, place, segment)
            said.append(value_bn.gather(1, place))
            told.append(self.write(key_bn.gather(1, place), said[-1], generator))
            known += new.shape[1]
        return Episode(key_bn, value_bn, torch.stack(told, 1), torch.stack(said, 1), since, before)

    def lay(
        self,
        episode: Episode,
        place: Int[Tensor, "b k"],
        segments: int,
        generator: Generator,
        pool: Int[Tensor, "n t"] | None = None,
    ) -> Int[Tensor, "b t"]:
        """`segments` segments: those of the episode at `place`, filler elsewhere.

        With a `pool` of segments the filler is drawn from it, which is quicker to train on.
        """
        rows = len(place)
        if pool is None:
            laid = self.filler(rows, segments, generator).unflatten(1, (segments, -1)).clone()
        else:
            laid = pool[torch.randint(len(pool), (rows, segments), generator=generator)]
        return laid.scatter(1, place[..., None].expand_as(episode.told), episode.told).flatten(1)

    def stream(
        self,
        rows: int,
        fillers: int,
        generator: Generator,
        pool: Int[Tensor, "n t"] | None = None,
        *,
        segments: int = 1,
        corrected: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Token ids and labels `[b, (fillers + segments + 1) * segment_length]` of whole streams that end in questions.
        The segments with facts lie anywhere among the fillers, elsewhere in every stream.
        """
        episode = self.tell(rows, generator, segments=segments, corrected=corrected)
        place = anywhere(rows, fillers, segments, generator)
        laid = self.lay(episode, place, fillers + segments, generator, pool)
        asked = shuffled(rows, episode.keys.shape[1], generator)[:, : self.most_asked]
        question = self.ask(episode, asked, generator)
        silent = torch.full_like(laid, IGNORED)
        return torch.cat([laid, question.ids], 1), torch.cat([silent, question.labels], 1)


class SymbolRecall(RecallTask):
    """Pairs of a key and a value token at random even places among noise; the question names keys again.

    Vocabulary of 64: keys 4-19, values 20-35, noise 36-63. Keys differ within a stream, values need not.
    """

    vocabulary = 64
    first_key, first_value, first_noise = 4, 20, 36
    keys = values = 16

    def __init__(self, segment_length: int = 32, pairs: int = 4) -> None:
        if segment_length < 4 * pairs:
            raise ValueError(f"{pairs} pairs need a segment of {4 * pairs} tokens, segment_length is {segment_length}")
        if not 1 <= pairs <= self.keys:
            raise ValueError(f"pairs is {pairs}; there are {self.keys} keys, use 1 .. {self.keys}")
        self.name, self.segment_length, self.pairs = "recall-symbols", segment_length, pairs
        self.most_asked = segment_length // 4
        self.candidates = [[self.first_value + value] for value in range(self.values)]

    def write(self, keys: Int[Tensor, "b p"], values: Int[Tensor, "b p"], generator: Generator) -> Int[Tensor, "b t"]:
        """Pairs in the first half of the segment."""
        rows, count = keys.shape
        told = self.filler(rows, 1, generator)
        place = shuffled(rows, self.segment_length // 4, generator)[:, :count] * 2
        return told.scatter(1, place, keys + self.first_key).scatter(1, place + 1, values + self.first_value)

    def filler(self, rows: int, segments: int, generator: Generator) -> Int[Tensor, "b t"]:
        """Noise tokens."""
        shape = (rows, segments * self.segment_length)
        return torch.randint(self.first_noise, self.vocabulary, shape, generator=generator)

    def ask(self, episode: Episode, facts: Int[Tensor, "b n"], generator: Generator) -> Question:
        """Keys in the second half of the segment, each followed by its value."""
        rows, count = facts.shape
        return self._ask_into(self.filler(rows, 1, generator), episode, facts, count, generator)

    def ask_in_window(self, rows: int, generator: Generator) -> Question:
        """Pairs in the first half, all keys asked in the second."""
        episode = self.tell(rows, generator)
        return self._ask_into(episode.told[:, 0], episode, shuffled(rows, self.pairs, generator), self.pairs, generator)

    def _ask_into(self, ids: Tensor, episode: Episode, facts: Tensor, count: int, generator: Generator) -> Question:
        rows, half = ids.shape[0], self.segment_length // 2
        place = half + 2 * shuffled(rows, self.segment_length // 4, generator)[:, :count].sort(1).values
        values = episode.values.gather(1, facts) + self.first_value
        ids = ids.scatter(1, place, episode.keys.gather(1, facts) + self.first_key).scatter(1, place + 1, values)
        labels = torch.full_like(ids, IGNORED).scatter(1, place + 1, values)
        return Question(ids, labels, torch.full_like(ids, -1).scatter(1, place + 1, facts))


NAMES = ("Lily", "Tom", "Ben", "Sue", "Max", "Amy", "Sam", "Mia", "Tim", "Anna", "Jack", "Lucy")
THINGS = (
    *("ball", "car", "hat", "dog", "cat", "box", "cup", "toy"),
    *("bird", "bed", "cake", "book", "fish", "frog", "tree", "star"),
)


class LanguageRecall(RecallTask):
    """Sentences about who has what, told at a random place within a segment of real text, asked at another's beginning.

    `tokenizer` is any Hugging Face tokenizer, `filler` the text that surrounds the facts and lies between them.
    Names and things are drawn for every stream: names differ within it, things need not.
    """

    def __init__(
        self,
        tokenizer: Any,
        filler: str | Tensor,
        segment_length: int = 64,
        pairs: int = 2,
        names: tuple[str, ...] = NAMES,
        things: tuple[str, ...] = THINGS,
    ) -> None:
        if not 1 <= pairs <= len(names):
            raise ValueError(f"pairs is {pairs}; there are {len(names)} names, use 1 .. {len(names)}")
        self.name, self.segment_length, self.pairs = "recall-language", segment_length, pairs
        self.keys, self.most_asked = len(names), 1
        self.tokenizer, self.names, self.things = tokenizer, names, things
        self.text = filler if isinstance(filler, Tensor) else torch.tensor(self.encode(filler))
        if len(self.text) < 4 * segment_length:
            raise ValueError(f"the filler has {len(self.text)} tokens; give at least {4 * segment_length}")
        self.questions = [self._statement(f"{name} has a") for name in names]
        self.facts = [[self._statement(f"{name} has a {thing}.") for thing in things] for name in names]
        plain = [[self._statement(f"{name} has a {thing}") for thing in things] for name in names]
        start = len(self.questions[0])
        self.candidates = [statement[start:] for statement in plain[0]]
        for i, question in enumerate(self.questions):
            for j, value in enumerate(self.candidates):
                if plain[i][j] != question + value or self.facts[i][j][: len(plain[i][j])] != plain[i][j]:
                    raise ValueError(
                        f"this tokenizer does not split {names[i]!r} has a {things[j]!r} the same way in fact and "
                        "question; choose other names= or things="
                    )
        self.stop = self.facts[0][0][-1]
        if len({tuple(question) for question in self.questions}) < len(names):
            raise ValueError("two names are the same to this tokenizer; choose other names=")
        # what all questions end in is not part of a name
        shortest = min(len(question) for question in self.questions)
        self.tail = next(
            n for n in range(shortest + 1) if n == shortest or len({q[len(q) - n - 1] for q in self.questions}) > 1
        )
        if len(names) == 1:
            self.tail = len(self._statement(f"{names[0]} has a")) - len(self._statement(names[0]))
        longest = max(len(fact) for row in self.facts for fact in row)
        if longest * (pairs + 1) >= segment_length:
            raise ValueError(
                f"{pairs} facts and a question of up to {longest} tokens do not fit a segment of {segment_length}"
            )

    def encode(self, text: str) -> list[int]:
        """Token ids without special tokens."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _statement(self, text: str) -> list[int]:
        # sentencepiece adds the space before a word itself, byte-level BPE wants it given
        bare, spaced = self.encode(text), self.encode(" " + text)
        return bare if len(bare) < len(spaced) else spaced

    def write(self, keys: Int[Tensor, "b p"], values: Int[Tensor, "b p"], generator: Generator) -> Int[Tensor, "b t"]:
        """Facts one after another at a random place of the segment."""
        told = self.filler(len(keys), 1, generator)
        for row, (of, what) in enumerate(zip(keys, values, strict=True)):
            said = torch.tensor(self._said(of, what))
            start = int(torch.randint(self.segment_length - len(said) + 1, (), generator=generator))
            told[row, start : start + len(said)] = said
        return told

    def _said(self, keys: Tensor, values: Tensor) -> list[int]:
        pairs = zip(keys.tolist(), values.tolist(), strict=True)
        return [token for key, value in pairs for token in self.facts[key][value]]

    def filler(self, rows: int, segments: int, generator: Generator) -> Int[Tensor, "b t"]:
        """Running text from a random place; from the beginning again at its end."""
        start = torch.randint(len(self.text), (rows, 1), generator=generator)
        return self.text[(start + torch.arange(segments * self.segment_length)) % len(self.text)]

    def ask(self, episode: Episode, facts: Int[Tensor, "b n"], generator: Generator) -> Question:
        """Questions with their answers open the segment, behind a full stop; text follows."""
        return self._ask_into(self.filler(len(facts), 1, generator), 0, episode, facts)

    def recite(self, episode: Episode, generator: Generator) -> Question:
        """All facts in the order they were told, with labels on names and things: it teaches to keep them apart."""
        ids = self.filler(len(episode.told), 1, generator)
        labels = torch.full_like(ids, IGNORED)
        for row in range(len(ids)):
            said, wanted = [self.stop], [IGNORED]
            for key, value in zip(episode.keys[row].tolist(), episode.values[row].tolist(), strict=True):
                name = self.questions[key][: len(self.questions[key]) - self.tail]
                said += self.facts[key][value]
                wanted += [*name, *[IGNORED] * self.tail, *self.candidates[value]]
                wanted += [IGNORED] * (len(said) - len(wanted))
            ids[row, : len(said)], labels[row, : len(said)] = torch.tensor(said), torch.tensor(wanted)
        return Question(ids, labels, torch.full_like(ids, -1))

    def ask_in_window(self, rows: int, generator: Generator) -> Question:
        """The facts open the segment, one question follows them."""
        episode = self.tell(rows, generator)
        ids = self.filler(rows, 1, generator)
        start = max(len(fact) for facts in self.facts for fact in facts) * self.pairs
        for row in range(rows):
            said = torch.tensor(self._said(episode.keys[row], episode.values[row]))
            ids[row, start - len(said) : start] = said
        asked = torch.randint(self.pairs, (rows, 1), generator=generator)
        return self._ask_into(ids, start, episode, asked)

    def _ask_into(self, ids: Tensor, start: int, episode: Episode, facts: Tensor) -> Question:
        labels, fact = torch.full_like(ids, IGNORED), torch.full_like(ids, -1)
        for row in range(len(ids)):
            said = [self.stop]
            for which in facts[row].tolist():
                key, value = int(episode.keys[row, which]), int(episode.values[row, which])
                begin = start + len(said) + len(self.questions[key])
                said += self.facts[key][value]
                end = min(begin + len(self.candidates[value]), self.segment_length)
                labels[row, begin:end] = torch.tensor(self.candidates[value])[: max(0, end - begin)]
                fact[row, begin:end] = which
            said = said[: self.segment_length - start]
            ids[row, start : start + len(said)] = torch.tensor(said)
        return Question(ids, labels, fact)
