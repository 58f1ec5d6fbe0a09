"""Sessions: reading any length, generating, forking, and never mixing with one another."""

from __future__ import annotations

import copy

import pytest
import torch

import mnemic
from families import DECODERS, ENCODERS, POSITIONS, make
from helpers import (
    CONFIGS,
    SEGMENT,
    assert_differ,
    assert_equal_stream,
    assert_near,
    assert_same_stream,
    every_kind,
    feed,
    first_forms,
    host,
    matrix,
    other,
    shake,
    tokens,
)
from mnemic.state import nbytes

WINDOW = 2 * SEGMENT
SOME = ["gpt2", "llama", "gemma3", "bloom"]
GREEDY = {"max_new_tokens": 7, "min_new_tokens": 7, "do_sample": False}


class Letters:
    """A tokenizer of one letter a token."""

    def __call__(self, text, add_special_tokens=False):
        assert not add_special_tokens
        return {"input_ids": [3 + ord(letter) % 90 for letter in text]}

    def decode(self, ids, skip_special_tokens=True):
        return " ".join(str(int(token)) for token in ids)


@pytest.fixture
def model():
    return host("llama", CONFIGS["emt-0"])


@matrix(SOME)
@torch.no_grad()
def test_read_equals_forward_in_pieces(config, name):
    model, ids, question = host(name, config), tokens(1, 101), tokens(1, 5, 3)
    one, two = mnemic.Session(model, window=WINDOW), mnemic.Session(model, window=WINDOW)
    assert one.read(ids) == 101
    for part in ids.split(13, 1):
        two.forward(part)
    assert_same_stream(one.stream, two.stream)
    assert_near(one.forward(question).logits, two.forward(question).logits)
    assert one.stream.seen == (106,)


@matrix(ENCODERS)
@torch.no_grad()
def test_an_encoder_reads_segment_by_segment(config, name):
    model, ids = host(name, config), tokens(1, 3 * SEGMENT + 3)
    one, two = mnemic.Session(model), mnemic.Session(model)
    one.read(ids)
    for part in ids.split(SEGMENT, 1):
        two.forward(part)
    assert_equal_stream(one.stream, two.stream)
    assert one.stream.written == (4,)
    with pytest.raises(ValueError, match=r"9 tokens is longer than the segment of 8.*Session\.read"):
        one.forward(tokens(1, SEGMENT + 1))
    with pytest.raises(ValueError, match="is an encoder and has no cache"):
        _ = one.cache
    with pytest.raises(ValueError, match="is an encoder and keeps no keys"):
        mnemic.memory_cache(model, SEGMENT)


@matrix(SOME)
@torch.no_grad()
def test_generate_takes_in_prompt_and_answer(config, name):
    model, ids, prompt = host(name, config), tokens(1, 43), tokens(1, 5, 3)
    session, by_hand = mnemic.Session(model, window=WINDOW), mnemic.Session(model, window=WINDOW)
    session.read(ids)
    by_hand.read(ids)
    answer = session.generate(prompt, **GREEDY)
    assert answer.shape == (1, 7)
    for token in answer[0]:
        logits = by_hand.forward(prompt).logits[0, -1]
        logits[2] = -torch.inf
        assert logits.argmax() == token
        prompt = token[None]
    by_hand.read(prompt)
    assert_same_stream(session.stream, by_hand.stream)
    assert session.stream.seen == (43 + 5 + 7,)
    assert_near(session.forward(tokens(1, 3)).logits, by_hand.forward(tokens(1, 3)).logits)


@pytest.mark.parametrize("more", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}, {"num_beams": 2}])
@pytest.mark.parametrize("already", [0, 20])
@torch.no_grad()
def test_generate_several_takes_in_the_first(model, more, already):
    session, by_hand = mnemic.Session(model, window=WINDOW), mnemic.Session(model, window=WINDOW)
    for each in (session, by_hand):
        if already:
            each.read(tokens(1, already))
    prompt = tokens(1, 5, 3)
    answer = session.generate(prompt, **{**GREEDY, **more})
    by_hand.read(torch.cat([prompt, answer[:1]], 1))
    assert_same_stream(session.stream, by_hand.stream)
    assert session.stream.batch == 1


@torch.no_grad()
def test_text_needs_a_tokenizer(model):
    session = mnemic.Session(model, Letters())
    assert session.read("a long story") == 12
    answer = session.generate("what?", **GREEDY)
    assert len(answer.split()) == 7
    bare = mnemic.Session(model)
    with pytest.raises(ValueError, match=r"text needs a tokenizer: Session\(model, tokenizer\)"):
        bare.read("a long story")
    assert bare.read([5, 6, 7]) == 3
    assert bare.read(torch.tensor([5, 6, 7])) == 3


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_two_sessions_of_one_model_never_mix(name):
    model = host(name, CONFIGS["emt-0"])
    alone = []
    for seed in (1, 2):
        session = mnemic.Session(model, window=WINDOW)
        alone.append([session.forward(part).logits for part in tokens(1, 60, seed).split(7, 1)])
    sessions = [mnemic.Session(model, window=WINDOW) for _ in range(2)]
    parts = [tokens(1, 60, seed).split(7, 1) for seed in (1, 2)]
    for step in range(len(parts[0])):
        for which, session in enumerate(sessions):
            assert torch.equal(session.forward(parts[which][step]).logits, alone[which][step])
    # nor does a plain call see either
    fresh = feed(model, tokens(1, 7, 1))
    assert_near(fresh, alone[0][0], 1e-5)


@every_kind
@torch.no_grad()
def test_forks_are_independent(config):
    model, question = host("llama", config), tokens(1, 5, 3)
    session = mnemic.Session(model, window=WINDOW)
    session.read(tokens(1, 43))
    fork, again = session.fork(), session.fork()
    assert_equal_stream(fork.stream, session.stream)
    fork.read(other(tokens(1, 43)))
    expected = session.forward(question).logits
    assert torch.equal(again.forward(question).logits, expected)
    assert_differ(fork.forward(question).logits, expected)


@matrix(["llama", "bert"])
@torch.no_grad()
def test_reset_forgets_everything(config, name):
    model = host(name, config)
    session = mnemic.Session(model, window=WINDOW if name == "llama" else None)
    first = session.forward(tokens(1, SEGMENT)).logits
    session.read(tokens(1, 43, 2))
    assert session.nbytes > 0
    session.reset()
    assert session.stream is None
    assert session.nbytes == 0
    assert torch.equal(session.forward(tokens(1, SEGMENT)).logits, first)


def memory_bytes(session):
    return nbytes(session.stream.state) + sum(bank.nbytes for bank in session.stream.banks if bank is not None)


@every_kind
@torch.no_grad()
def test_flush_writes_what_waits(config):
    model = host("llama", config)
    session = mnemic.Session(model, window=SEGMENT)
    session.flush()  # before the first token there is nothing to write
    assert session.stream is None
    session.read(tokens(1, 2 * SEGMENT + 3))
    before = session.stream
    assert before.counts == (3,)
    assert session.nbytes > nbytes(before.state)
    session.flush()
    assert session.stream.counts == (0,)
    assert session.stream.written == (3,)
    assert session.nbytes == memory_bytes(session)  # neither keys nor waiting tokens
    changed = any(not torch.equal(session.stream.state[key], tensor) for key, tensor in before.state.items())
    assert changed or session.stream.banks[0].length == before.banks[0].length + 3
    flushed = session.stream
    session.flush()
    assert session.stream is flushed
    # a segment that begins after a flush is a whole one
    session.read(tokens(1, SEGMENT))
    assert session.stream.counts == (0,)
    assert session.stream.written == (4,)
    assert session.nbytes == memory_bytes(session)


@first_forms(["gpt2", "llama", "bert"])
@torch.no_grad()
def test_a_failing_read_leaves_the_session_unchanged(config, name, monkeypatch):
    model, question = host(name, config), tokens(1, 5, 3)
    session = mnemic.Session(model, window=None if name in ENCODERS else WINDOW)
    session.read(tokens(1, 21))
    expected = session.fork().forward(question).logits
    stream, size = session.stream, session.nbytes
    bad = tokens(1, 200)
    bad[0, 150] = 10_000  # no such token
    monkeypatch.setattr("mnemic.session.check_known", lambda *_: None)  # fails in the middle of a long text, not before
    for use in (session.read, session.forward, *([] if name in ENCODERS else [session.generate])):
        with pytest.raises((IndexError, ValueError)):
            use(bad)
        assert session.stream is stream
        assert session.nbytes == size
        assert torch.equal(session.fork().forward(question).logits, expected)
    # an error after the trunk has run: the labels do not fit
    with pytest.raises(ValueError, match="batch_size"):
        session.forward(question, labels=tokens(1, 3))
    assert session.stream is stream
    assert torch.equal(session.forward(question).logits, expected)


@torch.no_grad()
def test_a_session_reads_while_the_memory_is_disabled(model):
    session = mnemic.Session(model, window=WINDOW)
    session.read(tokens(1, 21))
    stream = session.stream
    with mnemic.attached(model).disabled():
        session.read(tokens(1, 21))
    assert session.stream is stream


@pytest.mark.parametrize("name", DECODERS)
def test_the_default_window_is_that_of_the_config_or_what_the_base_allows(name):
    positions = 2048 if name == "bloom" else POSITIONS  # ALiBi has no positions to run out of
    assert mnemic.Session(host(name, CONFIGS["emt-0"])).window == positions
    assert mnemic.Session(host(name, CONFIGS["emt-0"].replace(window=24))).window == 24


def test_the_default_window_has_at_least_four_segments_and_at_most_the_bases_positions():
    model = make("llama", max_position_embeddings=10_000)
    for length, window in ((64, 2048), (512, 2048), (600, 2400), (3000, 10_000)):
        memory = mnemic.attach(model, mnemic.EMTConfig(segment_length=length, slots=4, dim=16))
        assert mnemic.Session(model).window == window
        memory.detach()
    # memory tokens are made for a base that sees no earlier words
    assert mnemic.Session(host("llama", CONFIGS["rmt-0"])).window == SEGMENT


@pytest.mark.parametrize("kind", ["emt-0", "memoria-0", "fast-weights-0", "knn-0", "infinity-former-0"])
def test_until_its_window_is_full_a_session_with_an_untrained_memory_is_the_base(kind):
    model = make("llama")
    ids = tokens(1, 3 * SEGMENT + 2)
    greedy = {"max_new_tokens": 60, "do_sample": False, "eos_token_id": None}
    said = model.generate(ids, **greedy)[:, ids.shape[1] :]
    mnemic.attach(model, CONFIGS[kind])
    session, other = mnemic.Session(model), mnemic.Session(model)
    session.read(ids[:, :10])
    assert torch.equal(session.generate(ids[:, 10:], **greedy), said)
    assert torch.equal(mnemic.batch([other]).generate([ids], **greedy)[0], said)


def test_a_session_and_a_memory_say_what_they_are(model):
    session = mnemic.Session(model)
    session.read(tokens(1, 20))
    read = "20 tokens read, 2 segments of 8 tokens written, window 256"
    assert repr(session) == f"<mnemic.Session emt of LlamaForCausalLM: {read}, {session.nbytes:,} bytes>"
    bert = mnemic.Session(host("bert", CONFIGS["emt-0"]))
    assert (
        repr(bert) == "<mnemic.Session emt of BertForMaskedLM: 0 tokens read, 0 segments of 8 tokens written, 0 bytes>"
    )
    memory = mnemic.attached(model)
    size = sum(parameter.numel() for parameter in memory.parameters())
    assert repr(memory) == (
        f"<mnemic.Attachment emt on LlamaForCausalLM: {size:,} parameters, segments of 8 tokens, window 8>"
    )
    memory.detach()
    assert "detached" in repr(memory)


@every_kind
def test_a_memory_knows_whether_it_is_trained(config):
    model = make("llama")
    memory = mnemic.attach(model, config)
    if not memory.parameters():
        assert memory.trained
        return
    assert not memory.trained
    assert not mnemic.attached(copy.deepcopy(model)).trained
    shake(memory.memory)
    assert memory.trained
    assert mnemic.attached(copy.deepcopy(model)).trained
