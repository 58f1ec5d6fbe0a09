"""Stories of bAbI (https://arxiv.org/abs/1502.05698): a small world of our own, the published archive, and a reader
that answers their questions by rules, from whatever sentences it is shown.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from torch import Generator

from mnemic.tasks.base import below
from mnemic.tasks.haystack import library

PERSONS = ("Lena", "Omar", "Petra", "Viktor", "Nora")
PLACES = ("attic", "cellar", "library", "pantry", "porch", "studio")
THINGS = ("basket", "lamp", "rope", "umbrella")
MOVES = ("went to", "moved to", "walked to", "hurried to")
TAKES = ("took", "picked up", "grabbed")
DROPS = ("put down", "dropped", "left")
DIRECTIONS = ("north", "south", "east", "west")
OWN = {"qa1": 8, "qa2": 12, "qa3": 16, "memorise": 1, "detect": 1, "reason": 2}
"""Questions of our own world, with the number of facts of a story."""


@dataclass(frozen=True)
class Told:
    """A story: its sentences, a question, the answer, and the sentences by index that the answer rests on."""

    facts: tuple[str, ...]
    question: str
    answer: str
    supports: tuple[int, ...]


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
