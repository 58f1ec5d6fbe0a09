"""Where an answer comes from: the attention that kept tokens got, and the passages that tell of it."""

from __future__ import annotations

import pytest
import torch

import mnemic
from families import make
from helpers import SEGMENT, assert_near, tokens
from mnemic.memories.recall import RecallConfig
from mnemic.sources import SINKS, Sources
from runs import characters

SMALL = {"segment_length": SEGMENT, "window": 2 * SEGMENT, "sinks": 4, "unit": 4, "budget": 8}


def session_of(name="llama", **settings):
    torch.manual_seed(0)
    model = make(name, attn_implementation="eager")
    mnemic.attach(model, RecallConfig(**{**SMALL, **settings}))
    return mnemic.Session(model, characters(), keep_text=True)


@pytest.mark.parametrize("cuts", [[3], [1, 1, 1]])
def test_what_is_noted_is_the_attention_of_a_base_that_sees_all(cuts):
    """With all that is kept in line the kept tokens get what they get in one forward over everything."""
    session, ids = session_of(budget=64, recall_in_reading=True), tokens(1, 5 * SEGMENT + 3)
    session.read(ids[:, :-3])
    with session.sources() as found:
        for part in ids[:, -3:].split(cuts, 1):
            session.forward(part)
    kept = session.stream.banks[0].length
    with mnemic.attached(session.model).disabled():
        weights = session.model(input_ids=ids, output_attentions=True).attentions
    assert len(found.noted) == len(weights)
    for place, weight in enumerate(weights):
        mass, count = found.noted[place]
        heads, group = len(mass), weight.shape[1] // len(mass)
        expected = weight[0, :, -3:].unflatten(0, (heads, group)).mean(1).sum(1)[:, :kept]
        assert_near(mass, expected, 1e-4)
        assert count == 3


@pytest.mark.parametrize("settings", [{}, {"by": "layer"}, {"layout": "capped"}, {"refresh": 3}])
def test_only_what_was_chosen_is_noted(settings):
    """Of many kept tokens as many get attention as the budget and the sinks have, whatever the calls."""
    session, ids = session_of(**settings), tokens(1, 8 * SEGMENT + 5)
    session.read(ids[:, :-5])
    other = session.fork()
    with session.sources() as whole:
        session.forward(ids[:, -5:])
    with other.sources() as single:
        for part in ids[:, -5:].split(1, 1):
            other.forward(part)
    for place, (mass, _) in whole.noted.items():
        assert_near(mass, single.noted[place][0], 1e-5)
        assert 0 < mass.sum(1).max() < 5
        assert (mass > 0).sum(1).max() <= 4 + 8 * 5
        assert mass.shape[1] <= session.stream.seen[0]
    assert whole.passages() == single.passages()


def test_passages_are_in_order_of_attention_and_in_words():
    session = session_of()
    text = "the ship was called Aurora. " * 8
    session.read(text)
    ids = session.ids(text)
    session = mnemic.Session(session.model, session.tokenizer, keep_text=True)
    session.read(text)
    with session.sources() as found:
        session.generate("ship?", max_new_tokens=4, do_sample=False)
    passages = found.passages(3)
    assert 0 < len(passages) <= 3
    shares = [each["share"] for each in passages]
    assert shares == sorted(shares, reverse=True)
    assert all(0 < share <= 1 for share in shares)
    for each in passages:
        assert SINKS <= each["first"] <= each["last"] < ids.shape[1]
        assert each["text"] == session.tokenizer.decode(ids[0, each["first"] : each["last"] + 1].tolist())
    with session.sources() as nothing:
        pass
    assert nothing.passages() == []


def test_the_passage_that_got_all_attention_comes_first():
    """Runs that lie side by side are one passage; sinks are none."""
    mass = torch.zeros(2, 100)
    mass[1, 32:64] = 1 / 32
    mass[0, 80] = 0.5
    mass[0, :SINKS] = 1.0
    found = Sources({0: (mass, 2)})
    assert found.passages() == [
        {"first": 32, "last": 63, "share": 0.25, "text": None},
        {"first": 80, "last": 95, "share": 0.25, "text": None},
    ]
    assert found.passages(1) == [{"first": 32, "last": 47, "share": 0.25, "text": None}]


def test_noting_changes_nothing_and_ends_with_its_block():
    session, ids = session_of(), tokens(1, 8 * SEGMENT)
    session.read(ids[:, :-9])
    plain, watched = session.fork(), session.fork()
    with watched.sources() as found:
        logits = watched.forward(ids[:, -9:-5]).logits
        with pytest.raises(RuntimeError, match=r"when the block of sources\(\) has ended"):
            found.passages()
    assert torch.equal(logits, plain.forward(ids[:, -9:-5]).logits)
    before = found.noted
    watched.forward(ids[:, -5:])
    assert found.noted is before
    with pytest.raises(KeyboardInterrupt), watched.sources():
        raise KeyboardInterrupt
    assert watched._layer.noted is None


def test_a_call_that_fails_is_not_noted():
    session, ids = session_of(), tokens(1, 8 * SEGMENT)
    session.read(ids[:, :-9])

    def fail(*_):
        raise KeyboardInterrupt

    with session.sources() as found:
        session.forward(ids[:, -9:-5])
        counted = {place: count for place, (_, count) in session._layer.noted.items()}
        hook = session.model.model.norm.register_forward_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            session.forward(ids[:, -5:])
        hook.remove()
    assert {place: count for place, (_, count) in found.noted.items()} == counted
    assert set(counted.values()) == {4}


def test_a_memory_that_keeps_no_tokens_has_no_sources():
    model = make("llama")
    mnemic.attach(model, mnemic.EMTConfig(segment_length=SEGMENT))
    session = mnemic.Session(model)
    with pytest.raises(ValueError, match=r"EMT keeps no tokens .* attach recall"), session.sources():
        pass
