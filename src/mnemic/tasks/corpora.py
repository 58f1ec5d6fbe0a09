"""Published texts as documents: WikiText, enwik8, whatever `datasets` loads; and batches whose rows stay with them."""

from __future__ import annotations

import itertools
import os
import re
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mnemic.tasks.documents import DocumentBatch, DocumentStream, novels

Text = tuple[str, str]
"""A document: its name and its text."""


HEADING = re.compile(r" = [^=\n].* = ")
"""Title of an article in WikiText. Those of its sections have more signs."""


def articles(text: str) -> list[Text]:
    """The articles of a WikiText file, in order: titles, and texts that begin with the title's line.

    An article begins with a line ` = Title = ` between two empty ones; other lines of that form are formulas or table
    rows.

    Raises:
        ValueError: no article in it.
    """
    lines = text.split("\n")
    starts = [
        place
        for place, line in enumerate(lines)
        if HEADING.fullmatch(line)
        and (place == 0 or not lines[place - 1].strip())
        and (place + 1 == len(lines) or not lines[place + 1].strip())
    ]
    if not starts:
        raise ValueError('this text has no line " = Title = " as articles of WikiText begin with; is it WikiText?')
    parts = itertools.pairwise([*starts, len(lines)])
    return [(lines[start].strip(" ="), "\n".join(lines[start:stop]).strip("\n") + "\n") for start, stop in parts]


def wikitext(path: str | os.PathLike[str]) -> list[Text]:
    """The articles of WikiText files: a file, or every `.txt` in a folder or a tar archive (Merity et al. 2016,
    https://arxiv.org/abs/1609.07843). Titles are not unique.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: a file without articles, or one that is not UTF-8.
    """
    return [article for _, text in novels(path) for article in articles(text)]


def enwik8(path: str | os.PathLike[str]) -> dict[str, list[Text]]:
    """The first bytes of English Wikipedia (http://mattmahoney.net/dc/textdata.html), divided as is usual: the first
    90 % to train on, 5 % to choose by, 5 % to test on; one document each. A cut moves back to where a character begins.

    `path` is the file or its zip, which is read and not unpacked. A beginning of it will do.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: a zip with another number of files than one.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; pass enwik8 or enwik8.zip")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = [entry for entry in archive.infolist() if not entry.is_dir()]
            if len(names) != 1:
                raise ValueError(f"{path} holds {len(names)} files; pass enwik8 or enwik8.zip, which holds one")
            if names[0].file_size > 2**30:
                raise ValueError(f"{path} unpacks to {names[0].file_size} bytes; enwik8 has 100,000,000")
            data = archive.read(names[0])
    else:
        data = path.read_bytes()
    cuts = [0, len(data) * 90 // 100, len(data) * 95 // 100, len(data)]
    for place in (1, 2):
        while cuts[place] > 0 and data[cuts[place]] & 0xC0 == 0x80:
            cuts[place] -= 1
    # the end of the file cuts through a character
    names = ("train", "validation", "test")
    parts = zip(names, itertools.pairwise(cuts), strict=True)
    return {name: [(f"enwik8 {name}", data[start:stop].decode(errors="ignore"))] for name, (start, stop) in parts}


def from_hub(
    name: str, split: str = "test", config: str | None = None, column: str = "text", documents: int | None = None
) -> list[Text]:
    """Documents of a dataset on the Hugging Face hub, one a row; of WikiText, whose rows are lines, the articles.

    Needs the package `datasets`, and the network where the dataset is not in its cache. `name` may be a folder: of data
    files, or what `save_to_disk` wrote. With `documents` no more than that are taken, nor, where a row is one, loaded.

    Raises:
        ModuleNotFoundError: the package is missing.
        ConnectionError: there is no network, or no such dataset.
        ValueError: the dataset has no such column or split.
    """
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("texts from the hub need the package datasets: pip install datasets") from error
    lines = "wikitext" in name.lower()
    rows: Any
    if (Path(name) / "dataset_dict.json").is_file() or (Path(name) / "state.json").is_file():
        saved: Any = datasets.load_from_disk(name)
        if isinstance(saved, datasets.DatasetDict) and split not in saved:
            raise ValueError(f"{name} has no split {split!r}; choose one of {', '.join(map(str, saved))}")
        rows = saved[split] if isinstance(saved, datasets.DatasetDict) else saved
    else:
        some: dict[str, Any] = {"streaming": True} if documents is not None and not lines else {}
        try:
            rows = datasets.load_dataset(name, config, split=split, **some)
        except OSError as error:  # also what says that there is no such dataset
            raise ConnectionError(
                f"cannot load {name} ({error}); it needs its right name and a network, or give local text files"
            ) from error
    if rows.column_names is not None and column not in rows.column_names:
        raise ValueError(f"{name} has no column {column!r}; choose one of {', '.join(rows.column_names)}")
    if lines:
        # some versions keep the line feed of each line
        return articles("\n".join(str(text).removesuffix("\n") for text in rows[column]))[:documents]
    found = rows[column] if documents is None else (row[column] for row in itertools.islice(rows, documents))
    return [(f"{name} {number}", str(text)) for number, text in enumerate(found)]


ENWIK8 = "http://mattmahoney.net/dc/enwik8.zip"
HUB = {"wikitext": "Salesforce/wikitext:wikitext-2-raw-v1", "pg19": "emozilla/pg19"}
"""Where on the hub the usual corpora are, with the configuration; enwik8 is read from where it is published."""


def published(name: str, split: str = "train", documents: int | None = None) -> list[Text]:
    """The documents of "wikitext", "pg19" or "enwik8", or of any other dataset (`from_hub`), a configuration behind a
    colon. Of PG-19, which is large, give the number of `documents`.

    Raises:
        ModuleNotFoundError, ConnectionError, ValueError: as `from_hub`.
    """
    if name == "enwik8":
        try:
            import datasets
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("enwik8 is fetched with the package datasets: pip install datasets") from error
        try:
            path = datasets.DownloadManager().download(ENWIK8)
        except OSError as error:
            raise ConnectionError(
                f"cannot fetch {ENWIK8} ({error}); get it by hand and give it as local text"
            ) from error
        return enwik8(str(path))[split]
    place, _, config = HUB.get(name, name).partition(":")
    return from_hub(place, split, config or None, documents=documents)


class Stateful:
    """The batches of a stream of documents, with the memory carried, or begun again every `reset_every` steps.

    Rows go on reading where they are: only `fresh` differs. `per_document` False leaves a memory alone where a document
    begins, so that only the steps count, as in Memoria's training.

    Raises:
        ValueError: `reset_every` below 1.
    """

    def __init__(self, stream: DocumentStream, reset_every: int | None = None, per_document: bool = True) -> None:
        if reset_every is not None and reset_every < 1:
            raise ValueError(f"reset_every is {reset_every}; use 1 step or more, or None to carry the memory on")
        self.stream, self.reset_every, self.per_document = stream, reset_every, per_document

    @property
    def steps(self) -> int | None:
        """Steps until the end; None for a stream without end."""
        return self.stream.steps

    def __getitem__(self, step: int) -> DocumentBatch:
        """The batch of a step. Rows that have run out of documents are never fresh.

        Raises:
            IndexError: a step below 0, or behind the end.
        """
        batch = self.stream[step]
        begins = step == 0 if self.reset_every is None else step % self.reset_every == 0
        fresh = batch.fresh if self.per_document else torch.zeros_like(batch.fresh)
        return replace(batch, fresh=(fresh | begins) & (batch.document >= 0))

    def __iter__(self) -> Iterator[DocumentBatch]:
        """The batches from step 0 on."""
        return (self[step] for step in (itertools.count() if self.steps is None else range(self.steps)))
