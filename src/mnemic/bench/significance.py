"""Whether a score is evidence that something is remembered, and whether two scores differ: exact tests.

A score is evidence when neither of two explanations gives as much, at a level of 1 %:

- *the model has no use for its own memory*: then it answers as well with the memory of another stream;
- *nothing is remembered, or not whose it is*: then it answers as well as the best floor that needs no memory of that
  kind (`FLOORS`).

What is independent is a stream, and not a question: questions about one stream share its state. So a stream is what is
counted. With one question a stream the tests are those of the textbooks:

- Two answers to the same questions are compared by the streams that one of the two answers better, of which each would
  be better in half if they were equally good: the exact test of McNemar, and with several questions a stream the sign
  test.
- A share of right answers is compared with a floor by the exact binomial test. With several questions a stream, a
  stream counts as the share of it that is right, and the binomial tail is multiplied by e, which bounds the tail of any
  such sum (V. Bentkus, "On Hoeffding's inequalities", Annals of Probability 32, 2004).

Seeds have streams of their own, so they are pooled: streams are joined, and a floor is the mean over them. A sum of
unequal chances has a lighter tail than the binomial of their mean, for what lies above it (Hoeffding 1956).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mnemic.bench.results import Score
from mnemic.tasks.base import UNBOUND

LEVEL = 0.01
"""What is more probable than this without a memory is no evidence of one."""

OTHER = "other stream"
"""The control that decides: what training gave is the same, and what was read is another's."""

FLOORS = ("uniform", "chance", "majority", "unigram", "own segment", "no memory")
FLOORS += ("n-gram, this segment", "reader, this segment")
FLOORS += ("a told value at random", "a told digit at random", "a stored value at random", "a told value")
FLOORS += ("the most frequent of its segment", UNBOUND)
"""Floors that need no memory, or one of the values that were told and not of whose they are. Not among them is what
needs more: the last segments, a sample, values of the right key of which it is not known which came last.
"""


def tail(right: int, count: int, share: float) -> float:
    """The chance of `right` or more of `count` independent questions when each is right with the chance `share`."""
    if right <= 0 or share >= 1:
        return 1.0
    if right > count or share <= 0:
        return 0.0
    yes, no = math.log(share), math.log1p(-share)
    whole = math.lgamma(count + 1)
    terms = (
        whole - math.lgamma(n + 1) - math.lgamma(count - n + 1) + n * yes + (count - n) * no
        for n in range(right, count + 1)
    )
    return min(1.0, math.fsum(map(math.exp, terms)))


def better(gained: int, lost: int) -> float:
    """One-sided exact test of McNemar: how probable it is that of all streams that two answer unequally well so many,
    or more, are `gained`, when neither is better.
    """
    return tail(gained, gained + lost, 0.5)


def differ(gained: int, lost: int) -> float:
    """The same, two-sided: as far from one half to either side."""
    return min(1.0, 2 * better(max(gained, lost), min(gained, lost)))


def above(shares: Sequence[float], floor: float, *, single: bool) -> float:
    """How probable it is that streams of which these `shares` of answers are right, or more, come of a `floor`.
    `single`: each has one question, so that a share is 0 or 1.
    """
    # what rounding has taken from a whole number of right streams is given back
    found = tail(math.floor(math.fsum(shares) + 1e-9), len(shares), floor)
    return found if single else min(1.0, math.e * found)


def by_stream(outcome: str, streams: int | None) -> list[float]:
    """What each of so many streams is worth, more being better, from the outcomes of its questions: the share that is
    right, or less the nats that it costs. Without a number every question is a stream.

    Raises:
        ValueError: outcomes that are not as many for each stream.
    """
    if "." in outcome:
        return [-float(word) for word in outcome.split()]
    count = len(outcome) if streams is None else streams
    if not count or len(outcome) % count:
        raise ValueError(f"{len(outcome)} outcomes are not the same number for each of {count} streams")
    each = len(outcome) // count
    return [outcome[place : place + each].count("1") / each for place in range(0, len(outcome), each)]


def gains(one: Sequence[float], other: Sequence[float]) -> tuple[int, int]:
    """In how many streams the one is better, and in how many the other."""
    pairs = list(zip(one, other, strict=True))
    return sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)


def interval(differences: Sequence[float], *, shares: bool) -> tuple[float, float]:
    """Where the mean of differences lies, one for each stream, in 95 of 100 such tests.

    Of shares, in [-1, 1], a half stream is added to either end and one to the middle, so that the interval has a width
    where no stream differs (A. Agresti and Y. Min, "Simple improved confidence intervals for comparing matched
    proportions", Statistics in Medicine 24, 2005).
    """
    more = 2 if shares else 0
    count = len(differences) + more
    mean = math.fsum(differences) / count
    square = (math.fsum(each * each for each in differences) + more / 2) / count
    width = 1.96 * math.sqrt(max(0.0, square - mean * mean) / count)
    return mean - width, mean + width


@dataclass(frozen=True)
class Evidence:
    """What the tests say of one mechanism on one task, over all its seeds.

    `gained` of `streams` are answered better with their own memory than with another stream's, `lost` worse; `other` is
    how probable that is without any use of the own memory. `above` is how probable the score is at the best `floor`,
    which gives `share`; None where the score is no share, and is compared as it is.
    """

    streams: int
    gained: int
    lost: int
    other: float
    floor: str
    share: float
    above: float | None
    over: bool

    @property
    def stands(self) -> bool:
        """Whether the score is evidence: both at most `LEVEL`, and the score on the right side of the floor."""
        return self.over and max(self.other, self.above or 0.0) <= LEVEL


def evidence(scores: Sequence[Score]) -> Evidence | None:
    """The tests of one mechanism's scores, one for each seed, on one task; None where the outcomes of single questions,
    with the own memory and with another stream's, are not known.
    """
    if not scores or any(not {"memory", OTHER} <= score.outcomes.keys() for score in scores):
        return None
    own, other = (
        [each for score in scores for each in by_stream(score.outcomes[name], score.streams)]
        for name in ("memory", OTHER)
    )
    gained, lost = gains(own, other)
    shares = all("." not in score.outcomes["memory"] for score in scores)
    weights = [len(by_stream(score.outcomes["memory"], score.streams)) for score in scores]
    floor, share = best_floor([score.floors for score in scores], weights, lowest=not shares)
    mean = math.fsum(w * score.score for w, score in zip(weights, scores, strict=True)) / sum(weights)
    single = all(score.streams in (None, len(score.outcomes["memory"])) for score in scores)
    return Evidence(
        streams=len(own),
        gained=gained,
        lost=lost,
        other=better(gained, lost),
        floor=floor,
        share=share,
        above=above(own, share, single=single) if shares else None,
        over=mean > share if shares else mean < share,
    )


def best_floor(
    floors: Sequence[Mapping[str, float]], weights: Sequence[int], *, lowest: bool = False
) -> tuple[str, float]:
    """The name and the mean, over seeds, of the best of `FLOORS`; the smallest is best where `lowest`. A guess that is
    always right says nothing: where a single value was told there is nothing to bind it to, so that floor is left out.
    """
    means = {
        name: math.fsum(w * each[name] for w, each in zip(weights, floors, strict=True)) / sum(weights)
        for name in FLOORS
        if all(name in each for each in floors)
    }
    known = {name: mean for name, mean in means.items() if lowest or mean < 1 - 1e-9 or name == "own segment"}
    if not known:
        return "none", math.inf if lowest else 0.0
    best = (min if lowest else max)(known, key=lambda name: known[name])
    return best, known[best]
