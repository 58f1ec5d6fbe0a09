"""The tables of a store: sessions, chunks by what they hold, and which session holds which chunk.

A session's row has its head (`mnemic.chunks`); in format 1, which knew no chunks, all of the session, which is a head
too. A chunk is there once, however many sessions, forks and versions hold it, and goes with the last one.

In SQLite writers wait for each other. In PostgreSQL whoever begins or ends to hold a chunk that is there locks it
first, so nobody removes what another is about to hold. If a chunk comes or goes between two steps, the foreign key
refuses the second, and the transaction is tried again.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sql

from mnemic.chunks import Units

FORMAT = 2
SECOND = 1_000_000
"""Times are stored in microseconds."""
AT_ONCE = 500
"""Chunks that a statement names."""

metadata = sql.MetaData()
store = sql.Table(
    "mnemic_store",
    metadata,
    sql.Column("format", sql.Integer, primary_key=True, autoincrement=False),
    sql.Column("id", sql.String(32), nullable=False),
)
sessions = sql.Table(
    "mnemic_sessions",
    metadata,
    sql.Column("name", sql.Text, primary_key=True),
    sql.Column("birth", sql.BigInteger, nullable=False),
    sql.Column("version", sql.BigInteger, nullable=False),
    sql.Column("memory", sql.Text, nullable=False),
    sql.Column("memory_fingerprint", sql.Text, nullable=False),
    sql.Column("base_model", sql.Text),
    sql.Column("base_fingerprint", sql.Text, nullable=False),
    sql.Column("nbytes", sql.BigInteger, nullable=False),
    sql.Column("created", sql.BigInteger, nullable=False),
    sql.Column("updated", sql.BigInteger, nullable=False),
    sql.Column("expires", sql.BigInteger, index=True),
    sql.Column("data", sql.LargeBinary, nullable=False),  # last: SQLite reads a row up to the column it needs
)
chunks = sql.Table(
    "mnemic_chunks",
    metadata,
    sql.Column("digest", sql.String(64), primary_key=True),
    sql.Column("nbytes", sql.BigInteger, nullable=False),
    sql.Column("data", sql.LargeBinary, nullable=False),
)
held = sql.Table(
    "mnemic_held",
    metadata,
    sql.Column("name", sql.Text, primary_key=True),
    sql.Column("digest", sql.String(64), sql.ForeignKey(chunks.c.digest), primary_key=True, index=True),
)

_OWN = sql.func.length(sessions.c.data).label("own")
_NAMED = held.c.name == sql.bindparam("named")
_SOME = sql.bindparam("digests", expanding=True)
_HELD = sql.select(held.c.digest).where(_NAMED)
_LOCK = sql.select(chunks.c.digest).where(chunks.c.digest.in_(_SOME)).order_by(chunks.c.digest).with_for_update()
_LEAVE = sql.delete(held).where(_NAMED, held.c.digest.in_(_SOME))
_REMOVE = (
    sql.delete(chunks)
    .where(chunks.c.digest.in_(_SOME), ~sql.exists().where(held.c.digest == chunks.c.digest))
    .returning(chunks.c.nbytes)
)
_THERE = sql.select(chunks.c.digest).where(chunks.c.digest.in_(_SOME))
_DATA = sql.select(chunks.c.data).where(chunks.c.digest == sql.bindparam("digest"))
_TOTAL = [sql.select(sql.func.sum(column)) for column in (sql.func.length(sessions.c.data), chunks.c.nbytes)]


@dataclass(frozen=True)
class Entry:
    """What a store knows of a session without loading it. Times are in UTC; `expires` is None for never.

    `nbytes` are those of its row and of its chunks, which others may hold too; `memory` is the kind of mechanism. Of a
    session that was removed, `freed` are the bytes that went with it: its row's, and those of chunks that it was the
    last to hold.
    """

    name: str
    version: int
    nbytes: int
    memory: str
    memory_fingerprint: str
    base_model: str | None
    base_fingerprint: str
    created: datetime
    updated: datetime
    expires: datetime | None
    freed: int = 0

    @staticmethod
    def of(row: sql.Row[Any], freed: int = 0) -> Entry:
        """What a row of `SHOWN` says."""
        values = {column.name: row._mapping[column] for column in SHOWN}
        for name in ("created", "updated", "expires"):
            if values[name] is not None:
                values[name] = datetime.fromtimestamp(values[name] / SECOND, UTC)
        return Entry(**values, freed=freed)


SHOWN = [sessions.c[field.name] for field in fields(Entry) if field.name != "freed"]


def prepare(connection: sql.Connection, identity: str) -> None:
    """Makes the tables that are not there, those of a store of format 1 too. Nobody else may do so at that time."""
    metadata.create_all(connection)
    if connection.execute(sql.select(store)).first() is None:
        connection.execute(sql.insert(store).values(format=FORMAT, id=identity))
    connection.execute(sql.update(store).where(store.c.format == 1).values(format=FORMAT))


def hold(connection: sql.Connection, name: str, units: Units | None) -> int:
    """Makes a session hold exactly these chunks, of which those that are not there are put there; returns the bytes of
    chunks that nobody holds any more, which are removed.
    """
    places = {unit.digest: place for place, unit in enumerate(units.known)} if units is not None else {}
    before = set(connection.execute(_HELD, {"named": name}).scalars())
    new, gone = sorted(places.keys() - before), sorted(before - places.keys())
    there = {digest for some in _some(sorted([*new, *gone])) for digest in connection.execute(_LOCK, some).scalars()}
    for digest in new:
        assert units is not None
        if digest not in there:
            data = units.data(places[digest])
            connection.execute(sql.insert(chunks), {"digest": digest, "nbytes": len(data), "data": data})
    if new:
        connection.execute(sql.insert(held), [{"name": name, "digest": digest} for digest in new])
    for some in _some(gone):
        connection.execute(_LEAVE, {"named": name, **some})
    return sum(sum(connection.execute(_REMOVE, some).scalars()) for some in _some(gone))


def remove(connection: sql.Connection, which: sql.ColumnElement[bool], **values: Any) -> list[Entry]:
    """Removes some sessions, and the chunks that nobody holds then; returns what was removed, by name."""
    rows = connection.execute(sql.delete(sessions).where(which).returning(*SHOWN, _OWN), values).all()
    return [Entry.of(row, row.own + hold(connection, row.name, None)) for row in sorted(rows, key=lambda row: row.name)]


def lacking(connection: sql.Connection, digests: Sequence[str]) -> list[str]:
    """Those of some chunks that are not there."""
    there = {digest for some in _some(digests) for digest in connection.execute(_THERE, some).scalars()}
    return [digest for digest in digests if digest not in there]


def data_of(connection: sql.Connection, digests: Sequence[str]) -> Generator[bytes | None]:
    """The bytes of chunks, one after another; None for one that is not there."""
    for digest in digests:
        data = connection.execute(_DATA, {"digest": digest}).scalar()
        yield None if data is None else bytes(data)


def total(connection: sql.Connection) -> int:
    """Bytes of all sessions and chunks."""
    return sum(int(connection.execute(each).scalar() or 0) for each in _TOTAL)


def _some(digests: Sequence[str]) -> Iterator[dict[str, Collection[str]]]:
    for first in range(0, len(digests), AT_ONCE):
        yield {"digests": digests[first : first + AT_ONCE]}
