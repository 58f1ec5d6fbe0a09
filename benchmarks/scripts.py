"""What the scripts of this folder share: options, and records with the command that makes them today."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from mnemic.bench.results import Record, command
from mnemic.cli.show import Table, console

Out = Annotated[Path, typer.Option(help="Folder for the result files.")]
Seeds = Annotated[str, typer.Option(help="Seeds, separated by commas.")]
Checkpoints = Annotated[Path | None, typer.Option(help="Folder for checkpoints; a run that was stopped goes on there.")]
Threads = Annotated[int | None, typer.Option(help="Threads for PyTorch; all cores by default.")]


def launch(app: typer.Typer) -> None:
    """Runs a script's command with one thread, with which small models are fastest, or with `OMP_NUM_THREADS`."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    app()


def numbers(text: str) -> list[int]:
    """Whole numbers that commas separate."""
    try:
        return [int(word.replace("_", "")) for word in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of whole numbers such as 0,1,2") from None


def saved(record: Record, out: Path, name: str | None = None) -> None:
    """Saves a record with the command as it was typed, where it has none yet, and says where."""
    typed = command().replace("mnemic", f"python benchmarks/{Path(sys.argv[0]).name}", 1)
    record.command = record.command or typed
    console.print(f"results {record.save(out, name)}", soft_wrap=True)


def today(found: Sequence[Record], former: str, script: str) -> list[Record]:
    """The records with their commands as they are typed today: what `script` does was `mnemic FORMER` once."""
    for record in found:
        record.command = re.sub(rf"^mnemic( --threads \d+)? {former}\b", f"python benchmarks/{script}", record.command)
    return list(found)


def shown(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], **options: Any) -> None:
    """Prints a table whose first column has names."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for place, name in enumerate(header):
        table.add_column(name, justify="right" if place else "left", **options)
    for row in rows:
        table.add_row(*row)
    console.print(table)
