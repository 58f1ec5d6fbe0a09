"""Long documents: read in order for language modelling, and read whole to be classified.

A language model with a memory reads a document segment after segment, and the memory lasts as long as the document:
`DocumentStream` keeps the rows of a batch in step with their documents and says where one begins. `bits_per_byte`
compares models whatever their tokenizers.

Nothing is downloaded: texts are read from files the caller has, folders or tar archives, which are not unpacked.
"""

from __future__ import annotations

import bisect
import heapq
import html
import itertools
import math
import os
import posixpath
import tarfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Generic, TypeVar

import torch
from jaxtyping import Bool, Int, Integer
from torch import Tensor

from mnemic.tasks.base import generator
from mnemic.unrolling import IGNORED

Item = TypeVar("Item")

# --- reading ---------------------------------------------------------------------------------------------------------


def novels(path: str | os.PathLike[str]) -> list[tuple[str, str]]:
    """Texts with their names, sorted by name.

    `path` is a folder or a tar archive (xz, gz, bz2 or plain) with UTF-8 files `*.txt`, at any depth, or one such file.
    A name is the path below the folder that all texts share, without `.txt`, so an archive and what it unpacks to give
    the same. A byte order mark is dropped and CRLF becomes LF.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: there is no text in it, it is neither of the three, or a text is not UTF-8.
    """
    found = {name: data for name, data in files(path, "a folder, a tar archive or a .txt file") if _is_text(name)}
    if not found:
        raise ValueError(f"{path} has no .txt file; give a folder, an archive or a file of UTF-8 texts")
    shared = posixpath.commonpath([PurePosixPath(name).parent for name in found])
    named = {
        PurePosixPath(name).relative_to(shared).with_suffix("").as_posix(): _decoded(name, data)
        for name, data in found.items()
    }
    return sorted(named.items())


def _is_text(name: str) -> bool:
    return name.endswith(".txt") and not PurePosixPath(name).name.startswith(".")


def _decoded(name: str, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 (byte {error.start}); convert it first") from error


def files(path: str | os.PathLike[str], wanted: str) -> Iterator[tuple[str, bytes]]:
    """Names, with slashes, and contents of the files in a folder or a tar archive, or of the one `.txt` file itself.

    Raises:
        FileNotFoundError: there is nothing at `path`; the message says what is `wanted`.
        ValueError: it is neither, or damaged.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; pass {wanted}")
    if path.is_dir():
        for file in sorted(file for file in path.rglob("*") if file.is_file()):
            yield file.relative_to(path).as_posix(), file.read_bytes()
    elif path.suffix == ".txt":
        yield path.name, path.read_bytes()
    else:
        try:
            with tarfile.open(path, "r:*") as archive:
                for member in archive:
                    data = archive.extractfile(member) if member.isfile() else None
                    if data is not None:
                        yield member.name, data.read()
        except (tarfile.TarError, EOFError) as error:
            raise ValueError(f"{path} is not a tar archive, or a damaged one ({error}); pass {wanted}") from error


# --- tokens and bytes ------------------------------------------------------------------------------------------------

CHUNK = 100_000
"""About how many characters go through a tokenizer at once."""


@dataclass(frozen=True)
class Tokens:
    """A text as tokens: `ids [n]` and the UTF-8 bytes that each stands for, `lengths [n]`, both int64.

    The lengths add up to the bytes of the text. A character that is spread over several tokens counts at the first.
    """

    ids: Int[Tensor, " n"]
    lengths: Int[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.ids)


def tokenize(
    text: str, tokenizer: Any = "bytes", chunk: int = CHUNK, advance: Callable[[int], object] = lambda characters: None
) -> Tokens:
    """A whole text as tokens, without special ones.

    `tokenizer` is "bytes", for ids 0 .. 255, or a fast Hugging Face tokenizer. The text goes through it in parts of
    about `chunk` characters that end at line ends, where the result is that of the whole text; `advance` is told of
    each.

    Raises:
        ValueError: another string, or a tokenizer that does not tell which characters a token stands for.
    """
    if isinstance(tokenizer, str):
        if tokenizer != "bytes":
            raise ValueError(f'tokenizer is {tokenizer!r}; use "bytes" or a Hugging Face tokenizer')
        ids = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long() if text else torch.empty(0).long()
        return Tokens(ids, torch.ones_like(ids))
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} does not tell which characters a token stands for, so its bytes cannot be "
            "counted; load the fast tokenizer"
        )
    ids, lengths = [], []
    for part, before in _parts(text, chunk):
        some, their = _encoded(tokenizer, part, before)
        ids += some
        lengths += their
        advance(len(part))
    return Tokens(torch.tensor(ids, dtype=torch.long), torch.tensor(lengths, dtype=torch.long))


def _parts(text: str, chunk: int) -> Iterator[tuple[str, str]]:
    """The text in parts, each with the character before it. A part begins with the line feed behind a word."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + max(chunk, 1))
        while end > 0 and text[end - 1].isspace():
            end = text.find("\n", end + 1)
        # what is left must have a word, or it may be no token
        end = len(text) if end < 0 or text[end:].isspace() else end
        yield text[start:end], text[start - 1 : start]
        start = end


def _encoded(tokenizer: Any, part: str, before: str) -> tuple[list[int], list[int]]:
    """Tokens of a part and their bytes. The character before it goes along and is taken off again, because some
    tokenizers treat the beginning of a text as the beginning of a word.
    """
    head = tokenizer(before, add_special_tokens=False, verbose=False)["input_ids"] if before else []
    encoding = tokenizer(before + part, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, ends = encoding["input_ids"], [end for _, end in encoding["offset_mapping"]]
    if ids[: len(head)] != head:
        raise ValueError(f"this tokenizer joins {before!r} and a line end to one token; pass a chunk= beyond the text")
    ids, ends = ids[len(head) :], ends[len(head) :]
    if not ids:
        raise ValueError(f"this tokenizer makes no token of {part[:20]!r}, so its bytes cannot be counted")
    sizes = torch.tensor([0, *(len(character.encode()) for character in before + part)]).cumsum(0)
    # each token gets the bytes up to its end that no token had before; the last one also what is left
    reached = torch.tensor(ends).cummax(0).values.clamp_min(len(before))
    reached[-1] = len(before) + len(part)
    return ids, sizes[reached].diff(prepend=sizes[len(before), None]).tolist()


def bits_per_byte(total_nll_nats: float, n_bytes: int) -> float:
    """Bits per byte of text: negative log-likelihoods in nats, summed over tokens, per byte that these tokens stand
    for (`Tokens.lengths`). Exact, and comparable between tokenizers, where every byte of the text is scored.

    Raises:
        ValueError: no bytes.
    """
    if n_bytes < 1:
        raise ValueError(f"n_bytes is {n_bytes}; bits per byte need at least 1")
    return total_nll_nats / math.log(2) / n_bytes


# --- documents in order ----------------------------------------------------------------------------------------------


@dataclass
class DocumentBatch:
    """One step of `b` rows with `t` tokens each.

    `input_ids [b, t]` int64. `targets [b, t]` int64: the token that follows each, -100 behind the last of a document
    that is used; *not shifted again*, unlike labels in Hugging Face, so that the last token of a segment is scored too.
    `target_bytes [b, t]` int64: the bytes those targets stand for, 0 where there is none or no lengths were given.
    `fresh [b]` bool: a document begins here, so the row's memory must begin again. `position [b]` int64: number of the
    segment within its document. `document [b]` int64: index into the documents, -1 where a row has run out of them.
    """

    input_ids: Int[Tensor, "b t"]
    targets: Int[Tensor, "b t"]
    target_bytes: Int[Tensor, "b t"]
    fresh: Bool[Tensor, " b"]
    position: Int[Tensor, " b"]
    document: Int[Tensor, " b"]


class DocumentStream:
    """Batches whose rows read documents segment after segment.

    A row reads a document to its end and takes the next one. Documents come in an order drawn from the seed, all of
    them once before one comes again; the row that is free first takes the next, the lower row of two. A document
    shorter than a segment is dropped, and so is the tail that does not fill one.

    To send gradients through several segments, give a multiple as `segment` and cut the batches: `fresh` then holds
    for all of it.

    Args:
        documents: tokens of each, 1-D integer tensors, or `Tokens`, which also give `target_bytes`.
        rows: rows of a batch.
        segment: tokens of a row in one step.
        seed: of the order; None keeps the order given, for evaluation.
        epochs: how often each document is read; None for ever. At the end rows that have no document left are idle:
            tokens 0, no targets, document and position -1, not fresh.

    Raises:
        ValueError: sizes below 1, a document that is not 1-D, or none that fills a segment.
    """

    def __init__(
        self,
        documents: Sequence[Integer[Tensor, " n"] | Tokens],
        rows: int,
        segment: int,
        seed: int | None = 0,
        epochs: int | None = None,
    ) -> None:
        if rows < 1 or segment < 1 or (epochs is not None and epochs < 1):
            raise ValueError(f"rows is {rows}, segment {segment}, epochs {epochs}; use 1 or more")
        self.documents = [document.ids if isinstance(document, Tokens) else document for document in documents]
        self.lengths = [document.lengths if isinstance(document, Tokens) else None for document in documents]
        for index, document in enumerate(self.documents):
            if document.ndim != 1 or document.is_floating_point():
                raise ValueError(f"document {index} is {list(document.shape)} {document.dtype}; give 1-D token ids")
        self.rows, self.segment, self.seed, self.epochs = rows, segment, seed, epochs
        self.used = [index for index, document in enumerate(self.documents) if len(document) >= segment]
        if not self.used:
            longest = max(map(len, self.documents), default=0)
            raise ValueError(f"no document fills a segment of {segment} tokens (the longest has {longest})")
        self._order: list[int] = []
        self._begun = 0  # epochs whose order is drawn
        self._source = None if seed is None else generator(seed)
        # the schedule as far as it is known: what each row reads, from which step on, and when rows are free
        self._from: list[list[int]] = [[] for _ in range(rows)]
        self._read: list[list[int]] = [[] for _ in range(rows)]
        self._free = [(0, row) for row in range(rows)]
        self._taken = 0

    @property
    def segments(self) -> int:
        """Segments of all documents: what one epoch reads."""
        return sum(self._segments(index) for index in self.used)

    def _segments(self, document: int) -> int:
        return len(self.documents[document]) // self.segment

    @property
    def steps(self) -> int | None:
        """Steps until every document has been read `epochs` times; None for a stream without end."""
        if self.epochs is None:
            return None
        while self._next() is not None:
            self._assign()
        return max(step for step, _ in self._free)

    def __iter__(self) -> Iterator[DocumentBatch]:
        """The batches from step 0 on, without end unless `epochs` was given."""
        return (self[step] for step in (itertools.count() if self.steps is None else range(self.steps)))

    def __getitem__(self, step: int) -> DocumentBatch:
        """The batch of a step, the same whenever it is asked for.

        Raises:
            IndexError: a step below 0, or behind the end.
        """
        if step < 0 or (self.steps is not None and step >= self.steps):
            raise IndexError(f"there is no step {step}" + (f"; the last is {self.steps - 1}" if self.steps else ""))
        while self._free[0][0] <= step and self._next() is not None:
            self._assign()
        shape, t = (self.rows, self.segment), self.segment
        batch = DocumentBatch(
            input_ids=torch.zeros(shape, dtype=torch.long),
            targets=torch.full(shape, IGNORED),
            target_bytes=torch.zeros(shape, dtype=torch.long),
            fresh=torch.zeros(self.rows, dtype=torch.bool),
            position=torch.full((self.rows,), -1),
            document=torch.full((self.rows,), -1),
        )
        for row in range(self.rows):
            place = bisect.bisect_right(self._from[row], step) - 1
            if place < 0:
                continue
            index, position = self._read[row][place], step - self._from[row][place]
            count = self._segments(index)
            if position >= count:
                continue
            ids, lengths, start = self.documents[index], self.lengths[index], position * t
            batch.input_ids[row] = ids[start : start + t]
            known = min(t, count * t - start - 1)
            batch.targets[row, :known] = ids[start + 1 : start + 1 + known]
            if lengths is not None:
                batch.target_bytes[row, :known] = lengths[start + 1 : start + 1 + known]
            batch.fresh[row], batch.position[row], batch.document[row] = position == 0, position, index
        return batch

    def _next(self) -> int | None:
        """The next document that no row has taken, None behind the end."""
        if self._taken == len(self._order):
            if self._begun == self.epochs:
                return None
            self._begun += 1
            count = len(self.used)
            order = range(count) if self._source is None else torch.randperm(count, generator=self._source).tolist()
            self._order += [self.used[place] for place in order]
        return self._order[self._taken]

    def _assign(self) -> None:
        """The row that is free first takes the next document."""
        index = self._next()
        if index is None:
            return
        step, row = self._free[0]
        self._taken += 1
        self._from[row].append(step)
        self._read[row].append(index)
        heapq.heapreplace(self._free, (step + self._segments(index), row))


# --- classification --------------------------------------------------------------------------------------------------

HYPERPARTISAN = (
    "the archive or folder of SemEval-2019 task 4 with articles-training-byarticle-*.xml and "
    "ground-truth-training-byarticle-*.xml (https://zenodo.org/records/1489920)"
)


def hyperpartisan(path: str | os.PathLike[str]) -> list[tuple[str, bool]]:
    """News articles and whether each is hyperpartisan, in the order of the file (SemEval-2019 task 4, by article).

    The text is the body without title, mark-up and line breaks, as is usual with these data. `path` is a folder or a
    tar archive with the two XML files. Split with `split(examples, strata=[label for _, label in examples])`.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: one of the two files is missing, or they are not about the same articles.
    """
    found: dict[str, ElementTree.Element] = {}
    for name, data in files(path, HYPERPARTISAN):
        for kind in ("articles", "ground-truth"):
            if PurePosixPath(name).name.startswith(f"{kind}-training-byarticle") and name.endswith(".xml"):
                found[kind] = ElementTree.fromstring(data)
    if len(found) < 2:
        missing = ", ".join(kind for kind in ("articles", "ground-truth") if kind not in found)
        raise ValueError(f"{path} lacks the file of {missing}; pass {HYPERPARTISAN}")
    labels = {article.get("id"): article.get("hyperpartisan") == "true" for article in found["ground-truth"]}
    articles = {article.get("id"): _plain(article) for article in found["articles"]}
    if articles.keys() != labels.keys():
        raise ValueError(f"{path}: the {len(articles)} articles and the {len(labels)} labels are not of the same ids")
    return [(text, labels[name]) for name, text in articles.items()]


def _plain(article: ElementTree.Element) -> str:
    # entities are escaped twice in these data
    return " ".join(html.unescape("".join(article.itertext())).split())


@dataclass(frozen=True)
class Split(Generic[Item]):
    """Examples to train on, to choose by, and to report."""

    train: list[Item]
    validation: list[Item]
    test: list[Item]


def split(
    items: Sequence[Item],
    seed: int = 0,
    strata: Sequence[Any] | None = None,
    shares: tuple[float, float, float] = (0.8, 0.1, 0.1),
) -> Split[Item]:
    """Divides items by chance, the same for a seed on every machine.

    With `strata`, one value an item (the label), each value is divided on its own, so that the parts agree in it.
    Items keep their order within a part. `shares` are those of train, validation and test; what rounding leaves over
    goes to train.

    Raises:
        ValueError: shares that do not add up to 1, or strata of another number than items.
    """
    if min(shares) < 0 or not math.isclose(sum(shares), 1):
        raise ValueError(f"shares are {shares}; they must be 0 or more and add up to 1")
    if strata is not None and len(strata) != len(items):
        raise ValueError(f"{len(items)} items have {len(strata)} strata; give one each")
    values = [None] * len(items) if strata is None else list(strata)
    source = generator(seed)
    parts: tuple[list[int], list[int], list[int]] = ([], [], [])
    for value in dict.fromkeys(values):
        members = [index for index, other in enumerate(values) if other == value]
        drawn = [members[place] for place in torch.randperm(len(members), generator=source).tolist()]
        validation, test = (round(share * len(drawn)) for share in shares[1:])
        test = min(test, len(drawn) - validation)
        parts[1].extend(drawn[:validation])
        parts[2].extend(drawn[validation : validation + test])
        parts[0].extend(drawn[validation + test :])
    train, validation, test = ([items[index] for index in sorted(part)] for part in parts)
    return Split(train, validation, test)


def macro_f1(predictions: Sequence[Any] | Tensor, labels: Sequence[Any] | Tensor) -> float:
    """Mean over classes of F1 = 2 right / (predicted + true), for every class that was predicted or is true.

    Raises:
        ValueError: not as many predictions as labels, or none.
    """
    said, true = (each.tolist() if isinstance(each, Tensor) else list(each) for each in (predictions, labels))
    if len(said) != len(true) or not true:
        raise ValueError(f"{len(said)} predictions and {len(true)} labels; give as many of both, at least 1")
    pairs = list(zip(said, true, strict=True))
    classes = set(said) | set(true)
    return sum(2 * pairs.count((c, c)) / (said.count(c) + true.count(c)) for c in classes) / len(classes)
