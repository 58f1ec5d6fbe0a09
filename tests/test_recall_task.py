"""The recall task: what is told, what lies between, what is asked, and what counts as an answer."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import mnemic
from families import make
from helpers import trained
from mnemic.bench import recall as bench
from mnemic.tasks.base import TEST_SEEDS, generator
from mnemic.tasks.facts import NAMES, THINGS, LanguageRecall, Question, SymbolRecall
from mnemic.tasks.recall import SentenceStreams, SymbolStreams, small_world
from mnemic.unrolling import IGNORED
from task_checks import real

PROSE = "once there was a big red house and it stood near the old sea . "
WORDS = ["[UNK]", *PROSE.split(), *NAMES, *THINGS, "has"]
CONTROLS = {"zeroed", "other stream", "fresh", "no memory"}


def by_words():
    """A token a word."""
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def by_letters(*merges):
    """A token a letter, spaces too, but for these merges."""
    letters = sorted({letter for word in [*WORDS, " .", *"[]"] for letter in word})
    vocabulary = {token: index for index, token in enumerate([*letters, *("".join(pair) for pair in merges)])}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocabulary, list(merges))))


def language(tokenizer=None, segment_length=64, **more):
    return LanguageRecall(tokenizer or by_words(), PROSE * 40, segment_length, **more)


def tasks():
    return [SymbolRecall(), language(), language(by_letters())]


every_task = pytest.mark.parametrize("task", tasks(), ids=["symbols", "words", "letters"])


def contains(row, part):
    """At how many places `part` stands in `row`."""
    return sum(row[i : i + len(part)] == part for i in range(len(row) - len(part) + 1))


def pairs_of(task, row):
    """The facts a segment tells, in their order."""
    if isinstance(task, SymbolRecall):
        return [(row[i] - 4, row[i + 1] - 20) for i in range(len(row) - 1) if 4 <= row[i] < 20]
    sentences = [(k, v, fact) for k, facts in enumerate(task.facts) for v, fact in enumerate(facts)]
    places = [(i, k, v) for k, v, fact in sentences for i in range(len(row)) if row[i : i + len(fact)] == fact]
    return [(k, v) for _, k, v in sorted(places)]


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


def is_key(ids):
    return (ids >= 4) & (ids < 20)


def is_value(ids):
    return (ids >= 20) & (ids < 36)


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


# --- whole streams as tasks ------------------------------------------------------------------------------------------

STREAMS = [
    SymbolStreams(),
    SymbolStreams(fillers=0, pairs=2, segment_length=16),
    SymbolStreams(fillers=2, pairs=16, segment_length=64),
    SentenceStreams(),
    SentenceStreams(fillers=0, pairs=5, segment_length=40),
    SentenceStreams(fillers=2, pairs=3, segment_length=90, tokenizer="bytes"),
    SentenceStreams(fillers=3, tokenizer=by_words(), filler=PROSE * 80),
    SentenceStreams(fillers=3, tokenizer=by_letters(), filler=PROSE * 80),
]
every_stream = pytest.mark.parametrize("task", STREAMS, ids=lambda task: f"{task.name}-{task.fillers}-{task.pairs}")


def parse(task, row):
    """The facts a segment tells, by their words."""
    return pairs_of(task.parts("train"), row)


@every_stream
def test_streams_tell_lie_still_and_ask_once(task):
    examples, length = task.examples(24, "test"), task.segment_length
    assert examples.input_ids.shape == (24, (task.fillers + 2) * length)
    candidates = task.parts("test").candidates
    for row in range(24):
        ids, place = examples.input_ids[row].tolist(), int(examples.place[row, 0])
        told = parse(task, ids[:length])
        assert len({key for key, _ in told}) == len(told) == task.pairs
        between = [parse(task, ids[i : i + length]) for i in range(length, len(ids) - length, length)]
        assert between == [[]] * task.fillers
        ((key, value),) = parse(task, ids[-length:])
        assert (key, value) in told, "what is asked was told"
        answer = examples.labels[row][examples.asked[row]].tolist()
        assert answer == candidates[value] == ids[place : place + len(answer)]
        assert place > len(ids) - length, "the question stands in the segment of its answer"
        start = int(examples.evidence[row, 0, 0])
        assert parse(task, ids[start : start + 30])[0] == (key, value)
        assert start < length
    assert examples.facts.tolist() == [task.pairs] * 24


@every_stream
def test_the_oracle_of_streams(task):
    examples = task.examples(200, "test")
    assert task.score(task.solve(examples), examples) == 1


@every_stream
def test_without_its_fact_a_stream_is_guessed(task):
    examples = task.examples(600, "test")
    seen = torch.ones_like(examples.asked)
    if isinstance(task, SymbolStreams):
        seen.scatter_(1, examples.evidence[:, 0], False)
    else:
        longest = max(len(fact) for facts in task.parts("test").facts for fact in facts)
        hidden = examples.evidence[:, 0] + torch.arange(longest)
        seen.scatter_(1, hidden.clamp_max(task.segment_length - 1), False)
    share = task.score(task.solve(examples, seen), examples)
    assert share == pytest.approx(1 / 16, abs=4 * (1 / 16 * 15 / 16 / 600) ** 0.5)


@pytest.mark.parametrize("task", [SymbolStreams(), SentenceStreams(pairs=3)], ids=["symbols", "sentences"])
def test_every_fact_and_every_value_is_asked_for_equally_often(task):
    examples = task.examples(800)
    candidates = task.parts("train").candidates
    order, values = [], []
    for row, start in enumerate(examples.evidence[:, 0, 0].tolist()):
        order.append(len(parse(task, examples.input_ids[row, :start].tolist())))
        values.append(candidates.index(examples.labels[row][examples.asked[row]].tolist()))
    # chi-square: 1 in 10,000 above these with 3, 2 and 15 degrees of freedom
    for counted, classes, critical in ((order, task.pairs, {4: 21.1, 3: 18.4}[task.pairs]), (values, 16, 44.3)):
        count, expected = torch.tensor(counted).bincount(minlength=classes).double(), 800 / classes
        assert len(count) == classes
        assert ((count - expected) ** 2 / expected).sum() < critical


def test_no_filler_of_10000_is_a_key_or_names_anyone():
    task = SymbolStreams(fillers=10)
    filler = task.examples(1000).input_ids[:, 32:352]
    assert int((is_key(filler) | is_value(filler)).sum()) == 0
    task = SentenceStreams(fillers=10)
    words = {word.lower() for word in (*NAMES, *THINGS, "has")}
    facts = torch.tensor([place for place, word in enumerate(task.text(range(task.vocabulary))) if word in words])
    assert len(facts) == len(words)
    filler = task.examples(1000).input_ids[:, 64:704]
    assert int(torch.isin(filler, facts).sum()) == 0


def test_splits_read_different_text():
    task = SentenceStreams()
    texts = {split: task.parts(split).text for split in ("train", "validation", "test")}
    said = {
        split: {tuple(part) for part in zip(*(text[i:].tolist() for i in range(24)), strict=False)}
        for split, text in texts.items()
    }
    for one, other in itertools.combinations(said.values(), 2):
        assert not one & other
    assert sum(map(len, texts.values())) == len(texts["train"]) + len(texts["validation"]) + len(texts["test"])
    assert len(texts["train"]) == pytest.approx(2 * len(texts["test"]), abs=2)


def test_floors_of_streams():
    symbols, sentences = SymbolStreams(), SentenceStreams()
    for task, pairs in ((symbols, 4), (sentences, 2)):
        floors = task.floors(1000)
        assert floors["uniform"] == 1 / 16
        assert floors["a stored value at random"] == pytest.approx(1 / pairs + (1 - 1 / pairs) / 16)
        assert list(floors)[-1] == "oracle"
        # the sample holds the facts' segment, or a share of it, with probability 1 / 5
        assert floors[f"sample of {task.segment_length} tokens"] == pytest.approx(0.2 + 0.8 / 16, abs=0.06)
        for name in ("majority", "last segment", "last 2 segments"):
            assert floors[name] == pytest.approx(1 / 16, abs=0.04), name
    assert SymbolStreams(0, 2, 16).floors(20)["last segment"] == 1


def test_the_small_world_has_no_sentence_twice():
    sentences = [each.strip() for each in small_world().split(".") if each]
    assert len(sentences) == len(set(sentences)) == 4096
    assert not {word.lower() for word in (*NAMES, *THINGS, "has")} & set(small_world().lower().split())


def test_bad_streams():
    with pytest.raises(ValueError, match="fillers is -1"):
        SymbolStreams(fillers=-1)
    with pytest.raises(ValueError, match="9 pairs need a segment of 36 tokens"):
        SymbolStreams(pairs=9)
    with pytest.raises(ValueError, match="tokenizer is 'letters'"):
        SentenceStreams(tokenizer="letters")
    with pytest.raises(ValueError, match="the filler says 'Tom has a', as facts do"):
        SentenceStreams(filler="Once Tom has a hat. " * 300)
    with pytest.raises(ValueError, match="the filler says 'Tom has a', as facts do"):
        SentenceStreams(tokenizer=by_words(), filler="has a house and " + PROSE * 80 + " Tom")
    with pytest.raises(ValueError, match="validation and test get a quarter each; give at least 1024"):
        SentenceStreams(filler="It was a big red house and there it stood . " * 58 + "so it is")


def test_a_real_tokenizer_and_a_real_text():
    tokenizer, text = AutoTokenizer.from_pretrained(real("models/stories260K")), real("text/tinyshakespeare.txt")
    task = SentenceStreams(tokenizer=tokenizer, segment_length=96, filler=text.read_text()[:40_000])
    examples = task.examples(100, "test")
    assert task.score(task.solve(examples), examples) == 1
    for row in range(4):
        name = tokenizer.decode(examples.input_ids[row, int(examples.evidence[row]) :][:6]).split()[0]
        opening = tokenizer.decode(examples.input_ids[row, -96 : int(examples.place[row])])
        assert f"{name} has a" in opening


def test_settings_do_not_hold_a_text():
    assert SentenceStreams().settings()["filler"] is None
    task = SentenceStreams(tokenizer=by_words(), filler=PROSE * 80)
    assert task.settings()["filler"] == f"{len(PROSE) * 80} characters"
    assert task.settings()["tokenizer"] == type(task.tokenizer).__name__


def test_streams_as_text():
    assert SymbolStreams().text([0, 4, 19, 20, 35, 36, 63]) == ["?", "k0", "k15", "v0", "v15", ".", "."]
    task = SentenceStreams(fillers=1, segment_length=16, pairs=1)
    ids = task.examples(1).input_ids[0].tolist()
    assert " has a " in " ".join(task.text(ids))


# --- what counts as an answer ----------------------------------------------------------------------------------------


def oracle(question, vocabulary=97):
    """Logits that answer everything right."""
    targets = F.pad(question.labels[:, 1:], (0, 1), value=0).clamp_min(0)
    return F.one_hot(targets, vocabulary).float()


@every_task
def test_an_oracle_has_answered(task):
    episode = task.tell(8, generator(0))
    question = task.ask(episode, torch.zeros(8, 1, dtype=torch.long), generator(1))
    assert bench.answered(oracle(question), question).tolist() == [True] * 8


@every_task
def test_one_wrong_token_is_no_answer(task):
    episode = task.tell(4, generator(0))
    question = task.ask(episode, torch.zeros(4, 1, dtype=torch.long), generator(1))
    for row in range(4):
        for place in (question.labels[row] != IGNORED).nonzero().flatten().tolist():
            logits = oracle(question)
            logits[row, place - 1, (question.labels[row, place] + 1) % 97] = 2
            assert bench.answered(logits, question).tolist() == [other != row for other in range(4)]


def test_what_is_not_asked_does_not_count():
    labels = torch.tensor([[-100, -100, 5, 6, -100]])
    question = Question(labels.clamp_min(0), labels, labels)
    logits = oracle(question)
    for place in (0, 3, 4):
        logits[0, place, 9] = 2
    assert bench.answered(logits, question).tolist() == [True]


# --- measuring -------------------------------------------------------------------------------------------------------


@pytest.fixture
def task():
    return SymbolRecall(segment_length=16, pairs=2)


@pytest.fixture
def config():
    return mnemic.EMTConfig(slots=4, dim=16, heads=2, segment_length=16)


def test_an_untrained_memory_scores_at_chance(task, config):
    attachment = mnemic.attach(make("gpt2"), config)
    seen = []
    (score,) = bench.evaluate(attachment, task, bench.Places(1, 0, 2), rows=48, batch=32, progress=seen.append)
    assert (score.length, score.tokens, score.examples) == (3, 64, 96)
    assert set(score.controls) == CONTROLS
    assert set(score.outcomes) == {"memory", *CONTROLS}
    assert sum(seen) == 48 * 4
    for name, outcome in score.outcomes.items():
        assert len(outcome) == 96
        assert set(outcome) <= {"0", "1"}
        share = score.score if name == "memory" else score.controls[name]
        assert share == pytest.approx(outcome.count("1") / 96)
        assert share < 0.25, f"{name} answers without a memory"
        assert outcome == score.outcomes["memory"], "an untrained memory changes nothing"
    assert score.details["state_bytes"] == 4 * 16 * 4
    assert 0 <= score.ceiling < 0.25
    assert {"margin_nats", "found_in_8_tokens", "tokens_until_value"} < set(score.details)
    assert bench.beyond_chance([score]) == {}


def test_a_seed_numbers_a_test(task, config):
    attachment, places = trained(make("gpt2"), config), bench.Places(after=2)
    scores = [bench.evaluate(attachment, task, places, rows=8, seed=seed, detail=False) for seed in (0, 0, 1)]
    assert scores[0] == scores[1]
    told = [task.tell(8, generator(TEST_SEEDS + 10_007 * seed)).told for seed in (0, 1)]
    assert not torch.equal(told[0], told[1])
    assert "margin_nats" not in scores[0][0].details


def test_every_kind_of_question_has_a_score(task, config):
    attachment = mnemic.attach(make("gpt2"), config)
    places = bench.Places(1, 2, 0, segments=2, corrected=1)
    scores = bench.evaluate(attachment, task, places, rows=12, batch=8)
    kinds = [bench.asked_for(score) for score in scores]
    assert kinds == ["first facts, beside corrected", "second facts, beside corrected", "corrected facts"]
    assert [score.examples for score in scores] == [12] * 3, "of two and two facts one is corrected"
    assert all(bench.places_of(score) == places for score in scores)
    assert ["old" in score.details for score in scores] == [False, False, True]
    plain = bench.evaluate(attachment, task, bench.Places(segments=2), rows=4, detail=False)
    assert [bench.asked_for(score) for score in plain] == ["first facts", "second facts"]


@pytest.mark.parametrize("anywhere", [False, True])
def test_places(anywhere):
    places = bench.Places(2, 3, 1, segments=2, anywhere=anywhere)
    assert (places.fillers, places.total) == (6, 8)
    drawn = places.draw(200, generator(0))
    assert (drawn[:, 0] < drawn[:, 1]).all()
    if anywhere:
        assert len(drawn.unique(dim=0)) == 28, "all pairs of eight places"
    else:
        assert drawn.unique(dim=0).tolist() == [[2, 6]]


def test_bad_places():
    with pytest.raises(ValueError, match="after is -1"):
        bench.Places(after=-1)
    with pytest.raises(ValueError, match="segments is 3"):
        bench.Places(segments=3)


def test_the_places_of_a_test_are_all_different():
    places = bench.test_places((0, 1, 8), 100, 2)
    assert len(set(places)) == len(places) == 14
    assert {each.before for each in places} == {each.after for each in places} == {0, 1, 8, 100}
    assert sum(each.anywhere for each in places) == 3


@every_task
def test_without_binding_the_values_are_known_and_not_whose(task):
    """Guessing by the told segments alone is right as often as the floor says."""
    episode = task.tell(400, generator(0), segments=2, corrected=1)
    for which in range(episode.keys.shape[1]):
        floors = bench.unbound(task, episode, which)
        assert floors["chance"].mean() == pytest.approx(1 / len(task.candidates))
        guessed = []
        for row in range(400):
            said = episode.said[row, episode.since[row, which]].tolist()
            best = [value for value in set(said) if said.count(value) == max(map(said.count, said))]
            guessed.append((int(episode.values[row, which]) in best) / len(best))
        assert floors[bench.UNBOUND].tolist() == pytest.approx(guessed)
        told = (episode.said.flatten(1) == episode.values[:, which, None]).float().mean(1)
        assert torch.equal(floors["a told value at random"], told)
        assert floors[bench.UNBOUND].mean() > told.mean() > 2 / len(task.candidates)


def test_a_control_above_chance_is_named(task, config):
    (score,) = bench.evaluate(mnemic.attach(make("gpt2"), config), task, bench.Places(), rows=32, detail=False)
    score.controls |= {"zeroed": 1 / 16 + 0.01, "fresh": 1 / 16 + 0.2}
    assert set(bench.beyond_chance([score])) == {"fresh"}


def test_conditions(task, config):
    attachment = trained(make("gpt2"), config)
    episode = task.tell(4, generator(0))
    laid = task.lay(episode, bench.Places(after=3).draw(4, generator(1)), 4, generator(1))
    stream = bench.read_stream(attachment, laid, lambda segments: None)
    assert stream.written == (4,) * 4
    states = bench.conditions(attachment, stream.state)
    own = stream.state["slots"]
    assert list(states) == list(bench.CONDITIONS)
    assert states["no memory"] is None
    assert torch.equal(states["memory"]["slots"], own)
    assert not states["zeroed"]["slots"].any()
    assert torch.equal(states["fresh"]["slots"], attachment.memory.init_state(4)["slots"])
    for row in range(4):
        assert torch.equal(states["other stream"]["slots"][row], own[row - 1])
    ids = task.ask(episode, torch.zeros(4, 1, dtype=torch.long), generator(2)).ids
    logits = [bench.logits_of(attachment, ids, state) for state in states.values()]
    assert all((a - b).abs().max() > 1e-4 for a, b in itertools.combinations(logits, 2)), "two conditions are one"
    with attachment.disabled(), torch.no_grad():
        torch.testing.assert_close(logits[-1], attachment.model(ids).logits)


def test_reading_in_parts_reads_the_same_number(task, config):
    attachment = trained(make("gpt2"), config)
    seen = []
    stream = bench.read_stream(attachment, task.filler(3, 8, generator(0)), seen.append, part=3)
    assert seen == [9, 9, 6]
    assert stream.seen == (8 * 16,) * 3


def test_every_condition_is_scored_under_its_own_name(task, config, monkeypatch):
    """Only one condition at a time is given an oracle: it alone must score."""
    attachment = mnemic.attach(make("gpt2"), config)
    asked = []
    ask = task.ask
    monkeypatch.setattr(task, "ask", lambda *given: asked.append(ask(*given)) or asked[-1])
    names = [name for name in bench.CONDITIONS if name != "no memory"]
    monkeypatch.setattr(
        bench, "conditions", lambda attachment, state, order: {**{n: n for n in names}, "no memory": None}
    )
    for right in names:

        def logits_of(attachment, ids, state, right=right):
            good = oracle(asked[-1]) if asked and asked[-1].ids.shape == ids.shape else torch.zeros(*ids.shape, 97)
            return good if state == right else torch.zeros_like(good)

        monkeypatch.setattr(bench, "logits_of", logits_of)
        (score,) = bench.evaluate(attachment, task, bench.Places(after=1), rows=8, batch=4, detail=False)
        shares = {"memory": score.score, **score.controls}
        assert shares == {name: float(name == right) for name in bench.CONDITIONS}
        assert score.ceiling == 0


@every_task
@pytest.mark.parametrize("sign", [1, -1])
def test_margins(task, sign, monkeypatch):
    """Every token of the right answer lies 30 nats above or below all others."""
    episode = task.tell(4, generator(0))
    question = task.ask(episode, torch.zeros(4, 1, dtype=torch.long), generator(1))
    place = (question.labels != IGNORED).long().argmax(1)
    given = []

    def logits_of(attachment, ids, state):
        given.append(ids)
        logits = torch.zeros(*ids.shape, 97)
        for row in range(4):
            for offset, token in enumerate(task.candidates[int(episode.values[row, 0])]):
                logits[row, place[row] + offset - 1, token] = 30 * sign
        return logits

    monkeypatch.setattr(bench, "logits_of", logits_of)
    margins = bench.margins(SimpleNamespace(), task, question, episode.values[:, 0], {})
    assert margins.shape == (4,)
    # answers that begin alike differ in fewer tokens; all differ in one
    assert (sign * margins > 20).all()
    if len(task.candidates[0]) == 1:
        torch.testing.assert_close(margins, torch.full((4,), 30.0 * sign))
    for candidate, ids in zip(task.candidates, given, strict=True):
        for row in range(4):
            assert ids[row, place[row] : place[row] + len(candidate)].tolist() == candidate
            assert torch.equal(ids[row, : place[row]], question.ids[row, : place[row]])


@pytest.mark.parametrize("knows", ["the new value", "the old value"])
def test_old_values_are_told_from_new_ones(knows, task, config, monkeypatch):
    """A memory that has one of both is right where it should be, and the old value is counted as such."""
    attachment = mnemic.attach(make("gpt2"), config)
    new, questions, ask = knows == "the new value", [], task.ask

    def asked(episode, facts, source):
        questions.append(facts)
        return ask(episode, facts, source)

    def logits_of(attachment, ids, state):
        logits = torch.zeros(*ids.shape, 97)
        old = torch.where(first.before < 0, first.values, first.before)
        wanted = (first.values if new else old).gather(1, questions[-1])
        logits.scatter_(2, (wanted + task.first_value)[:, None].expand(-1, ids.shape[1], -1), 5.0)
        return logits

    first = task.tell(6, generator(TEST_SEEDS), segments=2, corrected=2)
    monkeypatch.setattr(task, "ask", asked)
    monkeypatch.setattr(bench, "logits_of", logits_of)
    (score,) = bench.evaluate(attachment, task, bench.Places(segments=2, corrected=2), rows=6, detail=False)
    assert bench.asked_for(score) == "corrected facts"
    assert (score.score, score.details["old"]) == ((1, 0) if new else (0, 1))
