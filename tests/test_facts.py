"""The facts of recall: what is told, what lies between, and what is asked, as symbols and as language."""

from __future__ import annotations

import pytest
import torch

from mnemic.tasks.base import generator
from mnemic.tasks.facts import NAMES, THINGS, LanguageRecall, SymbolRecall
from mnemic.unrolling import IGNORED
from recalls import PROSE, by_letters, by_words, contains, every_task, is_key, is_value, language, pairs_of

# --- both forms ------------------------------------------------------------------------------------------------------


@every_task
def test_the_seed_alone_decides_the_streams(task):
    one, same, third = (task.stream(8, 3, generator(seed), segments=2, corrected=1) for seed in (5, 5, 6))
    assert one[0].shape == one[1].shape == (8, 6 * task.segment_length)
    assert torch.equal(one[0], same[0])
    assert torch.equal(one[1], same[1])
    assert (one[0][:, : task.segment_length] != third[0][:, : task.segment_length]).any(1).all()
    assert not torch.equal(one[1], third[1])


@every_task
def test_only_the_last_segment_has_labels_and_they_repeat_the_ids(task):
    ids, labels = task.stream(8, 3, generator(1))
    silent = labels[:, : -task.segment_length]
    assert (silent == IGNORED).all()
    has = labels != IGNORED
    assert has.any(1).all()
    assert torch.equal(labels[has], ids[has])
    assert not has[:, -task.segment_length].any(), "the first token of a segment follows from nothing in it"


@every_task
def test_fillers_come_from_the_pool(task):
    pool = task.filler(4, 1, generator(9))
    ids, _ = task.stream(16, 3, generator(1), pool)
    laid = ids.unflatten(1, (-1, task.segment_length))[:, :-1]
    found = (laid[:, :, None] == pool).all(-1)
    assert (found.any(2).sum(1) == 3).all(), "one of four segments tells the facts"
    assert found.flatten(0, 1).any(0).all()


@every_task
def test_facts_stand_anywhere(task):
    """Both in the first segment and in the last before the question, next to each other and apart."""
    pool = task.filler(4, 1, generator(9))
    ids, _ = task.stream(200, 2, generator(1), pool, segments=2)
    laid = ids.unflatten(1, (-1, task.segment_length))[:, :-1]
    told = ~(laid[:, :, None] == pool).all(-1).any(2)
    orders = {tuple(row) for row in told.int().tolist()}
    assert len(orders) == 6, "two of four segments"
    share = told.double().mean(0)
    assert share.tolist() == pytest.approx([0.5] * 4, abs=4 * (0.25 / 200) ** 0.5)


@every_task
def test_take_keeps_the_rows_together(task):
    episode = task.tell(6, generator(2), segments=2, corrected=1)
    part = episode.take(slice(2, 4))
    for name in ("keys", "values", "told", "said", "since", "before"):
        assert torch.equal(getattr(part, name), getattr(episode, name)[2:4])


@every_task
@pytest.mark.parametrize("corrected", [0, 1, 2])
def test_what_holds_is_what_was_told_last(task, corrected):
    """The segments, read in order, end in the episode's keys and values."""
    episode = task.tell(32, generator(3), segments=3, corrected=corrected)
    assert episode.told.shape[:2] == (32, 3)
    assert episode.keys.shape == (32, task.pairs + 2 * (task.pairs - corrected))
    changed = 0
    for row in range(32):
        holds, since, before = {}, {}, {}
        for segment, told in enumerate(episode.told[row].tolist()):
            facts = pairs_of(task, told)
            assert len({key for key, _ in facts}) == task.pairs
            assert sorted(value for _, value in facts) == sorted(episode.said[row, segment].tolist())
            again = [key for key, _ in facts if key in holds]
            assert len(again) == (corrected if segment else 0)
            for key, value in facts:
                assert holds.get(key) != value, "a correction gives another value"
                before[key], since[key] = holds.get(key, -1), segment
                holds[key] = value
        keys = episode.keys[row].tolist()
        assert dict(zip(keys, episode.values[row].tolist(), strict=True)) == holds
        assert dict(zip(keys, episode.since[row].tolist(), strict=True)) == since
        assert dict(zip(keys, episode.before[row].tolist(), strict=True)) == before
        changed += sum(value >= 0 for value in before.values())
    assert (changed > 0) == (corrected > 0)


@every_task
def test_facts_that_do_not_fit(task):
    with pytest.raises(ValueError, match=r"segments tell of \d+ keys; there are"):
        task.tell(1, generator(0), segments=9)
    with pytest.raises(ValueError, match=f"corrected is {task.pairs + 1}; a segment tells {task.pairs} facts"):
        task.tell(1, generator(0), segments=2, corrected=task.pairs + 1)


@every_task
def test_facts_tell_which_label_answers_which(task):
    episode = task.tell(8, generator(3))
    facts = torch.tensor([[1, 0]]).expand(8, -1)
    question = task.ask(episode, facts, generator(4))
    assert torch.equal(question.fact >= 0, question.labels != IGNORED)
    for row in range(8):
        for which in (0, 1):
            answer = question.labels[row][question.fact[row] == which].tolist()
            wanted = task.candidates[int(episode.values[row, which])]
            # a segment may end within the second answer, never within the first
            assert answer == wanted[: len(answer)]
            assert which == 0 or answer == wanted
    if isinstance(task, SymbolRecall):
        assert (question.fact[question.fact >= 0].view(8, 2) == torch.tensor([1, 0])).all(), "the order is not kept"


@every_task
def test_facts_and_question_share_the_window(task):
    question = task.ask_in_window(16, generator(7))
    assert question.ids.shape == (16, task.segment_length)
    for row in range(16):
        places = (question.fact[row] >= 0).nonzero().flatten().tolist()
        answer = question.labels[row, places]
        assert torch.equal(answer, question.ids[row, places])
        for which in {int(question.fact[row, place]) for place in places}:
            run = [place for place in places if question.fact[row, place] == which]
            before = 1 if isinstance(task, SymbolRecall) else len(task.questions[0]) - task.tail
            key_and_value = question.ids[row, run[0] - before : run[-1] + 1].tolist()
            assert contains(question.ids[row, : run[0] - 1].tolist(), key_and_value[-(len(run) + 1) :]) >= 1


# --- symbols ---------------------------------------------------------------------------------------------------------


def test_symbols_told_holds_exactly_the_pairs():
    episode = SymbolRecall(segment_length=16, pairs=3).tell(64, generator(0))
    assert episode.keys.shape == episode.values.shape == (64, 3)
    for keys, values, told in zip(
        episode.keys.tolist(), episode.values.tolist(), episode.told[:, 0].tolist(), strict=True
    ):
        assert len(set(keys)) == 3
        pairs = [(told[i] - 4, told[i + 1] - 20) for i in range(15) if 4 <= told[i] < 20]
        assert sorted(pairs) == sorted(zip(keys, values, strict=True))
        assert sum(20 <= token < 36 for token in told) == 3
        assert all(token >= 36 for token in told[8:]), "pairs lie in the first half"


def test_symbols_filler_tells_nothing():
    filler = SymbolRecall().filler(32, 20, generator(0))
    assert filler.shape == (32, 640)
    assert filler.min() == 36
    assert filler.max() == 63


def test_symbols_answers_follow_their_keys():
    task = SymbolRecall(segment_length=16, pairs=3)
    episode, facts = task.tell(64, generator(0)), torch.tensor([[2, 0]]).expand(64, -1)
    question = task.ask(episode, facts, generator(1))
    for row in range(64):
        places = (question.labels[row] != IGNORED).nonzero().flatten()
        assert len(places) == 2
        assert (places >= 9).all()
        assert (question.labels[row, places] - 20).tolist() == episode.values[row, [2, 0]].tolist()
        assert (question.ids[row, places - 1] - 4).tolist() == episode.keys[row, [2, 0]].tolist()
    assert is_key(question.ids).sum() == is_value(question.ids).sum() == 128
    assert len({tuple(row) for row in (question.labels != IGNORED).int().tolist()}) > 3, "always asked at one place"


def test_symbols_in_window_asks_every_pair_that_it_told():
    task = SymbolRecall(segment_length=16, pairs=3)
    question = task.ask_in_window(64, generator(0))
    told, asked = question.ids[:, :8].tolist(), question.ids[:, 8:].tolist()
    for first, second, fact in zip(told, asked, question.fact.tolist(), strict=True):
        pairs = [{(half[i], half[i + 1]) for i in range(7) if 4 <= half[i] < 20} for half in (first, second)]
        assert pairs[0] == pairs[1]
        assert len(pairs[0]) == 3
        assert sorted(which for which in fact if which >= 0) == [0, 1, 2]


def test_too_many_pairs_for_the_segment():
    SymbolRecall(segment_length=32, pairs=8)
    with pytest.raises(ValueError, match="9 pairs need a segment of 36 tokens"):
        SymbolRecall(segment_length=32, pairs=9)


# --- language --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", [by_words(), by_letters()], ids=["words", "letters"])
def test_sentences_stand_in_the_told_segment(tokenizer):
    task = language(tokenizer)
    episode = task.tell(32, generator(0))
    starts = set()
    for keys, values, told in zip(
        episode.keys.tolist(), episode.values.tolist(), episode.told[:, 0].tolist(), strict=True
    ):
        assert len(set(keys)) == 2
        said = "".join(f" {NAMES[k]} has a {THINGS[v]}." for k, v in zip(keys, values, strict=True))
        facts = [task.facts[k][v] for k, v in zip(keys, values, strict=True)]
        assert contains(told, facts[0] + facts[1]) == 1
        assert contains(tokenizer.decode(told).replace(" ", ""), said.replace(" ", "")) == 1
        starts.add(next(i for i in range(64) if told[i : i + len(facts[0])] == facts[0]))
    assert len(starts) > 3, "always told at one place"


@pytest.mark.parametrize("tokenizer", [by_words(), by_letters()], ids=["words", "letters"])
def test_one_question_opens_the_segment(tokenizer):
    task = language(tokenizer)
    episode = task.tell(16, generator(0))
    asked = torch.randint(2, (16, 1), generator=generator(1))
    question = task.ask(episode, asked, generator(2))
    for row, which in enumerate(asked[:, 0].tolist()):
        key, value = int(episode.keys[row, which]), int(episode.values[row, which])
        opening = [task.stop, *task.questions[key]]
        answer = task.candidates[value]
        ids, labels = question.ids[row].tolist(), question.labels[row].tolist()
        assert ids[: len(opening) + len(answer)] == opening + answer
        assert labels == [IGNORED] * len(opening) + answer + [IGNORED] * (64 - len(opening) - len(answer))
        assert tokenizer.decode(answer).replace(" ", "") == THINGS[value]


@pytest.mark.parametrize("tokenizer", [by_words(), by_letters()], ids=["words", "letters"])
def test_recite_labels_names_and_things_only(tokenizer):
    task = language(tokenizer)
    episode = task.tell(16, generator(0))
    said = task.recite(episode, generator(1))
    assert (said.fact == -1).all()
    for row, (keys, values) in enumerate(zip(episode.keys.tolist(), episode.values.tolist(), strict=True)):
        ids, labels = said.ids[row].tolist(), said.labels[row].tolist()
        facts = [task.facts[k][v] for k, v in zip(keys, values, strict=True)]
        assert ids[: 1 + sum(map(len, facts))] == [task.stop, *facts[0], *facts[1]]
        place = 1
        for key, value, fact in zip(keys, values, facts, strict=True):
            name, thing = task.encode(NAMES[key]), task.candidates[value]
            wanted = name + [IGNORED] * (len(fact) - len(name) - len(thing) - 1) + thing + [IGNORED]
            assert labels[place : place + len(fact)] == wanted
            place += len(fact)
        assert set(labels[place:]) == {IGNORED}


def test_letters_make_answers_of_several_tokens():
    assert {len(candidate) for candidate in language(by_letters()).candidates} == {4, 5}


def test_filler_runs_on_and_begins_again():
    task = language()
    filler = task.filler(32, 20, generator(0))
    assert filler.shape == (32, 1280)
    text = task.text.tolist() * 4
    assert all(contains(text, row) >= 1 for row in filler.tolist()[:4])
    assert len({tuple(row[:40]) for row in filler.tolist()}) > 4


@pytest.mark.parametrize("merge", [("a", " "), ("l", ".")], ids=["in the question", "at the full stop"])
def test_a_tokenizer_that_splits_fact_and_question_differently(merge):
    with pytest.raises(ValueError, match="does not split"):
        language(by_letters(merge))


def test_other_things_help_against_such_a_tokenizer():
    tokenizer = by_letters(("l", "."))
    task = language(tokenizer, things=("car", "hat", "dog"))
    assert len(task.candidates) == 3


def test_too_short_filler():
    with pytest.raises(ValueError, match="give at least 256"):
        LanguageRecall(by_words(), PROSE)


def test_too_many_sentences_for_the_segment():
    language(segment_length=16)
    with pytest.raises(ValueError, match="do not fit a segment of 15"):
        language(segment_length=15)


def test_names_limits_who_is_spoken_of():
    task = language()
    assert task.tell(64, generator(0), keys=3).keys.unique().tolist() == [0, 1, 2]
    assert task.tell(256, generator(0)).keys.unique().tolist() == list(range(len(NAMES)))
    few = language(names=("Tom", "Ben"), things=("car", "hat"))
    text = by_words().decode(few.tell(16, generator(0)).told.flatten())
    assert "Tom" in text
    assert "Ben" in text
    assert not any(name in text for name in NAMES if name not in ("Tom", "Ben"))
