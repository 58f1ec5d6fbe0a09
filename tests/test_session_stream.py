"""Answers a piece at a time: the same as `generate` gives, and a session that stands where its reader stopped."""

from __future__ import annotations

import threading

import pytest
import torch
from transformers import StoppingCriteria, TextIteratorStreamer, TextStreamer

import mnemic
from helpers import CONFIGS, SEGMENT, assert_equal_stream, assert_near, assert_same_stream, every_kind, host, tokens
from mnemic.host.release import GENERATE_CACHE as CACHE

WINDOW = 2 * SEGMENT
WAYS = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 0.9, "top_k": 20, "top_p": 0.95},
    "processors": {"do_sample": False, "repetition_penalty": 1.7, "no_repeat_ngram_size": 2, "min_new_tokens": 5},
}


class Letters:
    """A tokenizer of one letter a token; some tokens are halves of a character of two bytes."""

    def __call__(self, text, add_special_tokens=False):
        assert not add_special_tokens
        return {"input_ids": [3 + ord(letter) % 90 for letter in text]}

    def decode(self, ids, skip_special_tokens=True, **_):
        halves = b"".join(
            bytes([195]) if token % 3 == 0 else bytes([169]) if token % 3 == 1 else chr(30 + token).encode()
            for token in torch.as_tensor(ids).tolist()
            if token > 2
        )
        return halves.decode(errors="replace")


@pytest.fixture
def model():
    return host("llama", CONFIGS["emt-0"])


def pair(model, read=21, tokenizer=None):
    """Two sessions that have read the same."""
    session = mnemic.Session(model, tokenizer, window=WINDOW)
    if read:
        session.read(tokens(1, read))
    return session, session.fork()


def assert_same_session(one, two):
    if one.stream is None:
        assert two.stream is None
    else:
        assert_same_stream(one.stream, two.stream)
    assert one.nbytes == two.nbytes
    question = tokens(1, 5, 7)
    assert_near(one.fork().forward(question).logits, two.fork().forward(question).logits)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("read", [0, 21])
def test_the_pieces_are_what_generate_gives(model, way, read):
    one, two = pair(model, read)
    torch.manual_seed(1)
    ids = tokens(1, 5, 3)
    expected = model.generate(ids, **{CACHE: one.cache.fork()}, max_new_tokens=14, **way)
    torch.manual_seed(1)
    whole = one.generate(ids, max_new_tokens=14, **way)
    assert torch.equal(whole, expected[:, 5:])
    torch.manual_seed(1)
    assert list(two.answer(tokens(1, 5, 3), max_new_tokens=14, **way)) == whole[0].tolist()
    assert_same_session(one, two)


@every_kind
def test_every_kind_answers_in_pieces(config):
    one, two = pair(host("gpt2", config))
    whole = one.generate(tokens(1, 5, 3), max_new_tokens=6, do_sample=False)
    assert list(two.answer(tokens(1, 5, 3), max_new_tokens=6, do_sample=False)) == whole[0].tolist()
    assert_same_session(one, two)


def test_text_comes_in_whole_characters(model):
    one, two = pair(model, tokenizer=Letters())
    torch.manual_seed(3)
    text = one.generate("what?", max_new_tokens=40, do_sample=True)
    torch.manual_seed(3)
    pieces = list(two.answer("what?", max_new_tokens=40, do_sample=True))
    assert "".join(pieces) == text
    assert 1 < len(pieces) < 40  # a character of two tokens comes when it is whole
    assert "é" in text
    assert_same_session(one, two)


@pytest.mark.parametrize("count", [1, 3, 11])
def test_who_leaves_early_leaves_what_was_given(model, count):
    one, two = pair(model)
    given = []
    for token in one.answer(tokens(1, 5, 3), max_new_tokens=20, min_new_tokens=20, do_sample=False):
        given.append(token)
        if len(given) == count:
            break
    two.read(torch.cat([tokens(1, 5, 3), torch.tensor([given])], 1))
    assert_same_session(one, two)
    assert one.stream.seen == (21 + 5 + count,)


class Interrupt(StoppingCriteria):
    """Ctrl-C, which can come in any step."""

    def __init__(self, step):
        self.left = step

    def __call__(self, input_ids, scores, **kwargs):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize("step", [1, 2, 9])
def test_an_interrupted_step_leaves_what_was_given(model, step):
    one, two = pair(model)
    before, given = one.stream, []
    pieces = one.answer(tokens(1, 5, 3), max_new_tokens=20, stopping_criteria=[Interrupt(step)])
    with pytest.raises(KeyboardInterrupt):
        given.extend(pieces)
    assert len(given) == step - 1
    if given:
        two.read(torch.cat([tokens(1, 5, 3), torch.tensor([given])], 1))
    else:
        assert one.stream is before
    assert_same_session(one, two)


def test_half_a_character_is_not_left_behind(model):
    more = {"max_new_tokens": 40, "do_sample": True}
    one, two = pair(model, tokenizer=Letters())
    torch.manual_seed(3)
    seen = [21 + 5, *(one.stream.seen[0] for _ in one.answer("what?", **more))]
    whole = next(place for place in range(2, len(seen)) if seen[place] - seen[place - 1] > 1)
    torch.manual_seed(3)
    given = []
    pieces = two.answer("what?", stopping_criteria=[Interrupt(seen[whole] - seen[0])], **more)
    with pytest.raises(KeyboardInterrupt):  # in the step after the first half
        given.extend(pieces)
    assert len(given) == whole - 1
    assert two.stream.seen == (seen[whole - 1],)


def test_a_failing_step_leaves_what_was_given(model):
    one, two = pair(model)
    pieces = one.answer(tokens(1, 5, 3), max_new_tokens=20, min_new_tokens=20, do_sample=False)
    given = [next(pieces), next(pieces)]
    handle = model.lm_head.register_forward_hook(lambda *_: (_ for _ in ()).throw(OSError("the disk is gone")))
    with pytest.raises(OSError, match="the disk is gone"):
        next(pieces)
    handle.remove()
    two.read(torch.cat([tokens(1, 5, 3), torch.tensor([given])], 1))
    assert_same_session(one, two)
    with pytest.raises(StopIteration):
        next(pieces)


def test_nothing_is_read_before_the_first_piece_is_asked_for(model):
    session, _ = pair(model)
    before = session.stream
    pieces = session.answer(tokens(1, 5, 3), max_new_tokens=3)
    assert session.stream is before
    next(pieces)
    assert session.stream is not before


def test_a_session_is_not_used_while_it_answers(model):
    session, _ = pair(model)
    pieces = session.answer(tokens(1, 5, 3), max_new_tokens=9, min_new_tokens=9)
    next(pieces)
    session.fork().read(tokens(1, 4))
    next(pieces)
    session.read(tokens(1, 4))
    after = session.stream
    with pytest.raises(RuntimeError, match=r"the session was used while it answers.*session\.fork"):
        next(pieces)
    assert session.stream is after


@pytest.mark.parametrize("way", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}])
def test_ways_without_one_next_token_are_refused(model, way):
    session, _ = pair(model)
    with pytest.raises(
        ValueError, match=r"sequence\(s\) does not choose one token after another; use Session\.generate"
    ):
        session.answer(tokens(1, 5, 3), max_new_tokens=3, **way)


def test_what_cannot_be_answered_is_refused(model):
    session, _ = pair(model)
    with pytest.raises(ValueError, match=r"a streamer is for Session\.generate"):
        session.answer(tokens(1, 5, 3), streamer=TextStreamer(Letters()))
    with pytest.raises(ValueError, match="position_ids is the session's own; leave it out"):
        session.answer(tokens(1, 5, 3), position_ids=torch.arange(5)[None])
    with pytest.raises(ValueError, match=r"custom_generate is for Session\.generate"):
        session.answer(tokens(1, 5, 3), custom_generate=lambda *_, **__: None)
    with pytest.raises(ValueError, match=r"return_dict_in_generate is for Session\.generate"):
        session.answer(tokens(1, 5, 3), max_new_tokens=3, return_dict_in_generate=True)
    with pytest.raises(ValueError, match="is an encoder and has no cache"):
        mnemic.Session(host("bert", CONFIGS["emt-0"])).answer(tokens(1, 5, 3))


def test_gradients_of_the_caller_are_left_alone(model):
    session, _ = pair(model)
    for _ in session.answer(tokens(1, 5, 3), max_new_tokens=2):
        assert torch.is_grad_enabled()
    assert not session.stream.waiting.requires_grad


# --- streamers of Hugging Face ---------------------------------------------------------------------------------------


def test_a_text_streamer_prints_what_generate_returns(model, capsys):
    session, _ = pair(model, tokenizer=Letters())
    text = session.generate(
        "what?", max_new_tokens=9, do_sample=False, streamer=TextStreamer(Letters(), skip_prompt=True)
    )
    assert capsys.readouterr().out == text + "\n"


def test_an_iterator_streamer_runs_in_a_thread(model):
    session, again = pair(model, tokenizer=Letters())
    streamer = TextIteratorStreamer(Letters(), skip_prompt=True)
    more = {"max_new_tokens": 9, "do_sample": False}
    thread = threading.Thread(target=session.generate, args=("what?",), kwargs={**more, "streamer": streamer})
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == again.generate("what?", **more)
    assert_equal_stream(session.stream, again.stream)


def test_a_streamer_that_fails_leaves_the_session_as_it_was(model):
    class Broken(TextStreamer):
        def on_finalized_text(self, text, stream_end=False):
            raise KeyboardInterrupt

    session, _ = pair(model, tokenizer=Letters())
    before = session.stream
    with pytest.raises(KeyboardInterrupt):
        session.generate("what?", max_new_tokens=40, streamer=Broken(Letters(), skip_prompt=True))
    assert session.stream is before
