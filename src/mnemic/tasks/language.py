"""Language modelling on long documents read in order: bits per byte, by position in the document.

The oldest test of a memory (Transformer-XL, https://arxiv.org/abs/1901.02860; Compressive Transformer,
https://arxiv.org/abs/1911.05507; Memoria, https://arxiv.org/abs/2310.03052, section 4.2): what was read of a document
makes the rest easier to predict. A stream is an excerpt of `segments` segments of one document. Every token but the
first has a label. What counts is the probability that a model gives to each, not the most probable token: `bits` makes
bits per byte of negative log-likelihoods, which compare between tokenizers, and perplexity, which does not.

Without `data` documents come from a small world of our own. A document is about `cast` people with names, and every
person has six traits that never change within it. Sentences are drawn one by one: a person of the cast, one of eight
kinds of sentence, each as likely as another. Six kinds name a trait, one names another of the cast, one a random place.
So names and traits can be known from what was read, and the rest cannot: what an ideal reader pays for each word is
known exactly (`tales.reader_bits`), for a reader of everything as well as for one of the last segment. The lists, the
sentences and the reader are ours. With the tokenizer "words", a word is a token; its bytes are its letters and the
space before it.

With `data` documents are real ones, divided into those to train on, to choose by and to test on. Floors there are
n-gram models that are learned on training documents and count on in the segments that they may look at: an honest
mirror of a memory that remembers word for word.

`corpora.Stateful` makes batches for training whose rows stay with their documents, as in those papers, with the memory
carried from step to step or begun again every so many steps (Memoria: 500, on enwik8 1,500, and never at a document's
end).
"""

from __future__ import annotations

import bisect
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from mnemic.tasks.base import Examples, Task, TaskCard, below, generator, seed_of
from mnemic.tasks.corpora import Text, enwik8, from_hub, wikitext
from mnemic.tasks.documents import Tokens, bits_per_byte, novels, split, tokenize
from mnemic.tasks.ngrams import Learned
from mnemic.tasks.tales import FORMS, NAMES, OPENING, PLACES, TRAITS, facts_told, parse, reader_bits, tale
from mnemic.tasks.text import Encoder, encoder
from mnemic.unrolling import IGNORED

# --- the task --------------------------------------------------------------------------------------------------------

KINDS = ("texts", "wikitext", "enwik8", "hub")
STARTS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Where ranges of positions begin, in segments."""

TRAINED_TOKENS = 50_000
"""How much training text the n-gram floors are learned on."""

SCORED_TOKENS = 20_000
"""About how much test text floors are measured on at most: every token counts, so a few streams are many places."""


@dataclass(frozen=True)
class Language(Task):
    """Bits per byte of excerpts of `segments` segments with `segment_length` tokens.

    `tokenizer` is "words" (only without `data`), "bytes", or a fast Hugging Face tokenizer. `data` is a path, `kind`
    what is there: "texts" (`novels`: a folder, a tar archive or a file), "wikitext", "enwik8", or "hub": then `data` is
    the name of a dataset there, or name:config, and its own splits are used. Texts and articles are divided by
    document, 80/10/10, by `seed`. Documents shorter than an excerpt are not used; every excerpt begins a whole number
    of segments behind the beginning of its document. `order` is that of the n-gram floors.

    In `Examples` an answer is a segment, its evidence the beginning of each segment before it (of the first: the first
    token), `extra["bytes"]` the bytes that its labelled tokens stand for. `facts` counts the traits that are told; 0
    for real text. `score` is the share of tokens that are predicted, `floors` and `bits` are in bits per byte.

    Raises:
        ValueError: settings that cannot be, or no document of that length.
    """

    segments: int = 8
    segment_length: int = 64
    tokenizer: Any = "words"
    cast: int = 4
    data: str | None = None
    kind: str = "texts"
    seed: int = 0
    order: int = 4

    name = "language"
    card = TaskCard(
        "Language modelling",
        "Predict each token of a long document, the better for what was read of it long before.",
        "Transformer-XL: Attentive Language Models Beyond a Fixed-Length Context, https://arxiv.org/abs/1901.02860",
    )
    axis = "segments"
    by_answer = False
    solvable = False
    metric: ClassVar[str] = "bits per byte"
    lower_is_better: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.segments < 1 or self.segment_length < 2 or self.order < 1:
            raise ValueError(
                f"segments is {self.segments}, segment_length {self.segment_length}, order {self.order}; use 1, 2 and "
                "1 or more"
            )
        if not 2 <= self.cast <= len(NAMES):
            raise ValueError(f"cast is {self.cast}; a tale has 2 to {len(NAMES)} people")
        if self.kind not in KINDS:
            raise ValueError(f"kind is {self.kind!r}; choose one of {', '.join(KINDS)}")
        if isinstance(self.tokenizer, str) and self.tokenizer not in ("words", "bytes"):
            raise ValueError(f'tokenizer is {self.tokenizer!r}; use "words", "bytes" or a Hugging Face tokenizer')
        if self.data is not None and self.tokenizer == "words":
            raise ValueError(
                'tokenizer is "words", which knows the words of the generated tales only; real text takes "bytes" or a '
                "Hugging Face tokenizer"
            )

    @cached_property
    def encoder(self) -> Encoder:
        """Vocabulary and readable tokens."""
        lists = (NAMES, *TRAITS.values(), PLACES, [OPENING], [form.format("") for form in FORMS.values()])
        return encoder(self.tokenizer, [" ".join(words) for words in lists])

    @property
    def vocabulary(self) -> int:
        """Token ids are 0 .. vocabulary - 1."""
        return self.encoder.vocabulary

    @property
    def uniform(self) -> float:
        """Share of tokens that a uniform guess has right. In bits per byte see `floors`."""
        return 1 / self.vocabulary

    @property
    def length(self) -> int:
        """Tokens of a stream."""
        return self.segments * self.segment_length

    def text(self, ids: Sequence[int]) -> list[str]:
        """Tokens as a person reads them."""
        return self.encoder.pieces(ids)

    # --- streams -----------------------------------------------------------------------------------------------------

    def draw(self, rows: int, generator: Generator, split: str = "train") -> Examples:
        """New excerpts: of new tales, or of the split's documents, where each place is as likely as another."""
        if self.data is None:
            parts = [self._tale(generator) for _ in range(rows)]
        else:
            parts = [self._excerpt(split, generator) for _ in range(rows)]
        t, s = self.length, self.segments
        ids = torch.stack([part.ids for part in parts]) if parts else torch.empty(0, t, dtype=torch.long)
        lengths = torch.stack([part.lengths for part in parts]) if parts else torch.empty(0, t, dtype=torch.long)
        labels, answer = ids.clone(), (torch.arange(t) // self.segment_length).expand(rows, t).clone()
        labels[:, 0], answer[:, 0] = IGNORED, -1
        lengths[:, 0] = 0  # nothing predicts the first token
        begins = torch.arange(s) * self.segment_length
        before = torch.where(begins < begins[:, None], begins, -1)
        before[0, 0] = 0
        told = [len(facts_told(parse(self._spelt(row)[0]))) if self.data is None else 0 for row in ids.tolist()]
        return Examples(
            input_ids=ids,
            labels=labels,
            answer=answer,
            evidence=before.expand(rows, s, s).clone(),
            facts=torch.tensor(told, dtype=torch.long),
            extra={"bytes": lengths.unflatten(1, (s, -1)).sum(2)},
        )

    def _tale(self, generator: Generator) -> Tokens:
        # a sentence has 4 words at least, and a word is a token at least
        text = " ".join(tale(self.cast, self.length // 4 + 1, generator))
        if self.tokenizer != "words":
            tokens = tokenize(text, self.tokenizer)
            return Tokens(tokens.ids[: self.length], tokens.lengths[: self.length])
        words = text.split()[: self.length]
        # the space before a word is its first byte
        lengths = torch.tensor([len(word) + (place > 0) for place, word in enumerate(words)])
        return Tokens(torch.tensor(self.encoder.encode(" ".join(words))), lengths)

    def _excerpt(self, split: str, generator: Generator) -> Tokens:
        documents = self._tokens(split)
        starts = [(len(document) - self.length) // self.segment_length + 1 for document in documents]
        ends = list(itertools.accumulate(starts))
        place = below(ends[-1], generator)
        number = bisect.bisect_right(ends, place)
        start = (place - ends[number] + starts[number]) * self.segment_length
        part, document = slice(start, start + self.length), documents[number]
        return Tokens(document.ids[part].long(), document.lengths[part].long())

    @cached_property
    def documents(self) -> dict[str, list[Text]]:
        """The real documents of each split.

        Raises:
            ValueError: too few of them to divide.
        """
        assert self.data is not None
        if self.kind == "enwik8":
            return enwik8(self.data)
        if self.kind == "hub":
            name, _, config = self.data.partition(":")
            return {part: from_hub(name, part, config or None) for part in ("train", "validation", "test")}
        found = wikitext(self.data) if self.kind == "wikitext" else novels(self.data)
        if len(found) < 3:
            raise ValueError(f"{self.data} has {len(found)} documents; to divide them takes 3 or more")
        parts = split(found, self.seed, shares=(0.8, 0.1, 0.1) if len(found) >= 10 else _thirds(len(found)))
        return {"train": parts.train, "validation": parts.validation, "test": parts.test}

    @cached_property
    def _kept(self) -> dict[str, list[Tokens]]:
        return {}

    def _tokens(self, part: str) -> list[Tokens]:
        """The documents of a split that are long enough, tokenized when they are first asked for."""
        if part not in self._kept:
            tokens = [_small(tokenize(text, self.tokenizer)) for _, text in self.documents[part]]
            kept = [each for each in tokens if len(each) >= self.length]
            if not kept:
                longest = max(map(len, tokens), default=0)
                raise ValueError(
                    f"no {part} document of {self.data} has {self.length} tokens (the longest has {longest}); use "
                    "fewer segments or shorter ones"
                )
            self._kept[part] = kept
        return self._kept[part]

    # --- scoring -----------------------------------------------------------------------------------------------------

    def guess(
        self,
        ids: Int[Tensor, "b t"],
        asked: Bool[Tensor, "b t"],
        seen: Bool[Tensor, "b t"],
        generator: Generator,
    ) -> Int[Tensor, "b t"]:
        """The most frequent token of training everywhere: every token is asked for, so none may be looked at. Readers
        that are told each token after they have predicted it are in `floors`.
        """
        return torch.full_like(ids, self._most_frequent)

    @cached_property
    def _most_frequent(self) -> int:
        return int(self.examples(100).input_ids.flatten().bincount().argmax())

    def bits(self, nll_nats: Float[Tensor, "b t"], examples: Examples) -> dict[str, float]:
        """What a model's negative log-likelihoods come to. `nll_nats [b, t]`, nats, at labelled places: place `p` has
        that of the token at `p`, given those before. Other places are not read.

        Returns:
            "bits per byte" over everything and "perplexity" per token, then "bits per byte, segment 0", "1", "2-3",
            "4-7" and so on, by position in the excerpt. Sums over rows are divided by sums, so every byte counts alike.

        Raises:
            ValueError: another shape, or a labelled place whose number is not finite.
        """
        if nll_nats.shape != examples.labels.shape:
            raise ValueError(f"nll_nats is {list(nll_nats.shape)}, the labels are {list(examples.labels.shape)}")
        nats = nll_nats.detach().cpu().double().masked_fill(~examples.asked, 0)
        if not bool(nats.isfinite().all()):
            raise ValueError("nll_nats has a number that is not finite at a labelled place")
        sums, lengths = nats.unflatten(1, (-1, self.segment_length)).sum((0, 2)), examples.extra["bytes"].sum(0)
        found = {
            "bits per byte": bits_per_byte(float(sums.sum()), int(lengths.sum())),
            "perplexity": (sums.sum() / examples.asked.sum()).exp().item(),
        }
        starts = [start for start in STARTS if start < len(sums)]
        for start, stop in zip(starts, [*starts[1:], len(sums)], strict=True):
            name = f"{start}" if stop == start + 1 else f"{start}-{stop - 1}"
            part = float(sums[start:stop].sum()), int(lengths[start:stop].sum())
            found[f"bits per byte, segment {name}"] = bits_per_byte(*part)
        return found

    def result(self, predicted: Int[Tensor, "b t"], nats: Float[Tensor, "b t"], examples: Examples) -> float:
        """Bits per byte."""
        return self.bits(nats, examples)["bits per byte"]

    def views(self, generator: Generator) -> dict[str, list[list[int]]]:
        """For each reader which earlier segments it remembers, for each segment. The sample is one of them by chance,
        a memory of a segment's worth: n-grams of scattered tokens would be none.
        """
        numbers = range(self.segments)
        drawn = [[below(s, generator)] if s else [] for s in numbers]
        return {
            "this segment": [[] for _ in numbers],
            "last segment": [list(range(max(0, s - 1), s)) for s in numbers],
            "last 2 segments": [list(range(max(0, s - 2), s)) for s in numbers],
            "sample of a segment": drawn,
            "everything": [list(range(s)) for s in numbers],
        }

    def floors(self, rows: int = 200, number: int = 0) -> dict[str, float]:
        """Bits per byte without a trained memory, on test streams of about `SCORED_TOKENS` tokens: lower is better.

        A uniform guess among all tokens, frequencies of training text, and n-grams of training text together with those
        of what each reader remembers. "n-gram, this segment" has no memory. For generated tales also the ideal readers:
        "reader, this segment" is the best that is possible without a memory, "reader, everything" the best there is.
        """
        examples = self.examples(min(rows, 2 + SCORED_TOKENS // self.length), "test", number)
        total = int(examples.extra["bytes"].sum())
        streams = examples.input_ids.tolist()
        count = int(examples.asked.sum())
        found = {"uniform": count * math.log2(self.vocabulary) / total}
        model = self._learned
        unigram = [-math.log2(chance) for row in streams for chance in model.base(row, 1)[1:]]
        found["unigram"] = sum(unigram) / total
        views = self.views(generator(seed_of("test", number) + 1))
        others = self.examples(2 + SCORED_TOKENS // 5 // self.length, "validation").input_ids.tolist()
        bases = [[(row, model.base(row)) for row in some] for some in (others, streams)]
        for name, earlier in views.items():
            trust = [[1.0, 2.0] for _ in range(self.order + 1)]
            for row, base in bases[0]:
                model.bits(row, base, self.segment_length, earlier, trust, learn=True)
            sums = [model.bits(row, base, self.segment_length, earlier, trust) for row, base in bases[1]]
            found[f"n-gram, {name}"] = sum(sums) / total
        if self.data is None:
            spelt = [self._spelt(row) for row in streams]
            told = [(parse(words), segment) for words, segment in spelt]
            for name, earlier in views.items():
                paid = [sum(reader_bits(words, segment, earlier, self.cast)) for words, segment in told]
                found[f"reader, {name}"] = sum(paid) / total
        return found

    @cached_property
    def _learned(self) -> Learned:
        rows = -(-TRAINED_TOKENS // self.length)
        return Learned(self.order, self.vocabulary, self.examples(rows).input_ids)

    def _spelt(self, ids: Sequence[int]) -> tuple[list[str], list[int]]:
        """The words of a tale, and the segment in which each begins."""
        pieces = self.encoder.pieces(ids)
        pieces = [f" {piece}" for piece in pieces] if self.tokenizer == "words" else pieces
        ends = list(itertools.accumulate(len(piece) for piece in pieces))
        words = list(re.finditer(r"\S+", "".join(pieces)))
        # a tokenizer may give a word the space before it
        places = [bisect.bisect_right(ends, max(0, word.start() - 1)) for word in words]
        return [word.group() for word in words], [place // self.segment_length for place in places]


def _thirds(count: int) -> tuple[float, float, float]:
    """Shares that give validation and test a document each."""
    return (count - 2) / count, 1 / count, 1 / count


def _small(tokens: Tokens) -> Tokens:
    """The same in a third of the space: long documents are kept whole."""
    return Tokens(tokens.ids.int(), tokens.lengths.short())
