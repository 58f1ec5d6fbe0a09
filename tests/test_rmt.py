"""The Recurrent Memory Transformer against its definition, `[m ; x ; m]` by hand, and at its edges."""

from __future__ import annotations

import pytest
import torch

import mnemic
from families import make
from helpers import SEGMENT, assert_differ, assert_near, carrier, feed, host, stream, tokens, trained
from mnemic import RMTConfig
from mnemic.host.release import GENERATE_CACHE as CACHE

CONFIG = RMTConfig(segment_length=SEGMENT, tokens=3)


def by_hand(model, memory, ids):
    """The logits and the memory after each segment, from plain calls of the base with embeddings."""
    trunk, count = model.base_model, memory.config.tokens
    outputs, last = [], []
    hook = (trunk.h if hasattr(trunk, "h") else trunk.layers)[-1].register_forward_hook(
        lambda block, args, output: last.append(output[0] if isinstance(output, tuple) else output)
    )
    tokens_bnd = memory.first.expand(len(ids), -1, -1)
    for part in ids.split(SEGMENT, 1):
        words = trunk.get_input_embeddings()(part)
        with mnemic.attached(model).disabled():
            logits = model(inputs_embeds=torch.cat([tokens_bnd, words, tokens_bnd], 1), use_cache=False).logits
        outputs.append(logits[:, count : count + part.shape[1]])
        tokens_bnd = memory.norm(last[-1][:, -count:])
    hook.remove()
    return torch.cat(outputs, 1), tokens_bnd


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "phi"])
@torch.no_grad()
def test_a_stream_equals_the_definition(name):
    model, ids = host(name, CONFIG), tokens(2, 4 * SEGMENT)
    expected, state = by_hand(model, mnemic.attached(model).memory, ids)
    for lengths in (None, [3, 9, 12, 8]):
        cache = carrier(model)
        assert_near(feed(model, ids, lengths, carried=cache), expected, 1e-5)
        assert_near(stream(cache).state["tokens"], state, 1e-5)


@torch.no_grad()
def test_flushing_writes_what_was_read_so_far():
    model, ids = host("llama", CONFIG), tokens(1, SEGMENT + 3)
    session = mnemic.Session(model)
    session.read(ids)
    before = session.stream
    session.flush()
    _, state = by_hand(model, mnemic.attached(model).memory, ids)
    assert_near(session.stream.state["tokens"], state, 1e-5)
    assert (session.stream.counts, session.stream.written, session.stream.seen) == ((0,), (2,), (SEGMENT + 3,))
    assert session.cache.window.kept == 0
    assert_differ(before.state["tokens"], session.stream.state["tokens"])
    session.flush()  # nothing waits
    assert session.stream.written == (2,)


@torch.no_grad()
def test_an_encoder_has_its_memory_behind_the_text():
    model, ids = host("bert", CONFIG), tokens(2, 2 * SEGMENT)
    memory, layer = mnemic.attached(model).memory, carrier(model)
    logits = feed(model, ids, carried=layer)
    tokens_bnd, expected = memory.first.expand(2, -1, -1), []
    positions = torch.cat([torch.arange(SEGMENT), torch.arange(253, 256)])[None]
    for part in ids.split(SEGMENT, 1):
        words = model.get_input_embeddings()(part)
        with mnemic.attached(model).disabled():
            output = model(
                inputs_embeds=torch.cat([words, tokens_bnd], 1), position_ids=positions, output_hidden_states=True
            )
        expected.append(output.logits[:, :SEGMENT])
        tokens_bnd = memory.norm(output.hidden_states[-1][:, SEGMENT:])
    assert_near(logits, torch.cat(expected, 1), 1e-5)
    assert_near(layer.stream.state["tokens"], tokens_bnd, 1e-5)


@torch.no_grad()
def test_outputs_have_the_words_alone():
    model, ids = host("llama", CONFIG), tokens(2, 2 * SEGMENT)
    output = model(ids, output_hidden_states=True)
    assert output.logits.shape[:2] == ids.shape
    assert {tuple(hidden.shape[:2]) for hidden in output.hidden_states} == {tuple(ids.shape)}


@torch.no_grad()
def test_the_memory_keeps_its_size_over_many_segments():
    model = make("gpt2")
    mnemic.attach(model, CONFIG)
    session = mnemic.Session(model)
    session.read(tokens(1, 300 * SEGMENT))
    assert_near(session.stream.state["tokens"].std(-1, unbiased=False), torch.ones(1, 3), 1e-3)


@torch.no_grad()
def test_rows_of_a_sliding_host_begin_their_segments_apart():
    # layers that see 16 keys, counted as they lie: tokens of a row that begins must not stand between another's keys
    model = trained(make("mistral"), CONFIG).model
    alone = []
    for row, time in enumerate((5, 2)):
        cache = mnemic.memory_cache(model, SEGMENT)
        first = feed(model, tokens(1, time, row), carried=cache)
        alone.append((first, feed(model, tokens(1, 20, 9 + row), carried=cache)))
    ids, mask = torch.zeros(2, 5, dtype=torch.long), torch.ones(2, 5, dtype=torch.long)
    ids[0], ids[1, 3:], mask[1, :3] = tokens(1, 5)[0], tokens(1, 2, 1)[0], 0
    cache = mnemic.memory_cache(model, SEGMENT)
    feed(model, ids, mask=mask, carried=cache)
    logits = feed(model, torch.cat([tokens(1, 20, 9), tokens(1, 20, 10)]), carried=cache)
    assert_near(logits, torch.cat([alone[0][1], alone[1][1]]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens": 0}, "tokens is 0; a memory has at least 1"),
        ({"deviation": 0.0}, "deviation is 0.0; tokens that start alike stay alike"),
        ({"tokens": 125}, "a segment of 8 tokens with 250 memory tokens beside it is longer than the model's 256"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(ValueError, match=message):
        mnemic.attach(make("gpt2"), RMTConfig(**{"segment_length": SEGMENT, **settings}))


@torch.no_grad()
def test_a_cache_that_it_cannot_join_is_refused():
    model, ids = make("llama"), tokens(1, 5)
    used = model(ids, use_cache=True)[CACHE]
    mnemic.attach(model, CONFIG)
    with pytest.raises(ValueError, match=rf"cannot join a DynamicCache of 5 tokens; pass {CACHE}=mnemic"):
        model(ids, **{CACHE: used})
    gpt = host("gpt2", CONFIG)
    with pytest.raises(ValueError, match="memory tokens have no token_type_ids"):
        gpt(ids, token_type_ids=torch.zeros_like(ids))
