"""Proactive interference: many updates of each key, and only the last counts (PI-LLM, "Unable to Forget",
https://arxiv.org/abs/2506.08184).

A dictionary has categories, the keys, with values that belong to them. A stream names the keys to follow, then updates
each of `n_keys` keys `updates` times, `bird: heron; tool: rasp; bird: wren; ...`, and asks for the current value of
every key that it named. A key's values differ from one another within a stream. The order is random, but no key comes
twice in a row; with `sequential` all updates of one key come before those of the next. Nothing is hard to find here:
what makes a memory fail are the values that counted before. So beside the score stand the shares of answers that were
the last value, an earlier one, or never told, and how old the earlier ones are (`InterferenceTask.measures`).

The last values stand near the question by design, so a memory of a segment or two goes far in the score, as the floors
show. What needs a longer reach: `asked_keys` below `n_keys` with short segments, or `sequential`.

The layout is ours: the instruction and the updates fill whole segments, the questions one more:

    [; ; ; instruction; key: value; key: value; | ... | question: key is value. key is value. padding]

The marks in front fill what the updates leave of their segments, so that the question begins a new one. Values have
labels; the full stop behind belongs to the answer only where a tokenizer writes one value as the beginning of another.
All random orders in which no key comes twice in a row can occur, but they are not exactly equally likely, as in the
published generator: keys are drawn by what is left of them.

Without `data` the dictionary is our own: keys are English nouns, values invented words, so that nothing can be known of
them beforehand. `data` is the path of the published dictionary, a JSON object of 46 lists with 400 values each.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Generator, Tensor

from mnemic.tasks.base import UNBOUND, Examples, Task, TaskCard, below
from mnemic.tasks.text import Encoder, Question, Story, assemble, behind, encoder, runs, write

NOUNS = (
    *("river", "tool", "bird", "fruit", "game", "metal", "dance", "sport", "cloth", "planet", "engine", "spice"),
    *("bridge", "flower", "insect", "drink", "vessel", "lamp", "stone", "song", "wind", "tower", "coin", "bread"),
    *("colour", "garden", "mask", "drum", "ladder", "market", "island", "knot", "letter", "mirror", "needle", "oven"),
    *("paint", "quilt", "road", "statue", "tent", "village", "window", "yarn", "zone", "school"),
)
"""The keys of our own dictionary."""

CHOICES = 400
"""Values of a key in our own dictionary."""

OPENING = "Remember the current value of each of these keys"
QUESTION = "Current values:"

SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]

KEYS = (2, 3, 4, 5, 6, 8, 11, 15, 20, 26, 35, 46)
"""Numbers of keys in the paper's tests."""

UPDATES = (2, 3, 4, 6, 8, 12, 17, 24, 34, 48, 68, 97, 139, 197, 281, 400)
"""Updates of a key in the paper's tests."""

LENGTHS = (1, 2, 3, 4, 6, 10, 16, 25, 40)
"""Words of a value in the paper's tests."""


def _settings(**changes: Any) -> dict[str, Any]:
    return {"n_keys": 46, "categories": 46, "choices": CHOICES, "segment_length": 512, **changes}


TESTS: dict[str, list[dict[str, Any]]] = {
    "updates": [_settings(updates=updates) for updates in UPDATES],
    "keys": [_settings(updates=updates, n_keys=keys) for updates in (125, 350) for keys in KEYS],
    "asked": [_settings(updates=updates, asked_keys=keys) for updates in (125, 350) for keys in KEYS],
    "length": [
        _settings(updates=updates, value_words=words, segment_length=2048) for updates in (4, 20) for words in LENGTHS
    ],
    "sequential": [_settings(updates=updates, sequential=True) for updates in UPDATES],
}
"""The paper's tests 1 to 5 as settings: more updates of all keys; more keys; more keys of which the current value is
asked, the stream as long as ever; longer values; updates key by key. The segments are ours, and fit our dictionary."""


def invented(number: int) -> str:
    """A word of three syllables; different for different numbers of 0 .. 342,999."""
    # the factor has no divisor in common with 70 ** 3, so that each word comes once; it sets neighbours apart
    place = (number * 104_729 + 20_011) % len(SYLLABLES) ** 3
    return "".join(SYLLABLES[place // len(SYLLABLES) ** power % len(SYLLABLES)] for power in (2, 1, 0))


@lru_cache
def dictionary(data: str | None) -> dict[str, list[str]]:
    """Keys with their values: our own, or those of a JSON file.

    Raises:
        ValueError: a file that is not an object of lists of text.
    """
    if data is None:
        return {
            noun: [invented(CHOICES * place + value) for value in range(CHOICES)] for place, noun in enumerate(NOUNS)
        }
    found = json.loads(Path(data).read_text(encoding="utf-8"))
    if not isinstance(found, dict) or not all(
        isinstance(values, list) and all(isinstance(value, str) for value in values) for values in found.values()
    ):
        raise ValueError(f"{data} is not a JSON object of keys, each with a list of values")
    return found


@dataclass
class World:
    """The dictionary in tokens: keys as updates begin (`heads`) and as questions do (`asks`), and values by key."""

    coder: Encoder
    heads: list[list[int]]
    asks: list[list[int]]
    values: list[list[list[int]]]
    mark: int
    """The token that ends an update."""
    stop: list[int]
    """What follows an answer."""
    ended: bool
    """Whether that belongs to the answer."""
    unclear: list[bool]
    """Keys that are the end of another's name: what stands before must be known to tell them apart."""


@dataclass(frozen=True)
class InterferenceTask(Task):
    """`n_keys` keys with `updates` updates each; `asked_keys` of them are named and asked (all by default).

    `categories` and `choices` are how many keys of the dictionary streams are made of, and how many values of each.
    With `value_words` a value is so many words of its key. `tokenizer` is "words", where every word of our own
    dictionary is a token, "bytes", or one of Hugging Face.

    `extra["key"]` is the number of the key in the dictionary, `extra["age"]` the number of segments since its last
    update, `extra["since"]` how many updates of other keys came behind it.

    Raises:
        ValueError: numbers that the dictionary does not hold, fewer than two keys, questions that do not fit a segment,
            or a tokenizer that writes the mark between updates inside a word.
    """

    n_keys: int = 8
    updates: int = 4
    asked_keys: int | None = None
    value_words: int = 1
    sequential: bool = False
    categories: int = 16
    choices: int = 40
    segment_length: int = 40
    data: str | None = None
    tokenizer: Any = "words"

    name = "interference"
    axis = "updates"
    card = TaskCard(
        title="Proactive interference",
        asks="Follow keys whose values are updated again and again, and tell the current value of each.",
        paper="Unable to Forget (PI-LLM), https://arxiv.org/abs/2506.08184",
    )

    def __post_init__(self) -> None:
        if self.n_keys < 2:
            raise ValueError(f"n_keys is {self.n_keys}; interference needs 2 keys or more")
        if self.n_keys > self.categories:
            raise ValueError(f"n_keys is {self.n_keys}, but categories is {self.categories}; use more categories")
        for name, limit in (("updates", self.choices), ("asked_count", self.n_keys), ("value_words", self.choices)):
            if not 1 <= getattr(self, name) <= limit:
                raise ValueError(f"{name.replace('count', 'keys')} is {getattr(self, name)}; use 1 .. {limit}")
        entries = dictionary(self.data)
        fewest = min(len(values) for values in entries.values())
        if self.categories > len(entries) or self.choices > fewest:
            raise ValueError(
                f"categories is {self.categories} and choices {self.choices}; the dictionary has {len(entries)} and "
                f"{fewest}"
            )
        world = self._world
        longest = sorted(
            len(ask) + self.value_words * max(map(len, values)) + len(world.stop)
            for ask, values in zip(world.asks, world.values, strict=True)
        )
        need = len(self._question) + sum(longest[-self.asked_count :])
        if need > self.segment_length:
            raise ValueError(
                f"segment_length is {self.segment_length}; {self.asked_count} questions need up to {need} tokens"
            )

    @property
    def asked_count(self) -> int:
        """Keys that are asked."""
        return self.n_keys if self.asked_keys is None else self.asked_keys

    @cached_property
    def _world(self) -> World:
        entries = dict(list(dictionary(self.data).items())[: self.categories])
        entries = {key: values[: self.choices] for key, values in entries.items()}
        texts = [
            OPENING,
            QUESTION,
            "a: is ; , .",
            *entries,
            *(value for values in entries.values() for value in values),
        ]
        coder = encoder(self.tokenizer, texts)
        values = [[coder.encode(value) for value in each] for each in entries.values()]
        heads = [coder.encode(f"{key}:") for key in entries]
        sample = next(iter(entries.values()))[0]
        mark, stop = (behind(coder, sample, sign, joint="") or coder.encode(sign) for sign in ";.")
        inside = {token for each in (*heads, *(value for some in values for value in some)) for token in each}
        if len(mark) != 1 or mark[0] in inside:
            raise ValueError("this tokenizer does not write ';' behind a word as a token of its own; choose another")
        for key, some in zip(entries, values, strict=True):
            if len({tuple(value) for value in some}) < len(some):
                raise ValueError(f"two values of {key!r} are the same to this tokenizer; choose another")
        # sorted, a value that begins another stands right before one that it begins
        ordered = [sorted(map(tuple, some)) for some in values]
        ended = any(b[: len(a)] == a for some in ordered for a, b in pairwise(some))
        unclear = [any(len(b) > len(a) and b[len(b) - len(a) :] == a for b in heads) for a in heads]
        return World(
            coder, heads, [coder.encode(f"{key} is") for key in entries], values, mark[0], stop, ended, unclear
        )

    @cached_property
    def _names(self) -> list[str]:
        return list(dictionary(self.data))[: self.categories]

    @cached_property
    def _question(self) -> list[int]:
        return self._world.coder.encode(QUESTION)

    @property
    def vocabulary(self) -> int:
        """Of the dictionary and the sentences around, or the tokenizer."""
        return self._world.coder.vocabulary

    @property
    def uniform(self) -> float:
        """Any value of the key."""
        return float(self.choices) ** -self.value_words

    def text(self, ids: Sequence[int]) -> list[str]:
        """Words, or what the tokenizer has."""
        return self._world.coder.pieces(ids)

    # --- streams -----------------------------------------------------------------------------------------------------

    def draw(self, rows: int, generator: Generator, split: str = "train") -> Examples:
        """Streams as long as the longest of them needs: whole segments, then the questions."""
        world, names = self._world, self._names
        keys = _luck(generator, rows, self.categories)[:, : self.n_keys]
        values = _luck(generator, rows, self.n_keys, self.choices)[:, :, : self.updates, None]
        if self.value_words > 1:
            # the first word makes the values of a key different, the others may be any
            shape = (rows, self.n_keys, self.updates, self.value_words - 1)
            values = torch.cat([values, torch.randint(self.choices, shape, generator=generator)], 3)
        order = self._order(rows, generator)
        asked = _luck(generator, rows, self.n_keys)[:, : self.asked_count]

        contexts: list[list[int]] = []
        told: list[dict[int, tuple[int, int]]] = []
        drawn = [each.tolist() for each in (keys, values, order, asked)]
        for key, value, when, wanted in zip(*drawn, strict=True):
            # the instruction names the keys in the dictionary's order: that of the questions is not known beforehand
            listed = ", ".join(names[each] for each in sorted(key[each] for each in wanted))
            context, last = [*world.coder.encode(f"{OPENING}: {listed}"), world.mark], {}
            count = [0] * self.n_keys
            for number, each in enumerate(when):
                last[each] = (len(context), number)
                context += world.heads[key[each]]
                for word in value[each][count[each]]:
                    context += world.values[key[each]][word]
                context.append(world.mark)
                count[each] += 1
            contexts.append(context)
            told.append(last)

        length = -(-max(map(len, contexts)) // self.segment_length) * self.segment_length
        stories = []
        for context, last, key, value, _, wanted in zip(contexts, told, *drawn, strict=True):
            front = length - len(context)
            questions, before = [], self._question
            for each in wanted:
                words = [token for word in value[each][-1] for token in world.values[key[each]][word]]
                answer = words + world.stop if world.ended else words
                place, number = last[each]
                extra = {
                    "key": key[each],
                    "age": length // self.segment_length - (front + place) // self.segment_length,
                    "since": self.n_keys * self.updates - 1 - number,
                }
                questions.append(Question([*before, *world.asks[key[each]]], answer, [front + place], extra))
                before = [] if world.ended else world.stop
            stories.append(Story([world.mark] * front + context, questions, self.n_keys * self.updates))
        return assemble(stories, self.segment_length, world.coder.pad)

    def _order(self, rows: int, generator: Generator) -> Int[Tensor, "b u"]:
        """Which key is updated when, `0 .. n_keys - 1`."""
        total = self.n_keys * self.updates
        if self.sequential:
            return torch.arange(self.n_keys).repeat_interleave(self.updates).expand(rows, total)
        left = torch.full((rows, self.n_keys), self.updates)
        order, row = torch.empty(rows, total, dtype=torch.long), torch.arange(rows)
        luck = torch.rand(total, rows, generator=generator, dtype=torch.float64)
        for step in range(total):
            weight = left.clone()
            if step:
                weight[row, order[:, step - 1]] = 0
            # a key with more updates left than all others together can be kept apart only if it comes now
            must = 2 * weight > total - step
            weight = torch.where(must.any(1, keepdim=True), must.long(), weight)
            edge = weight.cumsum(1)
            place = (luck[step] * edge[:, -1]).long()
            order[:, step] = (edge <= place[:, None]).sum(1)
            left[row, order[:, step]] -= 1
        return order

    # --- reading -----------------------------------------------------------------------------------------------------

    def _told(self, ids: list[int], seen: list[bool]) -> Iterator[tuple[int, int, list[int]]]:
        """Every update that is wholly seen: where it begins, its key and its value in tokens."""
        start = 0
        for end, token in enumerate(ids):
            if token != self._world.mark or not seen[end]:
                continue
            # what follows a token that is not seen may be the rest of an update or of a longer name; in front of the
            # stream there is nothing
            hidden = next((place for place in range(end - 1, start - 1, -1) if not seen[place]), None)
            first = start if hidden is None else hidden + 1
            if first < end:
                yield from self._update(ids[first:end], first, hidden is None)
            start = end + 1

    def _update(self, said: list[int], start: int, before: bool) -> Iterator[tuple[int, int, list[int]]]:
        world = self._world
        for key in self._heads.get(said[0], ()):
            head = world.heads[key]
            if said[: len(head)] == head and len(said) > len(head) and (before or not world.unclear[key]):
                yield start, key, said[len(head) :]

    @cached_property
    def _heads(self) -> dict[int, list[int]]:
        """Keys by their first token."""
        found: dict[int, list[int]] = {}
        for key, head in enumerate(self._world.heads):
            found.setdefault(head[0], []).append(key)
        return found

    def _asked_key(self, before: list[int]) -> int | None:
        """The key whose question ends here."""
        asks = self._world.asks
        found = [key for key, ask in enumerate(asks) if before[-len(ask) :] == ask]
        return max(found, key=lambda key: len(asks[key]), default=None)

    def guess(
        self,
        ids: Int[Tensor, "b t"],
        asked: Bool[Tensor, "b t"],
        seen: Bool[Tensor, "b t"],
        generator: Generator,
    ) -> Int[Tensor, "b t"]:
        """The last value of the key that is seen; any of its values where none is."""
        world, said = self._world, torch.zeros_like(ids)
        for row in range(len(ids)):
            tokens, visible = ids[row].tolist(), seen[row].tolist()
            current = {key: value for _, key, value in self._told(tokens, visible)}
            for first, last in runs(asked[row].tolist()):
                known = first
                while known and visible[known - 1] and first - known < self.segment_length:
                    known -= 1
                key = self._asked_key(tokens[known:first])
                if key is None:
                    key = below(self.categories, generator)
                value = current.get(key)
                if value is None:
                    words = torch.randint(self.choices, (self.value_words,), generator=generator).tolist()
                    value = [token for word in words for token in world.values[key][word]]
                write(said[row], (first, last), value + world.stop)
        return said

    def sample(self, examples: Examples, generator: Generator) -> Bool[Tensor, "b t"]:
        """Whole updates, drawn evenly from all, as many as a segment's worth of tokens holds."""
        seen = self.last(examples, 0).clone()
        own = seen[0].tolist().index(True) if bool(seen[0].any()) else seen.shape[1]
        for row in range(len(seen)):
            tokens = examples.input_ids[row, :own].tolist()
            found = [(place, place + self._size(key, value)) for place, key, value in self._told(tokens, [True] * own)]
            room = self.segment_length
            for which in torch.randperm(len(found), generator=generator).tolist():
                first, last = found[which]
                room -= last - first
                if room < 0:
                    break
                # with the mark before, which tells where the key begins
                seen[row, first - 1 : last] = True
        return seen

    def _size(self, key: int, value: list[int]) -> int:
        return len(self._world.heads[key]) + len(value) + 1

    def majority(self, examples: Examples, rows: int = 500) -> float:
        """Score of always giving the value that is most frequent in training for the key that is asked."""
        train = self.examples(rows, "train", 0)
        counted: dict[int, Counter[tuple[int, ...]]] = {}
        for _, _, key, value in self._answers(train):
            counted.setdefault(key, Counter())[value] += 1
        predicted = torch.zeros_like(examples.labels)
        for row, first, key, value in self._answers(examples):
            most = counted[key].most_common(1)[0][0] if key in counted else ()
            most = most[: len(value)]
            predicted[row, first : first + len(most)] = torch.tensor(most, dtype=torch.long)
        return self.score(predicted, examples)

    def _answers(self, examples: Examples) -> Iterator[tuple[int, int, int, tuple[int, ...]]]:
        """Row, place, key and tokens of every answer."""
        labels = examples.labels.tolist()
        for row, (key, asked) in enumerate(zip(examples.extra["key"].tolist(), examples.asked.tolist(), strict=True)):
            for each, (first, last) in zip(key, runs(asked), strict=True):
                yield row, first, each, tuple(labels[row][first:last])

    def more_floors(self, examples: Examples, luck: Generator) -> dict[str, float]:
        """Memories of all values without their order, in closed form: any value of the key, or of all keys."""
        return {"a value of the key": 1 / self.updates, "a told value": 1 / (self.updates * self.n_keys)}

    def unbound(self, most: int = 0) -> dict[str, float]:
        """Here a value tells whose it is, and what has to be bound is when it was told: any value of the key."""
        return {UNBOUND: 1 / self.updates} if self.updates > 1 else {}

    # --- what was said instead ---------------------------------------------------------------------------------------

    def intrusions(self, predicted: Int[Tensor, "b t"], examples: Examples) -> Int[Tensor, "b n"]:
        """How many updates of its key ago each answer was right: 0 the current value, 1 the one before, -1 another
        key's value, -2 never told.

        A value of several tokens is known by the right tokens up to the first mistake and the token predicted there,
        which is how far a model's own writing would have come; the newest value that begins so counts.
        """
        world, rows = self._world, []
        streams = (examples.extra["key"], examples.input_ids, predicted, examples.asked)
        for keys, tokens, said, asked in zip(*(each.tolist() for each in streams), strict=True):
            places = runs(asked)
            told: dict[int, list[list[int]]] = {}
            for _, key, value in self._told(tokens[: places[0][0]], [True] * places[0][0]):
                told.setdefault(key, []).append(value + world.stop)
            ages = []
            for key, (first, last) in zip(keys, places, strict=True):
                wrong = next((place for place in range(first, last) if said[place] != tokens[place]), None)
                if wrong is None:
                    ages.append(0)
                    continue
                began = [*tokens[first:wrong], said[wrong]]
                earlier = told[key][-2::-1]
                age = next((age for age, value in enumerate(earlier, 1) if value[: len(began)] == began), None)
                other = any(value[: len(began)] == began for each in told if each != key for value in told[each])
                ages.append(age if age is not None else -1 if other else -2)
            rows.append(ages)
        return torch.tensor(rows)

    def measures(self, predicted: Int[Tensor, "b t"], examples: Examples) -> dict[str, float]:
        """Shares of answers that are the "last" value of the key, an "earlier" one, or "never" told of it, with "other
        key" the part of those that belongs to another. Of the earlier ones, where there are any: their mean age in
        updates, mean age as a share of the oldest, the share of age 1, and of the first value.
        """
        ages = self.intrusions(predicted, examples).flatten()
        shares = {"last": ages == 0, "earlier": ages > 0, "never": ages < 0, "other key": ages == -1}
        found = {name: share.double().mean().item() for name, share in shares.items()}
        old = ages[ages > 0].double()
        if len(old):
            oldest = self.updates - 1
            found |= {
                "mean age": old.mean().item(),
                "mean relative age": (old / oldest).mean().item(),
                "age 1": (old == 1).double().mean().item(),
                "first value": (old == oldest).double().mean().item(),
            }
        return found


def _luck(generator: Generator, *shape: int) -> Int[Tensor, "*b n"]:
    """A random order of the last dimension."""
    # float64 and a stable sort: the order is the same on every machine
    return torch.rand(*shape, generator=generator, dtype=torch.float64).argsort(dim=-1, stable=True)
