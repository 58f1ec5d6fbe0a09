"""The tables of what is registered: mechanisms, and tasks with their floors, which `mnemic tasks floors` measures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mnemic.analysis.markdown import markdown, missing
from mnemic.bench.results import Record, records
from mnemic.cli.tasks import floor_name, shown
from mnemic.memories import CONFIGS
from mnemic.tasks import TASKS

FEW = 3
"""Up to so many settings stand beside each other."""


def tables(results: Path) -> dict[str, str]:
    """Every table by name: `mechanisms`, `tasks`, and `floors-NAME` for each task."""
    found = {record.task: record for record in records(results)}
    names = [f"floors-{name}" for name in sorted(TASKS)]
    made = {name: floors(found[name]) if name in found else missing(f"`{name}`") for name in names}
    return {"mechanisms": mechanisms(), "tasks": tasks()} | made


def mechanisms() -> str:
    """What is implemented."""
    rows = []
    for kind, config in sorted(CONFIGS.items()):
        card = config.card
        rows.append([f"`{kind}`", card.title, card.seam, card.trains, card.bytes_law, card.paper])
    return markdown(["kind", "mechanism", "seam", "trains", "bytes a session", "source"], rows)


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


def _plain(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
