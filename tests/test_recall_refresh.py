"""Recall with `refresh`: some tokens of a segment share one choice, however calls are cut, joined, saved or failed."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import mnemic
from helpers import SEGMENT, assert_near, feed, random_cuts, tokens
from mnemic.host.further import in_parts
from mnemic.memories.recall import Recall, RecallConfig
from mnemic.memories.recall_naive import naive
from mnemic.memory import Site
from test_recall import recalling
from test_recall_choice import SMALL, asked_of

SETTINGS = [{}, {"search": "candidates", "wider": 1}, {"by": "layer"}, {"choice": "mean"}, {"choice": "bounds"}]
every_choice = pytest.mark.parametrize("settings", SETTINGS, ids=str)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Mean keys of few tokens, so that there are some."""
    monkeypatch.setattr("mnemic.bank.LEAST", SEGMENT)


# --- the choice ------------------------------------------------------------------------------------------------------


def part_of(asked, begin, end):
    here = {"turned_hts": asked.turned_hts[:, begin:end], "position_t": asked.position_t[begin:end]}
    return dataclasses.replace(asked, **here, number=asked.number[begin:end])


def seen_by_each(memory, asked, cuts):
    """What each token sees, of calls of so many tokens."""
    found, held, start = [], None, 0
    for count in cuts:
        parts, held = in_parts(memory, Site(0, "attention"), part_of(asked, start, start + count), held)
        assert [begin for begin, *_ in parts] == [0, *(end for _, end, _ in parts[:-1])]
        found += [more for begin, end, more in parts for _ in range(begin, end)]
        start += count
    return found


@every_choice
@pytest.mark.parametrize("kept", [40, 41])
@pytest.mark.parametrize("number", [0, 2])
def test_tokens_that_share_equal_naive(settings, kept, number):
    """Also where the first token that is asked for is not the first of those that share."""
    memory = RecallConfig(**SMALL, budget=12, refresh=3, **settings).build(64, 1)
    asked = asked_of(kept, time=6, number=number)
    expected = naive(memory, asked)
    for cuts in ([6], [1, 1, 1, 1, 1, 1], [2, 3, 1], [5, 1]):
        for t, more in enumerate(seen_by_each(memory, asked, cuts)):
            for head, row in enumerate(expected):
                there = slice(None) if more.keep_ktm is None else more.keep_ktm[head, 0]
                assert_near(more.keys_ktms[head, 0][there], torch.stack([key for _, key, _ in row[t]]), 1e-5)
                assert_near(more.values_ktmv[head, 0][there], torch.stack([value for *_, value in row[t]]), 1e-6)
    chosen = [[[number for number, *_ in row[t]] for row in expected] for t in range(6)]
    first = 3 - number
    assert chosen[0] == chosen[first - 1] != chosen[first] == chosen[first + 2]


def test_padding_chooses_nothing():
    memory, asked = RecallConfig(**SMALL, budget=12, refresh=3).build(64, 1), asked_of(40, time=7)
    padded = dataclasses.replace(asked, number=[-1, 2, -1, 3, 4, -1, -1])
    parts, held = in_parts(memory, Site(0, "attention"), padded, None)
    assert [part[:2] for part in parts] == [(0, 3), (3, 7)]
    for t, (*_, more) in zip((1, 3), parts, strict=True):
        alone = memory.further(Site(0, "attention"), part_of(asked, t, t + 1))
        assert torch.equal(more.chosen_ktc, alone.chosen_ktc)
    nothing = dataclasses.replace(asked, number=[-1] * 7)
    assert in_parts(memory, Site(0, "attention"), nothing, held) == ([(0, 7, held)], held)
    assert in_parts(memory, Site(0, "attention"), nothing, None) == ([(0, 7, None)], None)


def counting(monkeypatch):
    """How many tokens the memory was asked for, call by call."""
    asked, further = [], Recall.further
    monkeypatch.setattr(Recall, "further", lambda *args: asked.append(len(args[2].number)) or further(*args))
    return asked


@torch.no_grad()
def test_between_two_choices_nothing_is_asked(monkeypatch):
    model = recalling(refresh=4)
    session = mnemic.Session(model)
    session.read(tokens(1, 10 * SEGMENT))
    asked, counts = counting(monkeypatch), []
    for token in tokens(1, SEGMENT + 1, 3).split(1, 1):
        before = len(asked)
        session.forward(token)
        counts.append(len(asked) - before)
    assert counts == [2, 0, 0, 0, 2, 0, 0, 0, 2]
    session.forward(tokens(1, 3))
    session.forward(tokens(1, 2))
    assert asked[-2:] == [1, 1], "of a call only those that choose are asked for"
    assert len(asked) == 8


# --- in attention ----------------------------------------------------------------------------------------------------


@every_choice
@torch.no_grad()
def test_cuts_rows_and_padding_change_nothing(settings):
    model, ids = recalling(refresh=3, **settings), tokens(3, 9 * SEGMENT + 5)
    expected = feed(model, ids)
    for lengths in (random_cuts(ids.shape[1], 2), [1] * ids.shape[1]):
        assert_near(feed(model, ids, lengths), expected, 1e-4)
    for row in range(3):
        assert_near(feed(model, ids[row : row + 1]), expected[row : row + 1], 1e-4)
    for count in (1, 2, 4, 5):
        changed = ids.clone()
        changed[:, -count] = tokens(3, 1, 5)[:, 0]
        assert_near(feed(model, changed)[:, :-count], expected[:, :-count], 1e-6)
    for left in (True, False):
        gap = torch.zeros_like(ids[:2, :5])
        padded = [torch.cat([gap, ids[:2]] if left else [ids[:2, :7], gap, ids[:2, 7:]], 1), ids[2:3]]
        padded[1] = torch.cat([ids[2:3], ids[2:3, :5]], 1)
        mask = torch.ones(3, ids.shape[1] + 5, dtype=torch.long)
        mask[:2, slice(0, 5) if left else slice(7, 12)] = 0
        for lengths in (None, random_cuts(mask.shape[1], 3)):
            found = feed(model, torch.cat(padded), lengths, mask=mask)
            assert_near(found[:2][mask[:2].bool()].view(2, ids.shape[1], -1), expected[:2], 1e-4)
            assert_near(found[2:, : ids.shape[1]], expected[2:], 1e-4)
    own = feed(recalling(refresh=1, **settings), ids)
    assert (own - expected).abs().max() > 1e-3


@torch.no_grad()
def test_off_it_is_the_base_and_where_everything_fits_it_is_that_of_each_token():
    model, ids = recalling(refresh=3, budget=128), tokens(2, 9 * SEGMENT + 5)
    assert_near(feed(model, ids), feed(recalling(budget=128), ids), 1e-5)
    with mnemic.attached(model).disabled():
        off = feed(model, ids)
    bare = recalling()
    with mnemic.attached(bare).disabled():
        assert torch.equal(feed(bare, ids), off)


@torch.no_grad()
def test_eager_attention_shares_too():
    ids, found = tokens(1, 9 * SEGMENT + 5), []
    for implementation in ("sdpa", "eager"):
        model = recalling(refresh=3)
        mnemic.attached(model).detach()
        model.set_attn_implementation(implementation)
        mnemic.attach(model, RecallConfig(**SMALL, budget=8, refresh=3))
        found += [feed(model, ids), feed(model, ids, random_cuts(ids.shape[1], 1))]
    for each in found[1:]:
        assert_near(each, found[0], 1e-4)


@torch.no_grad()
def test_several_memories_share_as_one_does():
    model, ids = recalling(), tokens(2, 9 * SEGMENT + 5)
    mnemic.attached(model).detach()
    emt = mnemic.EMTConfig(segment_length=SEGMENT, window=2 * SEGMENT, slots=4, dim=16)
    mnemic.attach(model, [RecallConfig(**SMALL, budget=8, refresh=5), emt])
    expected = feed(model, ids)
    assert_near(feed(model, ids, [1] * ids.shape[1]), expected, 1e-4)
    own = recalling(refresh=1)
    assert (feed(own, ids) - expected).abs().max() > 1e-3


# --- sessions --------------------------------------------------------------------------------------------------------


def in_the_middle(model, read=12 * SEGMENT, asked=4):
    """A session that has asked some tokens of a segment, so that the next ones share a choice."""
    session = mnemic.Session(model)
    session.read(tokens(1, read))
    session.forward(tokens(1, asked, 3))
    assert session.stream.held[0].keys() == {0, 1}
    return session


QUESTION = tokens(1, 7, 9)


@torch.no_grad()
def test_a_choice_follows_forks_and_files_to_the_bit():
    model = recalling(refresh=3)
    session = in_the_middle(model)
    expected = session.fork().forward(QUESTION).logits
    again = mnemic.Session.from_bytes(session.to_bytes(), model)
    assert "bank.chosen" in session.contents()[0]
    assert torch.equal(again.contents()[0]["bank.chosen"], session.contents()[0]["bank.chosen"])
    for each in (again, again.fork(), mnemic.Session.from_bytes(again.to_bytes(), model), session.fork()):
        assert torch.equal(each.forward(QUESTION).logits, expected)
    lost = session.fork()
    lost._layer.stream = dataclasses.replace(lost.stream, held=())
    assert (lost.forward(QUESTION).logits - expected).abs().max() > 1e-3, "the choice is what makes them equal"
    session.forward(tokens(1, SEGMENT - 4))
    assert session.stream.held == ({},)
    assert "bank.chosen" not in session.contents()[0]


@torch.no_grad()
def test_rows_of_a_batch_and_beams_carry_their_choice():
    model = recalling(refresh=3, recall_in_reading=False)
    sessions = [in_the_middle(model, 12 * SEGMENT + 3 * number, 1 + 2 * number) for number in range(3)]
    expected = [session.fork().forward(QUESTION[:, : 2 + 2 * row]).logits for row, session in enumerate(sessions)]
    batch = [session.fork() for session in sessions]
    found = mnemic.batch(batch).forward([QUESTION[:, : 2 + 2 * row] for row in range(3)])
    for each, wanted in zip(found, expected, strict=True):
        assert_near(each.logits, wanted, 1e-4)
    assert all(session.stream.held[0] for session in batch[:1])
    beams, by_hand = sessions[1].fork(), sessions[1].fork()
    answer = beams.generate(QUESTION, max_new_tokens=SEGMENT, num_beams=2, do_sample=False, eos_token_id=None)
    by_hand.forward(torch.cat([QUESTION, answer], 1))
    assert_near(beams.forward(tokens(1, 4, 9)).logits, by_hand.forward(tokens(1, 4, 9)).logits, 1e-4)


@torch.no_grad()
def test_a_failed_call_leaves_the_choice_as_it_was():
    model = recalling(refresh=3)
    session = in_the_middle(model)
    before, expected = session.stream.held, session.fork().forward(QUESTION.clamp_min(6)).logits
    weight = model.get_input_embeddings().weight
    weight[5] = torch.nan
    for count in (3, 2 * SEGMENT):
        wrong = torch.cat([tokens(1, count).clamp_min(6), torch.tensor([[5]])], 1)
        with pytest.raises(mnemic.StateError, match="NaN"):
            session.forward(wrong)
        assert session.stream.held is before
    weight[5] = 0.1
    assert torch.equal(session.forward(QUESTION.clamp_min(6)).logits, expected)


@torch.no_grad()
def test_reading_ends_a_choice_that_is_for_questions_alone():
    """And where it retrieves too, it makes no difference which tokens were read and which asked."""
    ids = tokens(1, 10 * SEGMENT + 7)
    for reads in (False, True):
        model = recalling(refresh=5, recall_in_reading=reads)
        session, whole = mnemic.Session(model), mnemic.Session(model)
        session.read(ids[:, :-6])
        session.forward(ids[:, -6:-4])
        assert session.stream.held[0]
        session.read(ids[:, -4:-3])
        assert bool(session.stream.held[0]) is reads
        found = session.forward(ids[:, -3:]).logits
        expected = whole.forward(ids).logits[:, -3:]
        assert torch.allclose(found, expected, atol=1e-4) is reads


@torch.no_grad()
def test_what_is_forgotten_is_shared_no_more():
    model = recalling(refresh=5)
    session = in_the_middle(model, asked=2)
    fork = session.fork()
    assert session.forget(0, 8 * SEGMENT)
    assert session.stream.held == ({},)
    assert fork.stream.held[0]
    assert (session.forward(QUESTION).logits - fork.forward(QUESTION).logits).abs().max() > 1e-3
    session.flush()
    assert session.stream.held == ({},)


def test_a_choice_made_in_inference_mode_is_shared_outside_of_it():
    model = recalling(refresh=5)
    with torch.inference_mode():
        session = in_the_middle(model, asked=2)
    model.requires_grad_(True)
    session.forward(QUESTION[:, :1]).logits.sum().backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().max() > 0


@pytest.mark.parametrize("change", ["beyond", "order", "shape", "float"])
@torch.no_grad()
def test_a_choice_that_no_session_makes_is_refused(change, tmp_path):
    model = recalling(refresh=3)
    tensors, meta = in_the_middle(model).contents()
    chosen = tensors["bank.chosen"]
    changed = {"beyond": chosen + 999, "order": chosen.flip(-1), "shape": chosen[:, :1], "float": chosen.float()}
    mnemic.state.write_file(tmp_path / "s.memory", tensors | {"bank.chosen": changed[change]}, meta)
    with pytest.raises(mnemic.StateError, match="bank"):
        mnemic.Session.load(tmp_path / "s.memory", model)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"refresh": 0}, rf"refresh is 0; use 1 to segment_length={SEGMENT}"),
        ({"refresh": SEGMENT + 1}, rf"refresh is {SEGMENT + 1}; use 1 to segment_length={SEGMENT}"),
        ({"refresh": 2, "layout": "capped"}, "refresh is 2, but 'capped' .* use layout='line'"),
    ],
)
def test_settings_that_cannot_be(settings, said):
    with pytest.raises(ValueError, match=said):
        RecallConfig(**{**SMALL, "budget": 8, **settings})
