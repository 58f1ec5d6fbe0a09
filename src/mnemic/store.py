"""Sessions by name in a database: SQLite in one file, or PostgreSQL where many workers share them.

A session is a row with its head and what a list shows, and holds chunks of what left its window, each of which is there
once (`mnemic.tables`), and which are read when they are used. Every write is one transaction, and says which version it
replaces: of two writers that read the same, the second gets a `Conflict`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, Self, TypeVar

import sqlalchemy as sql
from sqlalchemy.exc import DBAPIError, IntegrityError
from torch import nn

from mnemic import folders, tables
from mnemic.checks import check_bytes, check_kept
from mnemic.chunks import Lying, Units, Unread, cut_file, joined, read_unit, take_units
from mnemic.connections import Connections
from mnemic.databases import StoreError, engine_of, prepare_file, url_of
from mnemic.keeping import restored
from mnemic.session import Session, Stored
from mnemic.state import State, StateError, from_bytes, to_bytes, write_bytes
from mnemic.tables import SECOND, SHOWN, Entry

LONGEST_NAME = 512
"""Most characters of a name."""
ATTEMPTS = 20
"""How often a session is put or removed, if others do so with it, or with its chunks, at the same time."""
AGAIN = ("40001", "40P01")
"""What PostgreSQL calls transactions that it ended for another's sake: to be tried again."""
LONGEST_TTL = 100 * 365 * 24 * 3600
"""A hundred years, in seconds."""
LOCK = 6024313
"""PostgreSQL's advisory lock of whoever makes tables; that of whoever looks at the total is the next."""

# statements are made once: to make one takes longer than to run it
_NAMED = tables.sessions.c.name == sql.bindparam("named")
_ALIVE = sql.or_(tables.sessions.c.expires.is_(None), tables.sessions.c.expires > sql.bindparam("now"))
_STANDING = sql.select(tables.sessions.c.birth, tables.sessions.c.version).where(_NAMED, _ALIVE)
_READ = _STANDING.add_columns(tables.sessions.c.data)
_REPLACE = sql.update(tables.sessions).where(
    _NAMED,
    _ALIVE,
    tables.sessions.c.birth == sql.bindparam("born"),
    tables.sessions.c.version == sql.bindparam("replaced"),
)


class NoRoom(StoreError):
    """A session that would have more bytes than a store takes, or the store with it."""


class NotStored(StoreError, LookupError):
    """There is no session of that name, or it has expired."""


class Conflict(StoreError):
    """Somebody else has written, deleted or made a session of that name since this one was loaded.

    `name`; `expected`, the version this one came from; `found`, the one that is there (0 for none, both times).
    """

    def __init__(self, name: str, expected: int, found: int, again: bool = False) -> None:
        self.name, self.expected, self.found = name, expected, found
        mine = f"this one was loaded from version {expected}" if expected else "this one was never in the store"
        theirs = f"the store has version {found}" if found else "the store has none: it was deleted or has expired"
        if again:
            theirs += " of a new one, made after it was deleted or had expired"
        super().__init__(
            f"session {name!r}: {mine}, {theirs}; nothing was written. get() it again and repeat what was read, or "
            "put(..., overwrite=True) if this one is to replace whatever is there"
        )


Entries = list[Entry]
Result = TypeVar("Result")


class SessionStore:
    """Sessions by name, in any database that `url` names: a path, which is that of SQLite's file (`memories.db` is
    `sqlite:///memories.db`), or `postgresql+psycopg://...`.

    One store may be used from several threads, and goes on working in processes that are forked from this one; a fork
    waits for the transactions of other threads. With SQLite a process killed at any moment leaves each session in its
    old or its new version; so does a loss of power, but the latest versions may then be lost. `ttl` is how many seconds
    sessions live after their last `put`, for ever by default. One with more than `size_limit` bytes, its chunks
    counted, is refused, and one with which all that is there, each chunk counted once, would have more than
    `total_limit`; by default there are no limits but the database's. With `create=False` a SQLite file must be there.

    A store of an earlier release is brought up when it is opened, and earlier releases do not open it any more.

    Raises:
        ValueError: another kind of database, or SQLite without a file.
        StoreError: a database that cannot be reached or was written by another version of mnemic.
    """

    def __init__(
        self,
        url: str | os.PathLike[str] = "memories.db",
        *,
        ttl: float | None = None,
        size_limit: int | None = None,
        total_limit: int | None = None,
        create: bool = True,
    ) -> None:
        self._url = url_of(url)
        self.url = self._url.render_as_string(hide_password=True)
        self.ttl, self.size_limit, self.total_limit = _ttl(ttl), size_limit, total_limit
        self._sqlite = self._url.get_backend_name() == "sqlite"
        if self._sqlite:
            prepare_file(self._url.database, create)
            # the same file wherever the process goes
            self._url = self._url.set(database=os.path.abspath(self._url.database or ""))
        elif self._url.drivername != "postgresql+psycopg":
            raise ValueError(
                f"{self.url} names {self._url.drivername}; use sqlite:///file.db or postgresql+psycopg://..."
            )
        self._connections = Connections(functools.partial(engine_of, self._url))
        self._id = self._open()

    # --- sessions ----------------------------------------------------------------------------------------------------

    def get(self, name: str, model: nn.Module, tokenizer: Any = None, *, strict: bool = True) -> Session:
        """The session of that name. It knows its version, and `put` replaces that version alone.

        Chunks of what left the window stay in the store. They are read when they are used, and all of them are checked
        then: what uses one that was cut or changed raises `StateError`, which names it, as does what uses one that was
        deleted meanwhile, with the session or with that version of it; where the database cannot be reached any more it
        raises `StoreError`. What was read once stays with the session.

        Raises:
            NotStored: there is none.
            StateError: one of another base model or memory, or damaged, or a chunk of it is missing; see
                `Session.load`.
        """
        _, stored, tensors, meta, chunks = self._read(name)
        session = restored(Session, tensors, meta, chunks, self._source(name), model, tokenizer, strict)
        session.stored = stored
        return session

    def put(self, name: str, session: Session, *, ttl: float | None = None, overwrite: bool = False) -> int:
        """Keeps a session under that name, and returns its new version. `ttl` in seconds instead of the store's. What
        left the window and is in the store already, under this name or another, is not written again.

        A session that came from `get`, or was `put` before, replaces the version that it was then; any other must find
        the name free. With `overwrite` it replaces whatever is there.

        Raises:
            Conflict: another version is there. Nothing was written; the session in hand is as it was.
            StateError: a session that `get` would refuse, such as one whose state is not finite.
            StoreError: more bytes than `size_limit` or `total_limit` (`NoRoom`), or a database that cannot be reached.
            ValueError: a name that is empty, too long, or no text that can be stored.
        """
        with session.lock.use():  # of two threads that put it, the second would find the first one's version
            tensors, meta, units = session.parted()
            data = to_bytes(tensors | units.listed(), meta)
            session.stored = self._write(name, data, meta, units, session.stored, ttl, overwrite)
            return session.stored.version

    def delete(self, name: str) -> Entry:
        """Removes a session, expired or not, with the chunks that nobody else holds, and returns what was removed;
        raises `NotStored` if there is none.
        """
        _check_name(name)
        removed = self._tried(
            f"session {name!r} cannot be removed from", lambda it: tables.remove(it, _NAMED, named=name)
        )
        if not removed:
            raise NotStored(f"there is no session {name!r} in {self.url}")
        self._empty_log()
        return removed[0]

    def list(self) -> Entries:
        """Every session that has not expired, by name."""
        with self.transaction() as connection:
            rows = connection.execute(sql.select(*SHOWN).where(_ALIVE), {"now": _now()}).all()
        return sorted(map(Entry.of, rows), key=lambda entry: entry.name)

    def entry(self, name: str) -> Entry:
        """What the store knows of one session; raises `NotStored`."""
        _check_name(name)
        with self.transaction() as connection:
            row = connection.execute(sql.select(*SHOWN).where(_NAMED, _ALIVE), {"named": name, "now": _now()}).first()
        if row is None:
            raise NotStored(f"there is no session {name!r} in {self.url}")
        return Entry.of(row)

    def stored(self, name: str) -> Stored | None:
        """Which version of a session is there now, None for none: a session in hand that has it is the newest."""
        _check_name(name)
        with self.transaction() as connection:
            row = connection.execute(_STANDING, {"named": name, "now": _now()}).first()
        return None if row is None else Stored(self._id, name, row.birth, row.version)

    def export(self, name: str, path: str | os.PathLike[str]) -> None:
        """Writes a session as `Session.save` would, as a file or as a folder; raises `NotStored`."""
        data, _, tensors, meta, chunks = self._read(name, whole=True)
        if folders.is_folder(path):
            folders.save(path, tensors, meta, Units.of(chunks))
        else:
            write_bytes(path, to_bytes(joined(tensors, chunks), meta) if chunks else data)

    def purge(self) -> Entries:
        """Removes every session that has expired, as `delete` does, and returns what was removed."""
        removed = self._tried(
            "sessions cannot be removed from", lambda connection: tables.remove(connection, ~_ALIVE, now=_now())
        )
        if removed:
            self._empty_log()
        return removed

    # --- their bytes -------------------------------------------------------------------------------------------------

    def get_bytes(self, name: str) -> tuple[bytes, Stored]:
        """What `Session.from_bytes` takes, and where it stands; raises `NotStored`, and `StateError` if damaged."""
        data, stored, tensors, meta, chunks = self._read(name, whole=True)
        return to_bytes(joined(tensors, chunks), meta) if chunks else data, stored

    def _read(self, name: str, *, whole: bool = False) -> tuple[bytes, Stored, State, dict[str, Any], list[Lying]]:
        """A head's bytes, where the session stands, the head, and what lies beside it: all of one version, of which the
        `whole` is read now, or the chunks when they are used.
        """
        _check_name(name)
        with self.transaction() as connection:
            # or another's write between two statements is seen by the second
            snapshot = "BEGIN" if self._sqlite else "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"
            connection.exec_driver_sql(snapshot)
            row = connection.execute(_READ, {"named": name, "now": _now()}).first()
            if row is None:
                raise NotStored(f"there is no session {name!r} in {self.url}")
            tensors, meta = from_bytes(data := bytes(row.data), source := self._source(name))
            units = take_units(tensors, source)
            if lost := tables.lacking(connection, [unit.digest for unit in units]):
                raise StateError(f"{source} lacks its chunk {lost[0]}; restore it from a copy")
            chunks, fetch = [], functools.partial(tables.data_of, connection)
            if units:
                first = next(fetch([units[0].digest]))
                assert first is not None  # in one snapshot
                like = read_unit(first, units[0], source)
                chunks = Unread.of(units, like, fetch if whole else self._fetch, source)
            for each in chunks if whole else ():
                each.check_all()
        return data, Stored(self._id, name, row.birth, row.version), tensors, meta, chunks

    def _fetch(self, digests: Sequence[str]) -> Generator[bytes | None]:
        """The bytes of chunks, in a transaction of their own."""
        with self.transaction() as connection:
            yield from tables.data_of(connection, digests)

    def _source(self, name: str) -> str:
        """How errors name it."""
        return f"session {name!r} of {self.url}"

    def put_bytes(
        self,
        name: str,
        data: bytes,
        stored: Stored | None = None,
        *,
        ttl: float | None = None,
        overwrite: bool = False,
    ) -> Stored:
        """`put` for bytes of `Session.to_bytes` or of a file that `Session.save` wrote: no model is needed.

        `stored` is the version to replace, as `get_bytes` and this method give it. Raises `StateError` for bytes that
        are no session, or that no model could take.
        """
        tensors, meta = from_bytes(data, source := f"what is to be session {name!r}")
        check_bytes(tensors, meta, source)
        head, units = cut_file(tensors, check_kept)
        data = to_bytes(head | units.listed(), meta) if units.known else data
        return self._write(name, data, meta, units, stored, ttl, overwrite)

    def _write(
        self,
        name: str,
        data: bytes,
        meta: dict[str, Any],
        units: Units,
        stored: Stored | None,
        ttl: float | None,
        overwrite: bool,
    ) -> Stored:
        _check_name(name)
        size = len(data) + sum(units.size(place, place + 1) for place in range(len(units.known)))
        if self.size_limit is not None and size > self.size_limit:
            raise NoRoom(
                f"session {name!r} has {size:,} bytes, this store takes {self.size_limit:,}; flush() it, give it "
                "a shorter window=, or set size_limit="
            )
        now, ttl = _now(), self.ttl if ttl is None else _ttl(ttl)
        shown = {key: meta[key] for key in ("memory_fingerprint", "base_model", "base_fingerprint")}
        if wrong := [key for key, text in shown.items() if not _storable(text or "")]:
            raise StoreError(f"session {name!r} has a NUL or half a character in its {wrong[0]}: {shown[wrong[0]]!r}")
        values = {
            "memory": meta["memory"]["kind"],
            **shown,
            "nbytes": size,
            "updated": now,
            "expires": None if ttl is None else now + int(ttl * SECOND),
            "data": data,
        }
        if stored is not None and (stored.store, stored.name) != (self._id, name):
            stored = None

        def write(connection: sql.Connection) -> Stored:
            if stored is not None and not overwrite:
                new = _replace(connection, stored, values)
            else:
                new = self._add(connection, name, values, overwrite)
            tables.hold(connection, name, units)
            self._check_total(connection, name)
            return new

        def taken() -> None:
            """Somebody else may have made it since we looked."""
            if stored is None and not overwrite and (found := self.stored(name)):
                raise Conflict(name, 0, found.version)

        return self._tried(f"session {name!r} cannot be put into", write, taken)

    def _check_total(self, connection: sql.Connection, name: str) -> None:
        """Raises `StoreError` where all that is there now is more than there may be."""
        if self.total_limit is None:
            return
        if not self._sqlite:  # one at a time: of two that fit alone one may have to go
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({LOCK + 1})")
        if (total := tables.total(connection)) > self.total_limit:
            raise NoRoom(
                f"with session {name!r} this store would have {total:,} bytes, it takes {self.total_limit:,}; delete() "
                "or purge() others, or set total_limit="
            )

    def _add(self, connection: sql.Connection, name: str, values: dict[str, Any], overwrite: bool) -> Stored:
        """A new row, or, with `overwrite`, a new version of the one that is there."""
        named, now = {"named": name}, values["updated"]
        connection.execute(sql.delete(tables.sessions).where(_NAMED, ~_ALIVE), {**named, "now": now})
        if overwrite:
            newer = sql.update(tables.sessions).where(_NAMED).values(version=tables.sessions.c.version + 1, **values)
            row = connection.execute(newer.returning(tables.sessions.c.birth, tables.sessions.c.version), named).first()
            if row is not None:
                return Stored(self._id, name, row.birth, row.version)
        birth = secrets.randbits(62)
        connection.execute(
            sql.insert(tables.sessions), {"name": name, "birth": birth, "version": 1, "created": now, **values}
        )
        return Stored(self._id, name, birth, 1)

    # --- the database ------------------------------------------------------------------------------------------------

    def _tried(
        self, doing: str, work: Callable[[sql.Connection], Result], before: Callable[[], None] = lambda: None
    ) -> Result:
        """What `work` returns in a transaction, which is tried again where another's came in its way, `before` that is
        called.
        """
        problem = None
        for _ in range(ATTEMPTS):
            try:
                with self.transaction() as connection:
                    return work(connection)
            except _Again as error:
                problem = error.args[0]
            before()
        raise StoreError(f"{doing} {self.url}: {problem}; nothing was changed")

    def close(self) -> None:
        """Gives the connections back. The store opens new ones if it is used again."""
        self._connections.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sql.Connection]:
        """All or nothing; what the database cannot do becomes a `StoreError`."""
        try:
            with self._connections.begin() as connection:
                yield connection
        except DBAPIError as error:
            if isinstance(error, IntegrityError) or getattr(error.orig, "sqlstate", None) in AGAIN:
                raise _Again(error.orig) from error
            busy = "; another process has been writing for too long" if "locked" in str(error.orig) else ""
            raise StoreError(f"{self.url}: {str(error.orig).strip()}{busy}; nothing was changed") from error

    def _open(self) -> str:
        """The database's identity, its tables made if they are not there."""
        with self.transaction() as connection:
            there = sql.inspect(connection).has_table(tables.store.name)
            row = connection.execute(sql.select(tables.store)).first() if there else None
        with self.transaction() as connection:
            if row is None or row.format < tables.FORMAT:
                # one at a time: to make what another is making at that moment is an error
                lock = "BEGIN IMMEDIATE" if self._sqlite else f"SELECT pg_advisory_xact_lock({LOCK})"
                connection.exec_driver_sql(lock)
                tables.prepare(connection, uuid.uuid4().hex)
            row = connection.execute(sql.select(tables.store)).first()
        if row is None or row.format != tables.FORMAT:
            found = "no format" if row is None else f"format {row.format}"
            raise StoreError(f"{self.url} has {found}, this version of mnemic reads {tables.FORMAT}")
        return row.id

    def _empty_log(self) -> None:
        """What was deleted leaves SQLite's log too, unless somebody reads it at this moment."""
        if self._sqlite:
            with contextlib.suppress(DBAPIError), self._connections.begin() as connection:
                connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")


class _Again(Exception):
    """Another transaction came in the way of this one, which changed nothing; with what the database says of it."""


def _replace(connection: sql.Connection, stored: Stored, values: dict[str, Any]) -> Stored:
    """The next version of exactly that one; raises `Conflict` where it is not there any more."""
    values = {
        "named": stored.name,
        "born": stored.birth,
        "replaced": stored.version,
        "now": values["updated"],
        "version": stored.version + 1,
        **values,
    }
    if connection.execute(_REPLACE, values).rowcount == 1:
        return Stored(stored.store, stored.name, stored.birth, stored.version + 1)
    row = connection.execute(_STANDING, {"named": stored.name, "now": values["updated"]}).first()
    if row is None:
        raise Conflict(stored.name, stored.version, 0)
    raise Conflict(stored.name, stored.version, row.version, row.birth != stored.birth)


def _now() -> int:
    return time.time_ns() // 1000


def _ttl(seconds: float | None) -> float | None:
    if seconds is not None and not 0 < seconds <= LONGEST_TTL:
        raise ValueError(f"ttl is {seconds}; a session lives for more than 0 and at most {LONGEST_TTL:,} seconds")
    return seconds


def _check_name(name: str) -> None:
    if not isinstance(name, str) or not 0 < len(name) <= LONGEST_NAME:
        length = f"{len(name):,} characters" if isinstance(name, str) else type(name).__name__
        raise ValueError(f"a session's name is text of 1 to {LONGEST_NAME} characters, this is {length}")
    if not _storable(name):
        raise ValueError(f"the name {name!r} has a NUL or half a character, which databases do not store; leave it out")


def _storable(text: str) -> bool:
    """Whether databases take a text."""
    return "\0" not in text and not any("\ud800" <= letter <= "\udfff" for letter in text)
