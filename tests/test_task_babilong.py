"""BABILong: the worlds' rules told by a second reader, placement, leakage, bAbI's files, metrics, floors."""

import json
import re

import pytest
import torch

from mnemic.tasks.babi import OWN, PERSONS, PLACES, THINGS, Reader, babi, micro_story
from mnemic.tasks.babilong import FILLER, BabilongTask, lenient
from mnemic.tasks.base import generator
from task_checks import chi_square, perfect, real, words

STORIES = {
    "qa1_x_train": """1 Ann went to the barn.
2 Bob moved to the mill.
3 Where is Ann? \tbarn\t1
4 Ann went back to the mill.
5 Where is Ann? \tmill\t4
"""
    * 20,
    "qa1_x_test": """1 Bob went to the barn.
2 Ann journeyed to the mill.
3 Where is Bob? \tbarn\t1
1 Ann went to the barn.
2 Where is Ann? \tbarn\t1
1 Bob travelled to the mill.
2 Bob went to the barn.
3 Bob moved to the mill.
4 Where is Bob? \tmill\t3
""",
    "qa3_x_test": """1 Bob went to the barn.
2 Bob got the hat there.
3 Bob went to the mill.
4 Where was the hat before the mill? \tbarn\t2 3 1
""",
}


@pytest.fixture
def stories(tmp_path):
    folder = tmp_path / "tiny-babi"
    folder.mkdir()
    for name, text in STORIES.items():
        (folder / f"{name}.txt").write_text(text)
    return str(folder)


# --- the world of our own --------------------------------------------------------------------------------------------


def retold(told):
    """A story read with nothing shared with the solver: where each thing was, after each fact, and who has it."""
    where, has, visits = {}, {}, {thing: [] for thing in THINGS}
    for fact in told.facts:
        person, *_, last = fact.rstrip(".").split()
        if last in PLACES:
            assert where.get(person) != last
            where[person] = last
        elif any(verb in fact for verb in (" took ", " picked up ", " grabbed ")):
            assert last not in has
            assert person in where
            # a thing is taken where it was left
            assert not visits[last] or visits[last][-1] == where[person]
            has[last] = person
        else:
            assert has.pop(last) == person
        for thing, holder in has.items():
            if visits[thing][-1:] != [where[holder]]:
                visits[thing].append(where[holder])
    return where, visits


@pytest.mark.parametrize("question", ["qa1", "qa2", "qa3"])
def test_stories(question):
    source = generator(3)
    for _ in range(100):
        told = micro_story(question, OWN[question], source)
        where, visits = retold(told)
        asked = re.findall(r"\w+", told.question)
        assert len(told.facts) == OWN[question]
        assert len(set(told.supports)) == int(question[2])
        if question == "qa1":
            assert where[asked[2]] == told.answer
        elif question == "qa2":
            assert visits[asked[3]][-1] == told.answer
        else:
            trail, place = visits[asked[3]], asked[-1]
            assert trail.count(place) == 1
            assert trail[trail.index(place) - 1] == told.answer


@pytest.mark.parametrize("question", OWN)
def test_supports_are_enough(question):
    """The solver answers with the supporting facts alone: nothing else is needed."""
    source = generator(4)
    for _ in range(80):
        told = micro_story(question, OWN[question], source)
        facts = " ".join(told.facts[place] for place in told.supports)
        assert Reader(facts.lower()).answer(told.question.lower()) == told.answer
        for missing in told.supports:
            rest = " ".join(told.facts[place] for place in told.supports if place != missing)
            assert Reader(rest.lower()).answer(told.question.lower()) != told.answer


@pytest.mark.parametrize("question", OWN)
def test_answers_are_balanced(question):
    source = generator(5)
    answers = [micro_story(question, OWN[question], source).answer for _ in range(900)]
    counts = torch.tensor([answers.count(place) for place in PLACES])
    # 0.999 of chi-square with 5 degrees of freedom
    assert chi_square(counts) < 20.52


def test_reason():
    """Both ends of the row of three and both ways to ask come."""
    source = generator(6)
    seen = set()
    for _ in range(200):
        told = micro_story("reason", 2, source)
        seen.add((told.question.endswith("of?"), told.supports))
        middle = re.findall(r"the (\w+)", told.question)[0]
        assert all(middle in fact for fact in told.facts)
        assert told.answer in told.facts[told.supports[0]]
        assert told.answer not in told.facts[1 - told.supports[0]]
    assert len(seen) == 4


# --- placement -------------------------------------------------------------------------------------------------------


def test_facts_keep_their_order_and_their_words():
    task = BabilongTask(question="qa3")
    examples = task.examples(30)
    told = task._told(30, generator(0), "train")
    assert examples.input_ids.shape == (30, 640)
    assert (examples.facts == 16).all()
    assert (examples.extra["supports"] == 3).all()
    for row, story in enumerate(told):
        text = words(task, examples.input_ids[row])
        places = [text.index(fact.lower().replace(".", " .")) for fact in dict.fromkeys(story.facts)]
        assert places == sorted(places) or len(set(story.facts)) < 16
        for place, support in zip(examples.evidence[row, 0].tolist(), story.supports, strict=True):
            fact = task._encoder.encode(story.facts[support])
            assert examples.input_ids[row, place : place + len(fact)].tolist() == fact


def test_gaps_are_uniform():
    task = BabilongTask(question="detect", length=2048, segment_length=256)
    place = task.examples(800).evidence[:, 0, 0]
    # 0.999 of chi-square with 7 degrees of freedom; gaps per eighth differ by one of 16, which adds some
    assert chi_square((place * 8 // 2048).bincount(minlength=8)) < 24.32 + 6
    assert (BabilongTask(question="memorise").examples(20).evidence == 0).all()


def test_span():
    task = BabilongTask(question="qa1", length=2048, segment_length=256, span=(50, 75))
    examples = task.examples(200)
    ids = torch.tensor(task._encoder.encode(" ".join(PERSONS)))
    places = torch.isin(examples.input_ids[:, :2048], ids).nonzero()[:, 1]
    # 8 facts of up to 6 tokens shift what comes behind them
    assert len(places) == 1600
    assert places.min() >= 1000 - 48
    assert places.max() <= 1536 + 48
    point = BabilongTask(question="detect", length=1024, span=(50, 50)).examples(20).evidence
    assert ((point - 512).abs() < 30).all()


def test_no_filler_names_what_facts_name():
    """In 10,000 streams the words of the stories come in facts and nowhere else."""
    assert {word for each in FILLER for word in re.findall(r"\w+", each)}.isdisjoint(
        {each.lower() for each in (*PERSONS, *PLACES, *THINGS)}
    )
    assert len(set(FILLER)) == 180
    task = BabilongTask(question="detect", length=64, segment_length=32)
    examples = task.examples(10_000)
    for kind in (PERSONS, PLACES, THINGS):
        ids = torch.tensor(task._encoder.encode(" ".join(kind)))
        assert (torch.isin(examples.input_ids[:, :64], ids).sum(1) == (kind is not THINGS)).all()


@pytest.mark.parametrize("tokenizer", ["words", "bytes"])
@pytest.mark.parametrize("question", OWN)
@pytest.mark.parametrize("length", [0, 1536])
def test_oracle(question, tokenizer, length):
    task = BabilongTask(question, length, segment_length=768, tokenizer=tokenizer)
    assert perfect(task, 8) == 1
    assert task.examples(2).input_ids.shape == (2, length + 768)


def test_no_text_at_all():
    """Length 0 is the story itself."""
    task = BabilongTask(length=0, segment_length=128)
    examples = task.examples(5)
    told = task._told(5, generator(0), "train")
    for row, story in enumerate(told):
        said = " ".join([*story.facts, story.question, story.answer])
        ids = task._encoder.encode(said)
        assert examples.input_ids[row, : len(ids)].tolist() == ids
        assert not examples.input_ids[row, len(ids) :].any()


def test_a_million_tokens():
    assert perfect(BabilongTask(question="qa2", length=2**20, segment_length=2**10), 1) == 1


# --- floors and metrics ----------------------------------------------------------------------------------------------


def test_floors():
    floors = BabilongTask(question="memorise", length=256, segment_length=64).floors(200)
    assert floors["oracle"] == 1
    assert floors["uniform"] == pytest.approx(1 / 6)
    # the fact is 4 segments away: three standard deviations around a guess
    assert abs(floors["last segment"] - 1 / 6) < 0.08
    assert abs(floors["majority"] - 1 / 6) < 0.08
    floors = BabilongTask(question="detect", length=256, segment_length=64).floors(200)
    assert abs(floors["last segment"] - (0.25 + 0.75 / 6)) < 0.105
    floors = BabilongTask(question="qa1").floors(200)
    assert floors["oracle"] == 1
    assert 0.25 < floors["last place told"] < 0.5
    # a place that the question names is not the answer
    floors = BabilongTask(question="qa3", span=(0, 50)).floors(200)
    assert floors["uniform"] == 0.2
    assert abs(floors["last segment"] - 0.2) < 0.085


def test_lenient():
    assert lenient("Not in the Kitchen. Or is it?", "kitchen")
    assert not lenient("The attic. Or the kitchen", "kitchen")


def test_measures():
    task = BabilongTask(tokenizer="bytes", length=1024, segment_length=256)
    examples = task.examples(20, "test")
    assert task.measures(task.solve(examples), examples) == {"exact": 1, "lenient": 1}
    upper = torch.where(examples.labels >= 97, examples.labels - 32, examples.labels)
    assert task.measures(upper, examples) == {"exact": 0, "lenient": 1}
    assert task.measures(torch.full_like(upper, 97), examples) == {"exact": 0, "lenient": 0}


def test_reader():
    text = """
    bill is either in the park or the park. fred took the apple there. fred got the milk there.
    fred left the apple. fred picked up the apple there. julie is no longer in the office.
    fred gave the milk to bill."""
    answers = {
        "is bill in the park?": "maybe",
        "is bill in the hall?": "no",
        "is julie in the office?": "no",
        "what is fred carrying?": "apple",
        "how many objects is bill carrying?": "one",
        "who gave the milk?": "fred",
        "who received the milk?": "bill",
        "where is mary?": None,
        "why?": None,
    }
    assert {question: Reader(text).answer(question) for question in answers} == answers
    beside = Reader("the hall is north of the park.")
    assert beside.answer("what is the park south of ?") == "hall"
    assert beside.answer("what is north of the park?") == "hall"


# --- stories from files ----------------------------------------------------------------------------------------------


def test_babi(stories):
    (first, *_), *others = babi(stories, "qa1", "test")
    assert first.facts == ("Bob went to the barn.", "Ann journeyed to the mill.")
    assert (first.question, first.answer, first.supports) == ("Where is Bob?", "barn", (0,))
    assert len(others) == 2
    later = babi(stories, "qa1", "train")[0][1]
    # line 3 is a question: it is no fact and does not shift what follows
    assert len(later.facts) == 3
    assert later.supports == (2,)
    assert babi(stories, "qa3", "train") == ()


def test_given_stories(stories, tmp_path):
    task = BabilongTask(data=stories, length=256)
    assert task.answers == ("barn", "mill")
    assert task.names == {"ann", "bob", "barn", "mill"}
    assert len(task.stories("train")) == 36
    assert len(task.stories("validation")) == 4
    assert len(task.stories("test")) == 3
    assert perfect(task) == 1
    # questions whose facts do not fit are left out: the third has 3 facts of 6 tokens
    assert len(BabilongTask(data=stories, length=17, segment_length=17).stories("test")) == 2
    with pytest.raises(ValueError, match="no test question of qa1 fits; use a longer length"):
        BabilongTask(data=stories, length=4, segment_length=4).examples(1, "test")
    third = BabilongTask("qa3", data=stories, length=256)
    assert perfect(third) == 1
    assert third.uniform == 1
    with pytest.raises(ValueError, match="has no training questions of qa3; draw from the test split"):
        third.examples(1)
    indices = tmp_path / "indices.json"
    indices.write_text(json.dumps({"qa1": [0, 2]}))
    chosen = BabilongTask(data=stories, length=256, indices=str(indices))
    assert [told.question for told in chosen.stories("test")] == ["Where is Bob?"] * 2
    assert len(chosen.stories("train")) == 36
    assert chosen.examples(2, "test").facts.sort().values.tolist() == [2, 3]
    with pytest.raises(ValueError, match="1 of 2 test questions do not fit; use a longer length"):
        BabilongTask(data=stories, length=17, segment_length=17, indices=str(indices)).examples(1, "test")


def test_filler_from_files(tmp_path):
    """Sentences with a name, and those of fewer than 10 tokens, are left out."""
    for number in range(3):
        lines = "Lena saw the long grey road. The Attic was dark and full of old dust. No. " * 5
        (tmp_path / f"{number}.txt").write_text(lines + f"The road number {number} went on for many slow miles. " * 60)
    task = BabilongTask(length=2048, segment_length=256, tokenizer="bytes", filler=str(tmp_path), question="detect")
    for split, number in (("train", 0), ("validation", 1), ("test", 2)):
        examples = task.examples(5, split)
        for row in range(5):
            text = "".join(task.text(examples.input_ids[row, :2048].tolist()))
            assert len(re.findall("|".join(PERSONS), text)) == 1
            assert "dark" not in text
            assert "No." not in text
            assert set(re.findall(r"number (\d)", text)) == {str(number)}
        assert task.score(task.solve(examples), examples) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"question": "qa9"}, "question is 'qa9'; use one of qa1, qa2, qa3, memorise, detect, reason"),
        ({"length": 500}, "length is 500 and segment_length 128; the context must be whole segments"),
        ({"length": -128}, "whole segments"),
        ({"span": (60, 40)}, "span is (60, 40)"),
        ({"span": (0, 101)}, "use per cent"),
        ({"facts": 0}, "facts is 0; qa1 has 1 or more"),
        ({"facts": 3, "question": "reason"}, "facts is 3; reason has 2, leave it None"),
        ({"facts": 200}, "length is 512; 200 facts need"),
        ({"length": 0, "segment_length": 32}, "the segment that asks needs"),
        ({"length": 512, "segment_length": 8}, "segment_length is 8"),
        ({"filler": "x"}, "has no words of other texts"),
        ({"indices": "x"}, "pass data=, too"),
        ({"tokenizer": "letters"}, "tokenizer is 'letters'"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        BabilongTask(**settings)


def test_bad_files(stories):
    with pytest.raises(FileNotFoundError):
        BabilongTask(data="nowhere")
    with pytest.raises(ValueError, match="has no file of test questions of 'qa7'"):
        BabilongTask(data=stories, question="qa7")
    with pytest.raises(ValueError, match="have their own number"):
        BabilongTask(data=stories, facts=3)


# --- real data -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(1, 11))
def test_real_babi(number):
    """The solver answers every test question that is kept, which is all but two of task 5."""
    path = str(real("qa/babi-en-10k.tar.xz"))
    told = [each for story in babi(path, f"qa{number}", "test") for each in story]
    right = [Reader(" ".join(each.facts).lower()).answer(each.question.lower()) == each.answer.lower() for each in told]
    assert len(told) == 1000
    assert sum(right) == (998 if number == 5 else 1000)
    assert perfect(BabilongTask(f"qa{number}", length=2048, data=path), 10) == 1


def test_real_indices():
    path, indices = str(real("qa/babi-en-10k.tar.xz")), str(real("qa/babilong_test_100_idxs.json"))
    for question in ("qa1", "qa2", "qa3", "qa4", "qa5"):
        task = BabilongTask(question, 4096, data=path, indices=indices)
        assert len(task.stories("test")) == 100
    task = BabilongTask("qa1", 512, data=path, indices=indices)
    examples = task.examples(100, "test")
    assert task.score(task.solve(examples), examples) == 1
    counts = [len(told.facts) for told in task.stories("test")]
    assert sorted(examples.facts.tolist()) == sorted(counts)


def test_real_novels():
    stories, books = str(real("qa/babi-en-10k.tar.xz")), str(real("text/novels.tar.xz"))
    task = BabilongTask("qa2", 4096, 512, tokenizer="bytes", data=stories, filler=books)
    examples = task.examples(5, "test")
    assert task.score(task.solve(examples), examples) == 1
