"""`mnemic bench peers`: training steps beside public packages."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mnemic.cli.bench import Out, _numbers
from mnemic.cli.show import Table, console


def peers(
    pair: Annotated[str, typer.Option(help="Some of the pairs, separated by commas; all by default.")] = "",
    shape: Annotated[str, typer.Option(help="small, wide, or both, separated by a comma.")] = "small,wide",
    threads: Annotated[str, typer.Option(help="Numbers of threads for PyTorch, separated by commas.")] = "2,1",
    runs: Annotated[int, typer.Option(min=1, help="Counted steps of each side.")] = 9,
    out: Out = Path("results"),
) -> None:
    """A training step beside public packages of the same mechanisms (extra: peers): time, and peak of memory."""
    from mnemic.analysis.peers import cells
    from mnemic.bench.peers import peers as measure

    names, shapes = ([word for word in text.split(",") if word] for text in (pair, shape))
    try:
        record = measure(console.print, names, shapes, _numbers(threads), runs)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    header, rows = cells(record)
    table = Table(title="package / ours", title_justify="left", title_style="bold")
    for name in header:
        table.add_column(name)
    for row in rows:
        table.add_row(*(cell.replace("*", "") for cell in row))
    console.print(table)
    console.print(f"results {record.save(out, 'peers.json')}")
