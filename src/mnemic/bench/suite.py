"""A suite: tasks with their lengths, run with every mechanism and seed on equal terms.

A suite is a TOML file:

    title = "What it is for"

    [host]                        # fields of `Host`
    width = 64

    [recipe]                      # fields of `Recipe`, for all tasks
    steps = 600

    [memory.emt]                  # settings of a mechanism over its small ones, for all tasks
    heads = 2

    [[task]]
    name = "reverse"
    settings = { count = 12 }     # fields of the task
    lengths = [2, 4]              # values of the task's axis that it is asked at; its own setting if left out
    recipe = { steps = 1000 }     # over those above
    memory.emt = { slots = 32 }   # over those above
    only = ["none", "emt"]        # for what is meant for some mechanisms
    host = { depth = 4 }          # over that above

Every run writes one record, and a run whose record is there with the same settings is not run again. A run that was
killed goes on from its checkpoint.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from mnemic.bench.compare import NONE, Recipe, Run
from mnemic.bench.hosts import Host
from mnemic.bench.results import Record
from mnemic.memories import CONFIGS, MemoryConfig
from mnemic.tasks.base import TASKS

PLACE = files("mnemic") / "suites"
"""Where the suites that come with the package are."""


@dataclass(frozen=True)
class Entry:
    """A task of a suite."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    lengths: tuple[Any, ...] = ()
    recipe: Recipe = field(default_factory=Recipe)
    memory: dict[str, dict[str, Any]] = field(default_factory=dict)
    test_rows: int = 256
    only: tuple[str, ...] = ()
    host: Host | None = None

    def alike(self, other: Entry) -> bool:
        """Whether the two ask the same: what differs is the memory, the recipe or the host."""
        return (self.name, self.settings, self.lengths) == (other.name, other.settings, other.lengths)


@dataclass(frozen=True)
class Suite:
    """What is compared."""

    name: str
    title: str
    host: Host
    entries: tuple[Entry, ...]
    mechanisms: tuple[str, ...] = ()

    def runs(self, mechanisms: Sequence[str] = (), seeds: int = 1, host: Host | None = None) -> list[Run]:
        """Every task with every mechanism and seed; all registered mechanisms unless some are named. "none", the host
        without a memory, is always among them.

        Raises:
            ValueError: an unknown mechanism, or fewer than 1 seed.
        """
        if seeds < 1:
            raise ValueError(f"seeds is {seeds}; use 1 or more")
        named = list(mechanisms) or list(self.mechanisms) or sorted(CONFIGS)
        if unknown := sorted({*named} - {NONE, *CONFIGS}):
            raise ValueError(f"unknown memory {', '.join(unknown)}; known: {', '.join([NONE, *sorted(CONFIGS)])}")
        return [
            Run(
                task=entry.name,
                mechanism=mechanism,
                seed=seed,
                settings=entry.settings,
                lengths=entry.lengths,
                memory=entry.memory.get(mechanism, {}),
                host=host or entry.host or self.host,
                recipe=entry.recipe,
                test_rows=entry.test_rows,
                number=1 + sum(entry.alike(other) for other in self.entries[:place]),
            )
            for place, entry in enumerate(self.entries)
            for seed in range(seeds)
            for mechanism in dict.fromkeys([NONE, *named])
            if not entry.only or mechanism in entry.only
        ]


def names() -> list[str]:
    """The suites that come with the package."""
    return sorted(each.name.removesuffix(".toml") for each in PLACE.iterdir() if each.name.endswith(".toml"))


def load(suite: str | Path) -> Suite:
    """A suite by its name, or from a TOML file.

    Raises:
        FileNotFoundError: neither a name nor a file.
        ValueError: a file with an unknown task, mechanism or setting, or that is not TOML.
    """
    path = Path(suite)
    if path.is_file():
        name, text = path.stem, path.read_text()
    elif str(suite) in names():
        name, text = str(suite), (PLACE / f"{suite}.toml").read_text()
    else:
        raise FileNotFoundError(f"{suite} is neither a file nor one of the suites {', '.join(names())}")
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{suite} is not TOML: {error}") from error
    return parse(name, values)


def parse(name: str, values: dict[str, Any]) -> Suite:
    """A suite from the values of its file; raises `ValueError` naming what is wrong."""
    _known(name, values, {"title", "host", "recipe", "memory", "mechanisms", "test_rows", "task"})
    if not values.get("task"):
        raise ValueError(f"suite {name} has no [[task]]; add at least one")
    host = _made(Host, values.get("host", {}), f"{name}: host")
    common = values.get("recipe", {})
    entries = []
    for number, task in enumerate(values["task"]):
        where = f"{name}: task {number + 1} ({task.get('name')})"
        _known(where, task, {"name", "settings", "lengths", "recipe", "memory", "test_rows", "only", "host"})
        if task.get("name") not in TASKS:
            raise ValueError(f"{where}: there is no such task; known: {', '.join(sorted(TASKS))}")
        both = (values.get("memory", {}), task.get("memory", {}))
        memory = {kind: {**both[0].get(kind, {}), **both[1].get(kind, {})} for kind in {*both[0], *both[1]}}
        if unknown := sorted({*memory, *task.get("only", ())} - {NONE, *CONFIGS}):
            raise ValueError(f"{where}: unknown memory {', '.join(unknown)}; known: {', '.join(sorted(CONFIGS))}")
        _known(where, task.get("settings", {}), set(TASKS[task["name"]].__dataclass_fields__))  # pyright: ignore
        recipe = {**common, **task.get("recipe", {})}
        recipe = {key: tuple(value) if isinstance(value, list) else value for key, value in recipe.items()}
        entries.append(
            Entry(
                name=task["name"],
                settings=task.get("settings", {}),
                lengths=tuple(task.get("lengths", ())),
                recipe=_made(Recipe, recipe, f"{where}: recipe"),
                memory=memory,
                test_rows=task.get("test_rows", values.get("test_rows", 256)),
                only=tuple(task.get("only", ())),
                host=_made(Host, {**values.get("host", {}), **task["host"]}, f"{where}: host")
                if "host" in task
                else None,
            )
        )
    return Suite(name, values.get("title", name), host, tuple(entries), tuple(values.get("mechanisms", ())))


def _known(where: str, values: dict[str, Any], known: set[str]) -> None:
    if unknown := sorted(set(values) - known):
        raise ValueError(f"{where} has no {', '.join(unknown)}; known: {', '.join(sorted(known))}")


def _made(kind: Any, values: dict[str, Any], where: str) -> Any:
    _known(where, values, {each.name for each in dataclasses.fields(kind)})
    return kind(**values)


# --- records ---------------------------------------------------------------------------------------------------------


def plain(values: Any) -> Any:
    """Values as they come back from JSON."""
    return json.loads(json.dumps(values))


def file_name(run: Run) -> str:
    """`<task>-<settings' mark>-<mechanism>-seed<seed>.json`: one task may be in a suite with several settings, and with
    the same ones several times, where memory or recipe differ; then a number follows the mark.
    """
    task = {**run.settings, "lengths": list(run.lengths)}
    mark = hashlib.sha256(json.dumps(task, sort_keys=True).encode()).hexdigest()[:6]
    number = f"-{run.number}" if run.number > 1 else ""
    return f"{run.task}-{mark}{number}-{run.mechanism}-seed{run.seed}.json"


def finished(run: Run, folder: Path) -> Record | None:
    """The record of a run that was finished with the same settings, if there is one."""
    path = folder / file_name(run)
    if not path.is_file():
        return None
    record = Record.load(path)
    there, here = ({**each, "memory": _memory(each["memory"])} for each in (record.config, plain(run.described())))
    return record if there == here else None


def _memory(settings: dict[str, Any] | None) -> MemoryConfig | None:
    """A memory's settings as this release has them: earlier ones recorded fewer, and some that nothing used."""
    return None if settings is None else MemoryConfig.from_file(settings)


def limited(suite: Suite, tasks: Sequence[str]) -> Suite:
    """The suite with some of its tasks; raises `ValueError` for one that it does not have."""
    if unknown := sorted(set(tasks) - {entry.name for entry in suite.entries}):
        have = ", ".join(dict.fromkeys(entry.name for entry in suite.entries))
        raise ValueError(f"suite {suite.name} has no task {', '.join(unknown)}; it has {have}")
    return replace(suite, entries=tuple(entry for entry in suite.entries if entry.name in tasks)) if tasks else suite
