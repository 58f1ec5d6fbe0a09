"""What a task's scores are worth: its floors and its ceiling, measured without any model."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from functools import cache

from mnemic.bench.results import Record, Score
from mnemic.tasks.base import TASKS, Task


def measure(
    tasks: Sequence[Task], rows: int = 200, number: int = 0, report: Callable[[Task, Score], None] | None = None
) -> Record:
    """Floors of one task at one or more settings, on test streams, as a record: one score for each of the settings.

    `score` and `ceiling` are the oracle's, where there is one; `floors` is everything else. The settings themselves
    are in `config`, in the same order; so is the `metric`, "%" for shares (which are kept as shares).

    Raises:
        ValueError: no task, or tasks of more than one name.
    """
    names = {task.name for task in tasks}
    if len(names) != 1:
        raise ValueError(f"one record holds one task, these are {', '.join(sorted(names)) or 'none'}")
    name = names.pop()
    settings = [task.settings() for task in tasks]
    metric = getattr(tasks[0], "metric", "%")
    config = {"task": name, "metric": metric, "rows": rows, "settings": settings}
    record = Record(f"floors-{name}", "none", "none", number, config)
    begun = time.monotonic()
    for task in tasks:
        floors = dict(task.floors(rows, number))
        oracle = floors.pop("oracle", None)
        tokens = task.examples(1, "test", number).input_ids.shape[1]
        score = Score(_length(task, tokens), tokens, rows, oracle or 0.0, {}, floors, oracle)
        record.scores.append(score)
        if report is not None:
            report(task, score)
    record.seconds["floors"] = time.monotonic() - begun
    return record


def _length(task: Task, tokens: int) -> int:
    """Where the task stands on its axis, its tokens where that is no whole number."""
    along = getattr(task, task.axis)
    return along if isinstance(along, int) else tokens


def unbound(record: Record, place: int) -> dict[str, float]:
    """The best guess without binding for a suite's score, by number, from the settings in the record: for records from
    before tasks had that floor. Nothing where the task has none, or cannot be made from its settings alone.
    """
    config, kind = record.config, TASKS.get(record.task)
    if kind is None or not {"task", "lengths"} <= config.keys():
        return {}
    settings = dict(config["task"])
    if config["lengths"]:
        settings[kind.axis] = config["lengths"][place]
    return _unbound(record.task, json.dumps(settings, sort_keys=True))


@cache
def _unbound(name: str, settings: str) -> dict[str, float]:
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in json.loads(settings).items()}
    try:
        task = TASKS[name](**values)
    except (TypeError, ValueError, OSError, AttributeError):
        return {}  # with texts or a tokenizer that are elsewhere
    return task.unbound()
