"""Proactive interference: updates of keys, of which only the last counts."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch

from mnemic.tasks.base import generator
from mnemic.tasks.interference import CHOICES, NOUNS, TESTS, InterferenceTask, dictionary, invented
from task_checks import chi_square, critical, real


def readable(task, ids):
    """A stream as text, without the marks in front and the padding."""
    pieces = task.text(ids)
    text = "".join(pieces) if task.tokenizer == "bytes" else " ".join(pieces)
    text = text.replace("<pad>", "").replace("<0>", "").lower().lstrip("; ")
    return text.replace(" ;", ";").replace(" :", ":").replace(" .", ".").replace(" ,", ",").strip()


def parsed(task, ids):
    """By hand: the keys that are named, the updates in order, and the answers by key in the order of the questions."""
    named, *updates, questions = readable(task, ids).split("; ")
    listed = named.removeprefix("remember the current value of each of these keys: ").split(", ")
    questions = questions.removeprefix("current values: ").rstrip(".").split(". ")
    return listed, [tuple(each.split(": ")) for each in updates], [tuple(each.split(" is ")) for each in questions]


@pytest.fixture
def published():
    """The dictionary of the paper."""
    return str(real("qa/pi-llm.json"))


@pytest.fixture
def small(tmp_path):
    """Keys and values that a careless reader takes for one another."""
    path = tmp_path / "dictionary.json"
    entries = {
        "body": ["rib", "hip", "hip bone", "neck"],
        "water body": ["lake", "ice", "ice lake", "pond"],
        "Place": ["Ho", "Hove", "St. Ives", "Bo's Inn"],
    }
    path.write_text(json.dumps(entries))
    return str(path)


SETTINGS = [
    {},
    {"updates": 1},
    {"n_keys": 2, "updates": 40},
    {"n_keys": 16, "updates": 3, "segment_length": 80},
    {"asked_keys": 3, "segment_length": 24},
    {"value_words": 3, "segment_length": 80},
    {"sequential": True},
    {"tokenizer": "bytes", "segment_length": 200},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_rules(settings):
    task = InterferenceTask(**settings)
    examples = task.examples(20, "test", 3)
    assert examples.input_ids.shape[1] % task.segment_length == 0
    entries = dictionary(None)
    nouns = list(entries)
    for row, ids in enumerate(examples.input_ids.tolist()):
        listed, updates, answers = parsed(task, ids)
        keys = [key for key, _ in updates]
        told = {key: [value for each, value in updates if each == key] for key in keys}
        assert len(told) == task.n_keys
        assert set(told) <= set(nouns[: task.categories])
        assert all(len(values) == len(set(values)) == task.updates for values in told.values())
        for key, values in told.items():
            words = [word for value in values for word in value.split()]
            assert len(words) == task.updates * task.value_words
            assert set(words) <= set(entries[key][: task.choices])
        changes = sum(a != b for a, b in pairwise(keys))
        assert changes == (task.n_keys - 1 if task.sequential else len(keys) - 1)
        assert sorted(listed) == sorted(key for key, _ in answers)
        assert listed == sorted(listed, key=nouns.index)
        assert len(listed) == task.asked_count
        assert all(value == told[key][-1] for key, value in answers)
        assert [nouns[key] for key in examples.extra["key"][row].tolist()] == [key for key, _ in answers]
        since = [len(keys) - 1 - max(place for place, each in enumerate(keys) if each == key) for key, _ in answers]
        assert examples.extra["since"][row].tolist() == since
        for (key, value), place, age in zip(
            answers, examples.evidence[row, :, 0].tolist(), examples.extra["age"][row].tolist(), strict=True
        ):
            assert readable(task, ids[place : place + task.segment_length]).startswith(f"{key}: {value};")
            assert age == len(ids) // task.segment_length - 1 - place // task.segment_length
    assert examples.facts.tolist() == [task.n_keys * task.updates] * 20
    assert task.score(task.solve(examples), examples) == 1
    found = task.measures(examples.input_ids, examples)
    assert (found["last"], found["earlier"], found["never"]) == (1, 0, 0)


def test_question_opens_a_segment():
    task = InterferenceTask()
    examples = task.examples(5)
    last = examples.input_ids[:, -task.segment_length :].tolist()
    assert all(task.text(row)[:3] == ["current", "values", ":"] for row in last)
    assert bool((examples.place >= examples.input_ids.shape[1] - task.segment_length).all())
    # one token a value and nothing else has labels
    assert int(examples.asked.sum()) == 5 * 8


def test_balance():
    task = InterferenceTask(n_keys=4, updates=3, categories=6, choices=10)
    examples = task.examples(1500)
    keys = examples.extra["key"]
    values = examples.labels[examples.asked].view(keys.shape)
    for place in range(4):
        assert chi_square(keys[:, place].bincount(minlength=6)) < critical(5)
    both = keys * task.vocabulary + values
    assert len(both.unique()) == 60
    assert chi_square(both.flatten().unique(return_counts=True)[1]) < critical(59)


def test_all_updates_last_are_balanced_too():
    # with as many updates as values every value comes, and any of them last
    task = InterferenceTask(n_keys=2, updates=10, categories=2, choices=10)
    labels = task.examples(1000).labels
    counts = labels[labels >= 0].unique(return_counts=True)[1]
    assert len(counts) == 20
    assert chi_square(counts) < critical(19)


def test_orders():
    task = InterferenceTask(n_keys=3, updates=2, categories=3)
    orders = task._order(9000, generator(0)).tolist()
    seen = {tuple(order) for order in orders}
    # 90 orders of AABBCC, 30 of them without two that are the same side by side
    assert len(seen) == 30
    # keys are treated alike
    for place in range(6):
        counts = [sum(order[place] == key for order in orders) for key in range(3)]
        assert chi_square(counts) < critical(2)


def test_no_order_runs_into_a_dead_end():
    for keys, updates in ((2, 100), (3, 60), (5, 30)):
        order = InterferenceTask(n_keys=keys, updates=updates, choices=100)._order(200, generator(1))
        assert bool((order[:, 1:] != order[:, :-1]).all())
        assert bool((order.sort(1).values == torch.arange(keys).repeat_interleave(updates)).all())


def test_nothing_tells_the_answer_but_the_last_update():
    # 10,000 answers without the update that counts: none is right, as no value comes twice
    task = InterferenceTask(n_keys=8, updates=4)
    examples = task.examples(1250)
    ids, seen = examples.input_ids, ~examples.asked
    for offset in range(4):
        seen.scatter_(1, examples.evidence[:, :, 0] + offset, False)
    found = task.measures(task.solve(examples, seen), examples)
    assert found["last"] == 0
    assert found["earlier"] == 1
    assert found["age 1"] == 1
    # and the value stands once before the answers
    context = ids[:, : -task.segment_length]
    labels = examples.labels[examples.asked].view(1250, 8)
    assert int((context[:, None] == labels[:, :, None]).sum()) == 10_000


def test_words_differ():
    words = [invented(number) for number in range(46 * CHOICES)]
    assert len(set(words)) == len(words)
    assert len(set(NOUNS)) == len(NOUNS) == 46
    assert not set(NOUNS) & set(words)
    assert InterferenceTask().vocabulary < 700


def test_floors():
    task = InterferenceTask(n_keys=4, updates=4, categories=4, choices=8, segment_length=24)
    floors = task.floors(500)
    assert floors["uniform"] == 1 / 8
    assert floors["a value of the key"] == 1 / 4
    assert floors["a told value"] == 1 / 16
    assert abs(floors["majority"] - 1 / 8) < 0.04
    assert floors["oracle"] == 1
    assert floors["last segment"] < 0.98 < floors["last 2 segments"]
    # a sample of 6 of 16 updates has the last one of a key at 6/16; an older one is wrong; a guess is right at times
    assert 6 / 16 < floors["sample of 24 tokens"] < 6 / 16 + 0.1


def test_last_segment_floor_is_closed_in_blocks():
    # key by key, the segment before the question has the last 6 of 24 updates: two whole keys, and no part of others
    task = InterferenceTask(n_keys=8, updates=3, sequential=True, segment_length=36, choices=40)
    floors = task.floors(300)
    known = 3 / 8
    assert abs(floors["last segment"] - (known + (1 - known) / 40)) < 0.02


def test_intrusions():
    task = InterferenceTask(n_keys=3, updates=5, categories=4)
    examples = task.examples(2)
    world, keys = task._world, examples.extra["key"].tolist()
    predicted = examples.input_ids.clone()
    for row, ids in enumerate(examples.input_ids.tolist()):
        told = {}
        for _, key, value in task._told(ids, [True] * len(ids)):
            told.setdefault(key, []).append(value[0])
        one, two, three = keys[row]
        place = examples.place[row].tolist()
        predicted[row, place[0]] = told[one][-2] if row else told[one][0]
        predicted[row, place[1]] = told[three][2]
        never = next(value[0] for value in world.values[three] if value[0] not in told[three])
        predicted[row, place[2]] = never if row else told[three][-1]
        assert two != three
    assert task.intrusions(predicted, examples).tolist() == [[4, -1, 0], [1, -1, -2]]
    found = task.measures(predicted, examples)
    wanted = {"last": 1 / 6, "earlier": 2 / 6, "never": 3 / 6, "other key": 2 / 6}
    wanted |= {"mean age": 2.5, "mean relative age": 2.5 / 4, "age 1": 1 / 2, "first value": 1 / 2}
    assert found == pytest.approx(wanted)


def test_intrusions_of_several_tokens(small):
    task = InterferenceTask(
        n_keys=2, updates=4, categories=3, choices=4, data=small, tokenizer="bytes", segment_length=100
    )
    examples = task.examples(40)
    ids, ages = examples.input_ids, []
    for back in (1, 2, 3):
        predicted = ids.clone()
        for row, (keys, place) in enumerate(zip(examples.extra["key"].tolist(), examples.place.tolist(), strict=True)):
            told = {key: [] for key in keys}
            for _, key, value in task._told(ids[row].tolist(), [True] * ids.shape[1]):
                told[key].append([*value, *task._world.stop])
            for key, first in zip(keys, place, strict=True):
                old, now = told[key][-1 - back], told[key][-1]
                # what is written of the old value up to where it leaves the right one
                wrong = next(n for n, (a, b) in enumerate(zip(old, now, strict=False)) if a != b)
                predicted[row, first + wrong] = old[wrong]
        ages.append(task.intrusions(predicted, examples))
        assert bool((ages[-1] > 0).all())
        assert bool((ages[-1] <= back).all())
    assert int((ages[2] == 3).sum()) > 30


def test_right_by():
    task = InterferenceTask(updates=6)
    examples = task.examples(100)
    found = task.right_by(task.solve(examples, task.last(examples, 1)), examples)
    assert found[1][0] == 1
    assert found[2][0] < 0.3
    assert sum(count for _, count in found.values()) == 800


@pytest.mark.parametrize("tokenizer", ["words", "bytes"])
def test_names_within_names(small, tokenizer):
    task = InterferenceTask(
        n_keys=3, updates=4, categories=3, choices=4, data=small, tokenizer=tokenizer, segment_length=120
    )
    examples = task.examples(60)
    assert task.score(task.solve(examples), examples) == 1
    # "hip" begins "hip bone": an answer has its full stop, so that the one is not taken for the other
    last = torch.where(examples.asked & ~examples.asked.roll(-1, 1), examples.labels, 0)
    assert set(last[last > 0].tolist()) == set(task._world.stop)
    # where "water" is not seen, "body: ..." must not be taken for the body
    ids = examples.input_ids[0].tolist()
    mark, head = task._world.mark, task._world.heads[1]
    update = [mark, *head, *task._world.values[1][0], mark]
    cut = len(head) - len(task._world.heads[0])
    assert cut > 0
    seen = [False] * (1 + cut) + [True] * (len(update) - 1 - cut)
    assert list(task._told(update, seen)) == []
    assert [key for _, key, _ in task._told(update, [True] * len(update))] == [1]
    assert len(ids) % 120 == 0


def test_published_dictionary(published):
    task = InterferenceTask(n_keys=46, updates=3, categories=46, choices=400, segment_length=512, data=published)
    examples = task.examples(3)
    assert task.score(task.solve(examples), examples) == 1
    assert task.uniform == 1 / 400
    listed, updates, answers = parsed(task, examples.input_ids[0].tolist())
    assert len(listed) == len(answers) == 46
    assert len(updates) == 138
    entries = {key.lower(): {value.lower() for value in values} for key, values in dictionary(published).items()}
    assert all(value.replace(" ", "") in {each.replace(" ", "") for each in entries[key]} for key, value in updates)


def test_published_dictionary_in_bytes(published):
    task = InterferenceTask(categories=46, choices=400, segment_length=512, tokenizer="bytes", data=published)
    examples = task.examples(10)
    assert task.score(task.solve(examples), examples) == 1


def test_hugging_face_tokenizer():
    pytest.importorskip("tokenizers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(alphabet)} | {"<end>": len(alphabet)}
    # two letters are one token, a space and a letter are one token
    for pair in ("Ġr", "ri", "ta", "ka", "er"):
        vocabulary[pair] = len(vocabulary)
    raw = Tokenizer(models.BPE(vocabulary, [("Ġ", "r"), ("r", "i"), ("t", "a"), ("k", "a"), ("e", "r")]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>")
    task = InterferenceTask(n_keys=4, tokenizer=tokenizer, segment_length=128)
    examples = task.examples(10)
    assert task.score(task.solve(examples), examples) == 1
    assert isinstance(task.settings()["tokenizer"], str)


def test_presets():
    assert [len(TESTS[name]) for name in ("updates", "keys", "asked", "length", "sequential")] == [16, 24, 24, 18, 16]
    for name, field in (("updates", "updates"), ("keys", "n_keys"), ("asked", "asked_keys"), ("length", "value_words")):
        assert len({settings[field] for settings in TESTS[name]}) == {"updates": 16, "length": 9}.get(name, 12)
    assert all(settings["sequential"] for settings in TESTS["sequential"])
    for name in ("keys", "length", "sequential"):
        task = InterferenceTask(**TESTS[name][0])
        examples = task.examples(2)
        assert task.score(task.solve(examples), examples) == 1
    # the longest values of all keys just fit
    assert InterferenceTask(**TESTS["length"][-1]).value_words == 40


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_keys": 1}, "n_keys is 1"),
        ({"n_keys": 17}, "categories is 16"),
        ({"updates": 41}, r"updates is 41; use 1 \.\. 40"),
        ({"asked_keys": 9}, r"asked_keys is 9; use 1 \.\. 8"),
        ({"value_words": 0}, "value_words is 0"),
        ({"categories": 47}, "the dictionary has 46"),
        ({"choices": 401}, "46 and 400"),
        ({"segment_length": 30}, "questions need up to 35"),
        ({"tokenizer": "letters"}, "tokenizer is 'letters'"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        InterferenceTask(**settings)


def test_bad_dictionary(tmp_path):
    path = tmp_path / "bad.json"
    path.write_text('{"bird": "wren"}')
    with pytest.raises(ValueError, match="not a JSON object of keys, each with a list of values"):
        InterferenceTask(data=str(path))
    path = tmp_path / "twice.json"
    path.write_text('{"bird": ["Wren", "wren"], "tool": ["axe", "saw"]}')
    with pytest.raises(ValueError, match="two values of 'bird' are the same"):
        InterferenceTask(n_keys=2, updates=2, categories=2, choices=2, data=str(path))
    path = tmp_path / "mark.json"
    path.write_text('{"bird": ["a;b", "wren"], "tool": ["axe", "saw"]}')
    with pytest.raises(ValueError, match="token of its own"):
        InterferenceTask(n_keys=2, updates=2, categories=2, choices=2, data=str(path))
