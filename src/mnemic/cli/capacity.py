"""`mnemic bench capacity`: what every update rule holds and overwrites, without training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mnemic.cli.bench import Out, Seeds, _numbers
from mnemic.cli.show import Table, console


def capacity(
    pairs: Annotated[str, typer.Option(help="Numbers of pairs, separated by commas.")] = "4,8,16,32,64,128",
    seeds: Seeds = "0,1,2,3,4",
    reads: Annotated[int, typer.Option(min=1, help="Keys asked for each cell and seed, at most about.")] = 2048,
    out: Out = Path("results"),
) -> None:
    """Random keys into a matrix and out again: right answers of every update rule, by the number of pairs."""
    from mnemic.analysis.capacity import cells
    from mnemic.bench.capacity import capacity as measure

    try:
        record = measure(console.print, _numbers(pairs), _numbers(seeds), reads)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    header, rows = cells(record)
    table = Table(title="right answers, %: keys written once / four times", title_justify="left", title_style="bold")
    for name in header:
        table.add_column(name, justify="left" if name == header[0] else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(f"results {record.save(out, 'capacity.json')}")
