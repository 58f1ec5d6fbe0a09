"""Invariant 7 of the matrix: a loss reaches as many segments back as asked, and no parameter is frozen unawares."""

from __future__ import annotations

import pytest
import torch

import mnemic
from families import make
from helpers import SEGMENT, assert_near, host, matrix_of_writes, over_decoders_that_write, tokens, trains
from mnemic.unrolling import unroll

# `unroll` is for causal models; an encoder's segments have no next token to predict.
COUNT = 4


def last_segment(ids):
    """Labels in the last segment only; its first token is predicted from the segment before, so it has none."""
    labels = ids.clone()
    labels[:, : -SEGMENT + 1] = -100
    return labels


@over_decoders_that_write
def test_every_parameter_gets_a_gradient_at_step_two(config, name):
    model, ids = make(name), tokens(2, 3 * SEGMENT)
    attachment = mnemic.attach(model, config)
    if not trains(model):
        with pytest.raises(RuntimeError, match="does not require grad"):
            unroll(model, ids, last_segment(ids)).loss.backward()
        return
    optimiser = torch.optim.AdamW(attachment.parameters(), lr=1e-2)
    for _ in range(2):
        optimiser.zero_grad(set_to_none=True)
        unroll(model, ids, last_segment(ids)).loss.backward()
        missing = [
            key for key, p in attachment.memory.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)
        ]
        optimiser.step()
    assert not missing
    # and none of the base's
    assert all(p.grad is None for key, p in model.named_parameters() if ".mnemic." not in key)


# what a gradient passes is the memory's and the core's affair: one family of each kind
@matrix_of_writes(["gpt2", "llama", "gemma3", "bloom"])
@pytest.mark.parametrize("bptt_segments", [0, 1, None])
def test_gradient_reaches_bptt_segments_back_and_no_further(config, name, bptt_segments, monkeypatch):
    model, ids = host(name, config), tokens(2, COUNT * SEGMENT)
    memory = mnemic.attached(model).memory
    memory_class = type(memory)
    write, written = memory_class.write, []

    def recording_write(self, hidden_btd, state, keep_bt=None, **known):
        after = write(self, hidden_btd, state, keep_bt, **known)
        if self.gradient_reach == 0:
            assert not any(tensor.requires_grad for tensor in after.values())
        elif torch.is_grad_enabled():
            # a zero of its own for every write: its gradient is what arrives there
            values = {key: tensor for key, tensor in after.items() if tensor.is_floating_point()}
            probes = {key: torch.zeros_like(tensor, requires_grad=True) for key, tensor in values.items()}
            written.append(probes)
            after |= {key: tensor + probes[key] for key, tensor in values.items()}
        return after

    monkeypatch.setattr(memory_class, "write", recording_write)
    # the loss is in the last segment, whose own write comes after it; writes before the reach are made without a
    # gradient, so they have no probe at all
    reach = COUNT - 1 if bptt_segments is None else bptt_segments
    reach = reach if memory.gradient_reach is None else min(reach, memory.gradient_reach)
    for parallel in (False,) if memory.writes_see_reads else (False, True):
        written.clear()
        result = unroll(model, ids, last_segment(ids), bptt_segments=bptt_segments, parallel=parallel)
        if result.loss.requires_grad:
            result.loss.backward()
        arrived = [
            any(probe.grad is not None and bool(probe.grad.abs().sum() > 0) for probe in probes.values())
            for probes in written
        ]
        assert sum(arrived) == reach


@over_decoders_that_write
def test_both_ways_of_unrolling_agree(config, name):
    model, ids = host(name, config), tokens(2, COUNT * SEGMENT)
    if mnemic.attached(model).memory.writes_see_reads:
        with pytest.raises(ValueError, match=r"cannot run all at once: (the memory reads|memory tokens)"):
            unroll(model, ids, ids, parallel=True)
        return
    results = []
    for parallel in (True, False):
        result = unroll(model, ids, ids, parallel=parallel)
        gradients = torch.autograd.grad(result.loss, mnemic.attached(model).parameters()) if trains(model) else ()
        results.append((result, gradients))
    (one, one_gradients), (other, other_gradients) = results
    assert_near(one.loss, other.loss, 1e-5)
    assert_near(one.logits, other.logits)
    for a, b in zip(one_gradients, other_gradients, strict=True):
        assert_near(a, b, 1e-4)
