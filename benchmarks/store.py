"""Stores and folders under kills and crowds, and what keeping a session costs.

Children come from a server that has imported everything once and started nothing else, so they start fast, and what is
killed is a process like any other.

    python benchmarks/store.py --kills 200 --out results
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import sqlalchemy as sql
import torch
import typer

from mnemic import folders
from mnemic import tables as kept_in
from mnemic.analysis.markdown import markdown, missing
from mnemic.attachment import attach
from mnemic.bank import LEAST
from mnemic.bench.results import Record, records
from mnemic.checks import check_kept
from mnemic.chunks import cut_file, joined
from mnemic.cli.show import Show, console
from mnemic.memories.emt import EMTConfig
from mnemic.session import Session, Stored
from mnemic.state import State, from_bytes, to_bytes
from mnemic.store import Conflict, SessionStore
from scripts import Out, launch, saved, today
from timing import gpt2_small

SLOTS, DIM = 64, 256
"""The shape of what is stored."""
LOADED = ("mnemic.session", "mnemic.store", "mnemic.memories.emt", "mnemic.bench.results", "mnemic.cli.show", "typer")
"""What children of a server have: what its environment finds, for in Python 3.11 it does not know where scripts lie."""
Progress = Callable[[int], None]


def quiet(_: int) -> None:
    """No progress shown."""


def children() -> Any:
    """Where processes come from that have mnemic imported and hold nothing of this one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", *LOADED, "transformers.models.gpt2.modeling_gpt2"])
    return context


# --- sessions that can be told apart without a model ------------------------------------------------------------------


def tally(counts: Sequence[int]) -> bytes:
    """A session's bytes that carry some numbers, in every slot, and in what left its window."""
    return to_bytes(*_contents(counts))


def _contents(counts: Sequence[int]) -> tuple[State, dict[str, Any]]:
    meta = {"content": "session", "window": None, "memory": EMTConfig().to_dict(), "base_model": None}
    meta |= {"memory_fingerprint": "", "base_fingerprint": "", "stream": {"counts": [0], "written": [1], "seen": [1]}}
    tensors = {"state.counts": torch.tensor([list(counts)]), "state.slots": _slots(counts)}
    return tensors | _bank(counts) | {"waiting": torch.zeros(1, 0, DIM)}, meta


def _slots(counts: Sequence[int]) -> torch.Tensor:
    return torch.tensor(counts, dtype=torch.float32).repeat(SLOTS, DIM // len(counts) + 1)[None, :, :DIM].contiguous()


def _bank(counts: Sequence[int]) -> State:
    """Of each version other chunks: some that all have had before, one of these numbers, and a few tokens behind."""
    units = [*range(counts[0] % 5), sum(counts)]
    numbers = torch.tensor([*units, counts[-1]], dtype=torch.float32).repeat_interleave(LEAST)
    numbers[(there := LEAST * len(units) + 7) :] = 0
    keys = numbers[None, None, None, :, None].repeat(1, 1, 1, 1, 4)
    return {"bank.keys": keys, "bank.values": -keys, "bank.positions": torch.arange(there)[None]}


def counts_of(data: bytes) -> list[int]:
    """The numbers of `tally`; raises `StateError` or `ValueError` if they are not those everywhere."""
    return _counts(from_bytes(data)[0])


def _counts(tensors: State) -> list[int]:
    counts = tensors["state.counts"][0].tolist()
    expected = _bank(counts) | {"state.slots": _slots(counts)}
    if not all(torch.equal(tensors[name], tensor) for name, tensor in expected.items()):
        raise ValueError("a session is half of one version and half of another")
    return counts


# --- killed while it writes -------------------------------------------------------------------------------------------


@dataclass
class Kills:
    """What came of killing writers: versions acknowledged that were not there afterwards, sessions that were half one
    version and half another (or lacked a chunk), and kills after a write was done but before the writer could say so.
    `left` are chunks that nobody held in the end.
    """

    kills: int = 0
    lost: int = 0
    half_written: int = 0
    unacknowledged: int = 0
    versions: int = 0
    left: int = 0


def kill_while_putting(url: str, kills: int, seed: int = 0, progress: Progress = quiet) -> Kills:
    """Kills (SIGKILL) a process that puts versions of one session without pause, at a random moment, again and again.

    The writer tells every version that `put` returned; after the kill that one, or the next, must be there, whole.
    """
    with SessionStore(url) as store:
        store.put_bytes("killed", tally([1]), overwrite=True)

    def there() -> tuple[int, int]:
        with SessionStore(url) as store:
            data, stored = store.get_bytes("killed")
        return stored.version, counts_of(data)[0]

    found = _killed(_write_on, url, there, kills, 0.03, seed, progress)
    with SessionStore(url) as store:
        store.delete("killed")
        with store.transaction() as connection:
            orphans = ~kept_in.chunks.c.digest.in_(sql.select(kept_in.held.c.digest))
            found.left = len(connection.execute(sql.select(kept_in.chunks.c.digest).where(orphans)).all())
    return found


def kill_while_saving(folder: str, kills: int, seed: int = 0, progress: Progress = quiet) -> Kills:
    """`kill_while_putting` for versions that are saved into a folder."""
    _save(folder, 1)

    def there() -> tuple[int, int]:
        tensors, meta, chunks = folders.read(folder)
        (count,) = _counts(from_bytes(to_bytes(joined(tensors, chunks), meta))[0])
        return count, count

    found = _killed(_save_on, folder, there, kills, 0.1, seed, progress)
    _save(folder, found.versions + 1)
    named = {Path(str(each.unread.source)).name for each in folders.read(folder)[2]}
    found.left = len({path.name for path in Path(folder).iterdir()} - named - {folders.HEAD, folders.LOCK})
    return found


def _save(folder: str, version: int) -> None:
    tensors, meta = _contents([version])
    head, units = cut_file(tensors, check_kept)
    folders.save(folder, head, meta, units)


def _save_on(folder: str, tell: Connection) -> None:
    tensors, _, chunks = folders.read(folder)
    (version,) = _counts(joined(tensors, chunks))
    while True:
        version += 1
        _save(folder, version)
        tell.send(version)


def _killed(
    write: Callable[[str, Connection], None],
    where: str,
    there: Callable[[], tuple[int, int]],
    kills: int,
    within: float,
    seed: int,
    progress: Progress,
) -> Kills:
    """Kills those who `write`, up to `within` seconds after a version; `there` gives the one that is there, and what it
    holds.
    """
    found, source, context = Kills(), random.Random(seed), children()
    for _ in range(kills):
        mine, theirs = context.Pipe(duplex=False)
        writer = context.Process(target=write, args=(where, theirs), daemon=True)
        writer.start()
        theirs.close()
        told = mine.recv()
        time.sleep(source.uniform(0, within))
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        told = _last(mine, told)
        found.kills += 1
        try:
            version, held = there()
            found.half_written += held != version
            found.lost += version < told
            found.unacknowledged += version > told
            found.versions = version
        except ValueError:
            found.half_written += 1
        except LookupError:
            found.lost += 1
        progress(1)
    return found


def _write_on(url: str, tell: Connection) -> None:
    store = SessionStore(url)
    stored = store.get_bytes("killed")[1]
    while True:
        try:
            stored = store.put_bytes("killed", tally([stored.version + 1]), stored)
        except Conflict:
            # a server may still finish what a killed writer had asked of it
            stored = store.get_bytes("killed")[1]
            continue
        tell.send(stored.version)


def _last(told: Connection, last: int) -> int:
    """The last number that came through a pipe whose other end is gone."""
    try:
        while True:
            last = told.recv()
    except (EOFError, OSError):
        return last


# --- many writers -----------------------------------------------------------------------------------------------------


@dataclass
class Crowd:
    """What came of many writers. `accepted` updates are in the shared session and `refused` ones got a `Conflict`;
    `missing` are accepted ones that are not there, `wrong` what a writer read of its own session and had not put.
    """

    writers: int
    rounds: int
    accepted: int
    refused: int
    missing: int
    wrong: int
    seconds: float


def crowd(url: str, writers: int, rounds: int, progress: Progress = quiet) -> Crowd:
    """`writers` processes put and get `rounds` times: each a session of its own, and all of them one together."""
    context = children()
    with SessionStore(url) as store:
        names = ["shared", *(f"writer {number}" for number in range(writers))]
        for name in names:
            store.put_bytes(name, tally([0] * writers), overwrite=True)
        ends, begun = [], time.perf_counter()
        for number in range(writers):
            mine, theirs = context.Pipe(duplex=False)
            context.Process(target=_crowded, args=(url, number, rounds, theirs), daemon=True).start()
            theirs.close()
            ends.append(mine)
        accepted, refused, wrong = [0] * writers, 0, 0
        for number, end in enumerate(ends):
            accepted[number], more, bad = end.recv()
            refused, wrong = refused + more, wrong + bad
            progress(rounds)
        seconds = time.perf_counter() - begun
        data, stored = store.get_bytes("shared")
        missing = sum(abs(had - there) for had, there in zip(accepted, counts_of(data), strict=True))
        missing += abs(sum(accepted) - (stored.version - 1))
        for name in names:
            store.delete(name)
    return Crowd(writers, rounds, sum(accepted), refused, missing, wrong, seconds)


def _crowded(url: str, number: int, rounds: int, tell: Connection) -> None:
    accepted = refused = wrong = 0
    own = f"writer {number}"
    with SessionStore(url) as store:
        mine: Stored = store.get_bytes(own)[1]
        for turn in range(1, rounds + 1):
            mine = store.put_bytes(own, tally([turn] * 8), mine)
            data, stored = store.get_bytes(own)
            wrong += counts_of(data) != [turn] * 8 or stored != mine
            data, stored = store.get_bytes("shared")
            counts = counts_of(data)
            counts[number] += 1
            try:
                store.put_bytes("shared", tally(counts), stored)
                accepted += 1
            except Conflict:
                refused += 1
    tell.send((accepted, refused, wrong))


# --- what it costs ----------------------------------------------------------------------------------------------------


def thousand(url: str, sessions: int, seed: int = 0, progress: Progress = quiet) -> dict[str, Any]:
    """Load and save of every session of a model with the shape of GPT-2 small, in random order, in milliseconds.

    Each has read one segment of its own. Reading is not timed: that is the model's time.
    """
    torch.manual_seed(seed)
    config = EMTConfig(slots=SLOTS, dim=DIM, segment_length=16)
    model = gpt2_small()
    attach(model, config)
    session = Session(model, window=config.segment_length)
    with SessionStore(url) as store:
        for number in range(sessions):
            session = Session(model, window=config.segment_length)
            session.read(torch.randint(0, model.config.vocab_size, (1, config.segment_length)))
            store.put(f"user {number}", session, overwrite=True)
            progress(1)
        order = list(range(sessions))
        random.Random(seed).shuffle(order)
        loads, saves = [], []
        for number in order:
            begun = time.perf_counter()
            session = store.get(f"user {number}", model)
            loaded = time.perf_counter()
            store.put(f"user {number}", session)
            saves.append(time.perf_counter() - loaded)
            loads.append(loaded - begun)
            progress(1)
        entries = [entry for entry in store.list() if entry.name.startswith("user ")]
        state = session.stream.state if session.stream is not None else {}
    return {
        "sessions": sessions,
        "config": config.to_dict(),
        "load ms": spread(loads),
        "save ms": spread(saves),
        "load and save ms": spread([load + save for load, save in zip(loads, saves, strict=True)]),
        "bytes of the state": sum(tensor.numel() * tensor.element_size() for tensor in state.values()),
        "bytes of a session": statistics.median(entry.nbytes for entry in entries),
    }


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median, ninety-fifth percentile and most, in milliseconds."""
    ordered = sorted(1000 * value for value in seconds)
    return {"median": statistics.median(ordered), "p95": ordered[int(0.95 * len(ordered))], "most": ordered[-1]}


def file_bytes(url: str) -> int:
    """Bytes of SQLite's file and its log."""
    path = Path(url.removeprefix("sqlite:///"))
    return sum(part.stat().st_size for part in path.parent.glob(f"{path.name}*"))


def record(measures: dict[str, Any], seed: int, seconds: dict[str, float]) -> Record:
    """The result file's contents."""
    host = "GPT-2 small shape, random weights, float32"
    cost = measures["cost"]
    return Record(
        task="store",
        mechanism="emt",
        host=host,
        seed=seed,
        config=cost["config"],
        measures=measures,
        state_bytes=cost["bytes of the state"],
        seconds=seconds,
    )


# --- tables -----------------------------------------------------------------------------------------------------------


def cost(found: Sequence[Record]) -> str:
    """Milliseconds to load and save a session, and its bytes."""
    if not found:
        return missing("the store")
    m = found[0].measures["cost"]
    rows = [
        [name.removesuffix(" ms"), *(f"{m[name][which]:.2f}" for which in ("median", "p95"))]
        for name in ("load ms", "save ms", "load and save ms")
    ]
    note = (
        f"{m['sessions']:,} sessions of a memory of {m['config']['slots']} slots of {m['config']['dim']} in SQLite; "
        f"host: {found[0].host}. The memory's state has {m['bytes of the state']:,} bytes, a session's file "
        f"{m['bytes of a session']:,.0f}, the database {m['bytes of the database'] / m['sessions']:,.0f} for each. "
        f"Made by `{found[0].command}` on {found[0].machine['cores']} {found[0].machine['processor']} cores."
    )
    return markdown(["", "median, ms", "95 % within, ms"], rows) + "\n\n" + note


def crowds(found: Sequence[Record]) -> str:
    """What came of kills and of many writers, for each database, and of kills for a folder."""
    if not found:
        return missing("the store")
    m, header, rows = found[0].measures, ["where", "kills", "lost", "half written", "chunks left"], []
    header += ["writers x rounds", "updates", "refused", "missing", "read wrong", "puts a second"]
    for name in ("SQLite", "PostgreSQL", "a folder"):
        if f"kills, {name}" not in m:
            continue
        kills, crowd = m[f"kills, {name}"], m.get(f"crowd, {name}")
        told = [kills["kills"], kills["lost"], kills["half_written"], kills["left"]]
        if crowd is not None:
            puts = (crowd["writers"] * crowd["rounds"] + crowd["accepted"]) / crowd["seconds"]
            told += [f"{crowd['writers']} x {crowd['rounds']}", crowd["accepted"], crowd["refused"]]
            told += [crowd["missing"], crowd["wrong"], f"{puts:,.0f}"]
        rows.append([name, *map(str, told), *["-"] * (len(header) - 1 - len(told))])
    return markdown(header, rows) + f"\n\nMade by `{found[0].command}`."


def tables(results: Path) -> dict[str, str]:
    """The tables of the page, by name."""
    found = today(records(results, "store"), "bench store", "store.py")
    return {"store-cost": cost(found), "store-crowds": crowds(found)}


# --- the command ------------------------------------------------------------------------------------------------------

app = typer.Typer(add_completion=False)


@app.command()
def main(
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

        measures["cost"] = timed("load and save", 2 * sessions, thousand, url, sessions)
        measures["cost"]["bytes of the database"] = file_bytes(url)
        for name, where in {"SQLite": url, "PostgreSQL": postgres}.items():
            if where is not None:
                found = timed(f"kills, {name}", kills, kill_while_putting, where, kills)
                measures[f"kills, {name}"] = asdict(found)
                found = timed(f"crowd, {name}", writers * rounds, crowd, where, writers, rounds)
                measures[f"crowd, {name}"] = asdict(found)
        found = timed("kills, a folder", kills, kill_while_saving, f"{folder}/saved", kills)
        measures["kills, a folder"] = asdict(found)
    for name, found in measures.items():
        console.print(f"{name}: {found}", highlight=False, soft_wrap=True)
    made = record(measures, 0, seconds)
    # without the server's address
    made.command = (
        f"python benchmarks/store.py --kills {kills} --writers {writers} --rounds {rounds} --sessions {sessions}"
    )
    saved(made, out, "store.json")


if __name__ == "__main__":
    launch(app)
