"""`mnemic tasks`: what there is to test a memory with, one example of each, and what is reached without a memory."""

from __future__ import annotations

import dataclasses
import itertools
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.text import Text

from mnemic.cli.show import Table, console, listing

if TYPE_CHECKING:
    from mnemic.bench.results import Score
    from mnemic.tasks import Examples, Task

tasks_app = typer.Typer(no_args_is_help=True, help="What a memory is tested with: tasks, their examples, their floors.")

Settings = Annotated[list[str] | None, typer.Option("--set", help="A setting as key=value; may come more than once.")]

STYLES = {
    "evidence": "bold #222222 on #f6c667",
    "answer": "bold white on #1f5fa8",
    "other": "",
    "padding": "bright_black",
    "left out": "italic bright_black",
}


# --- settings from words ---------------------------------------------------------------------------------------------


def find(name: str) -> type[Task]:
    """The task of that name; a usage error that lists all where there is none."""
    from mnemic.tasks import TASKS

    if name not in TASKS:
        raise typer.BadParameter(f"{name!r} is no task; choose one of {', '.join(sorted(TASKS))}")
    return TASKS[name]


def made(kind: type[Task], words: Sequence[str] = (), *, many: bool = False) -> list[Task]:
    """The task with settings from words such as `segments=8`, each value as the type of its field.

    With `many`, values separated by commas (of fields that are not lists) make a task each, in all combinations.
    A usage error for an unknown setting, for one that does not fit its type, and for what the task refuses.
    """
    types_of = typing.get_type_hints(kind)
    known = [each.name for each in dataclasses.fields(kind) if each.init]  # pyright: ignore[reportArgumentType]
    choices: dict[str, list[Any]] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key not in known:
            raise typer.BadParameter(f"{word!r} is not one of this task's settings; known are {', '.join(known)}")
        parts = value.split(",") if many and not _is_list(types_of[key]) else [value]
        try:
            choices[key] = [parsed(types_of[key], part) for part in parts]
        except ValueError as error:
            raise typer.BadParameter(f"{key}={value}: {error}") from None
    try:
        combined = itertools.product(*choices.values())
        return [kind(**dict(zip(choices, values, strict=True))) for values in combined]
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from None


def parsed(kind: Any, text: str) -> Any:
    """A word as a value of a field's type: `int`, `float`, `bool`, `str`, a `Literal`, a tuple or list of these
    (commas between), or one of several types. `Any` keeps the word.

    Raises:
        ValueError: the word is none.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if type(None) in arguments and text.lower() == "none":
            return None
        for each in sorted((each for each in arguments if each is not type(None)), key=lambda each: each is str):
            try:
                return parsed(each, text)
            except ValueError:
                continue
        raise ValueError(f"{text!r} is none of {', '.join(_name(each) for each in arguments)}")
    if origin is typing.Literal:
        for each in arguments:
            if str(each) == text:
                return each
        raise ValueError(f"{text!r} is none of {', '.join(map(str, arguments))}")
    if _is_list(kind):
        of = arguments[0] if arguments else str
        parts = (part.strip() for part in text.strip("()[]").split(","))
        return (origin or kind)(parsed(of, part) for part in parts if part)
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{text!r} is neither true nor false")
        return text.lower() == "true"
    if kind in (int, float):
        try:
            return kind(text.replace("_", ""))
        except ValueError:
            raise ValueError(f"{text!r} is no {'whole ' * (kind is int)}number") from None
    return text


def _is_list(kind: Any) -> bool:
    return (typing.get_origin(kind) or kind) in (tuple, list) or any(
        _is_list(each) for each in typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType)
    )


def _name(kind: Any) -> str:
    return "none" if kind is type(None) else getattr(kind, "__name__", str(kind))


# --- commands --------------------------------------------------------------------------------------------------------


@tasks_app.command("list")
def list_tasks() -> None:
    """Every task: what it asks of a memory, the setting along which it gets harder, and its paper."""
    from mnemic.tasks import TASKS

    kinds = sorted(TASKS.items())
    facts = [{"asks": kind.card.asks, "axis": kind.axis, "paper": kind.card.paper} for _, kind in kinds]
    console.print(listing((name, kind.card.title, told) for (name, kind), told in zip(kinds, facts, strict=True)))


@tasks_app.command("show")
def show(
    name: Annotated[str, typer.Argument(help="A task; `mnemic tasks list` has all.")],
    settings: Settings = None,
    out: Annotated[Path | None, typer.Option(help="Draw it to this PNG too.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Which batch of the training streams it is the first of.")] = 0,
) -> None:
    """One example, segment by segment, evidence and answers in colours, and what is known of it."""
    [task] = made(find(name), settings or ())
    console.print(view(task, task.examples(1, "train", seed)))
    if out is not None:
        from mnemic.analysis.examples import picture

        console.print(f"picture {picture(task, out, seed)}")


@tasks_app.command("floors")
def floors(
    names: Annotated[list[str] | None, typer.Argument(help="Tasks; all of them by default.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="A setting as key=value; several values, separated by commas, are a row each."),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Test streams.")] = 200,
    out: Annotated[Path | None, typer.Option(help="Write the result files to this folder too.")] = None,
) -> None:
    """What is reached without a memory that has learned anything, and what is reached by the oracle."""
    from mnemic.bench.floors import measure
    from mnemic.tasks import TASKS

    # everything is made before anything is measured: a wrong setting of the last task costs nothing
    for tasks in [made(find(name), settings or (), many=True) for name in names or sorted(TASKS)]:
        scores: list[Score] = []
        record = measure(tasks, rows, report=lambda _, score, scores=scores: scores.append(score))
        console.print(floors_table(tasks, scores))
        if out is not None:
            console.print(f"results {record.save(out, f'{record.task}.json')}")


# --- what they print -------------------------------------------------------------------------------------------------


def view(task: Task, examples: Examples, row: int = 0) -> RenderableType:
    """One stream and what is known of it."""
    from mnemic.analysis.examples import layout, summary

    streams = Table.grid(padding=(0, 2))
    streams.add_column(style="bright_black", no_wrap=True)
    streams.add_column()
    for line in layout(task, examples, row):
        words = Text()
        for cell in line.cells:
            words.append(cell.text, STYLES[cell.mark]).append(" ")
        streams.add_row(line.title, words)
    settings = ", ".join(f"{key} {value}" for key, value in task.settings().items())
    return Group(
        Text.assemble((task.card.title, "bold"), f" ({task.name})"),
        Text(task.card.asks),
        Text(task.card.paper, "bright_black"),
        Text(f"{summary(task, examples, row)}\n{settings}\n", "bright_black"),
        streams,
        Text(),
        Text.assemble(("evidence", STYLES["evidence"]), "  ", ("answer", STYLES["answer"])),
        answers(task, examples, row),
    )


def answers(task: Task, examples: Examples, row: int = 0) -> Table:
    """Every answer of a stream: where it stands, where its evidence stands, and what else is known."""
    table = Table(box=None, header_style="bright_black")
    columns = ("answer", "tokens", "place", "lag", "evidence", *examples.extra)
    for column in columns:
        table.add_column(column, justify="left" if column in ("tokens", "evidence") else "right")
    place, lag, most = examples.place[row].tolist(), examples.lag[row].tolist(), 12
    for number, at in enumerate(place[:most]):
        if at < 0:
            continue
        words = task.text(examples.labels[row][examples.answer[row] == number].tolist())
        evidence = [each for each in examples.evidence[row, number].tolist() if each >= 0]
        more = " ..." * (len(evidence) > 8)
        table.add_row(
            str(number),
            escape(" ".join(word.strip() for word in words[:24])),
            f"{at:,}",
            f"{lag[number]:,}",
            " ".join(f"{each:,}" for each in evidence[:8]) + more,
            *(str(value[row, number].item()) for value in examples.extra.values()),
        )
    if len(place) > most:
        table.add_row("...", f"{len(place) - most} more")
    return table


def floors_table(tasks: Sequence[Task], scores: Sequence[Score]) -> Table:
    """Floors in rows, settings in columns."""
    settings = [task.settings() for task in tasks]
    varied = [key for key in settings[0] if len({str(each[key]) for each in settings}) > 1] or [tasks[0].axis]
    metric = getattr(tasks[0], "metric", "%")
    table = Table(title=f"{tasks[0].name}, {metric}", title_justify="left", title_style="bold")
    table.add_column("\n".join([*varied, "tokens"]))
    for task, score in zip(tasks, scores, strict=True):
        head = [*(str(getattr(task, key)) for key in varied), f"{score.tokens:,}"]
        table.add_column("\n".join(head), justify="right")
    found = [{floor_name(floor): value for floor, value in score.floors.items()} for score in scores]
    for name in dict.fromkeys(name for each in found for name in each):
        table.add_row(name, *(shown(each.get(name), metric) for each in found))
    if any(score.ceiling is not None for score in scores):
        table.add_row("oracle", *(shown(score.ceiling, metric) for score in scores), style="bold")
    return table


def shown(value: float | None, metric: str) -> str:
    """A floor as it is printed."""
    return "-" if value is None else f"{100 * value:.1f}" if metric == "%" else f"{value:.3f}"


def floor_name(floor: str) -> str:
    """A floor's name without its size, which differs from row to row."""
    return "sample of a segment" if floor.startswith("sample of ") and floor.endswith(" tokens") else floor
