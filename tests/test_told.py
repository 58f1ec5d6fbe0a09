"""Things that are told: what is drawn, what streams are made of it, and the lessons that train on them."""

from __future__ import annotations

import random

import pytest
import torch

import mnemic
from families import make
from mnemic.bench.lessons import Lesson, LessonRun, in_window, lessons, retrieved
from mnemic.tasks.telling import (
    ASK,
    CORRECT,
    HELD_OUT_RELATIONS,
    HELD_OUT_WORDINGS,
    NOT_TOLD,
    RELATIONS,
    RETRACT,
    TELL,
    VALUES,
    Teller,
    held_out,
    wording,
)
from mnemic.tasks.told import Copying, Mixture, Told, ToldThings, endings, pool_of, whole
from mnemic.unrolling import IGNORED
from runs import characters, prose

LENGTH = 160
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer(template=None):
    made = characters()
    made.chat_template = template
    return made


def pool(made=None):
    ids = (made or tokenizer())(prose(40_000), add_special_tokens=False)["input_ids"]
    return pool_of(torch.tensor(ids), LENGTH)


def said(made, ids):
    return "".join(made.convert_ids_to_tokens(ids.tolist()))


def answer(made, labels):
    return said(made, labels[labels != IGNORED])


# --- what is drawn ---------------------------------------------------------------------------------------------------


def test_names_and_values_are_wide():
    """A narrow vocabulary is learnt by heart."""
    luck, teller = random.Random(0), Teller()
    drawn = {kind: {teller.draw(luck, kind) for _ in range(4000)} for kind in ("name", "place", "thing", "number")}
    assert {kind: len(values) > 1000 for kind, values in drawn.items()} == dict.fromkeys(drawn, True)


@pytest.mark.parametrize("kind", VALUES)
def test_what_is_held_out_is_never_trained_on(kind):
    """By its hash, but for the kinds of few values."""
    luck = random.Random(1)
    train, test = ({Teller(split).draw(luck, kind) for _ in range(500)} for split in ("train", "test"))
    if kind in ("day", "year", "time"):
        return
    assert not train & test
    assert not any(map(held_out, train))
    assert all(map(held_out, test))


@pytest.mark.parametrize("listed", [TELL, ASK, CORRECT, RETRACT])
def test_wordings_are_held_out(listed):
    luck = random.Random(2)
    train, test = ({wording(luck, listed, split) for _ in range(500)} for split in ("train", "test"))
    assert train | test == set(listed)
    assert not train & test
    assert len(test) == HELD_OUT_WORDINGS[listed]


def test_relations_are_held_out():
    luck = random.Random(3)
    known = {fact.relation for fact in Teller().facts(luck, 500)}
    new = {fact.relation for fact in Teller("test", held_out_relations=True).facts(luck, 300)}
    assert new == set(HELD_OUT_RELATIONS)
    assert known == set(RELATIONS) - new


def test_no_subject_has_a_relation_twice():
    facts = Teller().facts(random.Random(4), 40)
    assert len({(fact.subject, fact.relation) for fact in facts}) == 40
    assert len({fact.subject for fact in facts}) < 40  # some have several
    assert len({fact.relation for fact in facts}) < 40  # some share one


# --- streams ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_what_is_asked_was_told(template):
    """The value stands in the stream, is what the labels spell, and is nowhere in the question."""
    made = tokenizer(template)
    task = ToldThings(made, pool(made), facts=3, segments=(4, 8))
    for seed in range(8):
        batch = task.batch(4, seed)
        assert batch.input_ids.shape == batch.labels.shape
        assert batch.input_ids.shape[1] % LENGTH == 0
        for row in range(4):
            ids, labels = batch.input_ids[row], batch.labels[row]
            asked = labels != IGNORED
            assert torch.equal(ids[asked], labels[asked])
            assert answer(made, labels).strip(" .</") == batch.answer[row]
            before, question = ids[:-LENGTH], ids[-LENGTH : len(ids) - LENGTH + int(asked[-LENGTH:].nonzero()[0])]
            assert batch.answer[row] in said(made, before)
            assert batch.how[row] == "told"
            assert batch.question[row] in said(made, question)


def test_answers_begin_at_one_place():
    """So the head of the model computes few logits."""
    task = ToldThings(tokenizer(), pool(), facts=2)
    labels = task.batch(16, 3).labels.unflatten(1, (-1, LENGTH)) != IGNORED
    first = labels.int().argmax(-1)[labels.any(-1)]
    assert first.unique().numel() == 1


def test_corrections_hold_and_what_was_taken_back_does_not():
    made = tokenizer()
    task = ToldThings(made, pool(), facts=2, segments=(6, 8), mixture=Mixture(0.5, 0.5, 0.0, 0.0))
    seen = set()
    for seed in range(6):
        batch = task.batch(8, seed)
        for row, (how, value) in enumerate(zip(batch.how, batch.answer, strict=True)):
            seen.add(how)
            text = said(made, batch.input_ids[row])
            assert (value == NOT_TOLD) == (how == "retracted")
            if how == "corrected":
                forms = ("No, ", "Correction", "has changed", "was wrong", "From now on", "meant")
                assert any(form in text for form in forms)
    assert seen == {"corrected", "retracted"}


def test_what_nobody_told_has_an_answer_of_its_own():
    made = tokenizer()
    batch = ToldThings(made, pool(), mixture=Mixture(0.0, 0.0, 1.0, 0.0)).batch(8, 0)
    assert set(batch.how) == {"never told"}
    assert {answer(made, labels).strip() for labels in batch.labels} == {NOT_TOLD}


def test_places_differ():
    """Facts stand anywhere: at a stream's beginning, at its end, across a border."""
    made = tokenizer()
    filler = pool(made)
    task = ToldThings(made, filler, segments=(4, 4))
    touched = torch.zeros(4)
    for seed in range(20):
        for ids in task.batch(4, seed).input_ids.unflatten(1, (-1, LENGTH))[:, :4]:
            known = (ids[:, None] == filler).all(-1).any(-1)
            assert 1 <= int((~known).sum()) <= 2
            touched += (~known).float()
    assert (touched > 8).all()


def test_same_seed_same_streams():
    task = ToldThings(tokenizer(), pool(), facts=2, questions=2)
    once, twice, other = task.batch(4, 7), task.batch(4, 7), task.batch(4, 8)
    assert torch.equal(once.input_ids, twice.input_ids)
    assert once.input_ids.shape != other.input_ids.shape or not torch.equal(once.input_ids, other.input_ids)


def test_too_short_segments_are_refused():
    ids = torch.tensor(tokenizer()(prose(4000), add_special_tokens=False)["input_ids"])
    with pytest.raises(ValueError, match=r"fits a segment of 8 tokens.*longer segments"):
        ToldThings(tokenizer(), pool_of(ids, 8))
    with pytest.raises(ValueError, match="at least two segments of 160"):
        pool_of(ids[:200], 160)
    with pytest.raises(ValueError, match="facts 0"):
        ToldThings(tokenizer(), pool(), facts=0)


def test_a_copy_is_asked_whole():
    batch = Copying(pool()).batch(3, 0)
    first, second = batch.input_ids.chunk(2, 1)
    assert torch.equal(first, second)
    assert (batch.labels[:, : LENGTH + 1] == IGNORED).all()
    assert torch.equal(batch.labels[:, LENGTH + 1 :], second[:, 1:])


def test_a_value_is_whole_with_any_end_behind_it():
    made = tokenizer()
    ends = endings(made)
    stop, mark, letter = (made.convert_tokens_to_ids(text) for text in (".", "!", "a"))
    assert ends[[stop, mark, letter]].tolist() == [True, True, False]
    labels = torch.tensor([[IGNORED, letter, letter, stop]])
    for said, right in (
        ([mark, letter, letter, stop], True),
        ([letter, letter, letter, mark], True),
        ([letter, letter, letter, letter], False),  # the value goes on
        ([letter, letter, letter, len(ends)], False),  # a row of the vocabulary without a token
        ([letter, letter, mark, stop], False),  # an end in the value's place
    ):
        assert whole(torch.tensor([said]), labels, ends).tolist() == [right]


# --- lessons ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("segments", "same"), [(4, True), (8, False)])
def test_text_that_is_all_retrieved_is_everything_in_the_window(segments, same):
    torch.manual_seed(0)
    made, model = tokenizer(), make("llama")
    attachment = mnemic.attach(model, mnemic.FastWeightsConfig(segment_length=LENGTH, dim=16))
    batch = ToldThings(made, pool() % model.config.vocab_size, segments=(segments, segments)).batch(4, 0)
    found = [retrieved(attachment, made, batch, LENGTH), in_window(attachment, batch)]
    asked = batch.labels != IGNORED
    assert (found[0][asked] == found[1][asked]).all() == same


def test_lessons_are_read():
    assert lessons("copying:200,1x8:500,4x64:2000") == [Lesson(200), Lesson(500, (1,), (8,)), Lesson(2000, (4,), (64,))]
    assert lessons("1+1+4x8+64:9,2:3") == [Lesson(9, (1, 1, 4), (8, 64)), Lesson(3, (2,), (8,))]
    for wrong in ("copying", "x8:10", "1x8", "", "copying:200,"):
        with pytest.raises(ValueError, match="is no lesson; write copying:STEPS"):
            lessons(wrong)


def test_a_lesson_draws_numbers_of_facts_and_segments():
    run = LessonRun("none", mnemic.FastWeightsConfig(segment_length=LENGTH), lessons("copying:2,0+1+2x1+8:30"), rows=2)
    batch = run.batches(tokenizer(), pool())
    streams = [batch(step) for step in range(run.steps)]
    assert not any(isinstance(each, Told) for each in streams[:2])
    told = [each for each in streams if isinstance(each, Told)]
    assert 15 < len(told) < 28
    lengths = {each.input_ids.shape[1] // LENGTH for each in told}
    assert max(lengths) > 5
    assert min(lengths) == 2
    assert torch.equal(batch(7).input_ids, streams[7].input_ids)
