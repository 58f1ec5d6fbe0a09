"""What is told in a text and asked for when it has long left the window: kinds of needles, and documents with them.

A needle is told once, behind a sentence of a novel or, in a chat, as a turn between other turns. Nothing here knows of
a model: `needles.py` asks.
"""

from __future__ import annotations

import functools
import itertools
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from mnemic.tasks.documents import tokenize
from mnemic.tasks.telling import FIRST as PEOPLE
from mnemic.tasks.telling import Teller, words
from mnemic.tasks.text import word_list
from mnemic.texts import around, plain
from mnemic.turns import Turns

FIRST = 64
"""The earliest place of a needle: the first tokens of a stream are always attended to, and would give it away."""
KEYS = range(10_000, 100_000)
CITIES = word_list("""
    Amsterdam Athens Barcelona Berlin Boston Cairo Chicago Delhi Dublin Geneva Hamburg Istanbul Kyoto Lisbon Madrid
    Mumbai Oslo Prague Seattle Sydney Toronto Vienna Warsaw Zurich""")
NAMES = {"cities": CITIES, "people": words(PEOPLE)}
LETTERS = "BCDFGHJKLMNPQRSTVWXZ"
"""Of the names of variables, three each."""


class Text(NamedTuple):
    """What needles stand in: the tokens it begins with, those behind, and before which of these one may stand."""

    start: list[int]
    ids: list[int]
    free: Callable[[int], bool]


# --- kinds -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Needle:
    """What is told, and what of it an answer has to name; in a chat, what was replied to it."""

    told: str
    key: str
    reply: str = ""


@dataclass(frozen=True)
class Question:
    """What is asked, and the numbers of the needles whose keys the answer has to name. Each key counts by itself."""

    asked: str
    needles: tuple[int, ...]


@dataclass(frozen=True)
class Telling:
    """What one document tells, in this order, and what it is asked."""

    needles: list[Needle]
    questions: list[Question]

    @property
    def asked(self) -> list[int]:
        """The needles whose keys are asked for, question by question."""
        return [number for question in self.questions for number in question.needles]

    def right(self, kind: Kind, answers: Sequence[str]) -> str:
        """For each of `asked` whether its key was named: "1" or "0"."""
        return "".join(
            "1" if kind.names(answer, self.needles[number].key) else "0"
            for question, answer in zip(self.questions, answers, strict=True)
            for number in question.needles
        )


@dataclass(frozen=True)
class Kind:
    """Numbers of five digits, each told in a sentence and asked for by its beginning.

    `forms` are what is told and what is asked, one for all of the `needles` or one for each; which of them stands where
    changes from document to document. `asked` of the needles are asked for, evenly chosen, or all. `in_turn` asks one
    question after another in one stream, where each is otherwise asked of a fork of the reader. An answer has `answer`
    tokens at most, and a question with what goes before it about `room` less.
    """

    forms: tuple[tuple[str, str], ...]
    needles: int = 1
    asked: int | None = None
    in_turn: bool = False
    named: str = "cities"
    answer: int = 8
    room: int = 64

    @property
    def floors(self) -> dict[str, float]:
        """What is right without reading."""
        return {"chance": 1 / len(KEYS)}

    def telling(self, of: str, number: int) -> Telling:
        """What document `number` of those that `of` describes tells. No two of them tell the same number."""
        keys = shuffled_keys(of)[number * self.needles : (number + 1) * self.needles]
        names = random.Random(f"{of} {number}").sample(NAMES[self.named], self.needles)
        needles, questions = [], []
        for place, (key, name) in enumerate(zip(keys, names, strict=True)):
            told, asked = self.forms[(place + number) % len(self.forms)]
            needles.append(Needle(told.format(key=key, name=name), str(key)))
            questions.append(Question(asked.format(name=name), (place,)))
        return Telling(needles, self._chosen(questions))

    def _chosen(self, questions: list[Question]) -> list[Question]:
        if self.asked is None:
            return questions
        return [questions[round(depth * (len(questions) - 1))] for depth in spread(self.asked)]

    def names(self, answer: str, key: str) -> bool:
        """Whether an answer names what was asked for."""
        return key in answer

    def text(self, texts: Sequence[tuple[str, str]], tokenizer: Any, count: int, luck: random.Random) -> Text:
        """`count` tokens of what the needles stand in."""
        ids = haystack(texts, tokenizer, count, luck)

        def free(place: int) -> bool:
            before, after = (tokenizer.decode(ids[place - 3 : end]) for end in (place, place + 1))
            # a whole word in small letters ends there, which "Mr." does not, and a space follows
            return bool(re.search(r"\b[a-z]+[.!?]\Z", before)) and after[len(before) : len(before) + 1].isspace()

        return Text(around(tokenizer)[0], ids, free)

    def written(self, tokenizer: Any, needle: Needle) -> list[int]:
        """What is told, as tokens."""
        return plain(tokenizer, needle.told)

    def prompt(
        self,
        tokenizer: Any,
        asked: str,
        *,
        before: Sequence[int] = (),
        context: Sequence[int] = (),
        new: bool = False,
    ) -> list[int]:
        """A question as tokens, behind what was asked and answered `before` and a `context` that is put before it all;
        in a `new` stream with what begins one.
        """
        return [*(around(tokenizer)[0] if new else ()), *context, *before, *plain(tokenizer, asked)]


@dataclass(frozen=True)
class Chain(Kind):
    """A number given to a variable, this one's value to another, and so on: asked for the number, an answer has to name
    all of them. The question brings an example of others; the document has no other chain, so naming every variable
    that was told is enough. After "variable tracking" of RULER (Hsieh et al., COLM 2024, arXiv 2404.06654).
    """

    @property
    def floors(self) -> dict[str, float]:
        """One name of all."""
        return {"chance": 1 / len(LETTERS) ** 3}

    def telling(self, of: str, number: int) -> Telling:
        """As of a `Kind`; no two documents have a variable in common."""
        ((told, asked),), count = self.forms, self.needles + 3
        *names, first, second, third = shuffled_variables(of)[number * count : (number + 1) * count]
        value = str(shuffled_keys(of)[number])
        given = [value, *(f"VAR {name}" for name in names[:-1])]
        return Telling(
            [Needle(told.format(name=name, key=each), name) for name, each in zip(names, given, strict=True)],
            [Question(asked.format(first, second, third, key=value), tuple(range(self.needles)))],
        )


@dataclass(frozen=True)
class Facts(Kind):
    """Facts of people, told and asked as turns of a chat in the model's template, among other turns. The reply says a
    fact again: a small model that has replied "Noted." goes on to do so when it is asked.
    """

    REPLY: ClassVar[str] = "noted: {s} {n} is {v}."
    REPLIES: ClassVar[tuple[str, ...]] = ("I see.", "Go on.", "And then?", "What happened next?")

    @property
    def floors(self) -> dict[str, float]:
        """Who knows what was told and not of whom. Without that it is less, by the kind of the value."""
        return {"a told value at random": 1 / self.needles}

    def telling(self, of: str, number: int) -> Telling:
        """As of a `Kind`; no document tells a value, or asks what is asked, of the one before it."""
        luck, teller, found = random.Random(of), Teller("test"), []
        while len(found) <= number:
            facts = teller.facts(luck, self.needles)
            near = [*facts, *(found[-1] if found else ())]
            if len({each.value for each in near}) == len({(each.subject, each.relation) for each in near}) == len(near):
                found.append(facts)
        ((told, asked),) = self.forms
        needles = [
            # what the user calls "my", the reply calls "your"
            Needle(fact.sentence(told), fact.value, fact.sentence(self.REPLY).replace("Noted: my ", "Noted: your "))
            for fact in found[-1]
        ]
        return Telling(needles, [Question(fact.sentence(asked), (place,)) for place, fact in enumerate(found[-1])])

    def names(self, answer: str, key: str) -> bool:
        """Whether the value is there as a whole."""
        return re.search(rf"(?<!\w){re.escape(key)}(?!\w)", answer, re.IGNORECASE) is not None

    def text(self, texts: Sequence[tuple[str, str]], tokenizer: Any, count: int, luck: random.Random) -> Text:
        """Turns of three sentences of a novel and a short reply, `count` tokens or some less."""
        said = " ".join(tokenizer.decode(haystack(texts, tokenizer, count, luck)).split())
        sentences = re.split(r"(?<=[.!?]) ", said)
        ids, places = [], set()
        for place in range(0, len(sentences), 3):
            turn = self._turn(tokenizer, " ".join(sentences[place : place + 3]), luck.choice(self.REPLIES), not ids)
            if len(ids) + len(turn) > count:
                continue  # a shorter one may fit
            ids += turn
            places.add(len(ids))
        return Text([], ids, places.__contains__)

    def written(self, tokenizer: Any, needle: Needle) -> list[int]:
        """A turn."""
        return self._turn(tokenizer, needle.told, needle.reply)

    def _turn(self, tokenizer: Any, said: str, reply: str, first: bool = False) -> list[int]:
        turns, answer = Turns(tokenizer), plain(tokenizer, reply)
        if not turns.template:
            raise ValueError("the tokenizer has no chat template; ask for another kind, or of another model")
        closing = turns.closing(answer)
        return [
            *turns.message(said, first=first)[0].tolist(),
            *answer,
            *(() if closing is None else closing[0].tolist()),
        ]

    def prompt(
        self,
        tokenizer: Any,
        asked: str,
        *,
        before: Sequence[int] = (),
        context: Sequence[int] = (),
        new: bool = False,
    ) -> list[int]:
        """A question as a turn, the `context` as words in front of it."""
        said = [tokenizer.decode(context, skip_special_tokens=True), asked] if context else [asked]
        return [*before, *Turns(tokenizer).message("\n\n".join(said), first=new and not before)[0].tolist()]


PROSE = (" One of the special magic numbers for {name} is: {key}.", "\n\nThe special magic number for {name} is:")
NUMBER = (" The number of {name} is {key}.", "\n\nThe number of {name} is")
NUMBERED = (
    "The door of the library opens with the code",
    "The number of my train ticket is",
    "The telephone number of the doctor is",
    "The bank account was opened under the number",
    "The prisoner's coat bears the mark",
)
KINDS: dict[str, Kind] = {
    "apart": Kind((("\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n", "\n\nThe pass key is"),)),
    "prose": Kind((PROSE,)),
    # five things of which each is told once, so that one reading is asked five times
    "five-depths": Kind(tuple((f" {form} {{key}}.", f"\n\n{form}") for form in NUMBERED), needles=5),
    "five-apart": Kind(
        tuple((f"\n\n{form} {{key}}. Remember it. {{key}} is the number.\n\n", f"\n\n{form}") for form in NUMBERED),
        needles=5,
    ),
    "multi-4": Kind((PROSE,), needles=4),
    "multi-16": Kind((PROSE,), needles=16),
    "multi-query": Kind((NUMBER,), needles=4, in_turn=True, named="people", room=192),
    "pairs-64": Kind((NUMBER,), needles=64, asked=8, named="people"),
    "variables": Chain(
        (
            (
                " VAR {name} = {key}.",
                "\n\nThe variables with the value 40817 are: VAR {0}, VAR {1}, VAR {2}.\n"
                "The variables with the value {key}, directly or through another one, are: VAR",
            ),
        ),
        needles=5,
        answer=32,
        room=128,
    ),
    "chat-facts": Facts((("Remember that {s} {n} is {v}.", "What is {s} {n}?"),), needles=5, answer=24, room=128),
}


# --- documents -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Which document: its tokens, where its needle stands (0 the start, 1 the latest place outside the window), and its
    number among those. Several needles are spread over all depths.
    """

    kind: str
    length: int
    depth: float
    number: int

    @property
    def name(self) -> str:
        """As it is kept under."""
        return f"{self.length} tokens, depth {self.depth:.3f}, number {self.number}"

    @property
    def depths(self) -> list[float]:
        """Of each of its needles."""
        count = KINDS[self.kind].needles
        return [self.depth] if count == 1 else spread(count)


@dataclass(frozen=True)
class Document:
    """Token ids, what they tell, and where each needle begins; and what another document tells."""

    ids: Int[Tensor, "1 t"]
    own: Telling
    positions: list[int]
    other: Telling


def spread(count: int) -> list[float]:
    """That many depths at even distances."""
    return [number / max(1, count - 1) for number in range(count)]


def places(kind: str, lengths: Sequence[int], depths: int, documents: int) -> list[Place]:
    """All documents of a kind, the short ones first."""
    wanted = spread(depths) if KINDS[kind].needles == 1 else [0.0]
    return [Place(kind, length, depth, number) for length in lengths for number in range(documents) for depth in wanted]


def telling(place: Place, seed: int, number: int) -> Telling:
    """What document `number` beside this one tells, and is asked."""
    return KINDS[place.kind].telling(f"{seed} {place.kind} {place.length} {place.depth}", number)


@functools.cache
def shuffled_keys(of: str) -> list[int]:
    """All keys, in an order of their own."""
    keys = list(KEYS)
    random.Random(of).shuffle(keys)
    return keys


@functools.cache
def shuffled_variables(of: str) -> list[str]:
    """All names of variables, in an order of their own."""
    names = ["".join(each) for each in itertools.product(LETTERS, repeat=3)]
    random.Random(of).shuffle(names)
    return names


def document(texts: Sequence[tuple[str, str]], tokenizer: Any, place: Place, seed: int, window: int) -> Document:
    """The document of a place: as many tokens as it says (a chat has some less), with every needle behind a sentence,
    or between turns, and outside the window.

    Raises:
        ValueError: too short a document for that, or a chat for a tokenizer without a template.
    """
    kind, own = KINDS[place.kind], telling(place, seed, place.number)
    parts = [kind.written(tokenizer, needle) for needle in own.needles]
    count = place.length - len(around(tokenizer)[0]) - sum(map(len, parts))
    if count - window <= FIRST:
        raise ValueError(
            f"{place.length} tokens leave no room between the first {FIRST} and a window of {window}; use more"
        )
    text = kind.text(texts, tokenizer, count, random.Random(f"{seed} {place}"))
    last = len(text.ids) - window
    gaps = nearest([FIRST + depth * (last - FIRST) for depth in place.depths], text.free, last)
    ids, positions, begun = list(text.start), [], 0
    for end, part in zip(gaps, parts, strict=True):
        ids += text.ids[begun:end]
        positions.append(len(ids))
        ids, begun = ids + part, end
    ids += text.ids[begun:]
    return Document(torch.tensor([ids]), own, positions, telling(place, seed, place.number + 1))


def haystack(texts: Sequence[tuple[str, str]], tokenizer: Any, count: int, source: random.Random) -> list[int]:
    """`count` tokens of novels drawn by chance, each from a line in its middle on, as its first lines are a title."""
    ids: list[int] = []
    for _, text in source.sample(list(texts), len(texts)):
        begin = 1 + text.find("\n", source.randrange(len(text) // 4, len(text) // 2))
        # a token has 4 characters or so
        ids += tokenize(text[begin : begin + 8 * (count - len(ids))], tokenizer).ids.tolist()
        if len(ids) >= count:
            return ids[:count]
    raise ValueError(f"the texts held out have {len(ids):,} tokens, and a document needs {count:,}; give more text")


def nearest(aims: Sequence[float], free: Callable[[int], bool], last: int) -> list[int]:
    """For each needle a place of its own where it may stand, in order, the nearest to where it is wanted that leaves
    room for those behind.
    """
    ends, found = [place for place in range(FIRST, last + 1) if free(place)], []
    if len(ends) < len(aims):
        raise ValueError(
            f"{len(ends)} sentences end between the tokens {FIRST:,} and {last:,}, and {len(aims)} needles are to "
            "stand behind one each; use longer lengths"
        )
    begin = 0
    for left, aim in zip(range(len(aims) - 1, -1, -1), aims, strict=True):
        begin = min(range(begin, len(ends) - left), key=lambda number: abs(ends[number] - aim)) + 1
        found.append(ends[begin - 1])
    return found
