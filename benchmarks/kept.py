"""What it costs to keep a session that carries gigabytes: a turn's `put` and `save`, and to go on from what was kept.

The first 5,120 tokens of a novel are read once. A session that remembers N tokens is made of them without
reading: the 4,096 that left the window are repeated, keys and values, with noise that is other each time, as equal
chunks would be kept once. Then it is put into a store (SQLite), saved as a folder and saved as a file; it reads turns,
and is put and saved after each; and it is restored from all three, says two tokens and reads a turn. Before it is
restored what was written is flushed and dropped from the system's cache of files, so that it comes from the disk.
Reading all N tokens again is not done but estimated: by the rate at which that turn was read. On a machine that does
other things, too, ratios hold and seconds do not; processor time is given beside the time on the clock.

    python benchmarks/kept.py --data novels.tar.xz --out results
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import sqlalchemy as sql
import torch
import typer

import mnemic
from mnemic import tables as kept_in
from mnemic.analysis.markdown import markdown, missing
from mnemic.bank import Bank
from mnemic.bench.results import Record, records
from mnemic.memories.recall import RecallConfig
from real_model import ids_of, opened, timed

READ = 4096
"""Tokens whose keys are repeated."""
NOISE = 0.02
"""Of the repetitions, as a part of the keys' and values' spread."""


def main(
    data: Annotated[Path | None, typer.Option(help="Text: a folder or a tar archive of .txt files.")] = None,
    model: Annotated[str, typer.Option(help="A causal model: a folder, or smollm2.")] = "smollm2",
    length: Annotated[int, typer.Option(min=1, help="Tokens that are remembered.")] = 100_000,
    turns: Annotated[int, typer.Option(min=1, help="Turns, after each of which it is kept.")] = 5,
    said: Annotated[int, typer.Option(min=1, help="Tokens of a turn.")] = 200,
    stored: Annotated[str, typer.Option(help="How keys are stored: base, int8, fp8.")] = "int8",
    scratch: Annotated[Path | None, typer.Option(help="A folder on the disk to measure; it gets one inside.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the record.")] = Path("runs"),
) -> None:
    """Times all of it and writes a record."""
    if data is None:
        raise typer.BadParameter("give --data, a text")
    host, tokenizer, name = opened(model)
    ids = ids_of(data, tokenizer)
    config = RecallConfig(stored=stored)  # pyright: ignore[reportArgumentType]
    with tempfile.TemporaryDirectory(dir=scratch) as place:
        measures = measured(host, config, ids, length, turns, said, Path(place), READ)
    record = Record("kept", "recall", f"{name}, untrained", 0, {"memory": config.to_dict()})
    record.config |= {"length": length, "turns": turns, "said": said, "repeated": READ, "noise": NOISE, "threads": 1}
    record.measures = measures
    record.command = f"python benchmarks/kept.py --data {data.name} --length {length} --turns {turns} --stored {stored}"
    print(record.save(out, "kept.json"))


@torch.no_grad()
def measured(
    host: Any, config: RecallConfig, ids: torch.Tensor, length: int, turns: int, said: int, place: Path, read: int
) -> dict[str, Any]:
    """Seconds and bytes of the first time and of a turn, for each way to keep a session, and of going on from it."""
    mnemic.attach(host, config)
    first = mnemic.Session(host)
    start = ids[:, : read + (config.window or 0)]
    first.read(start)
    session = filled(first, length, read)
    store = mnemic.SessionStore(place / "store.db")
    ways: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "store": (lambda: store.put("me", session), lambda: store.get("me", host)),
        "folder": (lambda: session.save(f"{place}/me/"), lambda: mnemic.Session.load(f"{place}/me/", host)),
        "file": (lambda: session.save(place / "me.memory"), lambda: mnemic.Session.load(place / "me.memory", host)),
    }
    found: dict[str, Any] = {"bytes of the session": session.nbytes}
    assert session.stream is not None
    assert session.stream.banks[0] is not None
    found["bytes of what left the window"] = session.stream.banks[0].nbytes
    kept: dict[str, dict[str, Any]] = {way: {"times": []} for way in ways}
    for turn in range(turns + 1):
        if turn:
            session.read(ids[:, (turn - 1) * said : turn * said])
        for way, (keep, _) in ways.items():
            before = _pieces(way, store, place)
            its = timed(keep)[0]._asdict()
            written = sum(size for (_, size) in (_pieces(way, store, place) - before))
            kept[way]["times"].append({**its, "bytes": written})
            print(f"{way}, {turn}: {its}, {written:,} bytes", flush=True)
    for way, (_, restore) in ways.items():
        store.close()
        _drop(place)
        its = kept[way]
        spent, again = timed(restore)
        its["restore"] = spent._asdict()
        for name in ("first token", "next token"):
            its[name] = timed(lambda again=again: again.forward(ids[:, -1:]))[0]._asdict()
        its["a turn read"] = timed(lambda again=again: again.read(ids[:, :said]))[0]._asdict()
        its["first"], *later = its["times"]
        its["turn"] = {key: statistics.median(time[key] for time in later) for key in its["first"]}
        its["reading / restoring"] = {
            clock: its["a turn read"][clock] * length / said / (its["restore"][clock] + its["first token"][clock])
            for clock in its["restore"]
        }
        told = {name: its[name] for name in ("turn", "restore", "first token", "reading / restoring")}
        print(f"{way}: {told}", flush=True)
        del again
    store.close()
    return found | {"ways": kept}


def filled(first: mnemic.Session, length: int, read: int) -> mnemic.Session:
    """A session that remembers so many tokens: the first `read` that left the window of another, each time with other
    noise.
    """
    assert first.stream is not None
    known = first.stream.banks[0]
    assert known is not None
    blocks = range(known.chunks[0].tensors["keys"].shape[0])
    both = (known.keys, known.values)
    parts = [torch.stack([torch.cat(part(block), 1) for block in blocks])[:, :, :read] for part in both]
    noise, bank = torch.Generator().manual_seed(0), Bank(stored=known.stored)
    while bank.length < length:
        count = min(read, length - bank.length)
        keys, values = (
            (part + NOISE * part.std() * torch.randn(part.shape, generator=noise))[:, :, :count] for part in parts
        )
        bank = bank.append(keys, values)
    session = first.fork()
    seen = length + first.stream.seen[0] - known.length
    written = -(-seen // first._router.segment_length)
    session._layer.stream = replace(first.stream.with_banks([bank]), seen=(seen,), written=(written,))
    return session


def _pieces(way: str, store: mnemic.SessionStore, place: Path) -> set[tuple[Any, int]]:
    """What is kept, piece by piece: what tells one that was written anew, and its bytes."""
    if way == "store":
        sizes = sql.func.length(kept_in.sessions.c.data)
        with store.transaction() as connection:
            sessions = connection.execute(sql.select(kept_in.sessions.c.version, sizes)).all()
            chunks = connection.execute(sql.select(kept_in.chunks.c.digest, kept_in.chunks.c.nbytes)).all()
        return {(each, size) for each, size in (*sessions, *chunks)}
    files = (place / "me").glob("*") if way == "folder" else place.glob("me.memory")
    found = [(path.name, path.stat()) for path in files]
    return {((name, stat.st_ino, stat.st_mtime_ns), stat.st_size) for name, stat in found if name != ".lock"}


def _drop(place: Path) -> None:
    """Drops files from the system's cache, where it can be asked to."""
    for path in place.rglob("*"):
        if path.is_file() and hasattr(os, "posix_fadvise"):
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def table(found: Sequence[Record]) -> str:
    """What a session that carries much costs to keep, the first time and after a turn, and to go on from."""
    if not found:
        return missing("sessions that carry much")
    m, config, rows = found[0].measures, found[0].config, []

    def seconds(times: dict[str, float], form: str = ".2f") -> str:
        return f"{times['processor']:{form}} ({times['clock']:{form}})"

    for way, its in m["ways"].items():
        cells = [cell for when in ("first", "turn") for cell in (seconds(its[when]), f"{its[when]['bytes']:,.0f}")]
        cells += [seconds(its[name]) for name in ("restore", "first token", "next token")]
        rows.append([way, *cells, seconds(its["reading / restoring"], ",.0f")])
    header = ["kept in a", "first, s", "bytes", "after a turn, s", "bytes", "restore, s", "first token, s"]
    note = f"{config['length']:,} tokens that left the window, {m['bytes of what left the window']:,} bytes "
    note += f'(`stored="{config["memory"]["stored"]}"`), and a window of {config["memory"]["window"]:,}; '
    note += f"{found[0].host}, float32, {config['threads']} thread; processor time, in brackets by the clock; "
    note += f"medians of {config['turns']} turns of {config['said']} tokens. Restored from the "
    note += (
        "disk, not from the system's cache. The last column is what it would take to read all of it again, at the rate "
    )
    note += "at which the restored session reads a turn, by what it takes to restore and to say one token. Made by "
    return f"{markdown([*header, 'next token, s', 'reading / restoring'], rows)}\n\n{note}`{found[0].command}`."


def tables(results: Path) -> dict[str, str]:
    """The table of the page, by name."""
    return {"kept": table(records(results, "kept"))}


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    typer.run(main)
