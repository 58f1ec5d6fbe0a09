"""`mnemic compare`: whether one of two mechanisms is better, by a paired test."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mnemic.cli.show import Table, console

if TYPE_CHECKING:
    from mnemic.analysis.comparison import Comparison


def compare(
    what: Annotated[
        list[str],
        typer.Argument(metavar="A.json B.json | FOLDER ONE OTHER", help="Two records, or two mechanisms of a suite."),
    ],
    task: Annotated[str, typer.Option(help="Of a suite: some of its tasks, separated by commas.")] = "",
) -> None:
    """Says whether one of two mechanisms answers the same questions better, and by how much: an exact paired test."""
    from mnemic.analysis.comparison import compared, concluded, paired, terms
    from mnemic.analysis.suite_tables import complete, told_apart
    from mnemic.bench.results import Record, is_record, records

    if len(what) not in (2, 3) or (len(what) == 2 and not all(is_record(path) for path in what)):
        raise typer.BadParameter("name two files of results, or a folder of them and two mechanisms")
    if len(what) == 3 and not Path(what[0]).is_dir():
        raise typer.BadParameter(f"{what[0]} is no folder of results")
    try:
        if len(what) == 2:
            one, other = complete([Record.load(path) for path in what])
            pairs = {one.task: [(one, other)]}
        else:
            pairs = paired(told_apart(complete(records(what[0]))), what[1], what[2])
            chosen = [word for word in task.split(",") if word]
            pairs = {name: each for name, each in pairs.items() if not chosen or name.split(" ")[0] in chosen}
            if not pairs:
                raise ValueError(f"{what[1]} and {what[2]} have no task and seed in common; run both")
        made = {name: compared(each) for name, each in pairs.items()}
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    for name, found in made.items():
        one, other = pairs[name][0]
        names = (one.mechanism, other.mechanism) if one.mechanism != other.mechanism else ("the first", "the second")
        unit = one.measures.get("metric", "%")
        console.print(table(name, names, found, unit))
        console.print(concluded(names, found, unit), soft_wrap=True)
        if differing := terms(one, other):
            console.print(f"Not on equal terms: they differ in {', '.join(differing)}.", soft_wrap=True)
        console.print()


def table(title: str, names: tuple[str, str], found: Sequence[Comparison], unit: str) -> Table:
    """A row for each length; scores that are evidence of a memory are bold."""
    counts = zip(*map(_counts, found), strict=True)
    seeds, streams = ("-".join(dict.fromkeys((str(min(each)), str(max(each))))) for each in counts)
    title = f"{title}, {unit}; streams: {streams}, seeds: {seeds}"
    made = Table(title=title, title_justify="left", title_style="bold")
    for column in ("length", *names, "difference", "95 %", "streams better : worse", "p"):
        made.add_column(column, justify="right")
    scale, digits = (100, 1) if unit == "%" else (1, 4)
    for each in found:
        scores = [f"{scale * score:.{digits}f}" for score in each.scores]
        scores = [f"[bold]{s}[/bold]" if stands else s for s, stands in zip(scores, each.evidence, strict=True)]
        ends = " .. ".join(f"{scale * end:+.{digits}f}" for end in each.interval)
        difference = f"{scale * each.difference:+.{digits}f}"
        made.add_row(f"{each.length:,}", *scores, difference, ends, f"{each.gained} : {each.lost}", f"{each.p:.2g}")
    return made


def _counts(each: Comparison) -> tuple[int, int]:
    return each.seeds, each.streams
