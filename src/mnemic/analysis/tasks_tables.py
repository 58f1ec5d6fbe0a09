"""The tables of the tasks' pages: their floors, from result files, and what there is, from the tasks themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mnemic.analysis.markdown import markdown, missing
from mnemic.bench.results import Record, records
from mnemic.tasks import TASKS

FEW = 3
"""Up to so many settings stand beside each other."""


def tables(results: Path) -> dict[str, str]:
    """Every table of these pages by name: `tasks`, `generators`, and `floors-NAME` for each task."""
    found = {record.task: record for record in records(results)}
    names = [f"floors-{name}" for name in sorted(TASKS)]
    made = {name: floors(found[name]) if name in found else missing(f"`{name}`") for name in names}
    speed = generators(found["generators"]) if "generators" in found else missing("the generators")
    return {"tasks": tasks(), "generators": speed} | made


def generators(record: Record) -> str:
    """How fast streams are made, beside how fast a small model trains on them."""
    measures = record.measures
    rows = [
        [f"`{name}`", f"{measures['tokens a second'][name]:,.0f}", f"{ratio:,.0f}"]
        for name, ratio in sorted(measures["generator / model"].items(), key=lambda item: item[1])
    ]
    threads = record.machine["cores"]
    return markdown(["task", "tokens a second", "times those a model trains on"], rows) + (
        f"\n\nOne thread, default settings; the model ({record.host}) trains on "
        f"{measures['model, tokens a second']:,.0f} tokens a second with {threads} threads. Made by `{record.command}`."
    )


def tasks() -> str:
    """What there is to test a memory with, with links to the pages, which are called like the tasks' modules."""
    rows = []
    for name, task in sorted(TASKS.items()):
        page = task.__module__.rpartition(".")[2]
        title, _, address = task.card.paper.rpartition(", http")
        paper = f"[{title}](http{address})" if title else task.card.paper
        rows.append(
            [f"[`{name}`]({page}.md)", task.card.title, task.card.asks, f"`{task.axis}`", paper],
        )
    return markdown(["task", "title", "what a memory must do", "gets harder along", "paper"], rows)


def floors(record: Record) -> str:
    """Floors and ceiling in columns and settings in rows; the other way round where there are few settings."""
    settings, scores, metric = record.config["settings"], record.scores, record.config["metric"]
    varied = [key for key in settings[0] if len({str(each[key]) for each in settings}) > 1]
    names = list(dict.fromkeys(floor_name(floor) for score in scores for floor in score.floors))
    ceiling = any(score.ceiling is not None for score in scores)
    columns = [*(f"`{key}`" for key in varied), "tokens", *names, *(["oracle"] * ceiling)]
    rows = []
    for each, score in zip(settings, scores, strict=True):
        values = {floor_name(floor): value for floor, value in score.floors.items()}
        cells = [*(values.get(name) for name in names), *([score.ceiling] * ceiling)]
        rows.append([*(_plain(each[key]) for key in varied), f"{score.tokens:,}", *(shown(c, metric) for c in cells)])
    if len(rows) <= FEW:
        columns, *rows = [list(each) for each in zip(columns, *rows, strict=True)]
    fixed = [f"`{key}` {_plain(each)}" for key, each in settings[0].items() if key not in varied and each is not None]
    note = f"In {metric}, {scores[0].examples:,} test streams" + ("; " + ", ".join(fixed)) * bool(fixed)
    return f"{markdown(columns, rows)}\n\n{note}. Made by `{record.command.split(' --out')[0]}`."


def shown(value: float | None, metric: str) -> str:
    """A floor as it is printed."""
    return "-" if value is None else f"{100 * value:.1f}" if metric == "%" else f"{value:.3f}"


def floor_name(floor: str) -> str:
    """A floor's name without its size, which differs from row to row."""
    return "sample of a segment" if floor.startswith("sample of ") and floor.endswith(" tokens") else floor


def _plain(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
