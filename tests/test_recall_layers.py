"""Recall in some blocks: the others see the window and its sinks, and their keys are not kept."""

from __future__ import annotations

import pytest
import torch

import mnemic
from families import make
from helpers import SEGMENT, assert_near, feed, tokens
from mnemic import RecallConfig
from test_sinks import few_positions

SINKS, WINDOW = 4, 2 * SEGMENT
SMALL = {"segment_length": SEGMENT, "window": WINDOW, "sinks": 4, "unit": 4, "recall_in_reading": True}


def recalling(name="llama", *, family=None, **settings):
    model = make(name, **(family or {}))
    mnemic.attach(model, RecallConfig(**{**SMALL, "budget": 8, **settings}))
    return model


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_the_others_see_the_window_and_its_sinks(implementation):
    time = 6 * SEGMENT
    ids, bare = tokens(2, time), make("llama")
    bare.set_attn_implementation(implementation)
    query = torch.arange(time)[:, None]
    begin = (query // SEGMENT * SEGMENT - (WINDOW - SEGMENT - SINKS)).where(query >= WINDOW, 0)
    seen = (torch.arange(time) <= query) & ((torch.arange(time) >= begin) | (torch.arange(time) < SINKS))
    masked = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]

    def narrow(block, args, kwargs):
        return args, kwargs | {"attention_mask": masked}

    bare.model.layers[1].register_forward_pre_hook(narrow, with_kwargs=True)
    expected = bare(ids).logits
    model = make("llama")
    model.set_attn_implementation(implementation)
    mnemic.attach(model, RecallConfig(**SMALL, budget=64, read_layers=[0]))
    for sizes in ([time], [SEGMENT] * 6, [5, 1, 20, time - 26]):
        assert_near(feed(model, ids, sizes, carried=mnemic.memory_cache(model, WINDOW)), expected, 1e-4)


@torch.no_grad()
def test_all_blocks_by_name_are_all_blocks():
    ids = tokens(2, 6 * SEGMENT)
    found = [
        feed(model, ids, carried=mnemic.memory_cache(model, WINDOW))
        for model in (recalling(), recalling(read_layers=[1, -2]))
    ]
    assert torch.equal(*found)


@torch.no_grad()
def test_only_their_keys_are_kept():
    model, ids = recalling(read_layers=[-1]), tokens(1, 6 * SEGMENT)
    session, everything = mnemic.Session(model), mnemic.Session(recalling())
    for each in (session, everything):
        each.read(ids)
    assert (session.sinks, everything.sinks) == (SINKS, 0)
    bank, all_of_it = (each.stream.banks[0] for each in (session, everything))
    assert bank.positions.tolist() == list(range(SINKS, 6 * SEGMENT - WINDOW + SEGMENT + SINKS))
    assert (len(bank.keys(0)[0]), bank.tensors()["keys"].shape[1], all_of_it.tensors()["keys"].shape[1]) == (2, 1, 2)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_each_key_is_kept_once_where_positions_run_out(name):
    """Keys that are turned back behind the sinks are still in the window; where they cannot be, they leave."""
    model, ids = recalling(name, family=few_positions(name), read_layers=[0]), tokens(1, 12 * SEGMENT)
    session = mnemic.Session(model)
    for part in ids.split(5, 1):
        session.read(part)
    bank, window = session.stream.banks[0], session._cache.window
    left = session.stream.seen[0] - window.context[0]
    assert bank.positions.tolist() == list(range(SINKS, left + SINKS))
    whole = mnemic.Session(model)
    whole.read(ids)
    for mine, theirs in zip(bank.tensors().values(), whole.stream.banks[0].tensors().values(), strict=True):
        assert_near(mine.float(), theirs.float(), 1e-4)
    assert_near(session.forward(ids[:, :5]).logits, whole.forward(ids[:, :5]).logits, 1e-4)


@pytest.mark.parametrize(
    ("layers", "said"),
    [([], "is empty"), ([2], "read_layers is 2, but the model has 2 blocks"), ([0, -2], "names block 0 of 2 twice")],
)
def test_what_cannot_be_is_refused(layers, said):
    with pytest.raises(ValueError, match=said):
        recalling(read_layers=layers)
