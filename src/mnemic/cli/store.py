"""`mnemic store`: the sessions of a store, from the terminal."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from mnemic.cli.show import Table, console, listing

if TYPE_CHECKING:
    from mnemic.store import Entry, SessionStore

store_app = typer.Typer(no_args_is_help=True, help="Sessions by name: what is kept, and taking it out or away.")

Url = Annotated[str, typer.Option("--store", help="A path (SQLite), or postgresql+psycopg://...")]
Name = Annotated[str, typer.Argument(help="The session's name.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]
DEFAULT = "memories.db"


@contextmanager
def _opened(url: str) -> Iterator[SessionStore]:
    """A store that is there, its errors as one line and exit status 1."""
    from mnemic.state import StateError
    from mnemic.store import SessionStore, StoreError

    try:
        with SessionStore(url, create=False) as store:
            yield store
    except (StoreError, StateError, ValueError, OSError, ImportError) as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error


@store_app.command("list")
def list_sessions(store: Url = DEFAULT) -> None:
    """Every session: its version, size, age, and the memory and base it belongs to."""
    with _opened(store) as opened:
        entries = opened.list()
    console.print(listing(_told(entry) for entry in entries))
    total = sum(entry.nbytes for entry in entries)
    console.print(
        f"{len(entries):,} session{'s' * (len(entries) != 1)}, {total:,} bytes, in {opened.url}", soft_wrap=True
    )


@store_app.command()
def show(name: Name, store: Url = DEFAULT) -> None:
    """All that the store knows of a session without its model. `mnemic inspect` looks into what `export` writes."""
    with _opened(store) as opened:
        entry = opened.entry(name)
    table = Table.grid(padding=(0, 2))
    for field, value in dataclasses.asdict(entry).items():
        table.add_row(Text(field.replace("_", " "), style="bright_black"), _plain(value))
    console.print(table)


@store_app.command()
def delete(name: Name, store: Url = DEFAULT, yes: Yes = False) -> None:
    """Removes a session for good, and says what was removed."""
    with _opened(store) as opened:
        if not yes:
            typer.confirm(f"Remove session {name!r} from {opened.url} for good?", abort=True)
        entry = opened.delete(name)
    console.print(_removed(entry))


@store_app.command()
def export(
    name: Name,
    file: Annotated[Path, typer.Argument(help="The file to write; `Session.load` and `mnemic inspect` read it.")],
    store: Url = DEFAULT,
) -> None:
    """Writes a session to a file of its own."""
    with _opened(store) as opened:
        opened.export(name, file)
    console.print(f"session {file}", soft_wrap=True)


@store_app.command()
def purge(store: Url = DEFAULT) -> None:
    """Removes the sessions that have expired, and says which."""
    with _opened(store) as opened:
        entries = opened.purge()
    for entry in entries:
        console.print(_removed(entry))
    console.print(f"{len(entries):,} removed")


def _told(entry: Entry) -> tuple[Text, str, dict[str, Text]]:
    facts = {
        "updated": entry.updated,
        "expires": entry.expires,
        "memory": f"{entry.memory} {entry.memory_fingerprint}",
        "base": f"{entry.base_model or 'unnamed'} {entry.base_fingerprint}",
    }
    title = f"version {entry.version}, {entry.nbytes:,} bytes"
    return _plain(entry.name), title, {name: _plain(value) for name, value in facts.items() if value is not None}


def _plain(value: Any) -> Text:
    """A value as text that cannot command the terminal: a name may be anything."""
    if isinstance(value, datetime):
        return Text(value.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"))
    text = "-" if value is None else str(value)
    return Text(text if text.isprintable() else repr(text))


def _removed(entry: Entry) -> Text:
    size = f"{entry.nbytes:,} bytes, of which {entry.freed:,} are free now"
    return Text.assemble("removed ", _plain(entry.name), f", version {entry.version}, {size}")
