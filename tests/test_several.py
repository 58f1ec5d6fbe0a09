"""Several memories on one model: each as it is alone."""

from __future__ import annotations

import pytest
import torch

import mnemic
from families import make
from helpers import SEGMENT, assert_near, feed, shake, tokens
from mnemic.memories.several import own

EMT = mnemic.EMTConfig(segment_length=SEGMENT, window=2 * SEGMENT, slots=4, dim=16)
RECALL = mnemic.RecallConfig(segment_length=SEGMENT, window=2 * SEGMENT, budget=8, sinks=4, unit=4)


def model_with(*configs, weights=None):
    model = make("llama")
    memory = mnemic.attach(model, list(configs)).memory
    shake(memory)
    members = list(memory.members) if len(configs) > 1 else [memory]
    for member, config in zip(members, configs, strict=True):
        if config is EMT and weights is not None:
            member.load_state_dict(weights)
    return model, members


@torch.no_grad()
def test_one_in_a_list_is_that_memory():
    assert mnemic.attach(make("llama"), [EMT]).config == EMT


@torch.no_grad()
def test_a_memory_that_adds_nothing_leaves_the_other_as_it_is_alone():
    ids = tokens(2, 9 * SEGMENT + 3)
    alone, (emt,) = model_with(EMT)
    expected = feed(alone, ids, carried=mnemic.memory_cache(alone, 2 * SEGMENT, sinks=0))
    both, members = model_with(RECALL, EMT, weights=emt.state_dict())
    recall = members[0]
    recall.config = recall.config.replace(budget=0, sinks=0)
    cache = mnemic.memory_cache(both, 2 * SEGMENT)
    assert_near(feed(both, ids, carried=cache), expected, 1e-5)
    its = mnemic.memory_cache(alone, 2 * SEGMENT, sinks=0)
    feed(alone, ids, carried=its)
    for name, tensor in own(cache.memory.stream.state, "1.").items():
        assert_near(tensor, its.memory.stream.state[name], 1e-5)
    # and recall, beside an EMT that reads nothing
    lone, _ = model_with(RECALL)
    expected = feed(lone, ids)
    quiet = make("llama")
    mnemic.attach(quiet, [RECALL, EMT])  # untrained
    assert_near(feed(quiet, ids), expected, 1e-5)
    assert (feed(both, ids) - expected).abs().max() > 1e-3


@torch.no_grad()
def test_they_are_saved_and_loaded_as_one(tmp_path):
    model, _ = model_with(RECALL, EMT)
    mnemic.attached(model).save_pretrained(tmp_path / "memory")
    session = mnemic.Session(model)
    session.read(tokens(1, 9 * SEGMENT))
    session.save(tmp_path / "s.memory")
    again = make("llama")
    mnemic.from_pretrained(again, tmp_path / "memory")
    there = mnemic.Session.load(tmp_path / "s.memory", again)
    assert torch.equal(there.forward(tokens(1, 4)).logits, session.forward(tokens(1, 4)).logits)


@pytest.mark.parametrize(
    ("configs", "said"),
    [
        ([EMT, RECALL.replace(window=3 * SEGMENT)], "window is 16 and 24"),
        ([EMT, RECALL.replace(segment_length=4)], "segment_length is 4 and 8"),
        (
            [mnemic.RMTConfig(segment_length=SEGMENT), mnemic.MemoryPromptConfig(segment_length=SEGMENT)],
            "put tokens beside|stands alone",
        ),
        ([RECALL, RECALL], "two of the memories keep the keys"),
        ([RECALL, mnemic.MemoryPromptConfig(segment_length=SEGMENT, window=2 * SEGMENT)], "of which theirs are none"),
        ([], "is no config and no list of some"),
        ([EMT, "emt"], "is no config and no list of some"),
    ],
)
def test_what_cannot_stand_together_is_refused(configs, said):
    model = make("llama")
    with pytest.raises(ValueError, match=said):
        mnemic.attach(model, configs)
    assert not mnemic.attachment.is_attached(model)
    with pytest.raises(ValueError, match="several are two at least"):
        mnemic.SeveralConfig()
    with pytest.raises(ValueError, match="among the memories"):
        mnemic.SeveralConfig.of([EMT, mnemic.SeveralConfig.of([EMT, EMT])])
