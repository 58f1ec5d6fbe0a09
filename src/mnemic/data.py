"""From texts to batches of streams: documents cut into rows of whole segments, and rows collated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Dataset

from mnemic.unrolling import IGNORED


@dataclass
class SegmentCollator:
    """Makes a batch of rows that are streams: padded to whole segments, which `unroll` and `mnemic.Trainer` want.

    A row is a mapping with `input_ids`, a sequence of token ids of any length, and maybe `labels`, as long, -100 where
    there is no loss. Without them every token but a row's first is predicted from those before it. Tokens that an
    `attention_mask` marks as padding are taken out. Of a longer row, `segments` segments are taken, from its beginning.

    Padding follows a row's tokens, so they do not see it, and it is never labelled. `pad_token_id` is only what stands
    there.
    """

    segment_length: int
    segments: int | None = None
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        if self.segment_length < 1 or (self.segments is not None and self.segments < 1):
            raise ValueError(f"segment_length is {self.segment_length}, segments {self.segments}; use 1 or more")

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Int[Tensor, "b t"]]:
        """`input_ids` and `labels`, both `[b, s * segment_length]`, with s as the longest row needs.

        Raises:
            ValueError: no rows, an empty one, or labels of another length than their tokens.
        """
        if not rows:
            raise ValueError("there are no rows to collate; pass at least 1")
        pairs = [self._pair(row, number) for number, row in enumerate(rows)]
        longest = max(len(ids) for ids, _ in pairs)
        width = -(-longest // self.segment_length) * self.segment_length
        input_ids = torch.full((len(pairs), width), self.pad_token_id)
        labels = torch.full((len(pairs), width), IGNORED)
        for row, (ids, wanted) in enumerate(pairs):
            input_ids[row, : len(ids)] = ids
            labels[row, : len(ids)] = wanted
        return {"input_ids": input_ids, "labels": labels}

    def _pair(self, row: Mapping[str, Any], number: int) -> tuple[Tensor, Tensor]:
        if row.get("input_ids") is None:
            raise ValueError(f"row {number} has no input_ids, it has {sorted(row)}; tokenize the texts first")
        ids = torch.as_tensor(row["input_ids"], dtype=torch.long)
        given = row.get("labels")
        labels = ids if given is None else torch.as_tensor(given, dtype=torch.long)
        if ids.ndim != 1 or labels.shape != ids.shape:
            raise ValueError(
                f"row {number} has input_ids {list(ids.shape)} and labels {list(labels.shape)}; give two lists of one "
                "length"
            )
        if (mask := row.get("attention_mask")) is not None:
            real = torch.as_tensor(mask).bool()
            ids, labels = ids[real], labels[real]
        if len(ids) == 0:
            raise ValueError(f"row {number} has no token; leave it out")
        most = None if self.segments is None else self.segments * self.segment_length
        return ids[:most], labels[:most]


def collate(
    rows: Sequence[Mapping[str, Any]], segment_length: int, *, segments: int | None = None, pad_token_id: int = 0
) -> dict[str, Int[Tensor, "b t"]]:
    """A batch of streams from rows of any length: what a `SegmentCollator` of these settings makes."""
    return SegmentCollator(segment_length, segments, pad_token_id)(rows)


class Streams(Dataset[dict[str, Tensor]]):
    """Documents cut into rows of `segments` whole segments, in order: `{"input_ids": [segments * segment_length]}`.

    A document is a text, if there is a `tokenizer` (Hugging Face's), or its token ids. A text column of `datasets` is a
    sequence of such: `Streams(dataset["text"], 64, 4, tokenizer)`.

    What does not fill a row at a document's end is a shorter row, of whole segments if it has one, and no row ever
    holds two documents. Less than a segment is left out.

    Raises:
        ValueError: sizes below 1, no document that fills a segment, texts without a tokenizer, or what is no document.
    """

    def __init__(
        self,
        documents: Iterable[str | Sequence[int] | Int[Tensor, " n"]],
        segment_length: int,
        segments: int,
        tokenizer: Any = None,
    ) -> None:
        if segment_length < 1 or segments < 1:
            raise ValueError(f"segment_length is {segment_length}, segments {segments}; use 1 or more")
        self.rows: list[Tensor] = []
        longest = 0
        if isinstance(documents, str):
            raise ValueError("this is one text, and documents are several; pass [text]")
        for given in documents:
            document = _ids(given, tokenizer)
            longest = max(longest, len(document))
            whole = document[: len(document) - len(document) % segment_length]
            self.rows += [row for row in whole.split(segments * segment_length) if len(row)]
        if not self.rows:
            raise ValueError(
                f"no document fills a segment of {segment_length} tokens (the longest has {longest}); "
                "give longer texts or a shorter segment_length"
            )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index]}


def _ids(document: Any, tokenizer: Any) -> Int[Tensor, " n"]:
    """The token ids of one document."""
    if isinstance(document, str):
        if tokenizer is None:
            raise ValueError("texts need a tokenizer: Streams(texts, segment_length, segments, tokenizer)")
        document = tokenizer(document, verbose=False)["input_ids"]  # not its reminder of the model's length
    if isinstance(document, Mapping):
        raise ValueError(f"a document is a text or token ids, this has {sorted(document)}; pass one column of the rows")
    try:
        ids = torch.as_tensor(document)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"a document is a text or a list of token ids, this is {str(document)[:80]!r}") from error
    if ids.ndim != 1 or ids.is_floating_point():
        raise ValueError(f"a document is a text or a list of token ids, this is {list(ids.shape)} of {ids.dtype}")
    return ids
