"""Needles in a haystack (RULER, https://arxiv.org/abs/2404.06654, section 3).

Several lines tell a number or a word for a key such as "quiet-harbor" each; the question names one key or more, so the
others are distractors. The haystack is repeated noise, other needles, or given text.

Rules. Every line stands between two sentences of the haystack. Where, is uniform over all gaps, or nearest to a fixed
`depth` in per cent, for a map of lengths and depths (`haystack.grid`). Keys differ within a stream, and so do the
values of one key. Nothing else in a stream has a key's form, so nothing unlabelled can be taken for a needle. Several
values of a key are asked in the order they were told, and each counts: the score is the share of values that are right,
as in RULER, where their order does not matter.

The layout is ours: `length` tokens of context, in whole segments, then one segment that asks:

    [hay, needle, hay | ... | hay | question, answer, padding]

Words and sentences are our own; only the rules follow the paper. RULER's keys and values that are UUIDs are left out.
For models of a few thousand parameters `haystack="markov"` is the same task in characters: needles `@kk=vvvv;` in
letters from a Markov chain of order 2.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Generator, Tensor
from torch.nn.utils.rnn import pad_sequence

from mnemic.tasks.base import Candidates, Examples, Task, TaskCard, below
from mnemic.tasks.haystack import (
    NOISE,
    Book,
    Characters,
    Drawn,
    Markov,
    check_context,
    check_question,
    drawn_number,
    gap,
    shortest,
    spelled,
    trimmed,
    woven,
)
from mnemic.tasks.passkey import INSTRUCTION
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
    word_list,
    write,
)

ADJECTIVES = word_list("""
    amber ancient balmy bitter bold brave brisk broad bronze calm clever cosy crimson crisp curly dainty daring
    deep dusty eager early fancy fierce frosty gentle giddy glossy golden grand hasty hazel hollow honest humble
    icy idle ivory jolly keen lively lofty lonely loyal lunar mellow mighty misty modest muddy narrow nimble
    noble opal pale patient placid plain polished proud quaint quick quiet rapid rare restless robust rosy royal
    rugged rusty sandy scarlet shady sharp shiny silent silver sleepy solar sober spicy stark steady stormy
    subtle sunny swift tame tender tidy vast vivid""")
NOUNS = word_list("""
    anchor acorn anvil arch badger barrel beacon bell birch bishop boulder bridge brook candle canyon castle
    cedar cliff clover comet compass coral cottage crane crater creek crown dagger desert dolphin eagle ember
    engine falcon feather fern fiddle fjord flute forest fossil fountain glacier goblet gondola granite grove
    hammer harbor hawk heron island jaguar jewel juniper kettle kite lagoon lantern lark ledger lemon lily lynx
    magnet maple meadow meteor mirror mule nectar oasis orchard otter owl palace parrot pebble pepper pine
    planet pony prairie quarry raven reef ribbon rocket saddle sparrow spruce""")
"""A key is one of each, such as "quiet-harbor"."""

VALUES = word_list("""
    algebra almond apron ballad banjo basket biscuit blanket bonnet bottle button cabinet carpet cello cereal
    chapel chess circus cocoa collar copper cotton cushion custard daisy diary dinner drama easel envelope essay
    fable fabric faucet feast fennel flannel gadget garlic ginger glove gravy guitar hazelnut helmet hockey hymn
    igloo jacket jelly jigsaw kimono kiosk ladle laundry leather lettuce linen locket lyric mango marble
    meringue mitten mosaic muffin mustard napkin needle noodle novel nutmeg oboe olive onion opera orchid
    pancake paper parcel parsley pastry pencil pillow pocket poem pottery pudding puzzle quilt radish raisin
    recipe rhubarb riddle rug salad sandal satchel sauce scarf sherbet shovel slipper soap sonnet spoon stamp
    stocking sugar syrup tailor teapot thimble toffee trumpet tulip turnip umbrella vanilla velvet vinegar
    violin waffle walnut waltz whistle zipper""")
"""What is told of a key with `values="word"`."""

DIGITS = 7
"""Of what is told with `values="number"`."""

NEEDLE = "A special {kind} for {key} is {value}."
MARKOV_NEEDLE = re.compile(r"@(\w\w)=(\d{4});")
MARKOV_QUESTION = re.compile(r"@(\w\w)=\Z")
TOLD = re.compile(r"a special (?:number|word) for (\w+) ?- ?(\w+) is (\d(?: ?\d)*|\w+)(?= ?\.)")
ASKED = re.compile(r"special (?:number|word)s? for (\w+) ?- ?(\w+) (?:was|were) told")
HAYSTACKS = ("noise", "needles", "essay", "markov")


@dataclass(frozen=True)
class NeedleTask(Task):
    """Needles in a haystack: `keys` keys with `per_key` values each are told in `length` tokens, `queries` are asked.

    `keys` above `queries` are distractors. `values` is "number" (7 digits) or "word" (one of 128).
    `haystack` is "noise" (the sentences of `PasskeyTask`), "needles" (everything else is needles of further keys),
    "essay" (texts from `data`, as in `documents.novels`: each split has its own), or "markov": letters of a Markov
    chain with needles `@kk=vvvv;` of two letters and four digits, in characters. `depth` in per cent is where the
    needles that are asked stand; None draws a place evenly for each. `tokenizer` is "words", where every digit is a
    token, "bytes", or one of Hugging Face; texts from `data` need one of the latter. `extra["depth"]` is where each
    was told, rounded.

    Raises:
        ValueError: settings outside their range, or lines that do not fit.
    """

    length: int = 512
    segment_length: int = 128
    keys: int = 4
    per_key: int = 1
    queries: int = 1
    values: str = "number"
    haystack: str = "noise"
    depth: float | None = None
    tokenizer: Any = "words"
    data: str | None = None

    name = "needle"
    axis = "length"
    card = TaskCard(
        title="Needles in a haystack",
        asks="Keep what was told of many keys in a long text, and say it of the key that is named.",
        paper="RULER, https://arxiv.org/abs/2404.06654",
    )

    def __post_init__(self) -> None:
        choices = {"values": ("number", "word"), "haystack": HAYSTACKS}
        for setting, allowed in choices.items():
            if getattr(self, setting) not in allowed:
                raise ValueError(f"{setting} is {getattr(self, setting)!r}; use one of {', '.join(allowed)}")
        if not 1 <= self.queries <= self.keys <= self._possible or self.per_key < 1:
            raise ValueError(
                f"keys is {self.keys}, queries {self.queries} and per_key {self.per_key}; use 1 <= queries <= keys "
                f"<= {self._possible} and 1 or more values for each"
            )
        if self.values == "word" and self.haystack != "markov" and self.per_key > len(VALUES):
            raise ValueError(f"per_key is {self.per_key}; there are {len(VALUES)} words")
        if (self.data is None) == (self.haystack == "essay"):
            raise ValueError(f'haystack is {self.haystack!r} and data is {self.data!r}; "essay" needs texts, only it')
        if self.haystack == "essay" and self.tokenizer == "words":
            raise ValueError('tokenizer is "words", which has no words of other texts; use "bytes" or Hugging Face')
        if self.haystack == "markov" and (self.tokenizer != "words" or self.values != "number"):
            raise ValueError('haystack "markov" has its own characters and values; leave tokenizer and values alone')
        needle, value = self._needle(*self._sample)
        needles = self.keys * self.per_key
        check_context(self, needles * len(needle) + 1)
        question = self._question(self._sample[0])
        each = len(question) + self.per_key * len(value) + (self.per_key - 1) * len(self._comma)
        check_question(self, self.queries * each)
        if self.haystack == "needles" and self.length // len(needle) + 2 + self.keys > self._possible:
            limit = (self._possible - self.keys - 2) * len(needle) // self.segment_length * self.segment_length
            raise ValueError(f"length is {self.length}; there are keys for {limit} tokens of needles")

    @cached_property
    def _encoder(self) -> Encoder:
        if self.haystack == "markov":
            return Characters()
        words = [*NOISE, *ADJECTIVES, *NOUNS, *VALUES, *"0123456789", NEEDLE.format(kind="word", key="-", value="")]
        asks = [self._asking(count, kind, "") for kind in ("number", "word") for count in (1, 2)]
        return encoder(self.tokenizer, [*words, *asks])

    @cached_property
    def _hay(self) -> Drawn | Book | Markov:
        if isinstance(self._encoder, Characters):
            return Markov(" ".join([*NOISE, INSTRUCTION, *ADJECTIVES, *NOUNS, *VALUES]), self._encoder)
        if self.data is not None:
            return Book(self.data, self._encoder, barred=_names_a_key)
        return Drawn([self._encoder.encode(each) for each in NOISE], cycle=True)

    @property
    def _possible(self) -> int:
        return 26**2 if self.haystack == "markov" else len(ADJECTIVES) * len(NOUNS)

    @property
    def _sample(self) -> tuple[str, str]:
        if self.haystack == "markov":
            return "aa", "0000"
        longest = max(ADJECTIVES, key=len) + "-" + max(NOUNS, key=len)
        return longest, "1234567" if self.values == "number" else max(VALUES, key=len)

    @property
    def vocabulary(self) -> int:
        """Token ids are 0 .. vocabulary - 1."""
        return self._encoder.vocabulary

    @property
    def uniform(self) -> float:
        """One of the possible values."""
        if self.haystack == "markov":
            return 1e-4
        return 1 / 9_000_000 if self.values == "number" else 1 / len(VALUES)

    @property
    def unit(self) -> int:
        """Tokens of a needle."""
        return min(len(self._needle(*self._sample)[0]), self.segment_length)

    def _key(self, number: int) -> str:
        if self.haystack == "markov":
            return Characters.letters[number // 26] + Characters.letters[number % 26]
        return f"{ADJECTIVES[number // len(NOUNS)]}-{NOUNS[number % len(NOUNS)]}"

    def _value(self, generator: Generator) -> str:
        if self.haystack == "markov":
            return f"{below(10**4, generator):04}"
        if self.values == "word":
            return VALUES[below(len(VALUES), generator)]
        return drawn_number(DIGITS, generator)

    def _needle(self, key: str, value: str) -> tuple[list[int], list[int]]:
        """A needle, and its value as an answer, as tokens."""
        if self.haystack == "markov":
            return self._encoder.encode(f"@{key}={value};"), self._encoder.encode(value)
        said = spelled(value, self._encoder)
        needle = self._encoder.encode(NEEDLE.format(kind=self.values, key=key, value=said))
        return needle, continued(self._encoder, "and", said)

    @staticmethod
    def _asking(count: int, kind: str, key: str) -> str:
        return (
            f"Which special {kind} for {key} was told? Answer:"
            if count == 1
            else f"Which special {kind}s for {key} were told? Answers:"
        )

    def _question(self, key: str) -> list[int]:
        text = f"@{key}=" if self.haystack == "markov" else self._asking(self.per_key, self.values, key)
        return self._encoder.encode(text)

    @cached_property
    def _comma(self) -> list[int]:
        return self._encoder.encode(";" if self.haystack == "markov" else "and")

    def draw(self, rows: int, generator: Generator, split: str = "train") -> Examples:
        """`rows` new streams. Evidence of each value is the needle that tells it."""
        return assemble([self._story(generator, split) for _ in range(rows)], self.segment_length, self._encoder.pad)

    def _story(self, generator: Generator, split: str) -> Story:
        # keys in random order: the first are asked, the next are distractors, the others may be hay
        order: list[int] = []
        while len(order) < self.keys:
            key = below(self._possible, generator)
            order += [] if key in order else [key]
        if self.haystack == "needles":
            drawn = torch.randperm(self._possible, generator=generator).tolist()
            order += [key for key in drawn if key not in order]
        lines: list[tuple[str, list[int], list[int]]] = []
        for key in map(self._key, order[: self.keys]):
            told: list[str] = []
            while len(told) < self.per_key:
                value = self._value(generator)
                told += [value] if value not in told else []
            lines += [(key, *self._needle(key, value)) for value in told]
        room = self.length - sum(len(line) for _, line, _ in lines)
        if room < 0:
            raise ValueError(f"length is {self.length}; the needles alone are {self.length - room} tokens, use more")
        hay, further = self._around(room, order[self.keys :], generator, split)
        count = self.queries * self.per_key
        drawn = torch.randint(len(hay) + 1, (len(lines),), generator=generator).tolist()
        gaps = [gap(self, hay, generator) if place < count else drawn[place] for place in range(len(lines))]
        context, begins = woven(hay, [line for _, line, _ in lines], gaps)
        before = list(itertools.accumulate((len(each) for each in hay), initial=0))
        questions = []
        for query in range(self.queries):
            own = sorted(range(query * self.per_key, (query + 1) * self.per_key), key=lambda line: begins[line])
            for which, line in enumerate(own):
                text = self._question(lines[line][0]) if which == 0 else self._comma
                extra = {"depth": round(100 * before[gaps[line]] / max(room, 1))}
                questions.append(Question(text, lines[line][2], [begins[line]], extra))
        return Story(context, questions, facts=len(lines) + further)

    def _around(self, room: int, keys: list[int], generator: Generator, split: str) -> tuple[list[list[int]], int]:
        """What the needles lie in, and how many further ones it has."""
        if self.haystack != "needles":
            return trimmed(self._hay.take(room, generator, split), room), 0
        hay, total = [], 0
        for key in keys:
            if total >= room:
                break
            hay.append(self._needle(self._key(key), self._value(generator))[0])
            total += len(hay[-1])
        return trimmed(hay, room), len(hay) - (total > room)

    def _read(self, text: str) -> dict[str, list[str]]:
        """What a text tells of each key, in order."""
        told: dict[str, list[str]] = {}
        if self.haystack == "markov":
            for key, value in MARKOV_NEEDLE.findall(text):
                told.setdefault(key, []).append(value)
        else:
            for first, second, value in TOLD.findall(text):
                told.setdefault(f"{first}-{second}", []).append(value.replace(" ", ""))
        return told

    def _named(self, text: str) -> str:
        """The key that the last question in a text names; nothing where there is none."""
        if self.haystack == "markov":
            found = MARKOV_QUESTION.findall(text)
            return found[-1] if found else ""
        found = ASKED.findall(text)
        return "-".join(found[-1]) if found else ""

    def guess(
        self, ids: Int[Tensor, "b t"], asked: Bool[Tensor, "b t"], seen: Bool[Tensor, "b t"], generator: Generator
    ) -> Int[Tensor, "b t"]:
        """Reads all needles that are seen whole; a value that none of them tells is drawn anew.

        Where a key has more values than are seen, those seen are the last ones if nothing behind the first seen token
        is unseen, as in a window, and otherwise any that follow each other.
        """
        said = torch.zeros_like(ids)
        for row in range(len(ids)):
            tokens, known = ids[row].tolist(), seen[row].tolist()
            told, given, key = self._read(readable(self._encoder, tokens, known)), 0, ""
            behind = (seen[row] | asked[row])[known.index(True) if True in known else 0 :]
            skip: dict[str, int] = {}
            for name, values in told.items():
                missing = max(self.per_key - len(values), 0)
                drawn = below(missing + 1, generator) if missing else 0
                skip[name] = missing if bool(behind.all()) else drawn
            for begin, end in runs(asked[row].tolist()):
                first = begin - begin % self.segment_length
                named = self._named(readable(self._encoder, tokens[first:begin], known[first:begin]))
                given, key = (given + 1, key) if named in ("", key) else (0, named)
                values = told.get(key, [])
                which = given - skip.get(key, 0)
                value = values[which] if 0 <= which < len(values) else self._value(generator)
                write(said[row], (begin, end), self._needle("", value)[1])
        return said

    def candidates(self, examples: Examples) -> Candidates | None:
        """The values of all keys but those that earlier questions of the stream have shown."""
        if self.keys * self.per_key == 1 and self.haystack != "needles":
            return None
        pattern, values, asked = MARKOV_NEEDLE if self.haystack == "markov" else TOLD, [], []
        for row, wanted in zip(examples.input_ids.tolist(), examples.asked.tolist(), strict=True):
            context = row[: -self.segment_length]
            read = pattern.findall(readable(self._encoder, context, [True] * len(context)))
            told = [found[-1].replace(" ", "") for found in read][::-1]
            known = {value: number for number, value in enumerate(dict.fromkeys(told))}
            left = torch.tensor([known[value] for value in told])
            for begin, end in runs(wanted):
                value = decoded(self._encoder, row[begin:end]).lower().replace(" ", "")
                # values of several keys may be equal: the newest of those left stands for all
                values.append(left.clone())
                asked.append(int((left == known[value]).long().argmax()))
                left[asked[-1]] = -1
        return Candidates(pad_sequence(values, batch_first=True, padding_value=-1), torch.tensor(asked))

    def measures(self, predicted: Int[Tensor, "b t"], examples: Examples) -> dict[str, float]:
        """Share of answers that are the value of another key ("another needle"), and of streams with all values right
        ("all values")."""
        others, total, whole = 0, 0, 0
        right = self.right(predicted, examples).tolist()
        for row in range(len(predicted)):
            places = runs(examples.asked[row].tolist())
            mine, right = right[: len(places)], right[len(places) :]
            whole += all(mine)
            ids = examples.input_ids[row].tolist()
            every = [
                value
                for values in self._read(readable(self._encoder, ids, [True] * len(ids))).values()
                for value in values
            ]
            for place, good in zip(places, mine, strict=True):
                written = decoded(self._encoder, predicted[row, place[0] : place[1]].tolist()).lower().replace(" ", "")
                total, others = total + 1, others + (not good and written in every)
        return {"another needle": others / max(total, 1), "all values": whole / max(len(predicted), 1)}

    def majority(self, examples: Examples, rows: int = 500) -> float:
        """As for every task, but counted over short streams: answers do not depend on the length."""
        return Task.majority(shortest(self), examples, rows)

    def text(self, ids: Sequence[int]) -> list[str]:
        """Tokens as a person reads them."""
        return self._encoder.pieces(ids)


_ADJECTIVES, _NOUNS = frozenset(ADJECTIVES), frozenset(NOUNS)


def _names_a_key(sentence: str) -> bool:
    """Whether words of a key follow each other in a sentence."""
    words = re.findall(r"\w+", sentence.lower())
    return any(first in _ADJECTIVES and second in _NOUNS for first, second in itertools.pairwise(words))
