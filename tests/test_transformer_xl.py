"""Transformer-XL: what equals one forward, what reaches where, and what the queue holds."""

from __future__ import annotations

import pytest
import torch

import mnemic
from families import DECODERS, make
from helpers import SEGMENT, assert_differ, assert_near, feed, tokens
from mnemic import TransformerXLConfig
from mnemic.unrolling import unroll


def attach(name, size, **settings):
    model = make(name)
    mnemic.attach(model, TransformerXLConfig(segment_length=SEGMENT, size=size, **settings), freeze=False)
    return model


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_a_memory_as_long_as_the_text_equals_one_forward(name):
    ids = tokens(2, 5 * SEGMENT - 3)
    expected = make(name)(ids).logits
    # a table of positions serves as long as the queue is not full: then hidden states keep the places they had
    assert_near(feed(attach(name, 4 * SEGMENT), ids), expected, 1e-5)
    assert_near(feed(attach(name, 4 * SEGMENT), ids, [3, 1, 9, *[1] * 24]), expected, 1e-5)
    assert_differ(feed(attach(name, SEGMENT), ids)[:, 2 * SEGMENT :], expected[:, 2 * SEGMENT :])


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
@torch.no_grad()
def test_distances_stay_right_when_the_queue_has_turned_over(name):
    # one block: what a token sees is the last 16 tokens before its segment and its segment, at their true distances
    model = make(name, num_hidden_layers=1)
    ids, size = tokens(2, 6 * SEGMENT), 2 * SEGMENT
    wanted = []
    for start in range(0, ids.shape[1], SEGMENT):
        first = max(0, start - size)
        wanted.append(model(ids[:, first : start + SEGMENT]).logits[:, -SEGMENT:])
    mnemic.attach(model, TransformerXLConfig(segment_length=SEGMENT, size=size))
    assert_near(feed(model, ids), torch.cat(wanted, 1), 1e-5)


@pytest.mark.parametrize("size", [SEGMENT, 11])
@torch.no_grad()
def test_same_length_gives_every_token_exactly_so_many_keys(size):
    ids, time = tokens(2, 5 * SEGMENT), 5 * SEGMENT
    query, key = torch.arange(time)[:, None], torch.arange(time)
    seen = (key <= query) & (key > query - size)
    band = torch.zeros(time, time).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None].expand(2, 1, -1, -1)
    expected = make("llama")(ids, attention_mask=band).logits
    assert_near(feed(attach("llama", size, same_length=True), ids), expected, 1e-5)
    assert_near(feed(attach("llama", size, same_length=True), ids, [1] * time), expected, 1e-5)
    assert_differ(feed(attach("llama", size), ids), expected)


@torch.no_grad()
def test_same_length_over_padding():
    model, short = attach("llama", SEGMENT, same_length=True), tokens(1, 19)
    ids, mask = torch.zeros(2, 24, dtype=torch.long), torch.zeros(2, 24, dtype=torch.long)
    ids[0, 5:], mask[0, 5:] = short[0], 1
    ids[1], mask[1] = tokens(1, 24, 3)[0], 1
    cache = mnemic.memory_cache(model, SEGMENT)
    assert_near(feed(model, ids, mask=mask, carried=cache)[0, 5:], feed(model, short)[0])


@torch.no_grad()
def test_a_longer_memory_in_use_than_in_training():
    model, ids = attach("llama", SEGMENT), tokens(2, 4 * SEGMENT)
    short = feed(model, ids)
    mnemic.attached(model).detach()
    mnemic.attach(model, TransformerXLConfig(segment_length=SEGMENT, size=4 * SEGMENT))
    assert_differ(feed(model, ids), short)
    assert_near(feed(model, ids), make("llama")(ids).logits, 1e-5)


def test_projections_learn_from_the_memory_and_nothing_crosses_a_segment():
    """One block: the second segment's loss has the gradient of one forward over [SG(first) ; second]."""
    ids = tokens(2, 2 * SEGMENT)
    labels = ids.clone()
    labels[:, : SEGMENT + 1] = -100
    plain = make("llama", num_hidden_layers=1)
    embedded = plain.get_input_embeddings()(ids)
    embedded = torch.cat([embedded[:, :SEGMENT].detach(), embedded[:, SEGMENT:]], 1)
    plain(inputs_embeds=embedded, labels=labels).loss.backward()
    model = make("llama", num_hidden_layers=1)
    mnemic.attach(model, TransformerXLConfig(segment_length=SEGMENT, size=SEGMENT), freeze=False)
    unroll(model, ids, labels).loss.backward()
    for (name, parameter), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert parameter.grad is not None, name
        assert_near(parameter.grad, expected.grad, 1e-5)
    # and the memory has a part in it: a queue of one token gives the keys another gradient
    other = make("llama", num_hidden_layers=1)
    mnemic.attach(other, TransformerXLConfig(segment_length=SEGMENT, size=1), freeze=False)
    unroll(other, ids, labels).loss.backward()
    own, its = (each.model.layers[0].self_attn.k_proj.weight.grad for each in (model, other))
    assert_differ(own, its)


def test_the_queue_holds_the_last_tokens_of_every_row():
    memory = TransformerXLConfig(segment_length=4, size=5).build(1, 2)
    state, queues = memory.init_state(2), [[], []]
    source, value = torch.Generator().manual_seed(0), 1.0
    for _ in range(6):
        keep = torch.rand(2, 4, generator=source) < 0.7
        keep[:, 0] = True
        hidden = torch.zeros(2, 4, 2)
        for b in range(2):
            for t in range(4):
                hidden[b, t], value = value, value + 1
                if keep[b, t]:
                    queues[b] = [*queues[b], value - 1][-5:]
        state = memory.write(hidden, state, keep)
        for b, queue in enumerate(queues):
            assert state["count"][b] == len(queue)
            assert state["memory"][b, :, 0].tolist() == queue + [0] * (state["memory"].shape[1] - len(queue))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("llama", {"size": 0}, "size is 0; the memory holds at least 1 token"),
        ("llama", {"window": 16}, "window is 16, so the base would keep keys that the memory holds too; leave it at"),
        ("bert", {}, "Transformer-XL is a decoder's memory"),
        ("gpt2", {"size": 250}, "a segment of 8 tokens with 250 memory tokens beside it is longer than"),
        ("bloom", {"same_length": True, "size": 8}, "a span of 8 keys cannot join a model that has its own"),
        ("mistral", {"same_length": True, "size": 8}, "a span of 8 keys cannot join a model that has its own"),
    ],
)
def test_refusals(name, settings, message):
    with pytest.raises(ValueError, match=message):
        mnemic.attach(make(name), TransformerXLConfig(**{"segment_length": SEGMENT, "size": 16, **settings}))
    # nothing was left behind
    assert not any(hasattr(module, "mnemic") for module in make(name).modules())
