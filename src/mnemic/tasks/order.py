"""Which of two fragments came first (Sequence Order Recall Tasks, Book-SORT, https://arxiv.org/abs/2410.08133).

A model reads an excerpt of a book, then it is shown two fragments of it and says which of them came first. Nothing has
to be looked up or understood: what is asked for is when a thing was read, which is what episodic memory keeps. Chance
is one half, for a reader who never saw the text as well.

The rules: an excerpt is made of whole sentences. A fragment is `fragment` words that follow each other. How far apart
the beginnings of the two are is drawn from one of four bins; for an excerpt of n words and fragments of f their edges
are f, n/4, n/3, n/2, n/1.25, or f, 1000, n/4, n/2, n/1.25 for long excerpts. The first fragment lies evenly at all
places that this distance leaves. The right answer is A as often as B, exactly: in every batch, and in every bin.

What is ours: an excerpt fills whole segments (its last segment runs on into the next sentence, of which nothing is
asked), so its number of words varies a little and is in `extra`. A fragment that stands in the excerpt twice is drawn
again. A stream asks one question:

    [excerpt | ... | excerpt | which came first? A: fragment B: fragment answer: A or B, padding]

Without `data` the text is of an own world of sentences, new for every stream and without a plot, so that nothing but
having read it tells the order. With `data` it is that of the books there; training, validation and test have books of
their own.
"""

from __future__ import annotations

import re
import sys
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Generator, Tensor

from mnemic.tasks.base import Examples, Task, TaskCard, below
from mnemic.tasks.base import generator as source
from mnemic.tasks.documents import novels
from mnemic.tasks.text import UNSEEN, Encoder, Question, Story, assemble, behind, encoder, string, write

EXCERPTS = (250, 1000, 2500, 10000, 20000)
"""Words of an excerpt in Book-SORT."""

FRAGMENTS = (20, 50)
"""Words of a fragment in Book-SORT."""

LONG = 5000
"""From so many words on the bins are those of long excerpts; Book-SORT has none between 2,500 and 10,000."""

BINS = 4

# --- the own world ---------------------------------------------------------------------------------------------------

SLOTS = {
    "quality": "old young tall quiet clever tired proud gentle hungry brave lazy merry pale stern shy bold",
    "who": "sailor baker farmer singer doctor widow painter miller hunter teacher soldier weaver gardener fisher clerk "
    "smith tailor shepherd nurse porter monk piper mason judge",
    "did": "found lost sold painted carried hid broke mended stole washed buried drew opened copied burned weighed",
    "colour": "red blue green white black yellow brown grey golden silver purple orange",
    "thing": "lamp boat clock letter barrel mirror ladder basket violin blanket kettle saddle candle hammer bottle "
    "carpet anchor bucket wagon statue drum key map bell",
    "place": "harbour market chapel cellar garden bridge tower stable forest kitchen library orchard mill valley "
    "station tavern meadow castle quarry island",
    "time": "dawn noon dusk midnight sunrise sunset",
}

WORDS = {slot: each.split() for slot, each in {**SLOTS, "who2": SLOTS["who"]}.items()}

TEMPLATES = (
    "The {quality} {who} {did} the {colour} {thing} near the {place}.",
    "At {time} the {who} {did} one {colour} {thing} in the {place}.",
    "In the {place} the {quality} {who} {did} every {colour} {thing}.",
    "Near the {place} one {who} {did} the {quality} {who2} and the {thing}.",
)


def story(sentences: int, generator: Generator) -> str:
    """Sentences without a plot: a template and its words are drawn evenly for each."""
    kinds = torch.randint(len(TEMPLATES), (sentences,), generator=generator).tolist()
    drawn = {slot: torch.randint(len(each), (sentences,), generator=generator).tolist() for slot, each in WORDS.items()}
    return " ".join(
        TEMPLATES[kind].format(**{slot: WORDS[slot][places[number]] for slot, places in drawn.items()})
        for number, kind in enumerate(kinds)
    )


# --- books -----------------------------------------------------------------------------------------------------------

LICENCE = re.compile(r"\*\*\* ?(START|END) OF TH(?:E|IS) PROJECT GUTENBERG[^\n]*")

END = re.compile(r"[.!?]['\"\u2019\u201d)\]_]*$")
BEGIN = re.compile(r"^['\"\u2018\u201c(\[_]*[A-Z]")
SHORT = re.compile(r"^['\"\u2018\u201c(\[_]*(?:[A-Z]|Mr|Mrs|Ms|Dr|St|Rev|Hon|Capt|Col|Gen|Lt|Prof|Sr|Jr|Messrs|Mme)\.$")


@dataclass(frozen=True)
class Text:
    """A text in tokens: `ids`, where each word begins in them, and which words begin a sentence; both with the end."""

    ids: Sequence[int]
    words: Sequence[int]
    sentences: Sequence[int]


def sentences(words: Sequence[str]) -> list[int]:
    """Which words begin a sentence, and the number of words where the last one ends. A text is taken to begin with one.

    A sentence ends with a full stop, a question or an exclamation mark, with what closes quotation, if the next word
    is capital; not with a title or an initial.
    """
    ends = [
        place
        for place in range(1, len(words))
        # most words are ruled out by their last letter, which is quicker
        if not words[place - 1][-1].isalnum()
        and END.search(words[place - 1])
        and BEGIN.match(words[place])
        and not SHORT.match(words[place - 1])
    ]
    return [0, *ends, len(words)] if words else [0]


def body(book: str) -> str:
    """A book without what Project Gutenberg puts before and behind it."""
    begin, end = 0, len(book)
    for found in LICENCE.finditer(book):
        if found[1] == "START":
            begin = found.end()
        else:
            end = found.start()
            break
    return book[begin:end]


@lru_cache(maxsize=1)
def library(path: str) -> list[tuple[str, list[str]]]:
    """Names and words of the texts at a path, in an order that is the same for all settings of a task.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: there are fewer than three texts.
    """
    books = [(name, [sys.intern(word) for word in body(book).split()]) for name, book in novels(path)]
    if len(books) < 3:
        raise ValueError(f"{path} has {len(books)} texts; training, validation and test need one each")
    return [books[place] for place in torch.randperm(len(books), generator=source(0)).tolist()]


def edges(words: int, fragment: int) -> list[int]:
    """The five edges of the four bins of distances, in words: a distance d of bin i has edges[i] < d <= edges[i + 1];
    bin 0 has its lower edge as well.
    """
    if words >= LONG and fragment < 1000:
        return [fragment, 1000, words // 4, words // 2, words * 4 // 5]
    return [fragment, words // 4, words // 3, words // 2, words * 4 // 5]


@dataclass(frozen=True)
class OrderTask(Task):
    """Excerpts of `segments` segments, fragments of `fragment` words, and the question which came `ask`, "first" or
    "last".

    `data` is a folder or a tar archive of UTF-8 texts `*.txt`, a book each, at least three: a tenth of them, but one
    at least, is kept for validation, another for test. `tokenizer` is "words" for the own world, "bytes" or one of
    Hugging Face for both. `OrderTask.published` has the paper's sizes.

    Raises:
        FileNotFoundError: there is nothing at `data`.
        ValueError: sizes out of range, a question that does not fit a segment, an excerpt that is too short for its
            fragments, or books that are too few or too short.
    """

    segments: int = 8
    segment_length: int = 48
    fragment: int = 8
    ask: str = "first"
    tokenizer: Any = "words"
    data: str | None = None

    name = "order"
    axis = "segments"
    card = TaskCard(
        title="Order recall",
        asks="After a text has been read, say which of two fragments of it came first.",
        paper="Assessing Episodic Memory in LLMs with Sequence Order Recall Tasks, https://arxiv.org/abs/2410.08133",
    )

    def __post_init__(self) -> None:
        if self.segments < 1 or self.fragment < 1:
            raise ValueError(f"segments is {self.segments}, fragment {self.fragment}; use 1 or more")
        if self.ask not in ("first", "last"):
            raise ValueError(f'ask is {self.ask!r}; use "first" or "last"')
        if self.data is not None and self.tokenizer == "words":
            raise ValueError('tokenizer "words" knows the own world only; use "bytes" or a Hugging Face tokenizer')
        question = sum(map(len, self._marks)) + max(map(len, self._labels))
        needed = question + round(2 * self.fragment * self.rate)
        if self.segment_length < needed:
            raise ValueError(
                f"segment_length is {self.segment_length}; two fragments of {self.fragment} words and their question "
                f"take some {needed} tokens, use more, or shorter fragments"
            )
        words, least = int(self.segments * self.segment_length / self.rate), max(5 * self.fragment, 16)
        # the last sentence may not fit
        if words - LONGEST < least:
            raise ValueError(
                f"{self.segments} segments of {self.segment_length} tokens are some {words} words; two fragments of "
                f"{self.fragment} words at all distances need {least + LONGEST}, use more segments"
            )

    @classmethod
    def published(
        cls,
        data: str,
        excerpt: int = 1000,
        fragment: int = 20,
        segment_length: int = 512,
        tokenizer: Any = "bytes",
        ask: str = "first",
    ) -> OrderTask:
        """With sizes in words as in Book-SORT: an excerpt of `EXCERPTS` and fragments of `FRAGMENTS`.

        The excerpt has about so many words: as many whole segments as come nearest to what they take on average.
        """
        some = cls(10**6, segment_length, 1, ask, tokenizer, data)
        segments = max(1, round(excerpt * some.rate / segment_length))
        return cls(segments, segment_length, fragment, ask, tokenizer, data)

    @cached_property
    def encoder(self) -> Encoder:
        """Words, bytes or a pretrained tokenizer."""
        own = [*TEMPLATES, *SLOTS.values(), *MARKS["first"], *MARKS["last"], *LABELS]
        return encoder(self.tokenizer, [re.sub(r"\{\w+\}", "", text) for text in own])

    @property
    def vocabulary(self) -> int:
        """Tokens of the tokenizer."""
        return self.encoder.vocabulary

    @property
    def uniform(self) -> float:
        """A or B."""
        return 0.5

    @property
    def unit(self) -> int:
        """A segment: single tokens of a fragment that is drawn from a text tell nothing."""
        return self.segment_length

    @property
    def capacity(self) -> int:
        """Tokens of an excerpt."""
        return self.segments * self.segment_length

    def text(self, ids: Sequence[int]) -> list[str]:
        """Words or pieces of words."""
        return self.encoder.pieces(ids)

    # --- texts -------------------------------------------------------------------------------------------------------

    @cached_property
    def rate(self) -> float:
        """Tokens a word takes, about: over some text of the own world, or of five of the books."""
        if self.data is None:
            texts = [story(200, source(0)).split()]
        else:
            books = library(self.data)
            texts = [words[len(words) // 2 :][:1000] for _, words in books[:: max(1, len(books) // 5)]]
        count = sum(map(len, texts))
        return sum(len(self._word(word)) for words in texts for word in words) / max(count, 1)

    def books(self, split: str) -> list[str]:
        """Names of the books of a split."""
        return [name for name, _ in self._share(split)]

    def _share(self, split: str) -> list[tuple[str, list[str]]]:
        # the division depends on no setting: a book that one length is trained on is not in another's test
        books = [] if self.data is None else library(self.data)
        kept = max(1, round(len(books) / 10))
        parts = {"train": books[: -2 * kept], "validation": books[-2 * kept : -kept], "test": books[-kept:]}
        return parts[split]

    def _shelf(self, split: str) -> list[Text]:
        """The books of a split in tokens, as far as they are long enough."""
        if split not in self._shelves:
            texts = [self._read(words) for _, words in self._share(split)]
            self._shelves[split] = [text for text in texts if len(text.ids) >= self.capacity]
            if not self._shelves[split]:
                raise ValueError(
                    f"no {split} book has {self.capacity} tokens (the longest has "
                    f"{max(len(text.ids) for text in texts)}); use fewer segments or longer books"
                )
        return self._shelves[split]

    @cached_property
    def _shelves(self) -> dict[str, list[Text]]:
        return {}

    @cached_property
    def _known(self) -> dict[str, list[int]]:
        return {}

    def _word(self, word: str) -> list[int]:
        """Tokens of a word with its marks behind another. Word by word, a fragment has the same tokens in the text and
        alone.
        """
        if word not in self._known:
            self._known[word] = behind(self.encoder, "the", word) or self.encoder.encode(word)
        return self._known[word]

    def _read(self, words: Sequence[str]) -> Text:
        # arrays, because a shelf of novels has millions of words
        ids, starts = array("i"), array("i", [0])
        for word in words:
            ids.extend(self._word(word))
            starts.append(len(ids))
        return Text(ids, starts, sentences(words))

    def _excerpt(self, shelf: list[Text] | None, generator: Generator) -> Text:
        """Whole sentences from a random one on, as many as fit; `ids` run on to the end of the last segment."""
        if shelf is None:
            words: list[str] = []
            text, first = self._read(words), 0
            while len(text.ids) < self.capacity:
                words += story(int(self.capacity / self.rate / SHORTEST) + 1, generator).split()
                text = self._read(words)
        else:
            text = shelf[below(len(shelf), generator)]
            room = bisect_right(text.words, len(text.ids) - self.capacity)
            first = below(max(1, bisect_right(text.sentences, room - 1)), generator)
        begin = text.sentences[first]
        start = text.words[begin]
        end = bisect_right(text.words, start + self.capacity) - 1
        last = bisect_right(text.sentences, end)
        places = text.words[begin : text.sentences[last - 1] + 1]
        return Text(
            list(text.ids[start : start + self.capacity]),
            [place - start for place in places],
            [place - begin for place in text.sentences[first:last]],
        )

    # --- questions ---------------------------------------------------------------------------------------------------

    def draw(self, rows: int, generator: Generator, split: str = "train") -> Examples:
        """`rows` excerpts with a question each. A and B are right equally often, and so in each bin of distances, as
        far as their number can be divided.
        """
        shelf = None if self.data is None else self._shelf(split)
        # sides and bins in turn from a random one on, in random order: even in every batch, fair for a single row
        begin = below(2 * BINS, generator)
        kinds = [(begin + place) % (2 * BINS) for place in torch.randperm(rows, generator=generator).tolist()]
        stories = [self._story(shelf, kind % 2, kind // 2, generator) for kind in kinds]
        return assemble(stories, self.segment_length, self.encoder.pad)

    def _story(self, shelf: list[Text] | None, side: int, which: int, generator: Generator) -> Story:
        for _ in range(TRIES):
            text = self._excerpt(shelf, generator)
            words = len(text.words) - 1
            if words < max(5 * self.fragment, 16):
                continue
            edge = edges(words, self.fragment)
            lowest = edge[which] + (which > 0)
            distance = lowest + below(edge[which + 1] - lowest + 1, generator)
            first = below(words - self.fragment - distance + 1, generator)
            begins = first, first + distance
            early, late = (list(text.ids[text.words[at] : text.words[at + self.fragment]]) for at in begins)
            whole = string(text.ids)
            if any(_twice(whole, string(each)) for each in (early, late)):
                continue
            # side 0: A is right
            shown = (early, late) if (side == 0) == (self.ask == "first") else (late, early)
            question = self._question(*shown)
            answer = self._labels[side]
            if len(question) + len(answer) > self.segment_length or self._parse(string(question)) != shown:
                continue
            extra = {"distance": distance, "bin": which, "words": words, "first word": first}
            evidence = [text.words[place] for place in begins]
            return Story(list(text.ids), [Question(question, answer, evidence, extra)], len(text.sentences) - 1)
        raise ValueError(
            f"in {TRIES} excerpts no two fragments of {self.fragment} words stood once and fitted a segment of "
            f"{self.segment_length}; use a longer segment_length, or a longer fragment"
        )

    @cached_property
    def _marks(self) -> list[list[int]]:
        return [[token for word in mark.split() for token in self._word(word)] for mark in MARKS[self.ask]]

    @cached_property
    def _labels(self) -> list[list[int]]:
        return [self._word(label) for label in LABELS]

    def _question(self, one: list[int], other: list[int]) -> list[int]:
        head, middle, end = self._marks
        return [*head, *one, *middle, *other, *end]

    def _parse(self, question: str) -> tuple[list[int], list[int]] | None:
        """The two fragments that a question, as a string of tokens, shows."""
        head, middle, end = map(string, self._marks)
        cut = question.find(middle, len(head))
        if cut < 0 or not (question.startswith(head) and question.endswith(end)):
            return None
        return [ord(c) for c in question[len(head) : cut]], [
            ord(c) for c in question[cut + len(middle) : len(question) - len(end)]
        ]

    # --- the solver --------------------------------------------------------------------------------------------------

    def guess(
        self,
        ids: Int[Tensor, "b t"],
        asked: Bool[Tensor, "b t"],
        seen: Bool[Tensor, "b t"],
        generator: Generator,
    ) -> Int[Tensor, "b t"]:
        """Finds the fragments in what is seen of the excerpt. Where one is not there, it came before or behind what
        was seen, whichever is longer; where neither is, the answer is a coin's.
        """
        predicted = torch.zeros_like(ids)
        for row, (tokens, places, visible) in enumerate(zip(ids, asked, seen, strict=True)):
            text = string(torch.where(visible, tokens, ord(UNSEEN)).tolist())
            end = int(places.long().argmax())
            begin = end // self.segment_length * self.segment_length
            luck = below(2, generator)
            shown = self._parse(text[begin:end])
            earlier = None if shown is None else self._earlier(text[:begin], *map(string, shown))
            side = luck if earlier is None else int(earlier != (self.ask == "first"))
            write(predicted[row], (end, end + int(places.sum())), self._labels[side])
        return predicted

    def _earlier(self, text: str, one: str, other: str) -> bool | None:
        """Whether `one` came before `other`; None where what is seen does not tell."""
        mine, theirs = _place(text, one), _place(text, other)
        if mine is not None and theirs is not None:
            return mine < theirs
        if mine is None and theirs is None:
            return None
        found = mine if mine is not None else theirs
        assert found is not None
        before, behind = (part.count(UNSEEN) for part in (text[:found], text[found:]))
        if before == behind:
            return None
        return (before < behind) == (mine is not None)

    # --- scoring -----------------------------------------------------------------------------------------------------

    def measures(self, predicted: Int[Tensor, "b t"], examples: Examples) -> dict[str, float]:
        """Accuracy for each bin of distances, as in the paper; bins that do not occur are left out."""
        right, bins = self.right(predicted, examples), examples.extra["bin"][examples.place >= 0]
        return {f"bin {place}": right[bins == place].double().mean().item() for place in bins.unique().tolist()}


LABELS = ("A", "B")

MARKS = {
    "first": ("Which came first? A:", "B:", "Answer:"),
    "last": ("Which came last? A:", "B:", "Answer:"),
}
"""What stands before, between and behind the fragments."""

SHORTEST, LONGEST = 10, 12
"""Words of the sentences of the own world."""

TRIES = 200


def _twice(text: str, part: str) -> bool:
    return text.find(part, text.find(part) + 1) >= 0


def _place(text: str, part: str) -> int | None:
    """Where a fragment is seen: as a whole, else its beginning or end at the edge of what is seen, if a quarter of it
    or more is there. A place may be just outside the text.
    """
    if (at := text.find(part)) >= 0:
        return at
    for size in range(len(part) - 1, max(1, len(part) // 4), -1):
        if (at := text.find(part[:size] + UNSEEN)) >= 0:
            return at
        if (at := text.find(UNSEEN + part[-size:])) >= 0:
            return at
    return None
