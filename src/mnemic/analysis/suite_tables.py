"""Tables of a suite: mechanism x task x length with spread, what of it is evidence, floors beside it, and cost."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mnemic.analysis.markdown import chance, markdown, missing, provenance, spread
from mnemic.bench.floors import unbound
from mnemic.bench.results import Record, Score, records
from mnemic.bench.significance import LEVEL, Evidence, evidence
from mnemic.tasks.base import UNBOUND

NONE = "none"

Case = tuple[str, str, int]
"""Task, its settings as text, and length."""


def suites(results: Path) -> dict[str, list[Record]]:
    """The records of every suite in a folder of results, by the suite's name."""
    folders = sorted(each for each in results.glob("suite-*") if each.is_dir())
    return {folder.name.removeprefix("suite-"): told_apart(complete(records(folder))) for folder in folders}


def complete(found: Sequence[Record]) -> list[Record]:
    """The records with the best guess without binding among the floors of their scores: earlier ones lack it."""
    return [
        replace(record, scores=[_complete(record, place) for place in range(len(record.scores))]) for record in found
    ]


def _complete(record: Record, place: int) -> Score:
    score = record.scores[place]
    return score if UNBOUND in score.floors else replace(score, floors={**score.floors, **unbound(record, place)})


def told_apart(found: Sequence[Record]) -> list[Record]:
    """The records, where one mechanism was run on a task with several settings each named with its own."""
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for record in found:
        groups.setdefault((record.task, settings_of(record), record.mechanism), []).append(record)
    named = []
    for (_, _, mechanism), runs in groups.items():
        said = [""] * len(runs)
        settings = [json.dumps([record.config.get(part) for part in ("memory", "recipe")]) for record in runs]
        for part in ("memory", "recipe"):
            if mechanism == NONE or len(set(zip(said, settings, strict=True))) == len(set(said)):
                break  # told apart already
            variants = [record.config.get(part) or {} for record in runs]
            names = sorted({name for variant in variants for name in variant})
            told = [{json.dumps(variant.get(name), sort_keys=True) for variant in variants} for name in names]
            differing = [name for name, values in zip(names, told, strict=True) if len(values) > 1]
            said = [
                ", ".join([*filter(None, [words]), *(f"{name} {variant.get(name)}" for name in differing)])
                for words, variant in zip(said, variants, strict=True)
            ]
        named += [
            replace(record, mechanism=" ".join(filter(None, [record.mechanism, words])))
            for record, words in zip(runs, said, strict=True)
        ]
    return named


def by_case(found: Sequence[Record]) -> dict[Case, dict[str, list[Score]]]:
    """Scores by task, settings and length, then by mechanism, one for each seed."""
    cases: dict[Case, dict[str, list[Score]]] = {}
    for record in sorted(found, key=lambda record: (record.task, settings_of(record), record.seed)):
        for score in record.scores:
            case = (record.task, settings_of(record), score.length)
            cases.setdefault(case, {}).setdefault(record.mechanism, []).append(score)
    return cases


def settings_of(record: Record) -> str:
    """The task's settings as text, without the axis, which differs from length to length."""
    axis = record.measures.get("axis")
    return json.dumps({name: value for name, value in record.config["task"].items() if name != axis}, sort_keys=True)


def mechanisms_of(found: Sequence[Record]) -> list[str]:
    """No memory first, the others by name."""
    return sorted({record.mechanism for record in found}, key=lambda name: (name != NONE, name))


def tables(results: Path) -> dict[str, str]:
    """`suite-NAME`, `suite-NAME-evidence` and `suite-NAME-cost` for every suite that was run, and for those that come
    with the package in any case.
    """
    from mnemic.bench.suite import names

    made = suites(results)
    tables: dict[str, str] = {}
    for name in {*names(), *made}:
        found = made.get(name, [])
        tables[f"suite-{name}"] = scores(found)
        tables[f"suite-{name}-evidence"] = tests(found)
        tables[f"suite-{name}-cost"] = cost(found)
    return tables


FLOORS = {
    "without binding": (UNBOUND,),
    "own segment": ("own segment", "no memory", "reader, this segment"),
    "last segment": ("last segment", "reader, last segment"),
    "last 2 segments": ("last 2 segments", "reader, last 2 segments"),
    "sample": ("sample", "reader, sample"),
}
"""The floors beside every score, and what tasks call them."""


def floor(score: Score, name: str) -> float | None:
    """A floor of a score; None where the task has none of the kind."""
    for key in FLOORS[name]:
        for own, value in score.floors.items():
            if own == key or (name == "sample" and own.startswith(f"{key} of ")):
                return value
    return None


def shown(values: Sequence[float], metric: str) -> str:
    """Mean with least and most, in per cent or in the task's unit."""
    return spread(values) if metric == "%" else spread(values, 1, 3)


def metrics(found: Sequence[Record]) -> dict[str, str]:
    """The unit of each task."""
    return {record.task: record.measures.get("metric", "%") for record in found}


def weighed(found: Sequence[Record]) -> dict[Case, dict[str, Evidence | None]]:
    """What the tests say of every mechanism in every case; of the host without a memory there is nothing to say."""
    cases = by_case(found)
    return {
        case: {name: evidence(scores) for name, scores in by_mechanism.items() if name != NONE}
        for case, by_mechanism in cases.items()
    }


def stand(tests: dict[str, Evidence | None]) -> list[str]:
    """The mechanisms whose score is evidence."""
    return [name for name, each in tests.items() if each is not None and each.stands]


def scores(found: Sequence[Record]) -> str:
    """Every mechanism on every task at every length that has evidence, which is bold, and what needs no learning."""
    if not found:
        return missing("this suite")
    mechanisms, rows, metric, tests = mechanisms_of(found), [], metrics(found), weighed(found)
    for case, by_mechanism in by_case(found).items():
        task, _, length = case
        proven = stand(tests[case])
        if not proven:
            continue
        unit, most = metric[task], max(map(len, by_mechanism.values()))

        def cell(name: str, unit: str = unit, most: int = most, seeds: dict[str, list[Score]] = by_mechanism) -> str:
            few = f", {len(seeds[name])} seed{'s' * (len(seeds[name]) > 1)}" if len(seeds[name]) < most else ""
            return shown([score.score for score in seeds[name]], unit) + few

        cells = [
            "" if name not in by_mechanism else f"**{cell(name)}**" if name in proven else cell(name)
            for name in mechanisms
        ]
        some, beside = next(iter(by_mechanism.values())), []
        for name in FLOORS:
            values = [value for s in some if (value := floor(s, name)) is not None]
            beside.append(shown([statistics.mean(values)], unit) if values else "")
        title = task if unit == "%" else f"{task} ({unit})"
        rows.append([title, f"{length:,}", str(most), *cells, *beside])
    header = ["task", "length", "seeds", *(f"`{name}`" for name in mechanisms), *(f"*{name}*" for name in FLOORS)]
    table = markdown(header, rows) + "\n\n" if rows else ""
    return table + "\n\n".join(filter(None, [left_out(tests), note(found)]))


def left_out(tests: dict[Case, dict[str, Evidence | None]]) -> str:
    """The rows without any evidence in a line, and what their scores fail by."""
    places: dict[str, list[str]] = {}
    failed: list[Evidence] = []
    unknown = 0
    for (task, _, length), by_mechanism in tests.items():
        if not stand(by_mechanism):
            places.setdefault(task, []).append(f"{length:,}")
            failed += [each for each in by_mechanism.values() if each is not None]
            unknown += sum(each is None for each in by_mechanism.values())
    if not places:
        return ""
    where = "; ".join(f"{task} at {', '.join(lengths)}" for task, lengths in places.items())
    why = [
        f"{sum(each.other > LEVEL for each in failed)} are no better than with another stream's memory",
        f"{sum(not each.over or (each.above or 0) > LEVEL for each in failed)} no better than the best floor",
        *[f"of {unknown} the outcomes of single questions are not known"] * bool(unknown),
    ]
    count = sum(map(len, places.values()))
    return (
        f"Left out: {count} row{'s' * (count > 1)} without evidence in any cell, {where}. "
        f"Of {len(failed) + unknown} scores there, {', '.join(why)}."
    )


def note(found: Sequence[Record]) -> str:
    """What marks mean; seeds, host, steps and machine."""
    seeds = sorted({record.seed for record in found})
    hosts = sorted({record.host for record in found})
    machine = found[0].machine
    where = machine["accelerator"] or f"{machine['cores']} {machine['processor']} cores"
    commands = sorted({record.command for record in found})
    hours = sum(record.seconds["all"] for record in found) / 3600
    return (
        f"Bold is evidence of a memory: better than with another stream's memory, and above the best floor that needs "
        f"no memory or knows the values that were told and not whose they are, each at {100 * LEVEL:.0f} %. Per cent "
        f"unless said otherwise; mean and, in brackets, least and most over seeds {', '.join(map(str, seeds))}, of "
        f"which *seeds* says how many. Host: {'; '.join(hosts)}. Floors in italics need nothing learned. {len(found)} "
        f"runs, {hours:.1f} process-hours on {where}. {provenance(found)} "
        f"Made by {', '.join(f'`{command}`' for command in commands)}."
    )


def tests(found: Sequence[Record]) -> str:
    """What both tests say of every score: how probable it is without use of the own memory, and at the best floor."""
    found = [record for record in found if record.mechanism != NONE]
    if not found:
        return missing("this suite")
    mechanisms, rows, metric = mechanisms_of(found), [], metrics(found)
    for (task, _, length), by_mechanism in weighed(found).items():
        known = [each for each in by_mechanism.values() if each is not None]
        best = f"{known[0].floor}, {shown([known[0].share], metric[task])}" if known else ""
        cells = [_cell(by_mechanism[name]) if name in by_mechanism else "" for name in mechanisms]
        rows.append([task, f"{length:,}", best, *cells])
    table = markdown(["task", "length", "best floor", *(f"`{name}`" for name in mechanisms)], rows)
    return (
        f"{table}\n\nOf each score two probabilities: of as many streams, or more, that are answered better with their "
        f"own memory than with another stream's, if that made no difference; and of the score, or a higher one, at the "
        f"best floor. Bold: both at most {LEVEL}. A dash: not a share, so compared with the floor as it is."
    )


def _cell(tested: Evidence | None) -> str:
    if tested is None:
        return "not known"
    said = f"{chance(tested.other)}; {'-' if tested.above is None else chance(tested.above)}"
    return f"**{said}**" if tested.stands else said


def cost(found: Sequence[Record]) -> str:
    """Steps, wall time, parameters, bytes and time a token of every mechanism: medians over tasks, least and most."""
    if not found:
        return missing("this suite")
    rows = []
    for name in mechanisms_of(found):
        mine = [record for record in found if record.mechanism == name]
        rows.append(
            [
                f"`{name}`",
                _range([record.config["recipe"]["steps"] for record in mine]),
                _range([record.seconds.get("training", 0) for record in mine]),
                _range([record.measures["parameters"] for record in mine]),
                _range([record.state_bytes or 0 for record in mine]),
                _range([record.measures["cost"]["microseconds a token"] for record in mine], 1),
                _range([record.measures["cost"]["with memory / base"] for record in mine], 2),
            ]
        )
    header = ["mechanism", "steps", "training, s", "memory's parameters", "bytes a stream"]
    table = markdown([*header, "microseconds a token", "with memory / base"], rows)
    return table + "\n\nMedians over tasks and seeds; in brackets least and most."


def _range(values: Sequence[float], digits: int = 0) -> str:
    middle, least, most = (f"{each:,.{digits}f}" for each in (statistics.median(values), min(values), max(values)))
    return middle if least == most else f"{middle} ({least}-{most})"
