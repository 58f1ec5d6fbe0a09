"""Tables of what stores and files were put through."""

from __future__ import annotations

from collections.abc import Sequence

from mnemic.analysis.markdown import markdown, missing
from mnemic.bench.results import Record


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


def kept(found: Sequence[Record]) -> str:
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


def mutated(found: Sequence[Record]) -> str:
    """Wrong files by how they came to be wrong."""
    if not found:
        return missing("wrong files")
    m = found[0].measures
    sorts = sorted({label.split(", ")[1] for label in m["refused"]})
    rows = [
        [sort, *(f"{m['refused'].get(f'{which}, {sort}', 0):,}" for which in ("session", "adapter"))] for sort in sorts
    ]
    note = (
        f"{m['sum']:,} of {m['files']:,} refused with a `StateError`, {len(m['loaded'])} loaded, {len(m['crashed'])} "
        f"crashed, {len(m['changed'])} changed anything. Made by `{found[0].command}`."
    )
    return markdown(["wrong by", "sessions refused", "adapters refused"], rows) + "\n\n" + note
