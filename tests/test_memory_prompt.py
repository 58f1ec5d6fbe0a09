"""What is MemoryPrompt's own: the LSTM over last tokens, prompts at the embeddings, a first segment without any."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import mnemic
from families import make
from helpers import SEGMENT, assert_differ, assert_near, shake, tokens
from mnemic.host.release import GENERATE_CACHE as CACHE
from mnemic.memories.memory_prompt import MemoryPromptConfig
from mnemic.state import nbytes

every_form = pytest.mark.parametrize("dim", [None, 24], ids=["paper", "projection"])


def build(width=16, depth=2, shaken=True, **settings):
    torch.manual_seed(0)
    settings = {"tokens": 2, "hidden": 12, **settings}
    memory = MemoryPromptConfig(segment_length=SEGMENT, **settings).build(width, depth)
    if shaken:
        shake(memory)
    return memory


def attached(name, **settings):
    model = make(name)
    torch.manual_seed(0)
    attachment = mnemic.attach(model, MemoryPromptConfig(segment_length=SEGMENT, tokens=3, hidden=16, **settings))
    shake(attachment.memory)
    return model, attachment


@every_form
@torch.no_grad()
def test_it_is_an_lstm_over_the_last_tokens_of_segments(dim):
    memory = build(dim=dim)
    segments = torch.randn(2, 6, SEGMENT, 16)
    mlp = nn.Sequential(memory.norm, memory.first, nn.ReLU(), memory.second)
    lstm = nn.LSTM(12, memory.lstm.hidden_size, batch_first=True)
    lstm.load_state_dict({f"{name}_l0": tensor for name, tensor in memory.lstm.state_dict().items()})
    outputs, (_, cell) = lstm(mlp(segments[:, :, -1]))
    state = memory.init_state(2)
    for s in range(6):
        state = memory.write(segments[:, s], state)
        prompts = memory.tokens_before(state).embeddings
        assert prompts.shape == (2, 2, 16)
        assert_near(prompts.flatten(1), memory.output(outputs[:, s]), 1e-5)
    assert_near(state["cell"], cell[0], 1e-5)
    assert state["count"].tolist() == [6, 6]


def test_only_the_last_real_token_is_read():
    memory = build()
    hidden = torch.randn(3, SEGMENT, 16, requires_grad=True)
    keep = torch.ones(3, SEGMENT, dtype=torch.bool)
    keep[1, 5:] = keep[2, :3] = False
    state = memory.write(hidden, memory.init_state(3), keep)
    (gradient,) = torch.autograd.grad(state["hidden"].sum(), hidden)
    last = torch.zeros(3, SEGMENT, dtype=torch.bool)
    last[0, 7] = last[1, 4] = last[2, 7] = True
    assert torch.equal(gradient.abs().sum(-1) > 0, last)
    for row, length in enumerate((8, 5, 8)):
        alone = memory.write(hidden[row : row + 1, :length], memory.init_state(1))
        assert_near(state["cell"][row], alone["cell"][0], 1e-6)


@torch.no_grad()
def test_a_row_without_tokens_reads_nothing():
    memory, keep = build(), torch.ones(2, SEGMENT, dtype=torch.bool)
    before = memory.write(torch.randn(2, SEGMENT, 16), memory.init_state(2))
    keep[1] = False
    after = memory.write(torch.randn(2, SEGMENT, 16), before, keep)
    assert all(torch.equal(after[name][1], before[name][1]) for name in before)
    assert not torch.equal(after["cell"][0], before["cell"][0])
    assert after["count"].tolist() == [2, 1]


@torch.no_grad()
def test_what_the_cell_held_is_kept_by_the_forget_gate_to_the_power_of_segments():
    memory, kept = build(), 0.9
    units = memory.lstm.hidden_size
    for weight in (memory.lstm.weight_ih, memory.lstm.weight_hh, memory.lstm.bias_hh):
        weight.zero_()
    # nothing enters, and the forget gate is 0.9 everywhere
    memory.lstm.bias_ih.zero_()
    memory.lstm.bias_ih[:units] = -1e4
    memory.lstm.bias_ih[units : 2 * units] = math.log(kept / (1 - kept))
    first = memory.init_state(2) | {"cell": torch.randn(2, units)}
    state = first
    for _ in range(20):
        state = memory.write(torch.randn(2, SEGMENT, 16), state)
    assert_near(state["cell"], kept**20 * first["cell"], 1e-5)
    memory.lstm.bias_ih[units : 2 * units] = 1e4
    state = first
    for _ in range(200):
        state = memory.write(torch.randn(2, SEGMENT, 16), state)
    assert torch.equal(state["cell"], first["cell"])


# --- on a host -------------------------------------------------------------------------------------------------------


@every_form
@pytest.mark.parametrize("name", ["gpt2", "llama"])
@torch.no_grad()
def test_prompts_stand_before_the_words_as_embeddings(name, dim):
    model, attachment = attached(name, dim=dim)
    one, two = tokens(2, SEGMENT), tokens(2, SEGMENT, 1)
    cache = mnemic.memory_cache(model, SEGMENT)
    first = model(one, **{CACHE: cache}).logits
    memory, state = attachment.memory, cache.memory.stream.state
    logits = model(two, **{CACHE: cache}).logits
    attachment.detach()
    assert torch.equal(first, model(one).logits)
    prompts = memory.tokens_before(state).embeddings
    words = model.get_input_embeddings()(two)
    joined = model(inputs_embeds=torch.cat([prompts, words], 1)).logits
    assert_near(logits, joined[:, memory.beside :], 1e-5)
    assert_differ(logits, model(two).logits, 1e-2)


@torch.no_grad()
def test_rows_that_have_read_nothing_have_no_prompt():
    memory = build()
    state = memory.init_state(2)
    assert memory.tokens_before(state) is None
    state = memory.write(torch.randn(2, SEGMENT, 16), state)
    state["count"][1] = 0
    assert memory.tokens_before(state).keep.tolist() == [[True, True], [False, False]]


@torch.no_grad()
def test_the_size_that_the_paper_gives():
    # an LSTM with 5 x 768 units behind an MLP with 1024: about seventy million parameters
    with torch.device("meta"):
        memory = MemoryPromptConfig().build(768, 12)
        slim = MemoryPromptConfig(dim=256).build(768, 12)
    units, hidden = 5 * 768, 1024
    mlp = 768 * hidden + hidden * hidden + 2 * hidden
    lstm = 4 * units * (hidden + units + 2)
    assert sum(p.numel() for p in memory.parameters()) == mlp + lstm + 2 * 768
    lstm = 4 * 256 * (hidden + 256 + 2)
    assert sum(p.numel() for p in slim.parameters()) == mlp + lstm + 257 * units + 2 * 768
    assert nbytes(memory.init_state(1)) == 8 * units + 8
    assert nbytes(slim.init_state(1)) == 8 * 256 + 8


def test_small_takes_a_size():
    assert MemoryPromptConfig.small(16, 64).dim is None
    assert MemoryPromptConfig.small(16, 64, 48).build(64, 2).init_state(3)["cell"].shape == (3, 48)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"tokens": 0}, "tokens is 0"), ({"hidden": 0}, "hidden is 0"), ({"dim": -1}, "dim is -1")],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MemoryPromptConfig(**settings)


def test_encoders_are_refused():
    with pytest.raises(ValueError, match="attach it to a causal model"):
        mnemic.attach(make("bert"), MemoryPromptConfig(segment_length=SEGMENT))
