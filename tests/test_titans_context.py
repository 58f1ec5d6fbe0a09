"""Titans' memory as context: memory tokens before a segment, against the definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import mnemic
from families import make
from helpers import (
    SEGMENT,
    assert_differ,
    assert_near,
    carrier,
    feed,
    host,
    stream,
    tokens,
)
from mnemic.memories.titans import TitansConfig
from mnemic.memory import Site
from test_titans import build, written

CONTEXT = TitansConfig(
    segment_length=SEGMENT, dim=16, heads=2, chunk=4, context="tokens", persistent=2, queries=3, write_layer=1
)


def loop_over_queries(memory, state):
    """[p ; h], one row, query and head at a time."""
    config, asker, rows = memory.config, memory.asker, []
    for b in range(len(state["learned_1"])):
        row = list(memory.tokens[: config.persistent])
        for token in memory.tokens[config.persistent :]:
            centred = token - token.mean()
            normed = centred / (centred.square().mean() + asker.norm.eps).sqrt()
            query, said = asker.query.weight @ (normed * asker.norm.weight + asker.norm.bias), []
            for head, part in enumerate(query.split(config.dim // config.heads)):
                answer = part / part.norm()
                for layer, first in enumerate(memory.first, 1):
                    answer = answer if layer == 1 else F.silu(answer) * (2.8 / len(answer)) ** 0.5
                    answer = (first[head] + state[f"learned_{layer}"][b, head]).T @ answer
                said.append(answer / (answer.square().mean() + 0.01).sqrt())
            row.append(token + asker.output.weight @ torch.cat(said))
        rows.append(torch.stack(row))
    return torch.stack(rows)


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("persistent", [0, 2])
def test_memory_tokens_are_what_the_network_says_of_each_query(layers, persistent):
    memory = build(context="tokens", layers=layers, persistent=persistent, queries=3).double()
    state = written(memory, torch.randn(2, 9, 32, dtype=torch.float64))
    state = {name: tensor.detach().double().requires_grad_() for name, tensor in state.items()}
    results = []
    for embeddings in (memory.tokens_before(state).embeddings, loop_over_queries(memory, state)):
        assert embeddings.shape == (2, memory.beside, 32)
        loss = (embeddings * torch.randn(2, memory.beside, 32, generator=torch.Generator().manual_seed(1))).sum()
        leaves = [*memory.parameters(), *state.values()]
        found = torch.autograd.grad(loss, leaves, allow_unused=True)
        results.append((embeddings, [each for each in found if each is not None]))
    (embeddings, found), (expected, wanted) = results
    torch.testing.assert_close(embeddings, expected, atol=1e-10, rtol=1e-10)
    assert len(found) == len(wanted) == 5 + 2 * layers
    for gradient, its in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, its, atol=1e-8, rtol=1e-8)


@torch.no_grad()
def test_a_memory_token_says_what_followed_its_query():
    # at a rate of 1 the value of a key is known by heart after it was met once
    settings = {"layers": 1, "heads": 1, "chunk": 1, "shift": False, "clip": None, "shaken": False}
    settings |= {"rate_bias": 50.0, "momentum_bias": -50.0, "forget_bias": -50.0}
    memory = build(context="tokens", persistent=1, queries=2, **settings)
    hidden, other = torch.randn(2, 1, 32)
    memory.tokens[1], memory.tokens[2] = hidden[0], other[0]
    torch.nn.init.normal_(memory.asker.output.weight)
    state = written(memory, hidden[:, None])
    value = memory.writer.value(memory.writer.norm(hidden[0]))
    said = memory.asker.output(value / (value.square().mean() + 0.01).sqrt())
    found = memory.tokens_before(state).embeddings[0]
    assert_near(found[1], hidden[0] + said, 1e-4)
    assert_differ(found[2], other[0] + said)
    assert torch.equal(found[0], memory.tokens[0])
    # a new memory has nothing to say, and one without an answer's way out neither
    assert torch.equal(memory.tokens_before(memory.init_state(1)).embeddings[0], memory.tokens)
    torch.nn.init.zeros_(memory.asker.output.weight)
    assert torch.equal(memory.tokens_before(state).embeddings[0], memory.tokens)


def by_hand(model, memory, ids):
    """The logits and the state after a stream, from plain calls of the base on [p ; h ; S]."""
    trunk, state, outputs = model.base_model, memory.init_state(len(ids)), []
    before, seen = memory.beside, []

    def block(layer):
        def hook(block, args, output):
            hidden = output[0] if isinstance(output, tuple) else output
            if Site(layer) in memory.writes:
                seen.append(hidden[:, before:])
            if Site(layer) in memory.reads:
                hidden = memory.read(Site(layer), hidden, state)
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return hook

    blocks = trunk.h if hasattr(trunk, "h") else trunk.layers
    hooks = [each.register_forward_hook(block(layer)) for layer, each in enumerate(blocks)]
    for part in ids.split(SEGMENT, 1):
        words = trunk.get_input_embeddings()(part)
        embeddings = torch.cat([loop_over_queries(memory, state), words], 1)
        with mnemic.attached(model).disabled():
            outputs.append(model(inputs_embeds=embeddings, use_cache=False).logits[:, before:])
        state = memory.write(seen[-1], state)
    for hook in hooks:
        hook.remove()
    return torch.cat(outputs, 1), state


@pytest.mark.parametrize("reads", [None, [], [0, 1]], ids=["closing gate", "none", "below the write"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
@torch.no_grad()
def test_a_stream_as_context_equals_the_definition(name, reads):
    model, ids = host(name, CONTEXT.replace(read_layers=reads)).double(), tokens(2, 4 * SEGMENT)
    memory = mnemic.attached(model).memory
    expected, state = by_hand(model, memory, ids)
    for lengths in (None, [3, 9, 12, 8]):
        cache = carrier(model)
        assert_near(feed(model, ids, lengths, carried=cache), expected, 1e-5)
        for key, tensor in stream(cache).state.items():
            assert_near(tensor, state[key], 1e-5)


def test_as_context_without_a_closing_gate():
    memory = build(context="tokens", read_layers=[])
    assert (memory.reads, len(memory.readers), memory.writes_see_reads, memory.beside) == ((), 0, True, 20)
    hidden, state = torch.randn(2, 5, 32), memory.init_state(2)
    output, after = memory.naive(hidden, state)
    assert torch.equal(output, hidden)
    torch.testing.assert_close(after, memory.write(hidden, state), atol=1e-5, rtol=1e-5)
    gated = build(context="tokens")
    assert gated.readers["0"].gate is not None
    assert gated.asker.gate is None
    for context in ("gate", "layer"):
        assert build(context=context).tokens_before(state) is None


def test_other_contexts_are_described_as_before_there_were_tokens():
    # finished runs are recognised by their settings
    names = {"persistent", "queries"}
    for context in ("gate", "layer"):
        assert not names & set(TitansConfig(context=context).to_dict())
    assert names < set(CONTEXT.to_dict())
    assert mnemic.MemoryConfig.from_dict(TitansConfig().to_dict() | {"context": "tokens"}).queries == 16


def test_as_context_is_for_decoders():
    with pytest.raises(ValueError, match="context 'tokens' puts tokens before a decoder's text; attach it to a causal"):
        mnemic.attach(make("bert"), CONTEXT)
