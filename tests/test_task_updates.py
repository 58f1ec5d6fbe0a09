"""Fact updates: the rules, read again from the words; balance, floors in closed form, and tables of one's own."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter

import pytest
import torch

from mnemic.tasks.base import TASKS
from mnemic.tasks.updates import RELATIONS, SUBJECTS, UpdatesTask
from task_checks import chi_square, critical

OBJECTS = 12


def dialogues(task, examples):
    """For each row: its turns as (subject, relation, object), the demonstrations, what is asked, and the answer."""
    for row, asked in zip(examples.input_ids.tolist(), examples.asked, strict=True):
        words = task.text(row)
        end = int(asked.long().argmax())
        facts = [
            (words[at], " ".join(words[at + 1 : at + 3]), words[at + 3], words[at + 4]) for at in range(0, end - 3, 5)
        ]
        assert all(stop == "." for *_, stop in facts)
        facts = [fact[:3] for fact in facts]
        told = task.turns * task.facts_per_turn
        turns = [facts[at : at + task.facts_per_turn] for at in range(0, told, task.facts_per_turn)]
        yield turns, facts[told:], (words[end - 3], " ".join(words[end - 2 : end])), words[end]


def told(turns, pair):
    return [(turn, fact[2]) for turn, facts in enumerate(turns) for fact in facts if fact[:2] == pair]


def test_words_of_the_own_world():
    assert TASKS["updates"] is UpdatesTask
    words = [word for things in RELATIONS.values() for word in things.split()] + [name.lower() for name in SUBJECTS]
    assert len(set(words)) == len(words)
    assert {len(things.split()) for things in RELATIONS.values()} == {OBJECTS}
    assert UpdatesTask().unit == 5
    assert UpdatesTask(segment_length=30).unit == 30


@pytest.mark.parametrize(
    "settings", [{}, {"turns": 3, "updates": 2, "pivots": 5}, {"updates": 0, "pivots": 1, "demonstrations": 0}]
)
def test_rules(settings):
    task = UpdatesTask(**settings)
    examples = task.examples(60)
    assert examples.input_ids.shape == (60, (task.turns + 1) * 25)
    for row, (turns, shown, pair, answer) in enumerate(dialogues(task, examples)):
        values = told(turns, pair)
        assert len(values) == len({turn for turn, _ in values}) == task.updates + 1
        assert all(one != two for (_, one), (_, two) in itertools.pairwise(values))
        assert values[-1][1] == answer
        assert examples.extra["updates"][row] == task.updates
        assert examples.extra["turns since update"][row] == task.turns - 1 - values[-1][0]
        place = int(examples.evidence[row, 0, 0])
        assert place // 25 == values[-1][0]
        assert task.text(examples.input_ids[row, place : place + 4].tolist()) == [*" ".join(pair).split(), answer]
        assert examples.facts[row] == 5 * task.turns
        assert len(shown) == task.demonstrations
        assert {relation for _, relation, _ in shown} <= {pair[1]}
        names = {subject for subject, *_ in shown}
        assert len(names) == len(shown)
        # demonstrations are about others, and not about anybody of the dialogue
        assert not names & {subject for facts in turns for subject, *_ in facts} | ({pair[0]} & names)


def test_every_pivot_is_updated():
    # one fact a turn is a pivot's or a distractor's: with pivots in every slot there is nothing else
    task = UpdatesTask(turns=4, updates=3, pivots=5)
    for turns, *_ in dialogues(task, task.examples(40)):
        counts = Counter(fact[:2] for facts in turns for fact in facts)
        assert set(counts.values()) == {4}
        assert len({subject for subject, _ in counts}) == 5


def test_nothing_else_is_said_of_a_pivot():
    # 10,000 streams: a distractor about the pair that is asked would be one statement more
    task = UpdatesTask(turns=3, updates=1, pivots=1)
    number = 0
    for batch in range(10):
        examples = task.examples(1000, number=batch)
        words = examples.input_ids[:, :75].reshape(1000, 15, 5)
        end = examples.asked.long().argmax(1, keepdim=True)
        pair = examples.input_ids.gather(1, end + torch.arange(-3, 0))
        said = (words[:, :, :3] == pair[:, None]).all(2).sum(1)
        shown = examples.input_ids[:, 75:95].reshape(1000, 4, 5)
        known = (shown[:, :, None, 0] == words[:, None, :, 0]).flatten(1).any(1)
        number += int((said != 2).sum() + known.sum())
    assert number == 0


def test_balance():
    task = UpdatesTask(turns=8, updates=2, pivots=2)
    answers, steps, demos, since, slots = Counter(), Counter(), Counter(), Counter(), Counter()
    things = {relation: words.lower().split() for relation, words in RELATIONS.items()}
    for number in range(4):
        examples = task.examples(1000, number=number)
        for row, (turns, shown, pair, answer) in enumerate(dialogues(task, examples)):
            place = things[pair[1]].index(answer)
            answers[pair[1], answer] += 1
            before = things[pair[1]].index(told(turns, pair)[-2][1])
            steps[(place - before) % OBJECTS] += 1
            for _, _, each in shown:
                demos[(place - things[pair[1]].index(each)) % OBJECTS] += 1
            since[int(examples.extra["turns since update"][row])] += 1
            slots[int(examples.evidence[row, 0, 0]) % 25 // 5] += 1
    rows = 4000
    assert len(answers) == 6 * OBJECTS
    assert chi_square(answers.values(), [rows / 72] * 72) < critical(71)
    # never the value before, evenly any other
    assert steps[0] == 0
    assert chi_square([steps[step] for step in range(1, OBJECTS)], [rows / 11] * 11) < critical(10)
    # the demonstrations say nothing about the answer: it is among them as often as chance has it
    assert chi_square([demos[step] for step in range(OBJECTS)], [4 * rows / 12] * 12) < critical(11)
    # the last of three turns of eight, drawn evenly
    expected = [rows * math.comb(7 - gap, 2) / math.comb(8, 3) for gap in range(6)]
    assert chi_square([since[gap] for gap in range(6)], expected) < critical(5)
    assert chi_square([slots[slot] for slot in range(5)], [rows / 5] * 5) < critical(4)


def test_floors():
    task = UpdatesTask(turns=8, updates=2)
    floors = task.floors(600)
    assert next(iter(floors)) == "uniform"
    assert list(floors)[-1] == "oracle"
    assert floors["oracle"] == 1
    assert floors["uniform"] == task.uniform == pytest.approx(1 / OBJECTS)
    # an object comes again after k changes with probability 1/n + (1 - 1/n) (-1 / (n - 1))^k
    again = [1 / OBJECTS + (1 - 1 / OBJECTS) * (-1 / (OBJECTS - 1)) ** k for k in range(3)]
    seen = [1 - math.comb(8 - last, 3) / math.comb(8, 3) for last in (1, 2)]
    wanted = {
        "majority": 1 / OBJECTS,
        "last segment": seen[0] + (1 - seen[0]) / OBJECTS,
        "last 2 segments": seen[1] + (1 - seen[1]) / OBJECTS,
        "first object told": again[2],
        "any object told": sum(again) / 3,
    }
    for name, share in wanted.items():
        assert floors[name] == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 600)), name
    assert floors["uniform"] < floors["sample of 25 tokens"] < floors["any object told"]


def test_measures():
    task = UpdatesTask(turns=6)
    examples = task.examples(200)
    assert task.measures(examples.labels, examples) == {"first token": 1, "earlier object": 0, "never told": 0}
    silent = task.measures(torch.zeros_like(examples.labels), examples)
    assert silent == {"first token": 0, "earlier object": 0, "never told": 1}
    old = examples.labels.clone()
    wanted = 0
    for row, (turns, _, pair, answer) in enumerate(dialogues(task, examples)):
        first = told(turns, pair)[0][1]
        old[row, examples.asked[row]] = task.world.encoder.encode(first)[0]
        wanted += first != answer
    assert task.measures(old, examples)["earlier object"] == wanted / 200
    assert wanted > 100


def test_the_solver_does_not_read_what_is_hidden():
    task = UpdatesTask(turns=6)
    examples = task.examples(100)
    seen = torch.zeros_like(examples.asked)
    seen[:, 6 * 25 :] = True
    seen &= ~examples.asked
    # the statement that counts is enough; nothing seen is a guess, whatever stands there
    guesses = [
        task.guess(ids, examples.asked, seen, torch.Generator().manual_seed(3))
        for ids in (examples.input_ids, torch.where(seen, examples.input_ids, 7))
    ]
    assert torch.equal(*guesses)
    assert 0 < task.score(guesses[0], examples) < 0.3
    place = examples.evidence[:, 0] + torch.arange(5)
    assert task.score(task.solve(examples, seen.scatter(1, place, True)), examples) == 1


@pytest.mark.parametrize("number", [0, 499_999_999])
def test_other_tokens(number):
    words, small = UpdatesTask(turns=5), UpdatesTask(turns=5, tokenizer="bytes", segment_length=150)
    one, other = words.examples(20, "test", number), small.examples(20, "test", number)
    assert small.unit == 150
    assert small.score(small.solve(other), other) == 1
    assert torch.equal(one.extra["turns since update"], other.extra["turns since update"])
    # the same dialogues, and what a segment has left is line ends
    text = "".join(small.text(other.input_ids[0, :750].tolist()))
    said = " ".join(words.text(one.input_ids[0, :125].tolist()))
    assert text.lower().replace("\n", "").replace(".", " .").split() == said.split()


# --- tables ----------------------------------------------------------------------------------------------------------


TRIPLES = [
    (subject, relation, thing)
    for relation, things in {
        "was born in": ["York", "New York", "New York City", "Bad Ems"],
        "is a friend of": ["Ann", "Mary Ann", "Jo"],
    }.items()
    for subject in ["Ann", "Mary Ann", "Jo", "Big Jo", "Ed", "Al Ed", "Kim", "Li"]
    for thing in things
]


def write(path, triples, form="tsv"):
    keys = ("subject", "relation", "object")
    lines = ["\t".join(each) if form == "tsv" else json.dumps(dict(zip(keys, each, strict=True))) for each in triples]
    path.write_text("\n".join(lines) + "\n\n", "utf-8")
    return str(path)


@pytest.mark.parametrize("tokenizer", ["words", "bytes"])
def test_table(tmp_path, tokenizer):
    lone = [("Ann", "is the capital of", "Rome"), ("Dr. Who", "was born in", "Gallifrey"), ("Li", "owns", "U.S.A")]
    paths = [write(tmp_path / form, TRIPLES + lone, form) for form in ("tsv", "jsonl")]
    tasks = [UpdatesTask(8, segment_length=260, tokenizer=tokenizer, data=path, demonstrations=3) for path in paths]
    one, other = (task.examples(150) for task in tasks)
    assert torch.equal(one.input_ids, other.input_ids)
    task = tasks[0]
    # names that end in others, objects that begin with others: all told apart
    assert task.score(task.solve(one), one) == 1
    assert task.uniform == pytest.approx((1 / 4 + 1 / 3) / 2)
    text = "".join(task.text(one.input_ids.flatten().tolist())).lower()
    assert "gallifrey" not in text
    assert "capital" not in text
    assert task.measures(task.solve(one), one)["first token"] == 1
    assert 1 / 4 < task.score(task.solve(one, task.last(one, 1)), one) < 0.95


def test_bad_tables(tmp_path):
    def task(triples, **settings):
        return UpdatesTask(data=write(tmp_path / "table", triples), segment_length=200, **settings)

    with pytest.raises(FileNotFoundError, match="nowhere"):
        UpdatesTask(data=str(tmp_path / "nowhere"))
    (tmp_path / "broken").write_text("a\tb\tc\na\tb\n")
    with pytest.raises(ValueError, match="line 2 is no triple"):
        UpdatesTask(data=str(tmp_path / "broken"))
    (tmp_path / "broken").write_text('{"subject": "a"}')
    with pytest.raises(ValueError, match="line 1 is no triple"):
        UpdatesTask(data=str(tmp_path / "broken"))
    with pytest.raises(ValueError, match="no relation has two objects and 9 subjects"):
        task(TRIPLES, demonstrations=8)
    with pytest.raises(ValueError, match="8 subjects; 9 are needed"):
        task(TRIPLES, demonstrations=4, pivots=4)
    with pytest.raises(ValueError, match="'Ann was born in' and 'ANN was born in' are the same"):
        task([*TRIPLES, ("ANN", "was born in", "York")])
    with pytest.raises(ValueError, match="two objects of 'was born in' are the same"):
        task([*TRIPLES, ("Ann", "was born in", "YORK")])


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"updates": -1}, "updates is -1"),
        ({"demonstrations": -1}, "demonstrations -1"),
        ({"turns": 3}, "turns is 3.*use 4 turns or more"),
        ({"pivots": 0}, "pivots is 0; use 1 .. 5"),
        ({"pivots": 6}, "pivots is 6; use 1 .. 5"),
        ({"segment_length": 24}, "segment_length is 24.* use 25 or more"),
        ({"tokenizer": "bytes"}, "takes up to .* tokens"),
        ({"demonstrations": 38}, "40 subjects; 41 are needed"),
        ({"tokenizer": "characters"}, "tokenizer is 'characters'"),
    ],
)
def test_bad_settings(settings, match):
    with pytest.raises(ValueError, match=match):
        UpdatesTask(**settings)
