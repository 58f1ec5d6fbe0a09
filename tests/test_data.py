"""Rows of any length to batches of whole segments, documents to rows."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset

import mnemic
from helpers import CONFIGS, SEGMENT, assert_near, host, tokens
from mnemic.unrolling import IGNORED, unroll
from runs import characters, prose


def test_rows_are_padded_to_whole_segments_and_padding_is_never_labelled():
    batch = mnemic.collate([{"input_ids": [5, 6, 7]}, {"input_ids": list(range(1, 11))}], 4, pad_token_id=9)
    assert batch["input_ids"].tolist() == [[5, 6, 7, *[9] * 9], [*range(1, 11), 9, 9]]
    assert batch["labels"].tolist() == [[5, 6, 7, *[IGNORED] * 9], [*range(1, 11), IGNORED, IGNORED]]


def test_labels_stand_only_where_they_are_wanted():
    row = {"input_ids": torch.arange(1, 6), "labels": [IGNORED, IGNORED, IGNORED, 4, 5]}
    assert mnemic.collate([row], 4)["labels"].tolist() == [[*[IGNORED] * 3, 4, 5, *[IGNORED] * 3]]


def test_padding_of_others_is_taken_out():
    rows = [
        {"input_ids": [0, 0, 7, 8], "attention_mask": [0, 0, 1, 1]},
        {"input_ids": [7, 8, 0], "attention_mask": [1, 1, 0], "labels": [IGNORED, 8, 0]},
    ]
    batch = mnemic.collate(rows, 4, pad_token_id=3)
    assert batch["input_ids"].tolist() == [[7, 8, 3, 3]] * 2
    assert batch["labels"].tolist() == [[7, 8, IGNORED, IGNORED], [IGNORED, 8, IGNORED, IGNORED]]


def test_no_more_segments_than_asked():
    batch = mnemic.SegmentCollator(2, segments=2)([{"input_ids": [1, 2, 3, 4, 5]}, {"input_ids": [6]}])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4], [6, 0, 0, 0]]


@torch.no_grad()
def test_padding_changes_no_loss():
    """A row's loss in a batch with longer ones is that of the row alone."""
    model = host("llama", CONFIGS["emt-0"])
    short, long = ({"input_ids": tokens(1, n, n)[0]} for n in (11, 3 * SEGMENT))
    both = unroll(model, *mnemic.collate([short, long], SEGMENT).values())
    for number, row in enumerate((short, long)):
        alone = unroll(model, *mnemic.collate([row], SEGMENT).values())
        assert_near(both.logits[both.rows == number], alone.logits, 1e-5)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": []}, "row 1 has no token"),
        ({"input_ids": [[1, 2]]}, r"row 1 has input_ids \[1, 2\]"),
        ({"input_ids": [1, 2], "labels": [1]}, r"input_ids \[2\] and labels \[1\]"),
    ],
)
def test_rows_that_cannot_be_collated(row, message):
    with pytest.raises(ValueError, match=message):
        mnemic.collate([{"input_ids": [1]}, row], 4)


def test_collator_settings():
    with pytest.raises(ValueError, match="no rows"):
        mnemic.collate([], 4)
    with pytest.raises(ValueError, match="segment_length is 0"):
        mnemic.SegmentCollator(0)
    with pytest.raises(ValueError, match="segments 0"):
        mnemic.SegmentCollator(4, segments=0)


def test_documents_are_cut_into_streams():
    documents = [torch.arange(11), torch.arange(100, 103), torch.arange(200, 204)]
    streams = mnemic.Streams(documents, 2, 2)
    assert [row["input_ids"].tolist() for row in streams] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9],
        [100, 101],
        [200, 201, 202, 203],
    ]
    with pytest.raises(ValueError, match=r"no document fills a segment of 12 tokens \(the longest has 11\)"):
        mnemic.Streams(documents, 12, 1)
    with pytest.raises(ValueError, match="segments 0"):
        mnemic.Streams(documents, 2, 0)


def test_streams_are_made_of_texts_lists_and_columns():
    tokenizer = characters()
    text = prose(40)
    ids = tokenizer(text)["input_ids"]
    expected = [row["input_ids"].tolist() for row in mnemic.Streams([torch.tensor(ids)], SEGMENT, 2)]
    for documents in ([text], [ids], Dataset.from_dict({"text": [text]})["text"]):
        rows = mnemic.Streams(documents, SEGMENT, 2, tokenizer)
        assert [row["input_ids"].tolist() for row in rows] == expected


@pytest.mark.parametrize(
    ("documents", "said"),
    [
        ("one text", r"pass \[text\]"),
        (["a text"], "texts need a tokenizer"),
        ([{"text": "a", "id": 1}], r"this has \['id', 'text'\]; pass one column"),
        ([[[1, 2]]], r"this is \[1, 2\] of torch.int64"),
    ],
)
def test_what_is_no_document_is_named(documents, said):
    with pytest.raises(ValueError, match=said):
        mnemic.Streams(documents, SEGMENT, 2)
