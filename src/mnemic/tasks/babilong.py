"""Facts scattered in a long text, and a question that needs one or several of them (BABILong,
https://arxiv.org/abs/2406.10149; "Scaling Transformer to 1M tokens and beyond with RMT",
https://arxiv.org/abs/2304.11062).

A short story of bAbI (https://arxiv.org/abs/1502.05698) is spread over a long text that has nothing to do with it, and
a question about the story follows at the end. Stories with several questions give one stream for each.

Rules. The text and the facts together have `length` tokens. Each fact stands between two sentences of the text, at
gaps drawn evenly and independently, sorted so that the story keeps its order, within `span` (per cent of the text).
Sentences of given texts have 10 tokens or more. Without given texts and stories the task is a world of its own:

    qa1         persons move; where is one of them?                                              1 fact
    qa2         persons move, take and lay down things; where is a thing?                        2 facts
    qa3         the same; where was a thing before it came to a place?                           3 facts
    memorise    one move, told first; where is the person?                                       RMT, section 4
    detect      one move, told anywhere; where is the person?
    reason      two facts, "X is north of Y"; what is north of Y, what is Y north of?

Everything in it is drawn evenly over places, so answers are balanced. No sentence of the text, given or our own, has a
person, place or thing of the stories: BABILong's novels have a "kitchen" now and then.

The layout is ours: the context in whole segments, then one segment that asks. Length 0 is BABILong's 0K: the story and
its question in one segment, nothing to remember.

    [text, fact, text | ... | text, fact, text | question, answer, padding]
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Generator, Tensor
from torch.nn.utils.rnn import pad_sequence

from mnemic.tasks.babi import (
    ASKS,
    DIRECTIONS,
    DROPS,
    EVENTS,
    MOVES,
    OWN,
    PERSONS,
    PLACES,
    TAKES,
    THINGS,
    Reader,
    Told,
    babi,
    micro_story,
)
from mnemic.tasks.base import Candidates, Examples, Task, TaskCard, below, generator, seed_of
from mnemic.tasks.haystack import Book, Drawn, shortest, trimmed, woven
from mnemic.tasks.text import (
    Encoder,
    Question,
    Story,
    assemble,
    continued,
    decoded,
    encoder,
    readable,
    runs,
    write,
)

_TIMES = ("in the early spring", "long after midnight", "for most of the winter", "when the tide was low")
_WHO = ("an old sailor", "the tall miller", "every passing cloud", "a flock of geese", "the village choir")
_DID = ("watched over the silent fields", "sang about distant mountains", "drifted along the grey coast")
_HOW = ("without any hurry at all", "until the stars were bright", "as if nothing else mattered")
FILLER = tuple(f"{when}, {who} {did} {how}." for when in _TIMES for who in _WHO for did in _DID for how in _HOW)
"""Sentences of our own, 180, none with a word of the stories."""


def lenient(text: str, target: str) -> bool:
    """BABILong's published match: the first sentence of what was written has the target in it, upper and lower case
    being one. "Not in the kitchen" passes for "kitchen", so exact match must stand beside it.
    """
    return target.lower() in text.lower().split(".")[0]


# --- the task --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BabilongTask(Task):
    """A story among `length` tokens of context, and a question.

    `question` is one of `OWN`, or with `data` any task of bAbI that is there ("qa1" ..): the folder or archive of
    bAbI's English files; training has their training questions but the last tenth of stories, which are for
    validation, and the test has their test questions. Questions whose facts do not fit in `length` are left out, and
    those of qa5 whose label contradicts the rule that the last fact counts (2 of its 1,000 test questions).
    `indices` names BABILong's file of the 100 test questions of each task: the test then has these and no others.
    `facts` is the number of facts of a story in our own world, that of `OWN` by default. `span` is where facts may
    stand, in per cent of the text. `filler` names texts as in `documents.novels`, each split has its own; without it
    the text is of our own sentences. `tokenizer` is "words", "bytes", or one of Hugging Face; `filler` needs one of the
    latter two. `extra["supports"]` is how many facts an answer rests on; evidence are those facts.

    Raises:
        ValueError: settings outside their range, or stories that do not fit.
        FileNotFoundError: there is nothing at `data`, `filler` or `indices`.
    """

    question: str = "qa1"
    length: int = 512
    segment_length: int = 128
    facts: int | None = None
    span: tuple[float, float] = (0, 100)
    tokenizer: Any = "words"
    data: str | None = None
    filler: str | None = None
    indices: str | None = None

    name = "babilong"
    axis = "length"
    card = TaskCard(
        title="BABILong",
        asks="Keep the few facts that matter out of a long text, and combine them when the question comes.",
        paper="BABILong, https://arxiv.org/abs/2406.10149",
    )

    def __post_init__(self) -> None:
        start, end = self.span
        if not 0 <= start <= end <= 100:
            raise ValueError(f"span is {self.span}; use per cent with 0 <= start <= end <= 100")
        if self.segment_length < 1 or self.length < 0 or self.length % self.segment_length:
            raise ValueError(
                f"length is {self.length} and segment_length {self.segment_length}; the context must be whole segments"
            )
        if self.filler is not None and self.tokenizer == "words":
            raise ValueError('tokenizer is "words", which has no words of other texts; use "bytes" or Hugging Face')
        if self.indices is not None and self.data is None:
            raise ValueError("indices name questions of bAbI; pass data=, too")
        if self.data is not None:
            if self.facts is not None:
                raise ValueError(f"facts is {self.facts}; stories of data have their own number, leave it None")
            if not babi(self.data, self.question, "test"):
                raise ValueError(f"{self.data} has no file of test questions of {self.question!r}")
            return
        if self.question not in OWN:
            raise ValueError(f"question is {self.question!r}; use one of {', '.join(OWN)}, or pass bAbI as data=")
        fixed = self.question in ("memorise", "detect", "reason")
        least = {"qa2": 4, "qa3": 6}.get(self.question, 1)
        if self.facts is not None and (fixed or self.facts < least):
            raise ValueError(
                f"facts is {self.facts}; {self.question} has "
                + (f"{OWN[self.question]}, leave it None" if fixed else f"{least} or more")
            )
        longest = f"{PERSONS[2]} {TAKES[1]} the {THINGS[3]}.", f"{PERSONS[3]} {MOVES[3]} the {PLACES[2]}."
        longest = (*longest, f"The {PLACES[2]} is north of the {PLACES[1]}.") if self.question == "reason" else longest
        need = self._count * max(len(self._encoder.encode(each)) for each in longest)
        ask = len(self._encoder.encode(f"Where was the {THINGS[3]} before the {PLACES[2]}? {PLACES[2]}"))
        if self.length and need > self.length:
            raise ValueError(f"length is {self.length}; {self._count} facts need {need} tokens, use more")
        if ask + (0 if self.length else need) > self.segment_length:
            need = ask + (0 if self.length else need)
            raise ValueError(f"the segment that asks needs {need} tokens, segment_length is {self.segment_length}")

    @property
    def _count(self) -> int:
        return OWN[self.question] if self.facts is None else self.facts

    @cached_property
    def _given(self) -> tuple[Told, ...]:
        """All questions from files."""
        parts = [babi(str(self.data), self.question, part) for part in ("train", "test")]
        return tuple(told for part in parts for story in part for told in story)

    @cached_property
    def answers(self) -> tuple[str, ...]:
        """What an answer can be."""
        return PLACES if self.data is None else tuple(sorted({told.answer for told in self._given}))

    @cached_property
    def names(self) -> frozenset[str]:
        """Persons, places and things of the stories, in lower case: no sentence of the text has one."""
        if self.data is None:
            return frozenset(each.lower() for each in (*PERSONS, *PLACES, *THINGS))
        facts = {fact for told in self._given for fact in told.facts}
        words = {word for fact in facts for word in re.findall(r"\b[A-Z]\w+|(?<=\bthe )\w+|(?<=\bThe )\w+", fact)}
        return frozenset(word.lower() for word in words) - {"the"}

    def _barred(self, sentence: str) -> bool:
        return not self.names.isdisjoint(re.findall(r"\w+", sentence.lower()))

    @cached_property
    def _encoder(self) -> Encoder:
        if self.tokenizer != "words":
            return encoder(self.tokenizer, [])
        if self.data is not None:
            said = {each for told in self._given for each in (*told.facts, told.question, told.answer)}
            return encoder("words", [*FILLER, *sorted(said)])
        own = [*PERSONS, *PLACES, *THINGS, *MOVES, *TAKES, *DROPS, *DIRECTIONS, "what where is was before the of ?"]
        return encoder("words", [*FILLER, *own])

    @cached_property
    def _hay(self) -> Drawn | Book:
        if self.filler is not None:
            return Book(self.filler, self._encoder, shortest=10, barred=self._barred)
        return Drawn([self._encoder.encode(each) for each in FILLER if not self._barred(each)])

    @cached_property
    def _known(self) -> dict[str, list[int]]:
        return {}

    def _tokens(self, sentence: str) -> list[int]:
        """A sentence of a story as tokens; there are few, so each is encoded once."""
        if sentence not in self._known:
            self._known[sentence] = self._encoder.encode(sentence)
        return self._known[sentence]

    @property
    def vocabulary(self) -> int:
        """Token ids are 0 .. vocabulary - 1."""
        return self._encoder.vocabulary

    @property
    def uniform(self) -> float:
        """One of the possible answers; a place that the question names is none."""
        return 1 / max(len(self.answers) - (self.question in ("qa3", "qa4", "reason")), 1)

    @property
    def unit(self) -> int:
        """Tokens of a fact, about."""
        fact = self._given[0].facts[0] if self.data is not None else f"{PERSONS[0]} {MOVES[0]} the {PLACES[0]}."
        return min(len(self._encoder.encode(fact)), self.segment_length)

    # --- drawing -----------------------------------------------------------------------------------------------------

    def stories(self, split: str = "train") -> list[Told]:
        """The questions of a split, from `data`, that fit.

        Raises:
            ValueError: there are none, or one of `indices` does not fit.
        """
        if self.indices is not None and split == "test":
            tests = [told for story in babi(str(self.data), self.question, "test") for told in story]
            chosen = json.loads(Path(self.indices).read_text(encoding="utf-8"))
            if self.question not in chosen:
                raise ValueError(f"{self.indices} has no questions of {self.question}; it has {', '.join(chosen)}")
            drawn = [tests[index] for index in chosen[self.question]]
            unfit = sum(not self._fits(told) for told in drawn)
            if unfit:
                raise ValueError(f"{unfit} of {len(drawn)} test questions do not fit; use a longer {self._short}")
            return drawn
        part = babi(str(self.data), self.question, "test" if split == "test" else "train")
        held = len(part) // 10
        shares = {"train": part[: len(part) - held], "validation": part[len(part) - held :], "test": part}
        told = [told for story in shares[split] for told in story]
        if not told:
            raise ValueError(f"{self.data} has no training questions of {self.question}; draw from the test split")
        if self.question == "qa5":
            # where somebody gave two things to the same person, some labels mean the first and some the last
            told = [
                each
                for each in told
                if Reader(" ".join(each.facts).lower()).answer(each.question.lower()) == each.answer.lower()
            ]
        fitting = [each for each in told if self._fits(each)]
        if not fitting:
            raise ValueError(f"no {split} question of {self.question} fits; use a longer {self._short}")
        return fitting

    @property
    def _short(self) -> str:
        return "length" if self.length else "segment_length"

    def _fits(self, told: Told) -> bool:
        need = sum(len(self._tokens(fact)) for fact in told.facts)
        ask = len(self._tokens(f"{told.question} {told.answer}"))
        return need <= self.length and ask <= self.segment_length if self.length else need + ask <= self.segment_length

    def _told(self, rows: int, generator: Generator, split: str) -> list[Told]:
        if self.data is None:
            return [micro_story(self.question, self._count, generator) for _ in range(rows)]
        # every question once before one comes again: 100 rows are BABILong's 100
        stories = self._fitting(split)
        order: list[int] = []
        while len(order) < rows:
            order += torch.randperm(len(stories), generator=generator).tolist()
        return [stories[place] for place in order[:rows]]

    def _fitting(self, split: str) -> list[Told]:
        if split not in self._by_split:
            self._by_split[split] = self.stories(split)
        return self._by_split[split]

    @cached_property
    def _by_split(self) -> dict[str, list[Told]]:
        return {}

    def draw(self, rows: int, generator: Generator, split: str = "train") -> Examples:
        """`rows` new streams. Evidence are the facts that the answer rests on."""
        stories = [self._story(told, generator, split) for told in self._told(rows, generator, split)]
        return assemble(stories, self.segment_length, self._encoder.pad)

    def _story(self, told: Told, generator: Generator, split: str) -> Story:
        facts = [self._tokens(fact) for fact in told.facts]
        answer = continued(self._encoder, told.question, told.answer)
        room = max(self.length - sum(map(len, facts)), 0)
        hay = trimmed(self._hay.take(room, generator, split), room) if room else []
        context, begins = woven(hay, facts, self._gaps(hay, len(facts), generator))
        evidence, extra = [begins[support] for support in told.supports], {"supports": len(told.supports)}
        question = self._tokens(told.question)
        if not self.length:
            return Story([], [Question(context + question, answer, evidence, extra)], len(facts))
        return Story(context, [Question(question, answer, evidence, extra)], len(facts))

    def _gaps(self, hay: list[list[int]], count: int, generator: Generator) -> list[int]:
        """Where the facts go, in order."""
        if self.question == "memorise":
            return [0] * count
        ends = torch.tensor([0, *(len(each) for each in hay)]).cumsum(0).double() * 100 / max(sum(map(len, hay)), 1)
        start, end = self.span
        allowed = ((ends >= start) & (ends <= end)).nonzero()[:, 0]
        # a span within one sentence: the gap that is nearest to it
        allowed = allowed if len(allowed) else (ends - (start + end) / 2).abs().argmin()[None]
        return allowed[torch.randint(len(allowed), (count,), generator=generator)].sort().values.tolist()

    # --- solving -----------------------------------------------------------------------------------------------------

    def guess(
        self, ids: Int[Tensor, "b t"], asked: Bool[Tensor, "b t"], seen: Bool[Tensor, "b t"], generator: Generator
    ) -> Int[Tensor, "b t"]:
        """Reads the facts that are seen and answers by them; what they do not give is drawn from all answers."""
        return self._solved(ids, asked, seen, generator, lambda text, question: Reader(text).answer(question))

    def _solved(
        self,
        ids: Tensor,
        asked: Tensor,
        seen: Tensor,
        generator: Generator,
        solver: Callable[[str, str], str | None],
    ) -> Tensor:
        said, spelling = torch.zeros_like(ids), {answer.lower(): answer for answer in self.answers}
        for row in range(len(ids)):
            tokens, known = ids[row].tolist(), seen[row].tolist()
            for begin, end in runs(asked[row].tolist()):
                text = readable(self._encoder, tokens[:begin], known[:begin])
                # what names nobody and nothing of the story need not be read
                facts = [each for each in text.split(".") if not self.names.isdisjoint(each.split())]
                answer = solver(".".join(facts), text[-200:])
                if answer is None:
                    answer = self._any(text[-200:], generator)
                answer = spelling.get(answer, answer)
                write(said[row], (begin, end), continued(self._encoder, "?", answer))
        return said

    def _any(self, question: str, generator: Generator) -> str:
        """Any answer but the place that the question names."""
        named = set()
        if self.question in ("qa3", "qa4", "reason"):
            named = {
                word
                for kind in ("before", "of it", "it of")
                for found in ASKS[kind].findall(question)
                for word in found
            }
        choices = [answer for answer in self.answers if answer not in named] or self.answers
        return choices[below(len(choices), generator)]

    def candidates(self, examples: Examples) -> Candidates | None:
        """The places that anybody went to; the newest that is the answer is the one that is asked for."""
        if self.question not in ("qa1", "qa2", "qa3"):
            return None
        spelling, values, asked = {each.lower(): number for number, each in enumerate(self.answers)}, [], []
        for row, wanted in zip(examples.input_ids.tolist(), examples.asked.tolist(), strict=True):
            for begin, end in runs(wanted):
                text = readable(self._encoder, row[:begin], [True] * begin)
                moves = [spelling[place] for _, place in EVENTS["move"].findall(text) if place in spelling][::-1]
                answer = spelling[decoded(self._encoder, row[begin:end]).strip().lower()]
                values.append(torch.tensor(moves))
                asked.append(moves.index(answer))
        return Candidates(pad_sequence(values, batch_first=True, padding_value=-1), torch.tensor(asked))

    def more_floors(self, examples: Examples, luck: Generator) -> dict[str, float]:
        """ "last place told": the place in the newest fact, whoever and whatever it is about. It is what a memory
        reaches that keeps places and not whose they are.
        """
        if self.question not in ("qa1", "qa2", "qa3"):
            return {}
        hidden, everything = examples.input_ids.masked_fill(examples.asked, 0), ~examples.asked

        def newest(text: str, question: str) -> str | None:
            moves = [place for _, place in EVENTS["move"].findall(text) if place in self.answers]
            return moves[-1] if moves else None

        said = self._solved(hidden, examples.asked, everything, luck, newest)
        return {"last place told": self.score(said, examples)}

    def unbound(self, most: int = 2**16) -> dict[str, float]:
        """As for every task, but in our own world alone, and counted over short streams, which are told as much."""
        return {} if self.data is not None else Task.unbound(shortest(self), most)

    def majority(self, examples: Examples, rows: int = 500) -> float:
        """Score of always giving the answer that is most frequent in training, or in the test where bAbI has no
        training questions. Stories are counted without the text around them.
        """
        if self.data is None:
            told = self._told(rows, generator(seed_of("train", 0)), "train")
        else:
            part = babi(self.data, self.question, "train") or babi(self.data, self.question, "test")
            told = [each for story in part for each in story]
        most = continued(self._encoder, "?", Counter(each.answer for each in told).most_common(1)[0][0])
        predicted = torch.zeros_like(examples.labels)
        for row in range(len(predicted)):
            for place in runs(examples.asked[row].tolist()):
                write(predicted[row], place, most)
        return self.score(predicted, examples)

    # --- measuring ---------------------------------------------------------------------------------------------------

    def measures(self, predicted: Int[Tensor, "b t"], examples: Examples) -> dict[str, float]:
        """Exact match, and BABILong's `lenient` match of the text that the predicted tokens make, side by side."""
        matches = []
        for row in range(len(predicted)):
            for begin, end in runs(examples.asked[row].tolist()):
                text, target = (
                    decoded(self._encoder, tokens[row, begin:end].tolist()).strip()
                    for tokens in (predicted, examples.input_ids)
                )
                matches.append(lenient(text, target))
        return {"exact": self.score(predicted, examples), "lenient": sum(matches) / max(len(matches), 1)}

    def text(self, ids: Sequence[int]) -> list[str]:
        """Tokens as a person reads them."""
        return self._encoder.pieces(ids)
