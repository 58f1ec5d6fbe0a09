"""The recall task: whole streams, their oracle and floors."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import AutoTokenizer

from mnemic.tasks.facts import NAMES, THINGS
from mnemic.tasks.recall import SentenceStreams, SymbolStreams, small_world
from recalls import PROSE, by_letters, by_words, is_key, is_value, pairs_of
from task_checks import real

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
