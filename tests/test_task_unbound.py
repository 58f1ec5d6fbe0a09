"""The best guess of somebody who knows which values were told and not whose they are: against all there could be."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from fractions import Fraction

import pytest
import torch

from mnemic.tasks import (
    MQAR,
    TASKS,
    BabilongTask,
    EmbeddedTask,
    InterferenceTask,
    NeedleTask,
    Retrieval,
    RewritesTask,
    SentenceStreams,
    SymbolStreams,
    UpdatesTask,
)
from mnemic.tasks.base import UNBOUND, Candidates


def floor(task, rows=2000):
    return task.unbound(rows * task.examples(1).input_ids.shape[1])[UNBOUND]


def most_frequent(values, told):
    """The mean share of the most frequent of `told` values of so many, over all there could be."""
    drawn = itertools.product(range(values), repeat=told)
    return float(sum(Fraction(max(Counter(each).values()), told) for each in drawn) / values**told)


def error(share, rows):
    return 4 * math.sqrt(share * (1 - share) / rows)


@pytest.mark.parametrize(
    ("task", "values"),
    [
        (Retrieval(pairs=2), 10),
        (Retrieval(pairs=4), 10),
        (SymbolStreams(fillers=0, pairs=3, segment_length=12), 16),
        (SentenceStreams(fillers=0, pairs=2), 16),
    ],
)
def test_all_asked_alike(task, values):
    rows = 300 if isinstance(task, SentenceStreams) else 4000
    best = most_frequent(values, task.pairs)
    assert floor(task, rows) == pytest.approx(best, abs=error(best, rows))


def best_of_rewrites(keys, values, pairs):
    """The best guess for every order of values, over all streams there could be, one as likely as another."""
    right = {}
    for told in itertools.product(range(keys), repeat=pairs):
        last = {key: place for place, key in enumerate(told)}
        for said in itertools.product(range(values), repeat=pairs):
            chances = right.setdefault(said, Counter())
            for place in last.values():
                chances[said[place]] += Fraction(1, len(last) * keys**pairs)
    return float(sum(max(chances.values()) for chances in right.values()) / values**pairs)


def test_keys_that_come_again():
    """The newer a value, the more probable it is the last one of its key: votes are by age."""

    class Small(RewritesTask):
        def examples(self, rows, split="train", number=0):
            made = super().examples(rows, split, number + 1)
            made.input_ids[:, 2 :: self.segment_length] %= 3  # three values only, for all there could be
            return made

    for pairs in (2, 4):
        best = best_of_rewrites(2, 3, pairs)
        assert floor(Small(pairs=pairs, keys=2, value_length=1), 8000) == pytest.approx(best, abs=error(best, 8000))


def test_what_was_answered_is_no_candidate_any_more():
    for pairs in (2, 4, 8):
        assert floor(MQAR(pairs=pairs), 50) == pytest.approx(sum(1 / left for left in range(1, pairs + 1)) / pairs)
    two = NeedleTask(length=256, segment_length=64, keys=2, queries=2)
    assert floor(two, 200) == pytest.approx(0.75, abs=0.1)


def test_the_newest_fact():
    task = UpdatesTask(turns=4, updates=3, pivots=1)
    examples = task.examples(200, "test")
    assert bool((task.candidates(examples).asked < 10).all()), "it was told in the last turn"
    assert floor(task, 50) > 0.3
    named = BabilongTask(question="qa1", length=128, segment_length=64)
    assert named.unbound(2**15)[UNBOUND] == pytest.approx(0.38, abs=0.06)


@pytest.mark.parametrize(
    "task",
    [
        EmbeddedTask(pairs=5),
        NeedleTask(),
        NeedleTask(length=256, segment_length=64, haystack="markov"),
        RewritesTask(rewrite=False),
        SymbolStreams(),
        SentenceStreams(),
        UpdatesTask(),
        BabilongTask(question="qa3"),
        MQAR(rebound=3),
    ],
    ids=lambda task: task.name,
)
def test_the_right_one_is_among_them(task):
    """With every vote for the value that is asked for, the guess is right."""
    examples = task.examples(20, "test")
    found = task.candidates(examples)
    assert len(found.values) == len(found.asked) == len(task.right(examples.labels, examples))
    right = found.values.gather(1, found.asked[:, None])
    assert bool((right >= 0).all())
    for row in range(0, len(right), 7):
        ages = torch.zeros(found.values.shape[1]).double()
        ages[found.asked[row]] = 1
        assert found.guessed(ages)[row] == 1


def test_votes():
    found = Candidates(torch.tensor([[1, 2, 2, -1], [1, 2, 3, -1], [3, -1, -1, -1]]), torch.tensor([1, 2, 0]))
    even = torch.full((4,), 0.25).double()
    assert found.guessed(even).tolist() == [1, pytest.approx(1 / 3), 1]
    assert found.guessed(torch.tensor([1.0, 0, 0, 0]).double()).tolist() == [0, 0, 1]
    assert found.guessed(torch.tensor([0.25, 0.25]).double()).tolist() == [0.5, 0, 1], "no votes for what is older"
    assert found.ages().tolist() == [pytest.approx(1 / 3)] * 3 + [0]


def test_values_that_tell_whose_they_are_lack_the_order():
    assert InterferenceTask(updates=4).floors(20)[UNBOUND] == 0.25
    found = Retrieval(pairs=4).floors(20)
    assert found[UNBOUND] > found["a told digit at random"]


def test_a_single_value_needs_no_binding():
    for task in (Retrieval(pairs=1), MQAR(pairs=1), SymbolStreams(pairs=1), RewritesTask(pairs=1), NeedleTask(keys=1)):
        assert UNBOUND not in task.floors(20)
    assert UNBOUND not in InterferenceTask(updates=1).floors(20)
    assert UNBOUND not in TASKS["passkey"]().floors(20)
