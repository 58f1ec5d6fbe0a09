"""Whether one of two mechanisms answers the same questions better: the exact test of McNemar, over all their seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from mnemic.analysis.suite_tables import settings_of
from mnemic.bench.results import Record, Score
from mnemic.bench.significance import LEVEL, by_stream, differ, evidence, gains, interval


@dataclass(frozen=True)
class Comparison:
    """Two mechanisms at one length: their `scores`, over the same `streams` of so many `seeds`; how many of these the
    first answers better (`gained`) and worse (`lost`); how probable a difference as large is without any (`p`); by how
    much the first is better, and the interval of that which holds in 95 of 100 such tests. `evidence`: whether either
    score is evidence of a memory.
    """

    length: int
    scores: tuple[float, float]
    streams: int
    seeds: int
    gained: int
    lost: int
    p: float
    difference: float
    interval: tuple[float, float]
    evidence: tuple[bool, bool]


def compared(pairs: Sequence[tuple[Record, Record]]) -> list[Comparison]:
    """Every length that both were asked at, from a pair of records for each seed.

    Raises:
        ValueError: no pair, records of different questions, or without the outcomes of single questions.
    """
    if not pairs:
        raise ValueError(
            "there is nothing to compare; name two records, or two mechanisms with a task and seed in common"
        )
    scores: dict[int, list[tuple[Score, Score]]] = {}
    for one, other in pairs:
        _same(one, other)
        there = {score.length: score for score in other.scores}
        for score in one.scores:
            if score.length in there:
                scores.setdefault(score.length, []).append((score, there[score.length]))
    if not scores:
        raise ValueError(f"{_named(*pairs[0])} were asked at no length in common; run both at one")
    return [_at(length, each, pairs[0]) for length, each in scores.items()]


def _at(length: int, pairs: Sequence[tuple[Score, Score]], named: tuple[Record, Record]) -> Comparison:
    first, second = [], []
    for one, other in pairs:
        if one.questions and other.questions and one.questions != other.questions:
            raise ValueError(
                f"{_named(*named)} did not answer the same questions at {length:,}: digests {one.questions} and "
                f"{other.questions}; run both again with one release"
            )
        if "memory" not in one.outcomes or "memory" not in other.outcomes:
            raise ValueError(f"{_named(*named)} have no outcomes of single questions at {length:,}; run them again")
        own, theirs = (by_stream(score.outcomes["memory"], score.streams) for score in (one, other))
        if len(own) != len(theirs):
            raise ValueError(
                f"{_named(*named)} have {len(own)} and {len(theirs)} streams at {length:,}; ask both alike"
            )
        first, second = first + own, second + theirs
    gained, lost = gains(first, second)
    differences = [a - b for a, b in zip(first, second, strict=True)]
    ones, others = ([pair[which] for pair in pairs] for which in (0, 1))
    tests = evidence(ones), evidence(others)
    return Comparison(
        length=length,
        scores=(statistics.mean(s.score for s in ones), statistics.mean(s.score for s in others)),
        streams=len(first),
        seeds=len(pairs),
        gained=gained,
        lost=lost,
        p=differ(gained, lost),
        difference=statistics.mean(differences),
        interval=interval(differences, shares="." not in ones[0].outcomes["memory"]),
        evidence=(tests[0] is not None and tests[0].stands, tests[1] is not None and tests[1].stands),
    )


def _same(one: Record, other: Record) -> None:
    """Refuses records that were not asked the same: by task, settings, seed and number of streams."""
    if one.task != other.task:
        raise ValueError(
            f"{_named(one, other)} are of the tasks {one.task} and {other.task}; compare records of one task"
        )
    if one.seed != other.seed:
        raise ValueError(
            f"{_named(one, other)} are of the seeds {one.seed} and {other.seed}, which have other test streams; compare"
            " records of one seed"
        )
    mine, theirs = json.loads(settings_of(one)), json.loads(settings_of(other))
    settings = [name for name in sorted({*mine, *theirs}) if mine.get(name) != theirs.get(name)]
    if settings:
        told = ", ".join(f"{name} {mine.get(name)!r} and {theirs.get(name)!r}" for name in settings)
        raise ValueError(
            f"{_named(one, other)} have other settings of {one.task}: {told}; compare records of one setting"
        )
    rows = [record.config.get("test rows") for record in (one, other)]
    if rows[0] != rows[1]:
        raise ValueError(f"{_named(one, other)} were asked {rows[0]} and {rows[1]} streams; ask both alike")


def _named(one: Record, other: Record) -> str:
    return f"{one.mechanism} and {other.mechanism}"


def paired(found: Sequence[Record], one: str, other: str) -> dict[str, list[tuple[Record, Record]]]:
    """The records of two mechanisms of a suite as pairs, one for each seed that both have, by task; a task that is
    there with several settings has these in its name.

    Raises:
        ValueError: a mechanism that is not there, or that is there with several settings that its name does not tell.
    """
    known = sorted({record.mechanism for record in found})
    for name in (one, other):
        if name not in known:
            raise ValueError(f"there is no {name!r} among these records; there are {', '.join(known)}")
    cases: dict[tuple[str, str, int], dict[str, Record]] = {}
    for record in found:
        if record.mechanism in (one, other):
            cases.setdefault((record.task, settings_of(record), record.seed), {})[record.mechanism] = record
    pairs: dict[tuple[str, str], list[tuple[Record, Record]]] = {}
    for (task, settings, _), records in cases.items():
        if len(records) == 2:
            pairs.setdefault((task, settings), []).append((records[one], records[other]))
    several = [task for task, _ in pairs]
    return {
        task if several.count(task) == 1 else f"{task} {settings}": each for (task, settings), each in pairs.items()
    }


def terms(one: Record, other: Record) -> list[str]:
    """What else differs between two runs than the memory: their host or recipe, by setting."""
    found = []
    for part in ("host", "recipe"):
        mine, theirs = one.config.get(part) or {}, other.config.get(part) or {}
        if isinstance(mine, dict) and isinstance(theirs, dict):
            found += [f"{part}: {name}" for name in sorted({*mine, *theirs}) if mine.get(name) != theirs.get(name)]
        elif mine != theirs:
            found.append(part)
    return found


def concluded(names: tuple[str, str], found: Sequence[Comparison], unit: str = "%") -> str:
    """What to conclude, in a sentence. With several lengths each is tested at a level that many times lower."""
    level = LEVEL / len(found)
    if len(found) == 1:
        [only] = found
        low, high = (_amount(each, unit) for each in only.interval)
        better, worse = names if only.difference >= 0 else names[::-1]
        size = (
            f"{_amount(abs(only.difference), unit)} ({names[0]} less {names[1]}, 95 %: {low} to {high}; p {only.p:.2g})"
        )
        if only.p > level:
            return f"No difference is shown between {names[0]} and {names[1]}: {size}, over {only.streams:,} streams."
        said = f"{better} answers these questions better than {worse}, by {size}."
        return said if any(only.evidence) else f"{said} But neither score is evidence of a memory."
    shown = [each for each in found if each.p <= level]
    parts = []
    for which, sign in ((0, 1), (1, -1)):
        places = [f"{each.length:,}" for each in shown if sign * (each.gained - each.lost) > 0]
        if places:
            parts.append(f"{names[which]} is better than {names[1 - which]} at {', '.join(places)}")
    left = [f"{each.length:,}" for each in found if each not in shown]
    parts += [f"no difference is shown at {', '.join(left)}"] * bool(left)
    said = "; ".join(parts)
    return (
        f"{said.replace('no', 'No', 1) if said.startswith('no d') else said} ({len(found)} tests, each at {level:.2g})."
    )


def _amount(difference: float, unit: str) -> str:
    return f"{100 * difference:.1f} points" if unit == "%" else f"{difference:.4f} nats"
