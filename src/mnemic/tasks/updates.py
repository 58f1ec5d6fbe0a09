"""Facts that are updated over the turns of a dialogue (MemoryPrompt, https://arxiv.org/abs/2402.15268).

A dialogue has turns of five facts, each "subject relation object." Some subjects are pivots: the same relation of
theirs is told again and again with a new object, with facts about others between. At the end comes a query: facts of
the same relation about other subjects, which show what is asked for, then "subject relation", and the answer is the
object that was told last. A memory must bind, and it must let go: earlier objects of the subject are the likely error.

The rules, and what of them is ours:

- A pivot's fact is told once and updated `updates` times, each time in another turn; the turns are drawn evenly. An
  object differs from the one before it. All other facts (distractors) are drawn with repetition, so they are updated
  at times as well, and may be about a pivot's subject in another relation.
- Every object is drawn evenly from all of its relation, also where the facts come from a table: nothing a pretrained
  model knows of the world helps, and the answers of a relation are equally frequent.
- The subjects of the demonstrations do not occur in the dialogue, and their objects are drawn on their own, so the
  query says nothing about its answer.
- One turn is one segment; what a segment has left is filled with line ends. The query is the last segment.

The facts are of an own world of invented names, or of the table of triples that `data` names.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Generator, Tensor
from torch.nn.utils.rnn import pad_sequence

from mnemic.tasks.base import Candidates, Examples, Task, TaskCard, below
from mnemic.tasks.text import UNSEEN, Encoder, Question, Story, assemble, behind, encoder, runs, string, write

SUBJECTS = (
    *("Adrel", "Belmo", "Corvin", "Dasha", "Elkan", "Fenna", "Gorin", "Hestia", "Ilmar", "Jorun"),
    *("Kelda", "Lumir", "Marek", "Nerys", "Oswin", "Petra", "Quillon", "Rasmin", "Selka", "Tovik"),
    *("Ulric", "Vanja", "Wendel", "Xanthe", "Yorick", "Zelma", "Arvid", "Brisa", "Cedrin", "Dorian"),
    *("Emrys", "Frida", "Gunnar", "Halla", "Isolde", "Jarek", "Kirin", "Leocad", "Mirko", "Nolwen"),
)

RELATIONS = {
    "lives in": "Oslo Lima Cairo Delhi Tokyo Rome Quito Dublin Athens Seoul Nairobi Paris",
    "plays the": "flute harp cello drum piano banjo oboe violin guitar trumpet tuba lute",
    "works with": "wood glass iron clay leather wool marble paper copper cotton stone silver",
    "owns a": "dog cat goat horse parrot rabbit donkey turtle sheep pony goose hamster",
    "eats only": "rice bread cheese fish soup beans plums carrots noodles apples nuts eggs",
    "wears a": "hat scarf cloak coat belt ring mask crown shawl vest cape turban",
}
"""Relations with their objects. All facts of this world are five words long, the full stop included."""


@dataclass(frozen=True)
class UpdatesTask(Task):
    """Dialogues of `turns` turns of `facts_per_turn` facts. `pivots` facts are updated `updates` times each; one of
    them is asked for, after `demonstrations` facts of the same relation.

    `data` is a table of triples in UTF-8, lines `subject<tab>relation<tab>object` or JSON objects with these three
    keys. Triples with a full stop inside are left out, because it ends a fact, and so are relations with fewer than two
    objects or not more subjects than demonstrations. `segment_length` must hold a turn.

    Raises:
        FileNotFoundError: there is nothing at `data`.
        ValueError: sizes out of range, a table that is too small or cannot be told apart in this tokenizer, or a
            turn that does not fit a segment.
    """

    turns: int = 20
    updates: int = 3
    pivots: int = 2
    facts_per_turn: int = 5
    demonstrations: int = 4
    segment_length: int = 25
    tokenizer: Any = "words"
    data: str | None = None

    name = "updates"
    axis = "turns"
    card = TaskCard(
        title="Fact updates",
        asks="Facts about subjects are updated over the turns of a dialogue; say the latest one of a subject.",
        paper="MemoryPrompt: A Light Wrapper to Improve Context Tracking in Pre-trained Language Models, "
        "https://arxiv.org/abs/2402.15268",
    )

    def __post_init__(self) -> None:
        if self.updates < 0 or self.demonstrations < 0:
            raise ValueError(f"updates is {self.updates}, demonstrations {self.demonstrations}; use 0 or more")
        if self.turns <= self.updates:
            raise ValueError(
                f"turns is {self.turns}; a fact and its {self.updates} updates stand in different turns, use "
                f"{self.updates + 1} turns or more"
            )
        if not 1 <= self.pivots <= self.facts_per_turn:
            raise ValueError(f"pivots is {self.pivots}; use 1 .. {self.facts_per_turn}, the facts of a turn")
        people, needed = len({subject for subject, _ in self.world.pairs}), self.demonstrations + self.pivots + 1
        if people < needed:
            raise ValueError(f"the table has {people} subjects; {needed} are needed, give more or fewer demonstrations")
        question, thing = (
            max(map(len, each)) for each in (self.world.questions, [o for each in self.world.objects for o in each])
        )
        fact = question + thing + len(self.world.stop)
        longest = max(self.facts_per_turn * fact, self.demonstrations * fact + question + thing)
        if self.segment_length < longest:
            raise ValueError(
                f"segment_length is {self.segment_length}; a turn or a query takes up to {longest} tokens of this "
                f"tokenizer, use {longest} or more"
            )

    @cached_property
    def world(self) -> World:
        """The facts that there are, in tokens."""
        triples = _own() if self.data is None else _table(self.data)
        return World(triples, self.tokenizer, self.demonstrations)

    @property
    def vocabulary(self) -> int:
        """Tokens of the tokenizer."""
        return self.world.encoder.vocabulary

    @property
    def uniform(self) -> float:
        """One of the relation's objects: the mean of 1 / objects over what is asked."""
        world = self.world
        return sum(1 / len(world.objects[relation]) for _, relation in world.pairs) / len(world.pairs)

    @property
    def unit(self) -> int:
        """A fact where all are equally long and fill a turn, else a turn."""
        world = self.world
        sizes = {len(question) for question in world.questions}, {len(o) for each in world.objects for o in each}
        fact = sum(min(size) for size in sizes) + len(world.stop)
        even = all(len(size) == 1 for size in sizes) and fact * self.facts_per_turn == self.segment_length
        return fact if even else self.segment_length

    def text(self, ids: Sequence[int]) -> list[str]:
        """Words or pieces of words."""
        return self.world.encoder.pieces(ids)

    # --- dialogues ---------------------------------------------------------------------------------------------------

    def draw(self, rows: int, generator: Generator, split: str = "train") -> Examples:
        """`rows` dialogues. Fewer rows from an equal generator are the first of more."""
        stories = [self._story(generator) for _ in range(rows)]
        return assemble(stories, self.segment_length, self.world.encoder.pad)

    def _story(self, generator: Generator) -> Story:
        world, pairs = self.world, self.world.pairs
        asked = below(len(pairs), generator)
        subject, relation = pairs[asked]
        others = [pair for pair in world.about[relation] if pair != asked]
        shown = [others[place] for place in torch.randperm(len(others), generator=generator).tolist()]
        shown = shown[: self.demonstrations]
        barred = {pairs[pair][0] for pair in shown}
        pivots, taken = [asked], {*barred, subject}
        while len(pivots) < self.pivots:
            pair = below(len(pairs), generator)
            if pairs[pair][0] not in taken:
                pivots.append(pair)
                taken.add(pairs[pair][0])

        said: list[list[tuple[int, int]]] = [[] for _ in range(self.turns)]
        since = 0
        for pivot in pivots:
            when = sorted(torch.randperm(self.turns, generator=generator)[: self.updates + 1].tolist())
            for turn, value in zip(when, self._values(pairs[pivot][1], generator), strict=True):
                said[turn].append((pivot, value))
            since = self.turns - 1 - when[-1] if pivot == asked else since
        distractors = self._distractors(barred, set(pivots), generator)
        order = torch.rand(self.turns, self.facts_per_turn, generator=generator, dtype=torch.float64).argsort(1)

        context: list[int] = []
        evidence, latest = 0, 0
        for turn, places in enumerate(order.tolist()):
            facts = said[turn] + [next(distractors) for _ in range(self.facts_per_turn - len(said[turn]))]
            for pair, value in (facts[place] for place in places):
                if pair == asked:
                    evidence, latest = len(context), value
                context += world.fact(pair, value)
            context += [world.fill] * ((turn + 1) * self.segment_length - len(context))
        question = [
            token for pair in shown for token in world.fact(pair, below(len(world.objects[relation]), generator))
        ]
        extra = {"updates": self.updates, "turns since update": since}
        query = Question(question + world.questions[asked], world.objects[relation][latest], [evidence], extra)
        return Story(context, [query], self.turns * self.facts_per_turn)

    def _values(self, relation: int, generator: Generator) -> list[int]:
        """Objects of a pivot in the order they are told: each is drawn evenly from all but the one before."""
        count = len(self.world.objects[relation])
        values = [below(count, generator)]
        for step in torch.randint(1, count, (self.updates,), generator=generator).tolist():
            values.append((values[-1] + step) % count)
        return values

    def _distractors(self, barred: set[str], pivots: set[int], generator: Generator) -> Iterator[tuple[int, int]]:
        """Facts that are not a pivot's and not about the subjects of the demonstrations, without end."""
        pairs, objects = self.world.pairs, self.world.objects
        shape = (self.facts_per_turn * self.turns,)
        while True:
            drawn = torch.randint(len(pairs), shape, generator=generator).tolist()
            luck = torch.rand(shape, generator=generator, dtype=torch.float64).tolist()
            for pair, share in zip(drawn, luck, strict=True):
                subject, relation = pairs[pair]
                if pair not in pivots and subject not in barred:
                    yield pair, int(share * len(objects[relation]))

    # --- the solver --------------------------------------------------------------------------------------------------

    def guess(
        self,
        ids: Int[Tensor, "b t"],
        asked: Bool[Tensor, "b t"],
        seen: Bool[Tensor, "b t"],
        generator: Generator,
    ) -> Int[Tensor, "b t"]:
        """The object that is told last of what is seen; any of the relation where none is seen."""
        predicted, places = torch.zeros_like(ids), _places(asked)
        for row, (pair, told) in enumerate(self._told(ids, asked, seen)):
            objects = self.world.objects[self.world.pairs[pair][1]]
            luck = below(len(objects), generator)
            write(predicted[row], places[row], objects[told[-1] if told else luck])
        return predicted

    def _told(
        self, ids: Int[Tensor, "b t"], asked: Bool[Tensor, "b t"], seen: Bool[Tensor, "b t"]
    ) -> Iterator[tuple[int, list[int]]]:
        """What each row asks for, and the objects it tells of that, in their order."""
        world, stop = self.world, string(self.world.stop)
        for row, places, visible in zip(ids, asked, seen, strict=True):
            text = string(torch.where(visible, row, ord(UNSEEN)).tolist())
            end = int(places.long().argmax())
            pair = world.asks(text[:end])
            question, told, at = string(world.questions[pair]), [], -1
            things = world.strings[world.pairs[pair][1]]
            while (at := text.find(question, at + 1)) >= 0:
                # a subject may end as another does, so a fact must begin here
                before = text[:at]
                if at % self.segment_length and not before.endswith((stop, UNSEEN)):
                    continue
                behind = text[at + len(question) : at + len(question) + world.longest]
                told += [things[part] for part in [behind[: behind.find(stop)]] if part in things and stop in behind]
            yield pair, told

    # --- scoring -----------------------------------------------------------------------------------------------------

    def more_floors(self, examples: Examples, luck: Generator) -> dict[str, float]:
        """Two that know all that was told but not when: a memory that never overwrites says the first object, one that
        cannot tell old from new says any of them.
        """
        first, some = (torch.zeros_like(examples.labels) for _ in range(2))
        asked, places = examples.asked, _places(examples.asked)
        for row, (pair, told) in enumerate(self._told(examples.input_ids, asked, ~asked)):
            objects = self.world.objects[self.world.pairs[pair][1]]
            write(first[row], places[row], objects[told[0]])
            write(some[row], places[row], objects[told[below(len(told), luck)]])
        return {"first object told": self.score(first, examples), "any object told": self.score(some, examples)}

    def candidates(self, examples: Examples) -> Candidates:
        """The objects that were told of anybody in the relation that is asked for: an object tells its relation."""
        ids, asked = examples.input_ids[:, : -self.segment_length], examples.evidence[:, 0, 0].tolist()
        values, right = [], []
        for row, relation, evidence in zip(ids.tolist(), self._relations(examples), asked, strict=True):
            text, things, found = string(row), self.world.strings[relation], []
            for pair in self.world.about[relation]:
                question, at = string(self.world.questions[pair]), -1
                while (at := text.find(question, at + 1)) >= 0:
                    said = text[at + len(question) : at + len(question) + self.world.longest]
                    thing = said[: said.find(string(self.world.stop))]
                    found += [(at, things[thing])] if thing in things else []
            found.sort(reverse=True)
            values.append(torch.tensor([value for _, value in found]))
            right.append([place for place, _ in found].index(evidence))
        return Candidates(pad_sequence(values, batch_first=True, padding_value=-1), torch.tensor(right))

    def majority(self, examples: Examples, rows: int = 500) -> float:
        """Score of always giving the object that a relation's queries have most often in training.

        Token by token over all relations, as it is elsewhere, would fall short of the uniform guess, which knows what
        is asked for.
        """
        train = self.examples(rows, "train", 0)
        counts = [Counter[tuple[int, ...]]() for _ in self.world.objects]
        for relation, answer in zip(self._relations(train), self._answers(train.labels, train), strict=True):
            counts[relation][answer] += 1
        predicted, places = torch.zeros_like(examples.labels), _places(examples.asked)
        for row, relation in enumerate(self._relations(examples)):
            common = counts[relation].most_common(1)
            write(predicted[row], places[row], common[0][0] if common else self.world.objects[relation][0])
        return self.score(predicted, examples)

    def measures(self, predicted: Int[Tensor, "b t"], examples: Examples) -> dict[str, float]:
        """ "first token": its accuracy, the paper's metric. "earlier object": share of answers that are an object the
        subject had before. "never told": share that are nothing that was told of it.
        """
        told = self._told(examples.input_ids, examples.asked, ~examples.asked)
        said, right = (self._answers(each, examples) for each in (predicted, examples.labels))
        first, earlier, never = 0, 0, 0
        for mine, true, (pair, values) in zip(said, right, told, strict=True):
            objects = self.world.objects[self.world.pairs[pair][1]]
            known = {tuple(objects[value]) for value in values}
            first += mine[0] == true[0]
            earlier += mine != true and mine in known
            never += mine not in known
        rows = max(len(said), 1)
        return {"first token": first / rows, "earlier object": earlier / rows, "never told": never / rows}

    def _relations(self, examples: Examples) -> list[int]:
        told = self._told(examples.input_ids, examples.asked, ~examples.asked)
        return [self.world.pairs[pair][1] for pair, _ in told]

    def _answers(self, tokens: Tensor, examples: Examples) -> list[tuple[int, ...]]:
        return [tuple(row[places].tolist()) for row, places in zip(tokens, examples.asked, strict=True)]


def _places(asked: Bool[Tensor, "b t"]) -> list[tuple[int, int]]:
    """Where each row's answer begins and ends."""
    return [runs(row)[0] for row in asked.tolist()]


class World:
    """Facts in tokens. `pairs` are the subjects and relations (by index) that facts are about, `questions` each of
    these in tokens, `objects` the tokens of each relation's objects, `about` the pairs of each relation.

    Raises:
        ValueError: no relation is left that can be asked for, or two entries that are the same to the tokenizer.
    """

    def __init__(self, triples: Sequence[tuple[str, str, str]], tokenizer: Any, demonstrations: int) -> None:
        subjects: dict[str, dict[str, None]] = {}
        objects: dict[str, dict[str, None]] = {}
        for subject, relation, thing in triples:
            subjects.setdefault(relation, {})[subject] = None
            objects.setdefault(relation, {})[thing] = None
        relations = [each for each in objects if len(objects[each]) > 1 and len(subjects[each]) > demonstrations]
        if not relations:
            raise ValueError(
                f"no relation has two objects and {demonstrations + 1} subjects; give a larger table or fewer "
                "demonstrations"
            )
        self.pairs = [(subject, place) for place, each in enumerate(relations) for subject in subjects[each]]
        questions = [f"{subject} {relations[place]}" for subject, place in self.pairs]
        things = [list(objects[each]) for each in relations]
        texts = [*questions, *(thing for each in things for thing in each), ".", "\n", "the"]
        self.encoder: Encoder = encoder(tokenizer, texts)
        self.questions = [self._inside(each) for each in questions]
        self.objects = [[self._inside(thing) for thing in each] for each in things]
        self.about: list[list[int]] = [[] for _ in relations]
        for pair, (_, relation) in enumerate(self.pairs):
            self.about[relation].append(pair)
        # the full stop as it is behind a word, where the tokenizer keeps it apart
        self.stop = behind(self.encoder, f"the {things[0][0]}", ".", joint="") or self.encoder.encode(".")
        self.fill = (self.encoder.encode("\n") or [self.encoder.pad])[-1]
        self.strings = [{string(thing): place for place, thing in enumerate(each)} for each in self.objects]
        self.longest = max(len(thing) for each in self.objects for thing in each) + len(self.stop)
        self._asks = {string(tokens): pair for pair, tokens in enumerate(self.questions)}
        self._sizes = sorted({len(tokens) for tokens in self.questions}, reverse=True)
        if len(self._asks) < len(questions):
            twice, _ = Counter(map(string, self.questions)).most_common(1)[0]
            same = [text for text, tokens in zip(questions, self.questions, strict=True) if string(tokens) == twice]
            raise ValueError(f"{same[0]!r} and {same[1]!r} are the same to this tokenizer; leave one of them out")
        for place, each in enumerate(relations):
            if len(self.strings[place]) < len(things[place]):
                raise ValueError(f"two objects of {each!r} are the same to this tokenizer; leave one of them out")

    def _inside(self, text: str) -> list[int]:
        """The tokens that a text has behind another word, whatever the tokenizer does with a single one."""
        return behind(self.encoder, "the", text) or self.encoder.encode(text)

    def fact(self, pair: int, value: int) -> list[int]:
        """A statement in tokens."""
        return [*self.questions[pair], *self.objects[self.pairs[pair][1]][value], *self.stop]

    def asks(self, before: str) -> int:
        """The pair that a text, as a string of tokens, ends in: the one with the longest name; any if none is seen."""
        found = (self._asks.get(before[-size:]) for size in self._sizes)
        return next((pair for pair in found if pair is not None), 0)


# --- tables ----------------------------------------------------------------------------------------------------------

KEYS = ("subject", "relation", "object")
"""Of a line of JSON."""


def _own() -> list[tuple[str, str, str]]:
    things = {relation: words.split() for relation, words in RELATIONS.items()}
    return [(subject, relation, thing) for relation, each in things.items() for subject in SUBJECTS for thing in each]


def _table(path: str) -> list[tuple[str, str, str]]:
    """Triples of a file, those with a full stop left out."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is not a file; pass data= a table of subject, relation and object")
    triples = []
    for number, line in enumerate(Path(path).read_text("utf-8-sig").splitlines(), 1):
        if not line.strip():
            continue
        try:
            parts = [json.loads(line)[key] for key in KEYS] if line.lstrip().startswith("{") else line.split("\t")
            subject, relation, thing = (" ".join(part.split()) for part in parts)
        except (ValueError, KeyError, AttributeError, TypeError):
            raise ValueError(
                f"{path}, line {number} is no triple; write subject, relation and object with tabs between, or as JSON "
                'with the keys "subject", "relation" and "object"'
            ) from None
        if all((subject, relation, thing)) and "." not in f"{subject}{relation}{thing}":
            triples.append((subject, relation, thing))
    return triples
