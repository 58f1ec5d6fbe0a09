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
