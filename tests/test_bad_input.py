"""Every wrong use is an error that names the value, the limit and the mend, and that leaves nothing half done."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import transformers as hf

import mnemic
from families import COMMON, DECODERS, POSITIONS, make
from helpers import (
    CONFIGS,
    SEGMENT,
    assert_same_stream,
    carrier,
    every_kind,
    feed,
    first_forms,
    host,
    matrix,
    positions_of,
    stream,
    tokens,
    trained,
)
from mnemic import EMTConfig
from mnemic.host.release import GENERATE_CACHE as CACHE

CONFIG = CONFIGS["emt-0"]
WINDOW = 2 * SEGMENT


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"segment_length": 0}, "segment_length is 0; a segment needs at least 1 token"),
        ({"slots": 0}, "slots is 0; it must be at least 1"),
        ({"stack": -1}, "stack is -1; it must be at least 1"),
        ({"dim": 60, "heads": 7}, "dim 60 is not divisible by 7 heads; set heads= to a divisor"),
        ({"write": "page"}, "write is 'page'; use 'segment' or 'token'"),
        ({"feedback": 0.0}, "feedback is 0.0; it must lie in (0, 1]"),
        ({"write": "token", "update_rate": 1.5}, "update_rate is 1.5; it must lie in (0, 1]"),
        ({"read_layers": []}, "read_layers is empty; name at least one block"),
    ],
)
def test_settings(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        EMTConfig(**changes)


def test_unknown_kinds_and_settings():
    with pytest.raises(ValueError, match=r"unknown memory kind 'elephant'; known: .*emt"):
        mnemic.MemoryConfig.from_dict({"kind": "elephant"})
    with pytest.raises(ValueError, match=r"EMTConfig has no setting trunk; known: \["):
        mnemic.MemoryConfig.from_dict({"kind": "emt", "trunk": 1})


# --- attaching -------------------------------------------------------------------------------------------------------


def refused(model, config, message, error=ValueError):
    """The error, and a model on which nothing was attached, hooked or frozen."""
    names, wants = list(model.state_dict()), [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(error, match=message):
        mnemic.attach(model, config)
    assert list(model.state_dict()) == names
    assert [parameter.requires_grad for parameter in model.parameters()] == wants
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_a_layer_the_model_does_not_have(name):
    for layer in (2, -3):
        refused(
            make(name), CONFIG.replace(read_layers=[layer]), rf"read_layers is {layer}, but the model has 2 blocks; use"
        )
        refused(
            make(name), CONFIG.replace(write_layer=layer), rf"write_layer is {layer}, but the model has 2 blocks; use"
        )


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_a_segment_longer_than_the_positions(name):
    message = f"segment_length {POSITIONS + 1} is longer than the model's {POSITIONS} positions; set segment_length to"
    refused(make(name), CONFIG.replace(segment_length=POSITIONS + 1), message)


def test_a_model_that_is_not_served():
    refused(torch.nn.Linear(2, 2), CONFIG, "Linear is not a Hugging Face transformer")
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 97}
    t5 = hf.T5ForConditionalGeneration(hf.T5Config(**sizes, decoder_start_token_id=0))
    refused(t5, CONFIG, "is an encoder-decoder, which mnemic does not serve yet")
    mamba = hf.MambaForCausalLM(hf.MambaConfig(hidden_size=64, num_hidden_layers=2, vocab_size=97, state_size=8))
    refused(mamba, CONFIG, "blocks without attention|stacks of 2 blocks")


def test_a_second_memory():
    model = host("llama", CONFIG)
    before = model.state_dict().keys()
    with pytest.raises(ValueError, match="already has a memory; detach it first"):
        mnemic.attach(model, CONFIG)
    assert model.state_dict().keys() == before


def test_no_memory():
    model = make("llama")
    for use in (mnemic.Session, mnemic.memory_cache, mnemic.attached):
        with pytest.raises(RuntimeError, match=r"LlamaForCausalLM has no memory; attach one with mnemic\.attach"):
            use(model)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_windows_that_do_not_fit(name):
    model = host(name, CONFIG)
    for use in (lambda window: mnemic.Session(model, window=window), lambda window: mnemic.memory_cache(model, window)):
        with pytest.raises(
            ValueError, match="segment_length 8 is longer than the window of 7; set window to at least 8"
        ):
            use(7)
        with pytest.raises(
            ValueError, match="window 257 is larger than the model's 256 positions; set it to at most 256"
        ):
            use(257)


# --- calls -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def refuse_call(model, message, *, window, error=ValueError, rows=2, **inputs):
    """The call fails, and the next one gives what it would have given without it."""
    carried, control = carrier(model, window), carrier(model, window)
    for each in (carried, control):
        feed(model, tokens(rows, 21), carried=each)
    before = stream(carried)
    with pytest.raises(error, match=message):
        model(**{CACHE: carried}, **inputs)
    assert stream(carried) is before
    assert not mnemic.attached(model).router.calls
    more = tokens(rows, 5, 4)
    assert torch.equal(feed(model, more, carried=carried), feed(model, more, carried=control))


@first_forms(DECODERS)
@pytest.mark.parametrize("window", [None, WINDOW])
def test_empty_input(config, name, window):
    model = host(name, config)
    for shape in ((2, 0), (0, 3)):
        empty = torch.zeros(shape, dtype=torch.long)
        message = rf"the input is empty \(shape \[{shape[0]}, {shape[1]}\]\); pass at least one row and one token"
        refuse_call(model, message, window=window, input_ids=empty)
    session = mnemic.Session(model, window=WINDOW)
    for empty in ([], torch.zeros(1, 0)):
        assert session.read(empty) == 0
    with pytest.raises(ValueError, match=r"a session is one stream: expected token ids \[1, T\], got \[2, 3\]"):
        session.read(torch.zeros(2, 3))


@first_forms(DECODERS)
@pytest.mark.parametrize("window", [None, WINDOW])
def test_a_batch_that_changes_size(config, name, window):
    message = r"the cache carries 2 stream\(s\) and the call brings 3 row\(s\); use one cache a batch"
    refuse_call(host(name, config), message, window=window, input_ids=tokens(3, 11))


@first_forms(DECODERS)
@pytest.mark.parametrize("window", [None, WINDOW])
def test_a_token_that_does_not_exist(config, name, window):
    # fails in the third segment of the call, when two are already written
    ids = tokens(2, 40)
    ids[1, 30] = 10_000
    refuse_call(host(name, config), "index out of range", window=window, error=IndexError, input_ids=ids)


@matrix(["gpt2", "llama", "bert"])
@torch.no_grad()
def test_weights_that_are_not_numbers(config, name):
    model = host(name, config)
    session = mnemic.Session(model, window=None if name == "bert" else WINDOW)
    session.read(tokens(1, 13))
    stream_before, question = session.stream, tokens(1, 5, 4)
    expected = session.fork().forward(question).logits
    row = model.get_input_embeddings().weight
    kept = row[question[0, 2]].clone()
    row[question[0, 2]] = torch.nan
    with pytest.raises(
        mnemic.StateError,
        match=r"(hidden states (after|entering)|keys of) (block \d|the head) are NaN or infinite.*nothing was written",
    ):
        session.read(question)
    row[question[0, 2]] = kept
    assert session.stream is stream_before
    assert torch.equal(session.forward(question).logits, expected)


@pytest.mark.parametrize("window", [None, WINDOW])
def test_not_a_number_in_a_batch(window):
    model = host("llama", CONFIG)
    embeddings = model.get_input_embeddings()(tokens(2, 11)).detach().clone()
    embeddings[1, 4] = torch.nan
    # attention may carry a NaN to tokens before it too (0 times NaN), but to no other row
    message = r"first at row 1, token \d of the call\), so nothing was written"
    refuse_call(model, message, window=window, error=mnemic.StateError, inputs_embeds=embeddings)


@every_kind
@torch.no_grad()
def test_padding_may_be_anything(config):
    # what stands where the mask is 0 never reaches the memory, before, between or after real tokens
    model, mask = host("llama", config), torch.ones(1, 35, dtype=torch.long)
    mask[0, :3] = mask[0, 13:17] = mask[0, 32:] = 0
    real = mask[0].bool()
    ids, plain, spoilt = tokens(1, 35), carrier(model), carrier(model)
    embeddings = model.get_input_embeddings()(ids).clone()
    takes_ids = mnemic.attached(model).memory.takes_ids
    model(**({"input_ids": ids[:, real]} if takes_ids else {"inputs_embeds": embeddings[:, real]}), **{CACHE: plain})
    embeddings[0, ~real], ids[0, ~real] = 1e4, 96
    given = {"input_ids": ids} if takes_ids else {"inputs_embeds": embeddings}
    model(**given, attention_mask=mask, position_ids=positions_of(mask), **{CACHE: spoilt})
    assert stream(plain).written == (3,)
    assert_same_stream(stream(spoilt), stream(plain))


def test_a_stream_on_another_device():
    model = host("llama", CONFIG)
    cache = mnemic.memory_cache(model, WINDOW)
    feed(model, tokens(1, 5), carried=cache)
    here = cache.memory.stream
    cache.memory.stream = here.with_tensors({key: tensor.to("meta") for key, tensor in here.tensors().items()})
    with pytest.raises(ValueError, match="the cache's stream is on meta, the memory on cpu; move the model first"):
        feed(model, tokens(1, 5), carried=cache)


def test_a_stream_of_another_model():
    narrow = hf.LlamaForCausalLM(hf.LlamaConfig(**{**COMMON, "hidden_size": 32})).eval()
    trained(narrow, CONFIG)
    cache = mnemic.memory_cache(narrow, SEGMENT)
    feed(narrow, tokens(1, 5), carried=cache)
    model = host("llama", CONFIG)
    mine = mnemic.memory_cache(model, SEGMENT)
    mine.memory.stream = cache.memory.stream
    with pytest.raises(ValueError, match=r"the cache.s stream keeps 32 values of a token, this model.s memory 64"):
        feed(model, tokens(1, 5), carried=mine)
    # nothing of the failed call stays
    mine.memory.stream = None
    assert torch.equal(
        feed(model, tokens(1, 5), carried=mine), feed(model, tokens(1, 5), carried=carrier(model, SEGMENT))
    )


def test_a_stream_of_another_dtype():
    model = host("llama", CONFIG)
    cache = carrier(model)
    feed(model, tokens(1, 5), carried=cache)
    half = copy.deepcopy(model).to(torch.bfloat16)
    with pytest.raises((ValueError, RuntimeError), match=r"(?i)bfloat16|dtype"):
        feed(half, tokens(1, 5), carried=cache)


def test_checkpointing_with_keys_of_earlier_calls():
    model = host("llama", CONFIG).train()
    model.gradient_checkpointing_enable()
    cache = mnemic.memory_cache(model, WINDOW)
    model.eval()
    feed(model, tokens(1, 5), carried=cache)
    model.train()
    with pytest.raises(ValueError, match=r"gradient checkpointing drops the base's keys.*window=segment_length \(8\)"):
        model(tokens(1, 3), **{CACHE: cache})


def test_attention_weights_across_segments():
    model = host("llama", CONFIG)
    model.set_attn_implementation("eager")
    cache = mnemic.memory_cache(model, WINDOW)
    feed(model, tokens(1, 5), carried=cache)
    before = stream(cache)
    with pytest.raises(ValueError, match="attention weights cannot be joined across segments; call without"):
        model(tokens(1, 20), **{CACHE: cache}, output_attentions=True)
    assert stream(cache) is before
