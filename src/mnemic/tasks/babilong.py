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

import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Generator, Tensor

from mnemic.tasks.base import Examples, Task, TaskCard, below, generator, seed_of
from mnemic.tasks.haystack import Book, Drawn, library, trimmed, woven
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

PERSONS = ("Lena", "Omar", "Petra", "Viktor", "Nora")
PLACES = ("attic", "cellar", "library", "pantry", "porch", "studio")
THINGS = ("basket", "lamp", "rope", "umbrella")
MOVES = ("went to", "moved to", "walked to", "hurried to")
TAKES = ("took", "picked up", "grabbed")
DROPS = ("put down", "dropped", "left")
DIRECTIONS = ("north", "south", "east", "west")
OWN = {"qa1": 8, "qa2": 12, "qa3": 16, "memorise": 1, "detect": 1, "reason": 2}
"""Questions of our own world, with the number of facts of a story."""

_TIMES = ("in the early spring", "long after midnight", "for most of the winter", "when the tide was low")
_WHO = ("an old sailor", "the tall miller", "every passing cloud", "a flock of geese", "the village choir")
_DID = ("watched over the silent fields", "sang about distant mountains", "drifted along the grey coast")
_HOW = ("without any hurry at all", "until the stars were bright", "as if nothing else mattered")
FILLER = tuple(f"{when}, {who} {did} {how}." for when in _TIMES for who in _WHO for did in _DID for how in _HOW)
"""Sentences of our own, 180, none with a word of the stories."""


@dataclass(frozen=True)
class Told:
    """A story: its sentences, a question, the answer, and the sentences by index that the answer rests on."""

    facts: tuple[str, ...]
    question: str
    answer: str
    supports: tuple[int, ...]


# --- the world of our own --------------------------------------------------------------------------------------------


def micro_story(question: str, count: int, generator: Generator) -> Told:
    """A story of `count` facts in our own world with one of the questions in `OWN`."""

    def pick(choices: Sequence[Any]) -> Any:
        return choices[below(len(choices), generator)]

    if question == "reason":
        return _relations(pick)
    if question in ("qa1", "memorise", "detect"):
        where: dict[str, str] = {}
        facts, last = [], {}
        for number in range(count):
            person = pick(PERSONS)
            where[person] = pick([place for place in PLACES if place != where.get(person)])
            facts.append(f"{person} {pick(MOVES)} the {where[person]}.")
            last[person] = number
        person = pick(sorted(where))
        return Told(tuple(facts), f"Where is {person}?", where[person], (last[person],))
    while True:
        told = _things(question, count, pick)
        if told is not None:
            return told


def _relations(pick: Callable[[Sequence[Any]], Any]) -> Told:
    """Three places in a row along one direction, told as two facts that share the one in the middle."""
    first, second, third = pick([(a, b, c) for a in PLACES for b in PLACES for c in PLACES if len({a, b, c}) == 3])
    way = pick(DIRECTIONS)
    # "first is way of second" and "second is way of third"; either may be asked, from either end
    facts = [f"The {first} is {way} of the {second}.", f"The {second} is {way} of the {third}."]
    order = pick([(0, 1), (1, 0)])
    if pick([True, False]):
        question, answer, support = f"What is {way} of the {second}?", first, 0
    else:
        question, answer, support = f"What is the {second} {way} of?", third, 1
    return Told(tuple(facts[place] for place in order), question, answer, (order.index(support),))


@dataclass
class _Thing:
    holder: str | None = None
    taken: int = -1
    lies: tuple[int, ...] = ()
    """Facts that say where it was laid down."""
    trail: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    """Where it was, with the facts that say how it came there."""


def _things(question: str, count: int, pick: Callable[[Sequence[Any]], Any]) -> Told | None:
    """One try at a story with things; None where nothing in it can be asked."""
    where: dict[str, tuple[str, int]] = {}
    things = {name: _Thing() for name in THINGS}
    facts: list[str] = []
    for number in range(count):
        held = [name for name in THINGS if things[name].holder is not None]
        # a thing that was never told of may lie anywhere, another only where it was left
        near = [
            (person, name)
            for person in sorted(where)
            for name in THINGS
            if things[name].holder is None and (not things[name].trail or things[name].trail[-1][0] == where[person][0])
        ]
        deed = pick(["move", "move", *(["take", "take"] if near else []), *(["drop"] if held else [])])
        if deed == "take":
            person, name = pick(near)
            thing, (place, moved) = things[name], where[person]
            thing.holder, thing.taken = person, number
            thing.trail = thing.trail or [(place, (moved, number))]
            facts.append(f"{person} {pick(TAKES)} the {name}.")
        elif deed == "drop":
            name = pick(held)
            thing = things[name]
            facts.append(f"{thing.holder} {pick(DROPS)} the {name}.")
            thing.lies, thing.holder = (where[str(thing.holder)][1], number), None
        else:
            person = pick(PERSONS)
            old, moved = where.get(person, ("", -1))
            place = pick([place for place in PLACES if place != old])
            for thing in things.values():
                if thing.holder == person:
                    thing.trail.append((place, (moved, thing.taken, number)))
            where[person] = (place, number)
            facts.append(f"{person} {pick(MOVES)} the {place}.")
    if question == "qa2":
        asked = [name for name in THINGS if things[name].trail]
        if not asked:
            return None
        name = pick(asked)
        thing = things[name]
        supports = (thing.taken, where[thing.holder][1]) if thing.holder else thing.lies
        return Told(tuple(facts), f"Where is the {name}?", thing.trail[-1][0], tuple(sorted(supports)))
    trails = {name: [place for place, _ in things[name].trail] for name in THINGS}
    asked = [(name, at) for name in THINGS for at in range(1, len(trails[name]))]
    # "before the attic" must mean one visit
    asked = [(name, at) for name, at in asked if trails[name].count(trails[name][at]) == 1]
    if not asked:
        return None
    name, at = pick(asked)
    question = f"Where was the {name} before the {trails[name][at]}?"
    return Told(tuple(facts), question, trails[name][at - 1], tuple(sorted(things[name].trail[at][1])))


# --- stories of bAbI -------------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def babi(path: str, question: str, part: str) -> tuple[tuple[Told, ...], ...]:
    """Stories of bAbI from a folder or archive with its files `qa1_..._train.txt`: those of task `question`, such as
    "qa1", of `part` "train" or "test". Each story is its questions in order, with the facts told before each.

    An empty tuple where there is no such file.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: there is no text in it, or one is not UTF-8.
    """
    found: list[tuple[Told, ...]] = []
    for name, text in library(path):
        if not re.search(rf"(?:^|/){question}_[^/]*_{part}$", name):
            continue
        story: list[Told] = []
        facts: list[str] = []
        numbers: dict[str, int] = {}
        for line in text.splitlines():
            number, said = line.split(" ", 1)
            if number == "1":
                found += [tuple(story)] if story else []
                story, facts, numbers = [], [], {}
            if "\t" in said:
                asked, answer, supports = said.split("\t")
                because = tuple(sorted(numbers[each] for each in supports.split()))
                story.append(Told(tuple(facts), asked.strip(), answer.strip(), because))
            else:
                numbers[number] = len(facts)
                facts.append(said.strip())
        found += [tuple(story)] if story else []
    return tuple(found)


# --- reading ---------------------------------------------------------------------------------------------------------

EVENTS = {
    "move": re.compile(r"(\w+) (?:went|moved|walked|hurried|journeyed|travelled)(?: back)? to the (\w+)"),
    "take": re.compile(r"(\w+) (?:took|picked up|grabbed|got) the (\w+)"),
    "drop": re.compile(r"(\w+) (?:put down|dropped|left|discarded) the (\w+)"),
    "give": re.compile(r"\b(?!who\b)(\w+) (?:gave|passed|handed) the (\w+) to (\w+)"),
    "is": re.compile(r"(\w+) is (in|not in|no longer in) the (\w+)"),
    "either": re.compile(r"(\w+) is either in the (\w+) or the (\w+)"),
    "beside": re.compile(r"the (?!what\b)(\w+) is (north|south|east|west) of the (\w+)"),
}
ASKS = {
    "place": re.compile(r"where is (\w+) ?\?\s*\Z"),
    "thing": re.compile(r"where is the (\w+) ?\?\s*\Z"),
    "before": re.compile(r"where was the (\w+) before the (\w+) ?\?\s*\Z"),
    "of it": re.compile(r"what is the (\w+) (north|south|east|west) of ?\?\s*\Z"),
    "it of": re.compile(r"what is (north|south|east|west) of the (\w+) ?\?\s*\Z"),
    "what given": re.compile(r"what did (\w+) give to (\w+) ?\?\s*\Z"),
    "given to": re.compile(r"who did (\w+) give the (\w+) to ?\?\s*\Z"),
    "who gave": re.compile(r"who gave the (\w+)(?: to (\w+))? ?\?\s*\Z"),
    "who received": re.compile(r"who received the (\w+) ?\?\s*\Z"),
    "yes or no": re.compile(r"is (\w+) in the (\w+) ?\?\s*\Z"),
    "how many": re.compile(r"how many objects is (\w+) carrying ?\?\s*\Z"),
    "carrying": re.compile(r"what is (\w+) carrying ?\?\s*\Z"),
}
OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}
COUNTS = ("none", "one", "two", "three", "four", "five")


class Reader:
    """Reads facts in order and answers: the solver. What it was not told it does not know."""

    def __init__(self, text: str) -> None:
        self.where: dict[str, tuple[str, ...]] = {}
        """Where a person may be: one place, or two."""
        self.never: dict[str, str] = {}
        """Where a person was last said not to be."""
        self.holder: dict[str, str] = {}
        self.hands: dict[str, list[str]] = {}
        self.had: dict[str, list[str]] = {}
        self.trail: dict[str, list[str]] = {}
        self.beside: list[tuple[str, str, str]] = []
        self.given: list[tuple[str, str, str]] = []
        found = [(match.start(), kind, match) for kind, event in EVENTS.items() for match in event.finditer(text)]
        for _, kind, match in sorted(found, key=lambda each: each[0]):
            getattr(self, f"_{kind}")(*match.groups())

    def _move(self, person: str, place: str) -> None:
        self.where[person] = (place,)
        self.never.pop(person, None)
        for thing in self.hands.get(person, []):
            self._lies(thing, person)

    def _lies(self, thing: str, person: str) -> None:
        here, trail = self.where.get(person, ()), self.trail.setdefault(thing, [])
        if len(here) == 1 and trail[-1:] != [*here]:
            trail += here

    def _take(self, person: str, thing: str) -> None:
        self._drop(self.holder.get(thing, ""), thing)
        self.holder[thing] = person
        # bAbI lists things in the order in which a person had them first, even where one was laid down since
        order = self.had.setdefault(person, [])
        order += [] if thing in order else [thing]
        self.hands[person] = sorted([*self.hands.get(person, []), thing], key=order.index)
        self._lies(thing, person)

    def _drop(self, person: str, thing: str) -> None:
        if thing in self.hands.setdefault(person, []):
            self.hands[person].remove(thing)
        self.holder.pop(thing, None)
        self._lies(thing, person)

    def _give(self, giver: str, thing: str, taker: str) -> None:
        self.given.append((giver, thing, taker))
        self._drop(giver, thing)
        self._take(taker, thing)

    def _is(self, person: str, how: str, place: str) -> None:
        if how == "in":
            self._move(person, place)
        else:
            self.where.pop(person, None)
            self.never[person] = place

    def _either(self, person: str, one: str, other: str) -> None:
        self.where[person] = (one, other)
        self.never.pop(person, None)

    def _beside(self, one: str, way: str, other: str) -> None:
        self.beside += [(one, way, other), (other, OPPOSITE[way], one)]

    def answer(self, question: str) -> str | None:
        """The answer to a question at the end of a text; None where the facts do not give it."""
        for kind, ask in ASKS.items():
            match = ask.search(question)
            if match:
                return self._answer(kind, *match.groups())
        return None

    def _answer(self, kind: str, one: str, two: str | None = None) -> str | None:
        last: list[str] = []
        if kind == "place" and len(self.where.get(one, ())) == 1:
            last = [*self.where[one]]
        elif kind == "thing":
            last = self.trail.get(one, [])
        elif kind == "before":
            trail = self.trail.get(one, [])
            last = [before for before, place in itertools.pairwise(trail) if place == two]
        elif kind == "of it":
            last = [other for place, way, other in self.beside if (place, way) == (one, two)]
        elif kind == "it of":
            last = [place for place, way, other in self.beside if (way, other) == (one, two)]
        elif kind == "what given":
            last = [thing for giver, thing, taker in self.given if (giver, taker) == (one, two)]
        elif kind == "given to":
            last = [taker for giver, thing, taker in self.given if (giver, thing) == (one, two)]
        elif kind == "who gave":
            last = [giver for giver, thing, taker in self.given if thing == one and two in (None, taker)]
        elif kind == "who received":
            last = [taker for _, thing, taker in self.given if thing == one]
        elif kind == "yes or no":
            last = self._whether(one, str(two))
        elif kind == "how many" and one in self.hands:
            last = [COUNTS[len(self.hands[one])]] if len(self.hands[one]) < len(COUNTS) else []
        elif kind == "carrying" and one in self.hands:
            last = [",".join(self.hands[one]) or "nothing"]
        return last[-1] if last else None

    def _whether(self, person: str, place: str) -> list[str]:
        if person in self.where:
            return ["no" if place not in self.where[person] else "yes" if len(self.where[person]) == 1 else "maybe"]
        return ["no"] if self.never.get(person) == place else []


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
