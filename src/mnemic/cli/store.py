"""`mnemic store`: the sessions of a store, from the terminal; and `mnemic bench store`."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from mnemic.cli.bench import Out
from mnemic.cli.show import Show, Table, console, listing

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


def bench_store(
    kills: Annotated[int, typer.Option(min=1, help="Writers killed.")] = 200,
    writers: Annotated[int, typer.Option(min=1, help="Processes that write at once.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="Puts and gets of each.")] = 500,
    sessions: Annotated[int, typer.Option(min=1, help="Sessions to load and save.")] = 1000,
    postgres: Annotated[
        str | None, typer.Option(envvar="MNEMIC_POSTGRES", help="A PostgreSQL server: postgresql+psycopg://...")
    ] = None,
    out: Out = Path("results"),
) -> None:
    """Stores and folders: writers killed, writers in a crowd, and what it costs to load and save a session."""
    from mnemic.bench import store as measure

    seconds: dict[str, float] = {}
    measures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, Show("") as progress:
        url = f"sqlite:///{folder}/store.db"

        def timed(name: str, total: int, function: Any, *arguments: Any) -> Any:
            progress.phase(name, total)
            begun = time.perf_counter()
            found = function(*arguments, progress=progress.advance)
            seconds[name] = time.perf_counter() - begun
            return found

        measures["cost"] = timed("load and save", 2 * sessions, measure.thousand, url, sessions)
        measures["cost"]["bytes of the database"] = measure.file_bytes(url)
        for name, where in {"SQLite": url, "PostgreSQL": postgres}.items():
            if where is not None:
                found = timed(f"kills, {name}", kills, measure.kill_while_putting, where, kills)
                measures[f"kills, {name}"] = dataclasses.asdict(found)
                found = timed(f"crowd, {name}", writers * rounds, measure.crowd, where, writers, rounds)
                measures[f"crowd, {name}"] = dataclasses.asdict(found)
        found = timed("kills, a folder", kills, measure.kill_while_saving, f"{folder}/saved", kills)
        measures["kills, a folder"] = dataclasses.asdict(found)
    for name, found in measures.items():
        console.print(f"{name}: {found}", highlight=False, soft_wrap=True)
    record = measure.record(measures, 0, seconds)
    record.command = f"mnemic bench store --kills {kills} --writers {writers} --rounds {rounds} --sessions {sessions}"
    console.print(f"results {record.save(out, 'store.json')}")


def bench_mutated_files(
    files: Annotated[int, typer.Option(min=1, help="Wrong files, half sessions and half adapters.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Of the damage.")] = 0,
    out: Out = Path("results"),
) -> None:
    """Sessions and adapters that are damaged or made by hand, their checksums with them: what of them is loaded?"""
    from mnemic.bench.mutations import mutated_files
    from mnemic.bench.results import Record

    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, Show("") as progress:
        progress.phase("wrong files", files)
        found = mutated_files(files, Path(folder), seed, progress.advance)
    measures = {"files": found.files, "sum": sum(found.refused.values()), **dataclasses.asdict(found)}
    for label in ("loaded", "crashed", "changed"):
        console.print(f"{label}: {len(measures[label]):,} {measures[label][:5]}", highlight=False, soft_wrap=True)
    console.print(f"refused with a clear error: {measures['sum']:,} of {found.files:,}; slowest {found.slowest:.2f} s")
    record = Record("mutated-files", "all", "Llama, 2 blocks, width 64, random weights", seed, {}, measures=measures)
    record.seconds = {"all": time.perf_counter() - begun}
    console.print(f"results {record.save(out, 'mutated-files.json')}")
