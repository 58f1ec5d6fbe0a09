"""What every task promises, for all of them: a task is tested here by being registered.

The golden hashes hold for every machine. A generator that changes changes what its results mean: when that is wanted,
`python tests/test_tasks.py` prints the new dict.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mnemic.tasks import TASKS, Examples, Task
from mnemic.tasks.base import generator, seed_of
from mnemic.unrolling import IGNORED

ODD: dict[str, list[dict]] = {
    "babilong": [
        {"question": "qa3", "facts": 9, "length": 450, "segment_length": 150, "span": (20, 60)},
        {"question": "reason", "length": 600, "segment_length": 300, "tokenizer": "bytes"},
    ],
    "classification": [{"segments": 2, "segment_length": 90, "classes": 5, "cues": 6, "margin": 1}],
    "copy": [{"count": 3, "segment_length": 1}],
    "embedded": [{"pairs": 40, "segment_length": 33, "key_length": 3, "value_length": 1}],
    "interference": [
        {"n_keys": 3, "updates": 9, "sequential": True, "tokenizer": "bytes", "segment_length": 120},
        {"n_keys": 5, "updates": 3, "asked_keys": 2, "value_words": 3, "categories": 20, "choices": 12},
    ],
    "language": [{"segments": 3, "segment_length": 40, "cast": 2, "tokenizer": "bytes"}],
    "mqar": [
        {"length": 250, "pairs": 16, "segment_length": 32, "alphabet": 64, "noise": 40, "rebound": 9},
        {"length": 96, "pairs": 8, "segment_length": 12, "key_tokens": 2, "gaps": "uniform", "rebound": 3},
    ],
    "needle": [
        {"length": 600, "segment_length": 200, "keys": 3, "per_key": 2, "queries": 2, "values": "word"},
        {"length": 800, "segment_length": 400, "haystack": "needles", "depth": 35.0, "tokenizer": "bytes"},
    ],
    "order": [{"segments": 3, "segment_length": 90, "fragment": 12, "ask": "last"}],
    "passkey": [{"length": 800, "segment_length": 400, "depth": 100.0, "tokenizer": "bytes"}],
    "quadratic": [{"bound": 7, "segment_length": 33, "canonical": False}],
    "recall-language": [{"fillers": 1, "pairs": 3, "segment_length": 150, "tokenizer": "bytes"}],
    "recall-symbols": [{"fillers": 0, "pairs": 9, "segment_length": 36}],
    "retrieval": [{"pairs": 26, "segment_length": 6, "fillers": 2, "noise": 5}, {"pairs": 1, "segment_length": 8}],
    "reverse": [{"count": 15, "segment_length": 5}],
    "rewrites": [
        {"pairs": 30, "rewrite": True, "keys": 7, "key_length": 1, "value_length": 3},
        {"pairs": 1, "value_length": 1},
    ],
    "sorting": [{"length": 21, "segments": 1}, {"length": 60, "segments": 7}],
    "updates": [{"turns": 4, "updates": 0, "pivots": 1, "demonstrations": 0, "segment_length": 40}],
}
"""Settings beside the defaults. A task without any is tested with its defaults."""

ROWS: dict[str, int] = {
    "babilong": 200,
    "interference": 300,
    "language": 100,
    "needle": 300,
    "order": 400,
    "passkey": 400,
    "sorting": 200,
    "updates": 400,
}
"""Streams that the oracle answers, where the 1,000 of the others take too long."""

NEAR: dict[str, str] = {
    "language": "every segment is an answer, the first one too, which has nothing before it",
    "mqar": "keys come again at any distance, as published; `extra` tells how many segments lie between",
}
"""Tasks whose evidence may stand in the segment that asks, and why."""

BLIND: dict[str, str] = {
    "language": "every token is asked for, and the solver says the most frequent one",
    "quadratic": "fields have texts that are more frequent than others, and the solver says them",
    "sorting": "a model is told the right symbols up to each place, the solver is not",
}
"""Tasks whose solver does not score `uniform` where it has nothing but the question, and why."""

CHUNKS = 50

GOLDEN: dict[str, str] = {
    "babilong": "345a2b818c0c29cc",
    "babilong-1": "1d14522102da2dd1",
    "babilong-2": "80016100e8d8d98c",
    "classification": "fab8aa29eae4383d",
    "classification-1": "a95520caf2e0edad",
    "copy": "8fca3acd0c3b4ea4",
    "copy-1": "737d45a5406eb56a",
    "embedded": "d9b6b2a020fe70a5",
    "embedded-1": "20fa189274c5309d",
    "interference": "6bb1c4e6882e0516",
    "interference-1": "0d9a8f23ab8e0317",
    "interference-2": "6554f34bdd361f2b",
    "language": "e5f98906e2d554f3",
    "language-1": "179ca0461fc00f3c",
    "mqar": "3b78d47093001b33",
    "mqar-1": "7490dbe46b114776",
    "mqar-2": "5cc7fddee440da52",
    "needle": "acd77376198ada48",
    "needle-1": "f38e805f2c7b58cb",
    "needle-2": "a6290b8dd56b6d8c",
    "order": "d5dc96aa938eeee3",
    "order-1": "45b393b9157902ae",
    "passkey": "e3b259bc85d1989a",
    "passkey-1": "3b72bfc3b59cf145",
    "quadratic": "c9262bb9a6795863",
    "quadratic-1": "549358f357a801f9",
    "recall-language": "842d278cd077648a",
    "recall-language-1": "43b476471d712a7c",
    "recall-symbols": "4da63909c7dec26e",
    "recall-symbols-1": "7261711f630a6827",
    "retrieval": "73ea54b62077e1a2",
    "retrieval-1": "8c9323a77d611c28",
    "retrieval-2": "62199a96da91f284",
    "reverse": "3ad37dbea0c3263c",
    "reverse-1": "64695df4c64ac35c",
    "rewrites": "8b69d5f08915feb8",
    "rewrites-1": "cbc8a9329253e895",
    "rewrites-2": "fcbeb85852754796",
    "sorting": "d171e05bd3a0b605",
    "sorting-1": "580e497e06e96d56",
    "sorting-2": "6bc6fd3aabee165c",
    "updates": "10f6399fc0b4e8cd",
    "updates-1": "b32b04cd5fb074bb",
}

CASES = {
    f"{name}{f'-{place}' if place else ''}": (name, settings)
    for name in sorted(TASKS)
    for place, settings in enumerate([{}, *ODD.get(name, [])])
}


@functools.cache
def task_of(case: str) -> Task:
    name, settings = CASES[case]
    return TASKS[name](**settings)


@functools.cache
def streams(case: str) -> Examples:
    """Test streams, drawn once."""
    return task_of(case).examples(ROWS.get(CASES[case][0], 1000), "test", 3)


def hash_of(case: str) -> str:
    """Over the tokens and labels of four training streams, as little-endian int64."""
    examples = task_of(case).examples(4, "train", 1)
    both = torch.stack([examples.input_ids, examples.labels])
    return hashlib.sha256(both.contiguous().numpy().astype("<i8").tobytes()).hexdigest()[:16]


def garbage(task: Task, shape: torch.Size, seed: int) -> torch.Tensor:
    return torch.randint(task.vocabulary, shape, generator=generator(seed))


def tensors(examples: Examples) -> dict[str, torch.Tensor]:
    known = {each.name: getattr(examples, each.name) for each in dataclasses.fields(examples) if each.name != "extra"}
    return known | {f"extra {name}": value for name, value in examples.extra.items()}


def equal(one: Examples, other: Examples) -> bool:
    first, second = tensors(one), tensors(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


SOLVABLE = [case for case in CASES if task_of(case).solvable]


# --- what is drawn ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_streams_are_whole_segments_of_known_tokens(case):
    task, examples = task_of(case), streams(case)
    rows, length = examples.input_ids.shape
    assert length % task.segment_length == 0
    for name in ("input_ids", "labels", "answer"):
        assert getattr(examples, name).shape == (rows, length), name
    for name, value in tensors(examples).items():
        assert value.device.type == "cpu", name
        assert len(value) == rows, name
        if not name.startswith("extra"):
            assert value.dtype == torch.int64, name
    for name, value in examples.extra.items():
        assert value.shape == examples.evidence.shape[:2], name
    assert examples.facts.shape == (rows,)
    assert int(examples.facts.min()) >= task.solvable  # real text has no facts that could be counted
    assert int(examples.input_ids.min()) >= 0
    assert int(examples.input_ids.max()) < task.vocabulary


@pytest.mark.parametrize("case", CASES)
def test_labels_are_the_tokens_of_numbered_answers(case):
    examples = streams(case)
    assert bool(examples.asked.any(1).all()), "a stream that asks nothing"
    assert torch.equal(examples.labels[examples.asked], examples.input_ids[examples.asked])
    assert bool((examples.labels[~examples.asked] == IGNORED).all())
    assert torch.equal(examples.answer >= 0, examples.asked)
    assert int(examples.answer.min()) >= -1
    count = examples.evidence.shape[1]
    assert int(examples.answer.max()) == count - 1
    # 0, 1, .. without a gap in each row, in the order in which they stand, each in one piece
    place = examples.place
    there = (place >= 0).long()
    assert bool((there[:, 1:] <= there[:, :-1]).all())
    assert bool((there[:, 0] == 1).all())
    both = (place[:, 1:] >= 0) & (place[:, :-1] >= 0)
    assert bool((place[:, 1:] > place[:, :-1])[both].all())
    begins = examples.asked & (examples.answer != torch.nn.functional.pad(examples.answer[:, :-1], (1, 0), value=-1))
    assert torch.equal(begins.sum(1), there.sum(1))


@pytest.mark.parametrize("case", CASES)
def test_evidence_stands_before_the_segment_that_asks(case):
    task, examples = task_of(case), streams(case)
    place, evidence = examples.place, examples.evidence
    given = evidence >= 0
    assert int(evidence.min()) >= -1
    assert not bool((given & (place < 0)[:, :, None]).any()), "evidence for an answer that is not there"
    assert bool(given.any(2)[place >= 0].all()), "an answer without evidence"
    assert bool((evidence < place[:, :, None])[given].all())
    if task.solvable:  # of text that is predicted token by token, all is both
        assert not bool(examples.asked.gather(1, evidence.clamp(min=0).flatten(1))[given.flatten(1)].any())
    assert bool((examples.lag[place >= 0] > 0).all())
    if task.name not in NEAR:
        opens = place // task.segment_length * task.segment_length
        assert bool((evidence < opens[:, :, None])[given].all())


# --- the seed --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_a_batch_is_the_same_whenever_it_is_asked_for(case):
    task = task_of(case)
    splits = [task.examples(3, split, number) for split in ("train", "validation", "test") for number in (0, 7)]
    assert equal(splits[1], task.examples(3, "train", 7))
    assert equal(splits[1], task.draw(3, generator(seed_of("train", 7)), "train"))
    assert len({each.input_ids.numpy().tobytes() for each in splits}) == len(splits)


def test_streams_equal_the_golden_ones_here_and_in_another_process():
    environment = os.environ | {"PYTHONHASHSEED": "4321", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, str(Path(__file__)), "--json"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    here = {case: hash_of(case) for case in CASES}
    assert json.loads(done.stdout) == here
    assert here == {case: GOLDEN.get(case) for case in CASES}


def test_every_golden_hash_and_exception_belongs_to_a_task():
    assert set(GOLDEN) == set(CASES)
    assert set(ODD) | set(ROWS) | set(NEAR) | set(BLIND) <= set(TASKS)


# --- the solver ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SOLVABLE)
def test_the_oracle_is_always_right(case):
    task, examples = task_of(case), streams(case)
    said = task.solve(examples)
    assert said.shape == examples.labels.shape
    assert said.dtype == torch.int64
    assert task.score(said, examples) == 1.0


@pytest.mark.parametrize("case", SOLVABLE)
def test_the_solver_reads_nothing_but_what_it_sees(case):
    task = task_of(case)
    examples = streams(case).take(slice(0, 60))
    asked = examples.asked
    views = {
        "everything": torch.ones_like(asked),
        "last": task.last(examples, 1),
        "sample": task.sample(examples, generator(5)),
    }
    for name, seen in views.items():
        seen = seen & ~asked
        other = torch.where(seen, examples.input_ids, garbage(task, asked.shape, 9))
        one = task.guess(examples.input_ids.masked_fill(asked, 0), asked, seen, generator(1))
        two = task.guess(other, asked, seen, generator(1))
        assert torch.equal(one[asked], two[asked]), name


@pytest.mark.parametrize("case", [case for case, (name, _) in CASES.items() if name not in BLIND])
def test_guessing_is_worth_what_the_closed_form_says(case):
    task, examples = task_of(case), streams(case)
    # the segment that asks tells what answers are possible, but where it tells the answers too
    seen = torch.zeros_like(examples.asked) if task.name in NEAR else task.last(examples, 0)
    said = task.solve(examples, seen, seed=11)
    size = -(-len(said) // CHUNKS)
    parts = [slice(begin, begin + size) for begin in range(0, len(said), size)]
    scores = torch.tensor([task.score(said[part], examples.take(part)) for part in parts], dtype=torch.float64)
    # seldom right answers may all be missed: no spread then, and yet an error
    answers = int((examples.place >= 0).sum())
    error = max(float(scores.std()) / len(parts) ** 0.5, (task.uniform * (1 - task.uniform) / answers) ** 0.5)
    assert abs(task.score(said, examples) - task.uniform) <= 4 * error


@pytest.mark.parametrize("case", CASES)
def test_floors_lie_between_nothing_and_the_oracle(case):
    task = task_of(case)
    found = task.floors(rows=100 if task.solvable else 10)
    assert len(found) >= 3
    if not task.solvable:
        # in a unit of their own, such as bits a byte
        assert all(0 < value < math.inf for value in found.values())
        return
    assert found["uniform"] == task.uniform
    assert found["oracle"] == 1.0
    assert all(0 <= value <= 1 for value in found.values()), found
    assert task.uniform < 0.9


# --- what is written down --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_a_task_is_made_again_from_its_settings(case):
    task = task_of(case)
    settings = json.loads(json.dumps(task.settings()))
    again = type(task)(**{key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()})
    assert again == task
    assert equal(again.examples(2, "train", 5), task.examples(2, "train", 5))
    assert TASKS[task.name] is type(task)
    assert hasattr(task, task.axis)
    assert task.card.title
    assert task.card.asks[0].isupper()
    assert task.card.asks.endswith(".")
    assert task.card.paper


@pytest.mark.parametrize("case", CASES)
def test_some_of_the_streams_are_taken_with_all_that_is_known(case):
    examples = streams(case)
    rows = torch.tensor([4, 0, 2])
    taken = examples.take(rows)
    for name, value in tensors(examples).items():
        assert torch.equal(tensors(taken)[name], value[rows]), name
    assert torch.equal(taken.place, examples.place[rows])
    assert torch.equal(examples.take(slice(1, 3)).lag, examples.lag[1:3])


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_readable_one_by_one(case):
    task, examples = task_of(case), streams(case)
    ids = examples.input_ids[0].tolist()
    pieces = task.text(ids)
    assert len(pieces) == len(ids)
    assert all(isinstance(piece, str) for piece in pieces)
    assert task.text(ids[3:5]) == pieces[3:5]


if __name__ == "__main__":
    torch.set_num_threads(2)
    hashes = {case: hash_of(case) for case in CASES}
    print(json.dumps(hashes) if "--json" in sys.argv else json.dumps(hashes, indent=4))
