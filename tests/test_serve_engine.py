"""The engine: answers share steps, come and go, and each is as if it had been alone."""

from __future__ import annotations

import threading

import pytest
import torch

import mnemic
from helpers import assert_equal_stream
from mnemic.serve import engine as engine_file
from mnemic.serve.engine import Answer, Engine
from mnemic.serve.said import Said
from mnemic.turns import Turns
from ordered import ordered
from serving import TOKENIZER, model_of

TURNS = Turns(TOKENIZER)


class Heard:
    """An answer to a text, and what is told of it."""

    def __init__(self, model, text, count, session=None, whose="", **ways):
        self.pieces, self.done = [], threading.Event()
        session = session or mnemic.Session(model, TOKENIZER)
        prompt = TURNS.message(text, first=session.is_new)
        ways = TURNS.ways(model, {"max_new_tokens": count, "do_sample": False} | ways)
        self.answer = Answer(session, prompt, ways, Said(TOKENIZER), self.tell, TURNS.closing, whose=whose)

    def tell(self, piece):
        if piece is None:
            self.done.set()
        else:
            self.pieces.append(piece)

    def text(self):
        assert self.done.wait(60)
        if self.answer.error is not None:
            raise self.answer.error
        return "".join(self.pieces)


@pytest.fixture(scope="module")
def model():
    return model_of()


def running(engine, inside=None):
    """The engine, in a thread that is inside of something."""

    def run():
        with inside() if inside else torch.no_grad():
            engine._run()

    engine._thread = threading.Thread(target=run, daemon=True)
    engine.start()
    return engine


TEXTS = ["who?", "b" * 20, "c d e", "f"]
COUNTS = [4, 2, 7, 3]


def test_answers_that_come_and_go_equal_each_alone_bit_by_bit(model):
    """Two rows for four answers, each of another length, with sums in order: their sessions too."""
    engine = running(Engine(model, 2), ordered)
    heard = [Heard(model, text, count) for text, count in zip(TEXTS, COUNTS, strict=True)]
    for each in heard:
        engine.begin(each.answer)
    said = [each.text() for each in heard]
    engine.close()
    assert engine.tokens == sum(COUNTS)
    assert engine.steps < sum(COUNTS)
    with ordered():
        for each, text, count, found in zip(heard, TEXTS, COUNTS, said, strict=True):
            session = mnemic.Session(model, TOKENIZER)
            assert session.chat(text, max_new_tokens=count, do_sample=False) == found
            assert_equal_stream(each.answer.session.stream, session.stream)
            ours, theirs = each.answer.session.cache, session.cache
            for one, other in zip(ours.layers[:-1], theirs.layers[:-1], strict=True):
                kept = theirs.window.context[0]
                assert torch.equal(one.keys[:, :, -kept:], other.keys[:, :, -kept:])


def test_in_a_shared_step_one_fails_and_no_other(model, monkeypatch):
    alone = [mnemic.Session(model, TOKENIZER).chat(text, max_new_tokens=12, do_sample=False) for text in TEXTS[:3]]
    letters = [letter for letter in alone[1][2:8] if letter not in alone[0] + alone[2] + "".join(TEXTS)]
    poison, forward = TOKENIZER(letters[0], add_special_tokens=False)["input_ids"][0], type(model).forward

    def poisoned(self, input_ids=None, **kwargs):
        if input_ids.shape[1] == 1 and bool((input_ids == poison).any()):
            raise RuntimeError("poison")
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(type(model), "forward", poisoned)
    engine = running(Engine(model, 3))
    heard = [Heard(model, text, 12) for text in TEXTS[:3]]
    for each in heard:
        engine.begin(each.answer)
    with pytest.raises(RuntimeError, match="poison"):
        heard[1].text()
    assert [heard[0].text(), heard[2].text()] == [alone[0], alone[2]]
    engine.close()


def test_what_cannot_be_chosen_or_prepared_ends_alone(model):
    def broken(*_):
        raise RuntimeError("broken")

    engine = running(Engine(model, 3))
    heard = [Heard(model, "a", 8), Heard(model, "b", 8, logits_processor=[broken]), Heard(model, "c", 8, num_beams=2)]
    for each in heard:
        engine.begin(each.answer)
    expected = mnemic.Session(model, TOKENIZER).chat("a", max_new_tokens=8, do_sample=False)
    assert heard[0].text() == expected
    with pytest.raises(RuntimeError, match="broken"):
        heard[1].text()
    with pytest.raises(ValueError, match="one token after another"):
        heard[2].text()
    engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        engine.begin(heard[0].answer)


def test_owners_take_turns_and_a_long_prompt_stops_nobody(model, monkeypatch):
    monkeypatch.setattr(engine_file, "PIECE", 32)
    order: list[str] = []

    def run(rows, **heard):
        engine = Engine(model, rows)
        for name, each in heard.items():
            tell = each.answer.tell
            each.answer.tell = lambda piece, tell=tell, name=name: (order.append(name), tell(piece))
            engine._waiting.append(each.answer)
        running(engine)
        assert all(each.text() for each in heard.values())
        engine.close()

    run(1, **{name: Heard(model, "a", 1, whose=whose) for name, whose in (("a1", "a"), ("a2", "a"), ("b1", "b"))})
    assert list(dict.fromkeys(order)) == ["a1", "b1", "a2"]
    order.clear()
    long = Heard(model, "a" * 160, 2)
    run(2, long=long, short=Heard(model, "b", 3))
    assert order[:4] == ["short"] * 4
    assert long.text() == mnemic.Session(model, TOKENIZER).chat("a" * 160, max_new_tokens=2, do_sample=False)


def test_stop_strings_over_pieces():
    said = Said(TOKENIZER, ["b c", "zz"])
    ids, pieces = torch.tensor(TOKENIZER("a b b cd", add_special_tokens=False)["input_ids"]), []
    for count in range(1, len(ids) + 1):
        pieces.append(said.more(ids[:count], last=False))
        if said.stopped:
            break
    assert "".join(pieces) == said.text == "a b "
    assert pieces[:3] == ["a", " ", ""]
    said = Said(TOKENIZER, ["abc"])
    assert [said.more(torch.tensor(TOKENIZER("ab", add_special_tokens=False)["input_ids"]), last=True)] == ["ab"]
