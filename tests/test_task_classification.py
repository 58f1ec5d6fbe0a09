"""Classification of long documents: the generated ones and their rules, real ones, naive Bayes, measures."""

from __future__ import annotations

import itertools
import zipfile
from collections import Counter
from math import comb

import pytest
import torch

from mnemic.tasks.base import generator
from mnemic.tasks.classification import (
    CUES,
    FILLERS,
    QUESTION,
    TOPICS,
    Classification,
    KnownWords,
    NaiveBayes,
    kind_of,
    reviews,
)
from mnemic.unrolling import IGNORED
from task_checks import chi_square, real

# --- generated documents ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("classes", "margin"), [(2, 2), (2, 1), (3, 5), (6, 2), (2, 16)])
def test_the_class_is_named_most(classes, margin):
    task = Classification(classes=classes, margin=margin)
    examples = task.examples(100)
    assert examples.input_ids.shape == (100, 5 * 64)
    for row, ids in enumerate(examples.input_ids.tolist()):
        words = task.text(ids)
        counts = {topic: sum(words[:256].count(thing) for thing in TOPICS[topic].split()) for topic in task.topics}
        (answer,) = (place for place, label in enumerate(examples.labels[row].tolist()) if label != IGNORED)
        first, second = sorted(counts.values())[:-3:-1]
        assert max(counts, key=counts.__getitem__) == words[answer] == task.topics[int(examples.extra["class"][row, 0])]
        assert first - second >= margin
        assert sum(counts.values()) == int(examples.facts[row]) == 16
        evidence = [place for place in examples.evidence[row, 0].tolist() if place >= 0]
        assert [words[place] in TOPICS[words[answer]].split() for place in evidence] == [True] * first
        assert evidence == sorted(evidence)
        assert words[256:answer] == QUESTION.split()
        assert set(words[answer + 1 :]) == {"<pad>"}
        assert "<pad>" not in words[:256]


def test_the_answer_is_balanced_and_cues_are_spread():
    task = Classification(classes=4)
    examples = task.examples(2000)
    counts = examples.extra["class"].flatten().bincount(minlength=4)
    assert chi_square(counts.tolist(), 500) < 16.3  # 99.9 %, 3 degrees of freedom
    # one of each document's pieces of evidence, as sentences of the same crowd one another out
    evidence = examples.evidence[:, 0]
    given = (evidence >= 0).sum(1)
    drawn = (torch.rand(2000, generator=generator(3), dtype=torch.float64) * given).long()
    segment = evidence.gather(1, drawn[:, None])[:, 0] // 64
    # a document ends with a filler, so the last segment has a little less
    shares = (segment.bincount(minlength=4) / 2000).tolist()
    assert all(0.2 < share < 0.3 for share in shares), shares


def test_nothing_gives_the_class_away():
    # the sentences around things do not depend on the topic, and no answer stands in a document
    task = Classification(classes=2)
    examples = task.examples(10_000 // 20)
    answers = {answer for (answer,) in task._answers}
    document = examples.input_ids[:, :256]
    assert sum(int((document == answer).sum()) for answer in answers) == 0
    things = torch.tensor(sorted(token for (token,) in task._things.values()))
    frequency = [Counter(), Counter()]
    for ids, label in zip(document, examples.extra["class"][:, 0].tolist(), strict=True):
        frequency[label].update(ids[~torch.isin(ids, things)].tolist())
    assert frequency[0].keys() == frequency[1].keys()
    shares = [{token: count / each.total() for token, count in each.items()} for each in frequency]
    assert max(abs(shares[0][token] - shares[1][token]) for token in shares[0]) < 0.01


def test_no_answer_in_10_000_documents():
    task = Classification(segments=1, segment_length=32, cues=1, margin=1)
    answers = torch.tensor([answer for (answer,) in task._answers])
    for number in range(10):
        examples = task.examples(1000, "train", number)
        assert int(torch.isin(examples.input_ids[:, :32], answers).sum()) == 0
        assert (examples.answer.max(1).values == 0).all()


def test_things_are_of_one_topic_and_no_part_of_another_word():
    things = [thing for topic in TOPICS.values() for thing in topic.split()]
    others = {word for text in (*FILLERS, QUESTION, *(" ".join(cue) for cue in CUES)) for word in text.split()}
    assert [len(topic.split()) for topic in TOPICS.values()] == [12] * 6
    assert len(things) == len(set(things))
    words = [*things, *sorted(others), *TOPICS]
    # with bytes a thing is found by how it begins
    found = [(one, two) for one, two in itertools.product(things, words) if one != two and two.startswith(one)]
    assert [pair for pair in found if pair[1] not in TOPICS] == []
    assert not others & {*things}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"classes": 6, "segments": 7},
        {"tokenizer": "bytes", "segment_length": 200, "classes": 3},
        {"segments": 1, "cues": 3, "margin": 3, "segment_length": 33},
    ],
)
def test_the_oracle_is_always_right(settings):
    task = Classification(**settings)
    assert task.solvable
    examples = task.examples(200, "test")
    assert task.score(task.solve(examples), examples) == 1
    assert (examples.evidence < examples.place[:, :, None]).all()
    assert (examples.place[:, 0] // task.segment_length == task.segments).all()


def chance_to_tell(named, label_count, told):
    """Chance that counting `told` of `named` cues tells which of two classes, ties by a coin: hypergeometric."""
    total = 0.0
    for right in range(told + 1):
        wrong = told - right
        ways = comb(label_count, right) * comb(named - label_count, wrong) / comb(named, told)
        total += ways * (1 if right > wrong else 0.5 if right == wrong else 0)
    return total


def test_a_part_tells_what_it_should():
    # any eight of sixteen cues, as a memory of half of them would know
    task = Classification()
    examples = task.examples(1500, "test")
    things = torch.tensor([token for (token,) in task._things.values()])
    cue = torch.isin(examples.input_ids, things)
    luck = torch.rand(cue.shape, generator=generator(4), dtype=torch.float64).masked_fill(~cue, -1)
    kept = luck >= luck.topk(8, 1).values[:, -1:]
    score = task.score(task.solve(examples, kept), examples)
    expected = chance_to_tell(16, 9, 8)
    assert abs(score - expected) < 4 * (0.25 / 1500) ** 0.5
    # and nothing at all is a coin
    nothing = task.score(task.solve(examples, torch.zeros_like(kept)), examples)
    assert abs(nothing - task.uniform) < 4 * (0.25 / 1500) ** 0.5


def test_floors_lie_between_chance_and_the_oracle():
    floors = Classification().floors(600)
    assert floors["oracle"] == 1
    assert floors["uniform"] == 0.5
    assert abs(floors["majority"] - 0.5) < 0.08
    assert 0.55 < floors["last segment"] < floors["last 2 segments"] < 0.85
    assert 0.53 < floors["sample of 64 tokens"] < 0.8


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"segments": 0}, "segments is 0"),
        ({"classes": 1}, "classes is 1; there are topics for 2 to 6"),
        ({"classes": 7}, "classes is 7"),
        ({"margin": 0}, "margin is 0; 4 cues in each of 4 segments allow 1 to 16"),
        ({"margin": 17}, "margin is 17"),
        ({"kind": "poems"}, "kind is 'poems'; choose one of auto, hyperpartisan, reviews"),
        ({"keep": "middle"}, "keep is 'middle'"),
        ({"segment_length": 32}, "4 cues of up to 9 tokens do not fit a segment of 32"),
        ({"segment_length": 7, "cues": 0, "margin": 1}, "0 cues in each"),
        ({"segment_length": 20, "tokenizer": "bytes", "cues": 1, "segments": 8}, "do not fit a segment of 20"),
        ({"tokenizer": "gpt2"}, "tokenizer is 'gpt2'"),
    ],
)
def test_settings_that_cannot_be(settings, match):
    with pytest.raises(ValueError, match=match):
        Classification(**settings)


# --- measures --------------------------------------------------------------------------------------------------------


def test_measures():
    task = Classification()
    examples = task.examples(4).take(slice(0, 4))
    examples.extra["class"][:] = torch.tensor([[0], [0], [1], [1]])
    (music,), (sailing,) = task._answers
    place = examples.place
    labels = torch.tensor([music, music, sailing, sailing])
    examples.labels.scatter_(1, place, labels[:, None])

    def measured(*said):
        predicted = torch.zeros_like(examples.labels).scatter_(1, place, torch.tensor(said)[:, None])
        return task.measures(predicted, examples)

    assert measured(music, music, sailing, sailing) == {"accuracy": 1, "macro F1": 1}
    found = measured(music, sailing, sailing, sailing)
    assert found["accuracy"] == 0.75
    assert found["macro F1"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    # a token that is no answer is wrong, and no third class
    found = measured(music, 0, sailing, sailing)
    assert found["macro F1"] == pytest.approx((2 / 3 + 1) / 2)


def test_measures_of_answers_of_several_tokens():
    task = Classification(tokenizer="bytes", segment_length=200)
    examples = task.examples(60)
    other = [1 - label for label in examples.extra["class"][:, 0].tolist()]
    predicted = torch.zeros_like(examples.labels)
    for row, label in enumerate(other):
        first, answer = int(examples.place[row]), task._answers[label]
        predicted[row, first : first + len(answer)] = torch.tensor(answer)
    assert task.measures(predicted, examples) == {"accuracy": 0, "macro F1": 0}
    assert task.measures(examples.labels, examples) == {"accuracy": 1, "macro F1": 1}


# --- real documents --------------------------------------------------------------------------------------------------


@pytest.fixture
def shelf(tmp_path):
    """Forty reviews: of words without a meaning, but for one word at the end that tells the class."""
    for number in range(40):
        kind = ("neg", "pos")[number % 2]
        (tmp_path / "films" / kind).mkdir(parents=True, exist_ok=True)
        words = [f"w{(number * place) % 17}" for place in range(5 + 4 * number)]
        words.insert(2, f"number{number}")
        text = "\n".join([*words, "dull" if kind == "neg" else "find"])  # a word of the question
        (tmp_path / "films" / kind / f"{number:02}.txt").write_text(text)
    (tmp_path / "films" / "README").write_text("nothing")
    (tmp_path / "films" / "other.txt").write_text("nothing")
    return tmp_path / "films"


@pytest.fixture
def packed(shelf, tmp_path):
    with zipfile.ZipFile(tmp_path / "films.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(shelf.rglob("*")):
            archive.write(file, file.relative_to(tmp_path))
    return tmp_path / "films.zip"


def test_reviews_from_a_folder_or_a_zip(shelf, packed, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    found = reviews(packed)
    assert sorted(tmp_path.rglob("*")) == before, "nothing is unpacked"
    assert found == reviews(shelf)
    assert [label for _, label in found] == [False] * 20 + [True] * 20
    assert found[0][0].startswith("w0 w0 number0 ")
    assert found[0][0].endswith("dull")
    assert kind_of(packed) == kind_of(shelf) == "reviews"


def test_archives_that_do_not_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="none does not exist; pass the movie reviews"):
        reviews(tmp_path / "none")
    with zipfile.ZipFile(tmp_path / "one.zip", "w") as archive:
        archive.writestr("a/neg/1.txt", "bad")
    with pytest.raises(ValueError, match="no reviews of both kinds"):
        reviews(tmp_path / "one.zip")
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/neg/1.txt", b"\0" * (17 * 2**20))
    with pytest.raises(ValueError, match="has 17825792 bytes; at most 16777216 are read"):
        reviews(tmp_path / "bomb.zip")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").write_text("a")
    with pytest.raises(ValueError, match="neither XML files of Hyperpartisan nor reviews"):
        kind_of(tmp_path / "empty")


def test_real_documents_are_whole_segments(shelf):
    task = Classification(data=str(shelf), segments=4, segment_length=20)
    assert not task.solvable
    assert task.uniform == 0.5
    examples = task.examples(32)
    texts = task.documents.train
    lengths = Counter()
    for row, ids in enumerate(examples.input_ids.tolist()):
        words, place = task.text(ids), int(examples.place[row])
        first = place - len(task._question)
        assert first % 20 == 0, "the question opens a segment"
        assert 20 <= first <= 80
        assert set(words[place + 1 :]) <= {"<pad>"}
        assert "<pad>" not in words[:place], "no padding before the question"
        (text,) = [text for text, _ in texts if text.split()[2] == words[2]]
        whole = text.split()
        lengths[first] += 1
        if len(whole) < 20:
            assert words[:20] == (whole * 20)[:20]
        else:
            cut = whole[:80]
            assert words[: len(cut) // 20 * 20] == cut[: len(cut) // 20 * 20]
            assert words[first - 20 : first] == cut[-20:]
        assert words[place] == ("good" if int(examples.extra["class"][row]) else "bad")
        assert int(examples.facts[row]) == first // 20
        assert [p for p in examples.evidence[row, 0].tolist() if p >= 0] == list(range(0, first, 20))
    assert set(lengths) == {20, 40, 60, 80}


def test_the_end_that_is_kept(shelf):
    # the word that tells the class comes last: behind the cut of long reviews, or before it
    front, back = (
        Classification(data=str(shelf), segments=1, segment_length=20, keep=keep) for keep in ("front", "back")
    )
    tell = {"dull": "bad", "find": "good"}
    for task, wanted in ((front, False), (back, True)):
        examples = task.examples(30)
        long = [row for row in examples.input_ids.tolist() if len(set(task.text(row)[:20]) & set(tell)) == 0]
        assert (not long) == wanted


def test_splits_are_those_of_the_seed(shelf):
    def tests(seed):
        return [text for text, _ in Classification(data=str(shelf), seed=seed).documents.test]

    assert tests(1) == tests(1)
    assert len({tuple(tests(seed)) for seed in range(5)}) == 5
    parts = Classification(data=str(shelf)).documents
    assert [len(parts.train), len(parts.validation), len(parts.test)] == [32, 4, 4]
    assert sum(label for _, label in parts.test) == 2
    texts = [{text for text, _ in part} for part in (parts.train, parts.validation, parts.test)]
    assert not any(one & other for one, other in itertools.combinations(texts, 2))
    # all once before one comes again
    examples = Classification(data=str(shelf)).examples(8, "test")
    counts = Counter(map(tuple, examples.input_ids.tolist()))
    assert set(counts.values()) == {2}


def test_naive_bayes_is_a_floor_of_real_documents(shelf):
    task = Classification(data=str(shelf), segments=9, segment_length=20)
    floors = task.floors(40)
    assert "oracle" not in floors
    # the last segment has the word that tells
    assert floors["last segment"] == floors["all segments"] == 1
    examples = task.examples(40, "test")
    nothing = task.solve(examples, torch.zeros_like(examples.asked))
    assert task.score(nothing, examples) == 0.5, "without a word it says the class that is most frequent"
    # the question is no part of a document
    own = task.solve(examples, task.last(examples, 0))
    assert torch.equal(own, nothing)


def test_naive_bayes_by_hand():
    bayes = NaiveBayes([["a", "b", "a"], ["a"], ["c"]], [0, 0, 1], 2)
    # class 0 has words a twice (a document each) and b; class 1 has c; three words in all
    assert bayes.weight["a"] == pytest.approx([torch.tensor(3 / 6).log().item(), torch.tensor(1 / 4).log().item()])
    assert bayes.weight["c"] == pytest.approx([torch.tensor(1 / 6).log().item(), torch.tensor(2 / 4).log().item()])
    assert bayes([]) == bayes(["unheard"]) == bayes(["a"]) == 0
    assert bayes(["c"]) == bayes(["c", "c"]) == 1
    # seldom words do not speak for the class that has fewer documents
    uneven = NaiveBayes([["x", f"r{n}"] for n in range(30)] + [["x"]] * 10, [0] * 30 + [1] * 10, 2)
    assert uneven(["x"]) == 0


def test_known_words():
    known = KnownWords(["a a b c", "B b d"], ["yes"], most=2)
    assert known.encode("A b c yes") == [known.ids["a"], known.ids["b"], known.unknown, known.ids["yes"]]
    assert known.pieces([known.unknown, known.pad]) == ["<unk>", "<pad>"]
    assert known.vocabulary == 5


def test_real_hyperpartisan():
    path = real("classification/hyperpartisan-byarticle.tar.xz")
    task = Classification(data=str(path), segments=8, segment_length=128)
    parts = task.documents
    assert [len(parts.train), len(parts.validation), len(parts.test)] == [515, 65, 65]
    floors = task.floors(65)
    assert floors["majority"] == pytest.approx(41 / 65)
    assert floors["all segments"] > floors["majority"]
    assert set(task.measures(task.solve(task.examples(65, "test")), task.examples(65, "test"))) == {
        "accuracy",
        "macro F1",
    }


def test_real_reviews():
    found = reviews(real("classification/movie_reviews.zip"))
    assert (len(found), sum(label for _, label in found)) == (2000, 1000)
    words = sum(len(text.split()) for text, _ in found[:200]) / 200
    assert 500 < words < 1000
