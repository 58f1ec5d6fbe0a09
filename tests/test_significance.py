"""What counts as evidence: exact tests against known values, and how often they are wrong."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from mnemic.bench.results import Score
from mnemic.bench.significance import LEVEL, above, best_floor, better, by_stream, differ, evidence, gains, tail
from mnemic.tasks.base import UNBOUND


def exact(right, count, share):
    """The tail as a fraction."""
    terms = (math.comb(count, n) * share**n * (1 - share) ** (count - n) for n in range(right, count + 1))
    return float(sum(terms, Fraction(0)))


def test_the_tail_of_the_binomial_distribution():
    assert tail(10, 10, 0.5) == pytest.approx(1 / 1024)
    assert tail(8, 10, 0.5) == pytest.approx(56 / 1024)
    assert tail(5, 20, 0.1) == pytest.approx(0.0431745, abs=1e-7)
    for right, count, share in ((3, 7, Fraction(1, 3)), (180, 256, Fraction(3, 5)), (9, 400, Fraction(1, 100))):
        assert tail(right, count, float(share)) == pytest.approx(exact(right, count, share), rel=1e-9)
    assert [tail(0, 5, 0.1), tail(0, 0, 0.5), tail(5, 5, 1.0), tail(1, 5, 0.0), tail(6, 5, 0.9)] == [1, 1, 1, 0, 0]
    assert 0 < tail(500, 6_144, 0.01) < 1e-270


def test_mcnemar():
    """Values of the sign test: 9 of 10, 15 of 20, none at all."""
    assert differ(9, 1) == differ(1, 9) == pytest.approx(0.021484375)
    assert differ(15, 5) == pytest.approx(0.041389465)
    assert better(15, 5) == pytest.approx(0.041389465 / 2)
    assert better(5, 15) == pytest.approx(0.994091, abs=1e-6)
    assert differ(0, 0) == better(0, 0) == differ(5, 5) == 1


def test_streams_and_not_questions_are_counted():
    assert by_stream("110100001111", 3) == [0.75, 0, 1]
    assert by_stream("101", None) == [1, 0, 1]
    assert by_stream("1.5 0.25", None) == [-1.5, -0.25]
    assert gains([0.75, 0, 1, 1], [0.5, 0, 0, 2]) == (2, 1)
    for outcome, streams in (("11", 3), ("", None), ("", 0)):
        with pytest.raises(ValueError, match="outcomes are not the same number"):
            by_stream(outcome, streams)
    with pytest.raises(ValueError, match="zip"):
        gains([1.0], [1.0, 0.0])
    assert above([1, 1, 0, 1], 0.5, single=True) == tail(3, 4, 0.5)
    assert above([0.1] * 10 + [1] * 15, 0.5, single=False) == pytest.approx(math.e * tail(16, 25, 0.5))


def test_questions_that_depend_on_each_other_do_not_make_evidence():
    """Streams that answer all of their questions right or none: where nothing is remembered, no more than `LEVEL` of
    tests may say otherwise. Counted by questions, a tenth of them would.
    """
    source, tests, streams, questions, floor = torch.Generator().manual_seed(0), 2000, 60, 4, 0.3
    right = (torch.rand(tests, streams, generator=source) < floor).sum(1).tolist()
    ours = [above([1] * n + [0] * (streams - n), floor, single=False) <= LEVEL for n in right]
    naive = [tail(n * questions, streams * questions, floor) <= LEVEL for n in right]
    assert sum(ours) <= LEVEL * tests
    assert sum(naive) > 0.08 * tests


def score(own, other, floors, streams=None):
    outcomes = {"memory": own, "other stream": other}
    return Score(1, 8, len(own), own.count("1") / len(own), {}, floors, None, {}, outcomes, streams)


def test_evidence_pools_seeds():
    floors = {"uniform": 0.1, "last segment": 1.0, "a value of the key": 0.9, "oracle": 1.0}
    seeds = [score("1" * 30 + "0" * 10, "1" * 2 + "0" * 38, {**floors, UNBOUND: share}) for share in (0.4, 0.5)]
    found = evidence(seeds)
    assert (found.streams, found.gained, found.lost, found.floor) == (80, 56, 0, UNBOUND)
    assert found.share == pytest.approx(0.45)
    assert found.other == pytest.approx(2.0**-56)
    assert found.above == pytest.approx(tail(60, 80, 0.45))
    assert found.stands
    assert not evidence([score("1" * 30 + "0" * 10, "0" * 40, {**floors, UNBOUND: 0.7})]).stands, "not above the floor"
    assert not evidence([score("1" * 30 + "0" * 10, "1" * 29 + "0" * 11, floors)]).stands, "no better than another's"
    assert evidence([score("1" * 40, "0" * 40, {**floors, UNBOUND: 1.0})]).floor == "uniform", "nothing to bind"
    assert not evidence([score("1" * 40, "0" * 40, {**floors, "own segment": 1.0})]).stands, "nothing to remember"


def test_without_outcomes_nothing_can_be_said():
    assert evidence([]) is None
    assert evidence([Score(1, 8, 4, 1.0, {"other stream": 0.0}, {}, None)]) is None


def test_nats_are_less_when_they_are_better():
    own, other = ("1.0 2.0 " * 8).strip(), ("1.5 2.5 " * 8).strip()
    made = Score(1, 8, 16, 1.2, {}, {"unigram": 1.4, "reader, this segment": 1.3}, None, {}, {"memory": own}, 16)
    made.outcomes["other stream"] = other
    found = evidence([made])
    assert (found.gained, found.lost, found.floor, found.above, found.stands) == (
        16,
        0,
        "reader, this segment",
        None,
        True,
    )
    made.floors["reader, this segment"] = 1.1
    assert not evidence([made]).stands


def test_floors_that_need_no_memory():
    assert best_floor([{"last 2 segments": 1.0, "oracle": 1.0}], [4]) == ("none", 0.0)
    assert best_floor([{"uniform": 0.2, "majority": 0.1}, {"uniform": 0.2, "majority": 0.5}], [1, 3])[0] == "majority"
    assert best_floor([{"uniform": 0.2, UNBOUND: 0.4}, {"uniform": 0.2}], [1, 1]) == ("uniform", 0.2)
