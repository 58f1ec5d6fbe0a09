"""`mnemic bench SUITE`: a suite with its live table."""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mnemic.cli.show import SECONDS_BETWEEN_LINES, Table, console

if TYPE_CHECKING:
    from mnemic.bench.compare import Run
    from mnemic.bench.results import Record
    from mnemic.bench.workers import Event


def suite(
    name: Annotated[str, typer.Argument(metavar="SUITE", help="smoke, cpu, paper, or a TOML file.")],
    memory: Annotated[
        str, typer.Option(help="Mechanisms, separated by commas; all by default. none is always run.")
    ] = "",
    host: Annotated[
        str, typer.Option(help="tiny-gpt2, tiny-llama, or a pretrained causal model, which stays frozen.")
    ] = "",
    seeds: Annotated[int, typer.Option(help="Seeds, from 0 on.")] = 3,
    task: Annotated[str, typer.Option(help="Some of the suite's tasks, separated by commas.")] = "",
    match: Annotated[
        str,
        typer.Option(help="bytes: every mechanism gets as many bytes of state as the smallest; bytes=65536: so many."),
    ] = "",
    workers: Annotated[int, typer.Option(help="Runs at the same time; all cores by default.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the result files; the suite gets one of its own in it.")] = Path(
        "results"
    ),
) -> None:
    """Mechanism x task x length on equal terms, with controls and floors. A run that is finished is not run again."""
    from dataclasses import replace

    from mnemic.bench.compare import match_bytes, most_bytes
    from mnemic.bench.results import command, refuse_changes
    from mnemic.bench.suite import limited, load
    from mnemic.bench.workers import perform

    try:
        chosen = limited(load(name), [word for word in task.split(",") if word])
        model = replace(chosen.host, name=host) if host else chosen.host
        runs = chosen.runs([word for word in memory.split(",") if word], seeds, model)
        if match:
            runs = matched(runs, match, most_bytes, match_bytes)
        folder = out / (f"suite-{chosen.name}" + (f"-{model.title}" if host else "") + ("-bytes" if match else ""))
        refuse_changes(folder)
        for run in runs:
            run.described()  # wrong settings are told before anything runs
    except (ValueError, FileNotFoundError) as error:
        raise typer.BadParameter(str(error)) from None
    with Board(f"{chosen.title}: %, mean over finished seeds", runs) as board:
        perform(runs, folder, command(), workers or os.cpu_count() or 1, board.take)
    console.print(board.table())
    for number, error in board.failed.items():
        console.print(f"[red]failed:[/red] {label(runs[number])}: {escape(error)}", highlight=False)
    console.print(f"results {folder}")
    if board.failed:
        raise typer.Exit(1)


def matched(runs: list[Run], match: str, most_bytes: Any, match_bytes: Any) -> list[Run]:
    """The runs with states of equal bytes, task by task."""
    kind, _, number = match.partition("=")
    if kind != "bytes" or (number and not number.isdigit()):
        raise ValueError(f"match is {match!r}; use bytes, or bytes=65536")
    result = list(runs)
    for key in {(run.task, str(run.settings), run.lengths) for run in runs}:
        places = [i for i, run in enumerate(runs) if (run.task, str(run.settings), run.lengths) == key]
        states = [runs[i] for i in places if most_bytes(runs[i])]
        # as many as the smallest has, or as the one takes that cannot be made so small
        one, two = ([most_bytes(replace(run, size=size)) for run in states] for size in (1, 2))
        least = max((a for a, b in zip(one, two, strict=True) if a != b), default=0)
        most = int(number) if number else max(least, min(map(most_bytes, states)))
        for place, run in zip(places, match_bytes([runs[i] for i in places], most), strict=True):
            result[place] = run
    return result


def label(run: Run) -> str:
    """A run in a line."""
    return f"{run.task} {run.mechanism} seed {run.seed}"


class Board:
    """Bars of what is running above a table of what is finished."""

    def __init__(self, title: str, runs: list[Run]) -> None:
        self.title, self.runs = title, runs
        self.records: dict[int, Record] = {}
        self.failed: dict[int, str] = {}
        self.progress = Progress(
            TextColumn("{task.description:<44}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[note]}"),
            console=console,
        )
        self.all = self.progress.add_task("all runs", total=len(runs), note="")
        self.bars: dict[int, Any] = {}
        self.live = Live(self, console=console, refresh_per_second=2, transient=True)
        self.printed = 0.0

    def __enter__(self) -> Board:
        if console.is_terminal:
            self.live.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if console.is_terminal:
            self.live.__exit__(*error)

    def __rich__(self) -> Group:
        return Group(self.progress, self.table())

    def take(self, event: Event) -> None:
        """Shows an event."""
        run = self.runs[event.number]
        bar = self.bars.get(event.number)
        if event.record is not None or event.error is not None:
            if event.record is not None:
                self.records[event.number] = event.record
            elif event.error is not None:
                self.failed[event.number] = event.error
            if bar is not None:
                self.progress.remove_task(self.bars.pop(event.number))
            self.progress.advance(self.all)
            if not console.is_terminal and not event.again:
                done = len(self.records) + len(self.failed)
                console.print(f"{done} of {len(self.runs)}  {label(run)}: {outcome(event)}", highlight=False)
            return
        note = "  ".join(f"{name} {value:.3f}" for name, value in event.note.items())
        if bar is None:
            bar = self.bars[event.number] = self.progress.add_task("", total=event.total, note="")
        description = f"{label(run)}: {event.phase}"
        self.progress.update(bar, description=description, completed=event.done, total=event.total, note=note)
        if not console.is_terminal and time.monotonic() - self.printed > SECONDS_BETWEEN_LINES:
            self.printed = time.monotonic()
            console.print(f"  {description} {event.done} of {event.total}  {note}", highlight=False)

    def table(self) -> Table:
        """Scores by task and length, one column a mechanism, and the floors; what is evidence is bold."""
        from mnemic.analysis.suite_tables import FLOORS, by_case, floor, metrics, stand, weighed

        mechanisms = list(dict.fromkeys(run.mechanism for run in self.runs))
        caption = "bold: evidence of a memory"
        table = Table(title=self.title, title_justify="left", title_style="bold", caption=caption)
        table.add_column("task")
        table.add_column("length", justify="right")
        for name in mechanisms:
            table.add_column(name, justify="right")
        for name in FLOORS:
            table.add_column(name, justify="right", style="dim")
        found = list(self.records.values())
        units, tests = metrics(found), weighed(found)
        for case, by_mechanism in by_case(found).items():
            task, _, length = case
            proven = stand(tests[case])

            def cell(value: float | None, unit: str = units[task]) -> str:
                return "" if value is None else f"{100 * value:.1f}" if unit == "%" else f"{value:.3f}"

            means = [
                cell(statistics.mean(score.score for score in by_mechanism[name])) if name in by_mechanism else ""
                for name in mechanisms
            ]
            means = [
                f"[bold]{mean}[/bold]" if name in proven else mean for name, mean in zip(mechanisms, means, strict=True)
            ]
            some = next(iter(by_mechanism.values()))[0]
            title = task if units[task] == "%" else f"{task}, {units[task]}"
            table.add_row(title, f"{length:,}", *means, *(cell(floor(some, name)) for name in FLOORS))
        return table


def outcome(event: Event) -> str:
    """A finished run in a line."""
    if event.record is None:
        return f"failed: {event.error}"
    unit = event.record.measures["metric"]
    scale, digits = (100, 1) if unit == "%" else (1, 3)
    scores = ", ".join(f"{scale * score.score:.{digits}f}" for score in event.record.scores)
    return f"{scores} {unit} in {event.record.seconds['all']:.0f} s"
