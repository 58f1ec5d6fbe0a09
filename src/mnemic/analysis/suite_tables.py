"""Tables of a suite: mechanism x task x length with spread, controls and floors beside every score, and cost."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mnemic.analysis.markdown import markdown, missing, spread
from mnemic.bench.results import Record, Score, records
from mnemic.controls import CONDITIONS

NONE = "none"
CONTROLS = CONDITIONS[1:]

Case = tuple[str, str, int]
"""Task, its settings as text, and length."""


def suites(results: Path) -> dict[str, list[Record]]:
    """The records of every suite in a folder of results, by the suite's name."""
    folders = sorted(each for each in results.glob("suite-*") if each.is_dir())
    return {folder.name.removeprefix("suite-"): told_apart(records(folder)) for folder in folders}


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
    """`suite-NAME`, `suite-NAME-controls` and `suite-NAME-cost` for every suite that was run, and for those that come
    with the package in any case.
    """
    from mnemic.bench.suite import names

    made = suites(results)
    tables: dict[str, str] = {}
    for name in {*names(), *made}:
        found = made.get(name, [])
        tables[f"suite-{name}"] = scores(found)
        tables[f"suite-{name}-controls"] = controls(found)
        tables[f"suite-{name}-cost"] = cost(found)
    return tables


FLOORS = {
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


def scores(found: Sequence[Record]) -> str:
    """Every mechanism on every task at every length, and what needs no learning."""
    if not found:
        return missing("this suite")
    mechanisms, rows, metric = mechanisms_of(found), [], metrics(found)
    for (task, _, length), by_mechanism in by_case(found).items():
        unit = metric[task]
        some = next(iter(by_mechanism.values()))
        cells = [
            shown([s.score for s in by_mechanism[name]], unit) if name in by_mechanism else "" for name in mechanisms
        ]
        beside = []
        for name in FLOORS:
            values = [value for s in some if (value := floor(s, name)) is not None]
            beside.append(shown([statistics.mean(values)], unit) if values else "")
        title = task if unit == "%" else f"{task} ({unit})"
        rows.append([title, f"{length:,}", *cells, *beside])
    header = ["task", "length", *(f"`{name}`" for name in mechanisms), *(f"*{name}*" for name in FLOORS)]
    return markdown(header, rows) + "\n\n" + note(found)


def note(found: Sequence[Record]) -> str:
    """Seeds, host, steps and machine."""
    seeds = sorted({record.seed for record in found})
    hosts = sorted({record.host for record in found})
    machine = found[0].machine
    where = machine["accelerator"] or f"{machine['cores']} {machine['processor']} cores"
    commands = sorted({record.command for record in found})
    hours = sum(record.seconds["all"] for record in found) / 3600
    return (
        f"Per cent unless said otherwise; mean and, in brackets, least and most over seeds "
        f"{', '.join(map(str, seeds))}. Host: {'; '.join(hosts)}. Floors in italics need nothing learned. {len(found)} "
        f"runs, {hours:.1f} process-hours on {where}. Made by {', '.join(f'`{command}`' for command in commands)}."
    )


def controls(found: Sequence[Record]) -> str:
    """A memory's score beside the same model with another stream's, a zeroed, a fresh and no memory."""
    found = [record for record in found if record.mechanism != NONE]
    if not found:
        return missing("this suite")
    rows, metric = [], metrics(found)
    for (task, _, length), by_mechanism in by_case(found).items():
        for name in mechanisms_of(found):
            if name not in by_mechanism:
                continue
            seeds = by_mechanism[name]
            rows.append(
                [task, f"{length:,}", f"`{name}`", f"**{shown([s.score for s in seeds], metric[task])}**"]
                + [shown([s.controls[control] for s in seeds], metric[task]) for control in CONTROLS]
            )
    return markdown(["task", "length", "mechanism", "own memory", *CONTROLS], rows)


def cost(found: Sequence[Record]) -> str:
    """Steps, wall time, parameters, bytes and time a token."""
    if not found:
        return missing("this suite")
    rows = []
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for record in found:
        groups.setdefault((record.task, settings_of(record), record.mechanism), []).append(record)
    for (task, _, name), same in sorted(groups.items(), key=lambda item: (item[0][:2], item[0][2] != NONE, item[0][2])):
        rows.append(
            [
                task,
                f"`{name}`",
                f"{same[0].config['recipe']['steps']:,}",
                spread([record.seconds.get("training", 0) for record in same], 1, 0),
                f"{same[0].measures['parameters']:,}",
                f"{max(record.state_bytes or 0 for record in same):,}",
                f"{statistics.median(r.measures['cost']['microseconds a token'] for r in same):.1f}",
                f"{statistics.median(r.measures['cost']['with memory / base'] for r in same):.2f}",
            ]
        )
    header = ["task", "mechanism", "steps", "training, s", "memory's parameters", "bytes a stream"]
    return markdown([*header, "microseconds a token", "with memory / base"], rows)
