"""How things look in the terminal: tables that cut nothing off, and a run, as bars above a table that grows."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table as RichTable
from rich.text import Text

if TYPE_CHECKING:
    from mnemic.bench.results import Score

console = Console()
SECONDS_BETWEEN_LINES = 20


def need(*packages: str, extra: str = "plot") -> None:
    """Raises a usage error for packages of an extra that are not installed, before anything is done."""
    if lacking := [package for package in packages if importlib.util.find_spec(package) is None]:
        raise typer.BadParameter(f"this needs {' and '.join(lacking)}: pip install 'mnemic[{extra}]'")


class Table(RichTable):
    """A table that folds what is too long for its column: names and sources are whole, however narrow the terminal."""

    def add_column(self, *given: Any, **options: Any) -> None:
        """As the parent's, which cuts words off."""
        super().add_column(*given, **{"overflow": "fold", **options})


def listing(entries: Iterable[tuple[str | Text, str | Text, Mapping[str, str | Text]]]) -> RichTable:
    """Entries one below another: a name, what it is called, and facts by name."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bright_black")
    table.add_column()
    for name, title, facts in entries:
        if table.row_count:
            table.add_row()
        table.add_row(Text("", "bold").append(name), Text("", "bold").append(title))
        for fact, value in facts.items():
            table.add_row(f"  {fact}", Text().append(value))
    return table


class Show:
    """A `Reporter` that draws: use as a context manager."""

    def __init__(self, title: str) -> None:
        from mnemic.controls import CONDITIONS

        self.progress = Progress(
            TextColumn("{task.description:<28}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[note]}"),
            console=console,
        )
        self.table = Table(title=title, title_justify="left", title_style="bold")
        self.table.add_column("asked for")
        for name in ("filler before", "after", *CONDITIONS, "without binding"):
            self.table.add_column(name, justify="right", style="bold" if name == "memory" else "dim")
        self.live = Live(Group(self.progress), console=console, refresh_per_second=4)
        self.task = None
        self.printed = time.monotonic()

    def __enter__(self) -> Self:
        self.live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finish()
        self.live.__exit__(kind, error, trace)

    def _finish(self) -> None:
        if self.task is not None:
            # a phase that stopped early is complete all the same
            self.progress.update(self.task, total=self.progress.tasks[self.task].completed)

    def phase(self, name: str, total: int) -> None:
        """A new bar."""
        self._finish()
        self.task = self.progress.add_task(name, total=total, note="")

    def advance(self, steps: int, **values: float) -> None:
        """Moves the bar and shows the values beside it."""
        assert self.task is not None
        note = "  ".join(f"{name} {value:.3g}" for name, value in values.items())
        self.progress.advance(self.task, steps)
        if note:
            self.progress.update(self.task, note=note)
        if not console.is_terminal and time.monotonic() - self.printed > SECONDS_BETWEEN_LINES:
            # nobody sees a bar in a log file: a line from time to time
            self.printed = time.monotonic()
            task = self.progress.tasks[self.task]
            console.print(f"{task.description}: {task.completed:,.0f} of {task.total:,.0f}  {task.fields['note']}")

    def score(self, score: Score) -> None:
        """A new row."""
        from mnemic.bench.recall import UNBOUND, asked_for, places_of

        places, asked = places_of(score), asked_for(score)
        cells = [score.score, *score.controls.values(), score.floors[UNBOUND]]
        filler = ("any", "any") if places.anywhere else (f"{places.before:,}", f"{places.after:,}")
        self.table.add_row(asked, *filler, *(f"{100 * value:.1f}" for value in cells))
        if "old" in score.details:
            self.table.add_row("", "", "", f"[dim]{100 * score.details['old']:.1f} the old value[/dim]")
        self.live.update(Group(self.progress, self.table))
        if not console.is_terminal:
            console.print(f"{asked}, filler {' before, '.join(filler)} after: {100 * score.score:.2f} % right")
