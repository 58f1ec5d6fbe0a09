"""`mnemic report FOLDER`: the tables of result files, as they are."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from mnemic.cli.show import Table, console

if TYPE_CHECKING:
    from mnemic.bench.results import Record


def refuse_edited(folder: Path) -> None:
    """Names the files that are not as a command wrote them, and ends the command where there are any."""
    from mnemic.bench.results import is_record, problems

    files = (path for path in sorted(folder.rglob("*.json")) if is_record(path))
    edited = {path: found for path in files if (found := problems(path))}
    for path, found in edited.items():
        console.print(f"[red]edited:[/red] {path}: {'; '.join(found)}; make it anew with its command", soft_wrap=True)
    if edited:
        raise typer.Exit(1)


def print_results(folder: Path) -> None:
    """A table of every record in a folder and the folders in it."""
    from mnemic.bench.results import Record, is_record

    paths = [path for path in sorted(folder.rglob("*.json")) if is_record(path)]
    if not paths:
        raise typer.BadParameter(f"{folder} holds no result file; mnemic bench and mnemic train write some with --out")
    refuse_edited(folder)
    for path in paths:
        record = Record.load(path)
        console.print(table(record))
        console.print(f"[dim]{record.command}   {path}[/dim]\n", soft_wrap=True)


def table(record: Record) -> Table:
    """Lengths in columns; in rows the score, which is bold where it is evidence, the controls, those that are equal as
    one, floors, the ceiling, and what the tests say. They fit a narrow terminal so.
    """
    from mnemic.analysis.markdown import chance, merged
    from mnemic.analysis.suite_tables import complete
    from mnemic.bench.significance import evidence

    metric = record.measures.get("metric", {"drift": "perplexity", "copying": "nats"}.get(record.task, "%"))
    title = f"{record.task}, {record.mechanism} on {record.host}, seed {record.seed}, {metric}"
    made = Table(title=title, title_justify="left", title_style="bold")
    made.add_column("length")
    for score in record.scores:
        made.add_column(f"{score.length:,}", justify="right")
    controls = dict.fromkeys(name for score in record.scores for name in score.controls)
    [record] = complete([record])
    floors = dict.fromkeys(name for score in record.scores for name in score.floors)

    def cells(values: Iterable[float | None]) -> list[str]:
        return ["-" if v is None else f"{100 * v:.1f}" if metric == "%" else f"{v:.4f}" for v in values]

    tested = [evidence([score]) for score in record.scores]
    own = zip(cells(score.score for score in record.scores), tested, strict=True)
    made.add_row(
        "memory", *(f"[bold]{cell}[/bold]" if test is not None and test.stands else cell for cell, test in own)
    )
    beside = merged({name: cells(score.controls.get(name) for score in record.scores) for name in controls})
    beside |= {f"floor: {name}": cells(score.floors.get(name) for score in record.scores) for name in floors}
    beside["ceiling"] = cells(score.ceiling for score in record.scores)
    for name, values in beside.items():
        made.add_row(name, *values)
    if any(tested):
        made.add_row("p, other stream", *("-" if test is None else chance(test.other) for test in tested))
        above = (None if test is None else test.above for test in tested)
        made.add_row("p, best floor", *("-" if each is None else chance(each) for each in above))
        made.caption = "bold: evidence of a memory, both p at most 0.01"
    return made
