"""Classification of documents that are longer than a window.

The task of Memoria (https://arxiv.org/abs/2310.03052, section 4.3), which classifies the news articles of Hyperpartisan
(SemEval-2019 task 4, https://aclanthology.org/S19-2145), as Longformer (https://arxiv.org/abs/2004.05150) did before.
A document is read a segment at a time; then one more segment asks for its class and holds the answer:

    [document | ... | document | question, answer, padding]

Nothing of the document is in the segment that asks. A document of more than `segments` segments is cut at its end, or
at its beginning (`keep="back"`). A shorter one takes fewer segments, and the question comes earlier. No padding stands
between a document and its question: the last segment of a document reaches back to be full, so that some tokens are
read twice, and a document shorter than one segment is repeated until it fills one.

Without `data` documents come from a small world of our own: sentences that are about nothing, and among them, at random
places of the whole document, sentences that each name a thing of one topic. All topics are named, and the class is the
topic that is named most often, by `margin` at least. Counting decides, so there is an oracle, and every segment is
evidence: the last one alone is a floor above chance.

With `data` documents are real: Hyperpartisan, or the movie reviews of Pang and Lee 2004
(https://aclanthology.org/P04-1035). They are divided 80/10/10 by `seed`, so five seeds are five divisions. The floors
are naive Bayes classifiers that are learned on all training documents and are told a part of the document asked about,
or everything: a mechanism that does not beat the last one has not read better than a bag of words.
"""

from __future__ import annotations

import math
import os
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Generator, Tensor

from mnemic.tasks.base import Examples, Task, TaskCard, below, shuffled
from mnemic.tasks.documents import Split, files, hyperpartisan, macro_f1, split
from mnemic.tasks.text import WORD, Encoder, Words, encoder
from mnemic.unrolling import IGNORED

# --- real documents --------------------------------------------------------------------------------------------------

REVIEWS = "the movie reviews (polarity dataset 2.0): a zip, tar archive or folder with pos/*.txt and neg/*.txt"
LARGEST = 16 * 2**20
"""No review has as many bytes: a zip whose files say they have more is refused."""


def reviews(path: str | os.PathLike[str]) -> list[tuple[str, bool]]:
    """Reviews and whether each is positive, sorted by name: files `*.txt` in folders `pos` and `neg`, at any depth.

    `path` is a folder, a tar archive or a zip; archives are not unpacked. Line breaks become spaces.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: it has no reviews of both kinds, or a file beyond all measure.
    """
    found = {}
    for name, data in _archive(path):
        parts = PurePosixPath(name)
        if parts.suffix == ".txt" and parts.parent.name in ("pos", "neg") and not parts.name.startswith("."):
            text = data.decode("utf-8", errors="replace")
            found[name] = (" ".join(text.split()), parts.parent.name == "pos")
    if {label for _, label in found.values()} != {True, False}:
        raise ValueError(f"{path} has no reviews of both kinds; pass {REVIEWS}")
    return [found[name] for name in sorted(found)]


def _archive(path: str | os.PathLike[str]) -> Iterable[tuple[str, bytes]]:
    if not zipfile.is_zipfile(path):
        yield from files(path, REVIEWS)
        return
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if not entry.filename.endswith(".txt"):
                continue
            if entry.file_size > LARGEST:
                raise ValueError(f"{path}: {entry.filename} has {entry.file_size} bytes; at most {LARGEST} are read")
            yield entry.filename, archive.read(entry)


def kind_of(path: str | os.PathLike[str]) -> str:
    """ "hyperpartisan" or "reviews", by the names of the files at `path`.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: it is neither.
    """
    for name, _ in _archive(path):
        if "byarticle" in PurePosixPath(name).name and name.endswith(".xml"):
            return "hyperpartisan"
        if name.endswith(".txt") and PurePosixPath(name).parent.name in ("pos", "neg"):
            return "reviews"
    raise ValueError(f"{path} has neither XML files of Hyperpartisan nor reviews in pos/ and neg/; say which by kind=")


KINDS: dict[str, tuple[Any, str, tuple[str, ...]]] = {
    "hyperpartisan": (hyperpartisan, "is this article hyperpartisan ?", ("no", "yes")),
    "reviews": (reviews, "does the writer find this film good or bad ?", ("bad", "good")),
}
"""For each kind of real data what reads it, the question, and the answer for each class."""


class KnownWords(Words):
    """The words that training documents use most; every other one is one and the same token."""

    def __init__(self, texts: Iterable[str], needed: Sequence[str], most: int = 8192) -> None:
        counts = Counter(word for text in texts for word in WORD.findall(text.lower()))
        # equally frequent words by the alphabet
        kept = sorted(counts, key=lambda word: (-counts[word], word))[:most]
        super().__init__([*kept, *needed])
        self.unknown = self.vocabulary
        self.words, self.vocabulary = [*self.words, "<unk>"], self.vocabulary + 1

    def encode(self, text: str) -> list[int]:
        """One token a word or mark."""
        return [self.ids.get(word, self.unknown) for word in WORD.findall(text.lower())]


class NaiveBayes:
    """Bags of words: how many training documents of a class have a word, of all words of such documents (add-one
    smoothing), and how frequent the class is. A word counts once, however often it comes.
    """

    def __init__(self, texts: Sequence[Sequence[str]], labels: Sequence[int], classes: int) -> None:
        counts: list[Counter[str]] = [Counter() for _ in range(classes)]
        for words, label in zip(texts, labels, strict=True):
            counts[label].update(set(words))
        vocabulary = set().union(*counts)
        self.prior = [math.log((labels.count(c) + 1) / (len(labels) + classes)) for c in range(classes)]
        sums = [count.total() + len(vocabulary) for count in counts]
        self.weight = {
            word: [math.log((count[word] + 1) / total) for count, total in zip(counts, sums, strict=True)]
            for word in vocabulary
        }

    def __call__(self, words: Sequence[str]) -> int:
        """The most probable class. Words that training did not have say nothing."""
        known = [self.weight[word] for word in dict.fromkeys(words) if word in self.weight]
        scores = [math.fsum(each) for each in zip(self.prior, *known, strict=True)]
        return scores.index(max(scores))


# --- a world of topics -----------------------------------------------------------------------------------------------

TOPICS = {
    "music": "violin trumpet melody chorus concert flute guitar opera rhythm piano singer anthem",
    "sailing": "anchor harbour captain rudder mast deck voyage tide lighthouse hull cabin sail",
    "cooking": "pepper oven kettle recipe flour butter stew spoon garlic pastry sauce vinegar",
    "gardens": "tulip hedge rake orchard blossom compost ivy meadow pruning shovel lawn seedling",
    "law": "judge verdict jury lawyer trial statute witness appeal contract prison fine oath",
    "medicine": "nurse fever surgeon bandage pulse vaccine clinic remedy wound doctor pill cough",
}
"""A class and the things that belong to it."""

CUES = (
    ("there was talk of the", "that day ."),
    ("somebody brought up the", "again ."),
    ("she thought of the", "for a while ."),
    ("they argued about the", "until late ."),
)
"""What stands around a thing of a topic, the same for all topics."""

FILLERS = (
    "it rained for most of the morning .",
    "nobody knew what to say .",
    "the clock on the wall went on .",
    "a door was left open .",
    "he came back an hour later .",
    "the street was quiet by then .",
    "so the evening passed .",
    "two of them sat by the window .",
    "the others had gone home .",
    "after that nothing happened .",
)
QUESTION = "what was most of it about ?"


# --- the task --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Classification(Task):
    """Documents of up to `segments` segments with `segment_length` tokens, and a segment that asks for the class.

    Of generated documents: `classes` topics of six, `cues` sentences a segment name a thing of a topic, the class has
    `margin` more of them than any other topic. With `data`, a path, `kind` is "hyperpartisan", "reviews" or "auto",
    `keep` the end of a longer document that is read, "front" or "back", and `seed` divides the documents.

    `tokenizer` is "words" (of real documents the 8192 most frequent in training), "bytes" or one of Hugging Face.
    In `Examples` the evidence is where things of the class's own topic are named, of real documents where each segment
    begins; `facts` counts the sentences that name a thing, of real documents the segments; `extra["class"]` is the
    class.

    Raises:
        ValueError: settings that cannot be.
    """

    segments: int = 4
    segment_length: int = 64
    tokenizer: Any = "words"
    classes: int = 2
    cues: int = 4
    margin: int = 2
    data: str | None = None
    kind: str = "auto"
    keep: str = "front"
    seed: int = 0

    name = "classification"
    card = TaskCard(
        "Long document classification",
        "Read a whole document, then say its class.",
        "SemEval-2019 Task 4: Hyperpartisan News Detection, https://aclanthology.org/S19-2145",
    )
    axis = "segments"

    def __post_init__(self) -> None:
        if self.segments < 1 or self.segment_length < 2:
            raise ValueError(
                f"segments is {self.segments} and segment_length {self.segment_length}; use 1 and 2 or more"
            )
        if not 2 <= self.classes <= len(TOPICS):
            raise ValueError(f"classes is {self.classes}; there are topics for 2 to {len(TOPICS)}")
        if self.kind not in ("auto", *KINDS):
            raise ValueError(f"kind is {self.kind!r}; choose one of auto, {', '.join(KINDS)}")
        if self.keep not in ("front", "back"):
            raise ValueError(f'keep is {self.keep!r}; use "front" or "back"')
        if self.data is None:
            named = self.cues * self.segments
            if self.margin < 1 or self.margin > named:
                raise ValueError(
                    f"margin is {self.margin}; {self.cues} cues in each of {self.segments} segments allow 1 to {named}"
                )
            longest = max(len(self._cue(start, thing, end)[0]) for start, end in CUES for thing in self._things)
            if longest * named > self.segments * self.segment_length:
                raise ValueError(
                    f"{self.cues} cues of up to {longest} tokens do not fit a segment of {self.segment_length}; use "
                    "fewer or longer segments"
                )
        needs = len(self._question) + max(map(len, self._answers))
        if needs > self.segment_length:
            raise ValueError(f"segment_length is {self.segment_length}; question and answer need {needs}")

    @property
    def solvable(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Only generated documents have an oracle."""
        return self.data is None

    # --- words and tokens --------------------------------------------------------------------------------------------

    @cached_property
    def topics(self) -> list[str]:
        """The answers, by class."""
        return list(KINDS[self._kind][2]) if self.data is not None else list(TOPICS)[: self.classes]

    @cached_property
    def encoder(self) -> Encoder:
        """Vocabulary and readable tokens."""
        if self.data is not None and self.tokenizer == "words":
            question, answers = KINDS[self._kind][1:]
            return KnownWords((text for text, _ in self.documents.train), [question, *answers])
        texts = [*TOPICS, *TOPICS.values(), *(f"{start} {end}" for start, end in CUES), *FILLERS, QUESTION]
        return encoder(self.tokenizer, texts)

    @property
    def vocabulary(self) -> int:
        """Token ids are 0 .. vocabulary - 1."""
        return self.encoder.vocabulary

    @property
    def uniform(self) -> float:
        """One of the classes."""
        return 1 / len(self.topics)

    @property
    def unit(self) -> int:
        """A sample is drawn in pieces that hold a word or some, where words are several tokens."""
        return 1 if self.tokenizer == "words" else min(16, self.segment_length)

    def text(self, ids: Sequence[int]) -> list[str]:
        """Tokens as a person reads them."""
        return self.encoder.pieces(ids)

    @cached_property
    def _question(self) -> list[int]:
        return self.encoder.encode(QUESTION if self.data is None else KINDS[self._kind][1])

    @cached_property
    def _answers(self) -> list[list[int]]:
        return [self.encoder.encode(topic) for topic in self.topics]

    @cached_property
    def _things(self) -> dict[str, list[int]]:
        return {thing: self.encoder.encode(thing) for topic in self.topics for thing in TOPICS[topic].split()}

    def _cue(self, start: str, thing: str, end: str) -> tuple[list[int], int]:
        """A sentence that names a thing, and the place of the thing in it."""
        before = self.encoder.encode(start)
        return [*before, *self._things[thing], *self.encoder.encode(end)], len(before)

    # --- documents ---------------------------------------------------------------------------------------------------

    @cached_property
    def _kind(self) -> str:
        assert self.data is not None
        return kind_of(self.data) if self.kind == "auto" else self.kind

    @cached_property
    def documents(self) -> Split[tuple[str, int]]:
        """Real documents and their classes, divided by `seed`; each class on its own."""
        assert self.data is not None
        found = [(text, int(label)) for text, label in KINDS[self._kind][0](self.data) if text.strip()]
        return split(found, self.seed, strata=[label for _, label in found])

    @cached_property
    def _tokens(self) -> dict[str, dict[int, list[int]]]:
        """Tokens of the real documents that were drawn so far, by split and number."""
        return {"train": {}, "validation": {}, "test": {}}

    def draw(self, rows: int, generator: Generator, split: str = "train") -> Examples:
        """New documents with their question: generated ones, or real ones, each once before one comes again."""
        if self.data is None:
            drawn = [self._document(generator) for _ in range(rows)]
        else:
            drawn = [self._real(split, number) for number in self._order(rows, split, generator)]
        length = self.segment_length
        total = (self.segments + 1) * length
        ids, labels = torch.full((rows, total), self.encoder.pad), torch.full((rows, total), IGNORED)
        answer = torch.full((rows, total), -1)
        evidence = torch.full((rows, 1, max((len(found) for _, _, found in drawn), default=1)), -1)
        for row, (document, label, found) in enumerate(drawn):
            said = self._answers[label]
            first = len(document) + len(self._question)
            ids[row, :first] = torch.tensor(document + self._question)
            place = slice(first, first + len(said))
            ids[row, place] = labels[row, place] = torch.tensor(said)
            answer[row, place] = 0
            evidence[row, 0, : len(found)] = torch.tensor(found)
        if self.data is None:
            facts = torch.full((rows,), self.cues * self.segments)
        else:
            facts = torch.tensor([len(document) // length for document, _, _ in drawn], dtype=torch.long)
        classes = torch.tensor([[label] for _, label, _ in drawn], dtype=torch.long).reshape(rows, 1)
        return Examples(ids, labels, answer, evidence, facts, {"class": classes})

    def _document(self, generator: Generator) -> tuple[list[int], int, list[int]]:
        """A generated document, its class, and where the things of its class are named."""
        named, length = self.cues * self.segments, self.segments * self.segment_length
        label = below(self.classes, generator)
        # the class has what the others leave, which is `margin` more than each of them or a little over
        others = (named - self.margin) // self.classes
        topics = [topic for topic in range(self.classes) for _ in range(others)]
        topics += [label] * (named - len(topics))
        sentences: list[tuple[list[int], int]] = []
        for topic in topics:
            things = TOPICS[self.topics[topic]].split()
            thing = things[below(len(things), generator)]
            start, end = CUES[below(len(CUES), generator)]
            sentence, place = self._cue(start, thing, end)
            sentences.append((sentence, place if topic == label else -1))
        left, last = length - sum(len(sentence) for sentence, _ in sentences), []
        while left > 0:
            filler = self._fillers[below(len(FILLERS), generator)]
            if len(filler) > left:
                last = filler[:left]  # a document ends within a sentence that is about nothing
            else:
                sentences.append((filler, -1))
            left -= len(filler)
        document, evidence = [], []
        for number in shuffled(1, len(sentences), generator)[0].tolist():
            sentence, place = sentences[number]
            evidence += [len(document) + place] if place >= 0 else []
            document += sentence
        return document + last, label, evidence

    @cached_property
    def _fillers(self) -> list[list[int]]:
        return [self.encoder.encode(filler) for filler in FILLERS]

    def _order(self, rows: int, split: str, generator: Generator) -> list[int]:
        count = len(getattr(self.documents, split))
        if not count:
            raise ValueError(f"{self.data} leaves no {split} document; it takes more documents of each class")
        order: list[int] = []
        while len(order) < rows:
            order += torch.randperm(count, generator=generator).tolist()
        return order[:rows]

    def _real(self, split: str, number: int) -> tuple[list[int], int, list[int]]:
        """A real document as whole segments, its class, and where each segment begins."""
        text, label = getattr(self.documents, split)[number]
        known, length = self._tokens[split], self.segment_length
        if number not in known:
            ids, most = self.encoder.encode(text), self.segments * length
            ids = ids[:most] if self.keep == "front" else ids[-most:]
            if len(ids) < length:
                ids = (ids * length)[:length] or [self.encoder.pad] * length
            whole = len(ids) // length * length
            known[number] = ids[:whole] + (ids[-length:] if whole < len(ids) else [])
        return known[number], label, list(range(0, len(known[number]), length))

    # --- solving -----------------------------------------------------------------------------------------------------

    def guess(
        self,
        ids: Int[Tensor, "b t"],
        asked: Bool[Tensor, "b t"],
        seen: Bool[Tensor, "b t"],
        generator: Generator,
    ) -> Int[Tensor, "b t"]:
        """The topic that was named most often as far as was seen, one of those by chance where several were; of real
        documents, what naive Bayes says.
        """
        if self.data is None:
            counts = torch.stack([self._named(ids, seen, topic) for topic in range(self.classes)], 1)
            luck = torch.rand(counts.shape, generator=generator, dtype=torch.float64)
            classes = (counts + luck).argmax(1).tolist()
        else:
            read = seen & (torch.arange(ids.shape[1]) < asked.long().argmax(1, keepdim=True) - len(self._question))
            classes = [self._bayes(self._words(row, see)) for row, see in zip(ids.tolist(), read.tolist(), strict=True)]
        said = torch.zeros_like(ids)
        places = asked.long().argmax(1).tolist()
        for row, (label, place) in enumerate(zip(classes, places, strict=True)):
            # the question may stand in any segment, and answers need not be equally long
            tokens = self._answers[label][: ids.shape[1] - place]
            said[row, place : place + len(tokens)] = torch.tensor(tokens)
        return said

    def _named(self, ids: Int[Tensor, "b t"], seen: Bool[Tensor, "b t"], topic: int) -> Int[Tensor, " b"]:
        """How often things of a topic were named, where all of the name was seen."""
        count = torch.zeros(len(ids), dtype=torch.long)
        for thing in TOPICS[self.topics[topic]].split():
            tokens = self._things[thing]
            here = torch.ones(len(ids), ids.shape[1] - len(tokens) + 1, dtype=torch.bool)
            for place, token in enumerate(tokens):
                stop = ids.shape[1] - len(tokens) + 1 + place
                here &= (ids[:, place:stop] == token) & seen[:, place:stop]
            count += here.sum(1)
        return count

    def _words(self, ids: Sequence[int], seen: Sequence[bool]) -> list[str]:
        """The words among the tokens that were seen."""
        joint = " " if self.tokenizer == "words" else ""
        pieces = self.encoder.pieces(ids)
        kept = [piece if see else "\n" for piece, see in zip(pieces, seen, strict=True)]
        return re.findall(r"\w+", joint.join(kept).lower())

    @cached_property
    def _bayes(self) -> NaiveBayes:
        """Learned on training documents, cut as they are read."""
        parts = [self._real("train", number) for number in range(len(self.documents.train))]
        words = [self._words(document, [True] * len(document)) for document, _, _ in parts]
        return NaiveBayes(words, [label for _, label, _ in parts], len(self.topics))

    def measures(self, predicted: Int[Tensor, "b t"], examples: Examples) -> dict[str, float]:
        """ "accuracy" and "macro F1": the mean over classes of F1. What is none of the answers counts as wrong."""
        true = examples.extra["class"][:, 0].tolist()
        right = self.right(predicted, examples).tolist()
        said = [label if good else -1 for label, good in zip(true, right, strict=True)]
        for row in (row for row, good in enumerate(right) if not good):
            # there are as many places as the right answer has; the other one may be longer or shorter
            tokens = predicted[row][examples.asked[row]].tolist()
            for c, answer in enumerate(self._answers):
                if c != true[row] and answer[: len(tokens)] == tokens[: len(answer)]:
                    said[row] = c
        return {"accuracy": sum(right) / len(right), "macro F1": _macro_f1(said, true)}

    def more_floors(self, examples: Examples, luck: Generator) -> dict[str, float]:
        """Of real documents, where the solver is naive Bayes, "all segments": it is told everything."""
        return {} if self.data is None else {"all segments": self.score(self.solve(examples), examples)}


def _macro_f1(said: Sequence[int], true: Sequence[int]) -> float:
    """Over the classes that there are: what is no class is wrong, but no class of its own."""
    whole = macro_f1(said, true)
    classes = set(said) | set(true)
    return whole * len(classes) / len(classes - {-1})
