"""A session goes on with the memory that it was read with, and with no other."""

from __future__ import annotations

import pytest
import torch

import mnemic
from families import make
from helpers import SEGMENT, tokens

RECALL = mnemic.RecallConfig(segment_length=SEGMENT, window=2 * SEGMENT, budget=8, sinks=4, unit=4)
PAIRS = {
    "other blocks": (RECALL.replace(read_layers=[1]), RECALL.replace(read_layers=[0])),
    "all blocks": (RECALL, RECALL.replace(read_layers=[1])),
    "stored smaller": (RECALL, RECALL.replace(stored="int8")),
    "another kind": (mnemic.EMTConfig(segment_length=SEGMENT, slots=4, dim=16), mnemic.KNNLMConfig(segment_length=8)),
    "another width": tuple(mnemic.EMTConfig(segment_length=SEGMENT, slots=4, dim=dim) for dim in (16, 32)),
}


@pytest.mark.parametrize(("first", "second"), PAIRS.values(), ids=list(PAIRS))
@torch.no_grad()
def test_a_session_of_another_memory_is_refused(first, second):
    model = make("llama")
    attachment = mnemic.attach(model, first)
    session, other = mnemic.Session(model, window=2 * SEGMENT), mnemic.Session(model, window=2 * SEGMENT)
    session.read(tokens(1, 60))
    attachment.detach()
    attachment = mnemic.attach(model, second)
    before = session.stream
    for use in (
        lambda: session.read(tokens(1, 9)),
        lambda: session.fork().forward(tokens(1, 9)),
        lambda: mnemic.SessionBatch([session, other]).read([tokens(1, 9)[0]] * 2),
    ):
        with pytest.raises(ValueError, match="has been read with another memory"):
            use()
    assert session.stream is before
    attachment.detach()
    mnemic.attach(model, first)
    session.read(tokens(1, 9))
    assert session.stream.seen == (69,)


@torch.no_grad()
def test_sinks_cannot_be_forgotten_and_what_left_can():
    model = make("llama")
    mnemic.attach(model, RECALL.replace(read_layers=[1], window=3 * SEGMENT))
    session = mnemic.Session(model, keep_text=True)
    session.read(tokens(1, 10 * SEGMENT))
    kept = session.stream.banks[0].positions.tolist()
    for first, last in ((0, 3), (0, 60), (3, 20), (kept[-1] + 1, kept[-1] + 1)):
        with pytest.raises(
            ValueError, match=rf"the first 4, its sinks, and .* use 4 <= first <= last < {kept[-1] + 1}"
        ):
            session.forget(first, last)
    assert session.stream.banks[0].positions.tolist() == kept
    assert session.forget(4, 7) == 4
    assert session.forget(kept[-1], kept[-1]) == 1
    assert session.stream.banks[0].positions.tolist() == kept[4:-1]


def test_a_head_that_was_replaced_is_named():
    model = make("llama")
    attachment = mnemic.attach(model, mnemic.KNNLMConfig(segment_length=SEGMENT))
    model.resize_token_embeddings(100)
    with pytest.raises(ValueError, match="another head than when its memory was attached"):
        model(tokens(1, 20))
    attachment.detach()
    mnemic.attach(model, mnemic.KNNLMConfig(segment_length=SEGMENT))
    assert model(tokens(1, 20)).logits.shape[-1] == 100
