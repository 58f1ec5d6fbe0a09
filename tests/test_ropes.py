"""Rotary embeddings that depend on the length: a window is the same wherever it stands, and whoever else reads."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

import mnemic
from families import COMMON, GROUPED
from helpers import CONFIGS, SEGMENT, assert_differ, assert_near, shake, tokens
from mnemic.host.release import GENERATE_CACHE as CACHE

ORIGINAL = 32
"""Positions that these models were made for."""
WINDOW = 2 * SEGMENT
HALF = COMMON["hidden_size"] // 8


def dynamic():
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    return LlamaForCausalLM(
        LlamaConfig(**(COMMON | GROUPED | {"max_position_embeddings": ORIGINAL}), rope_parameters=rope)
    )


def longrope():
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * HALF,
        "long_factor": [6.0] * HALF,
        "original_max_position_embeddings": ORIGINAL,
    }
    config = Phi3Config(**(COMMON | GROUPED), rope_parameters=rope, original_max_position_embeddings=ORIGINAL)
    return Phi3ForCausalLM(config)


def hosted(make, **changes):
    torch.manual_seed(0)
    model = make().eval()
    attachment = mnemic.attach(model, CONFIGS["emt-0"].replace(window=WINDOW, **changes))
    shake(attachment.memory)
    return model


@pytest.mark.parametrize("make", [dynamic, longrope])
@torch.no_grad()
def test_a_window_is_the_same_wherever_it_stands(make):
    model = hosted(make)
    last = tokens(1, 2 * SEGMENT, seed=1)

    def logits(before):
        session = mnemic.Session(model)
        with mnemic.attached(model).disabled():  # the window alone
            if before:
                session.read(tokens(1, before, seed=2))
            session.read(last[:, :SEGMENT])
            return session.forward(last[:, SEGMENT:]).logits[0, -1]

    # another text within the window is another window; a second layer sees one more segment back
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    near = logits(0)
    for segments in (1, 3, 5, 11, 50):
        assert_near(logits(segments * SEGMENT), near, 1e-3)


@pytest.mark.parametrize("make", [dynamic, longrope])
@torch.no_grad()
def test_what_one_session_reads_changes_no_bit_of_another(make):
    model = hosted(make)
    ids, more = tokens(1, 5 * SEGMENT, seed=1), tokens(1, SEGMENT - 1, seed=3)

    def alice(meanwhile):
        session = mnemic.Session(model)
        session.read(ids)
        meanwhile()
        return session.forward(more).logits

    alone = alice(lambda: None)
    assert torch.equal(alice(lambda: mnemic.Session(model).read(tokens(1, 60 * SEGMENT, seed=4))), alone)
    mnemic.attached(model).detach()
    assert_differ(model(ids).logits[:, -1], alone[:, -1])


@pytest.mark.parametrize("make", [dynamic, longrope])
@torch.no_grad()
def test_a_window_sees_as_the_base_sees_a_text_of_its_length(make):
    model = hosted(make)
    memory, ids = mnemic.attached(model), tokens(1, WINDOW, seed=1)
    with memory.disabled():
        expected = model(ids).logits
        cache = mnemic.memory_cache(model, WINDOW)
        assert_near(model(ids, **{CACHE: cache}).logits, expected, 1e-5)
        # a longer text in one go chooses other frequencies, and leaves them on the module
        model(tokens(1, 3 * ORIGINAL, seed=2))
        cache = mnemic.memory_cache(model, WINDOW)
        assert_near(model(ids, **{CACHE: cache}).logits, expected, 1e-5)
