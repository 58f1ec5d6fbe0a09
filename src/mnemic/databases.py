"""How a store's database is opened: its URL, SQLite's file, and what every connection to it begins with."""

from __future__ import annotations

import os
import re
import sqlite3
import time
from pathlib import Path
from typing import Any

import sqlalchemy as sql
from sqlalchemy import event
from sqlalchemy.exc import SQLAlchemyError

from mnemic.connections import SECONDS_BUSY

LOG = 64 * 2**20
"""Bytes that SQLite's log keeps when it has been moved into the file."""


class StoreError(RuntimeError):
    """A store that cannot do what was asked, and has changed nothing."""


def url_of(url: str | os.PathLike[str]) -> sql.URL:
    """A database's URL; a path is that of SQLite's file. Raises `ValueError` for what is neither."""
    text = os.fsdecode(url)
    try:
        # what a colon follows is meant as a URL, but for a drive's letter
        if isinstance(url, str) and (not text or "://" in text or re.match(r"[\w+.-]{2,}:", text)):
            return sql.make_url(text)
    except SQLAlchemyError as error:
        raise ValueError(
            "url is no database's URL; use a path such as memories.db, sqlite:///memories.db, or "
            "postgresql+psycopg://..."
        ) from error
    return sql.URL.create("sqlite", database=text)


def engine_of(url: sql.URL) -> sql.Engine:
    """What opens connections; raises `ModuleNotFoundError` without the package that speaks with PostgreSQL."""
    try:
        if url.get_backend_name() != "sqlite":
            return sql.create_engine(url, pool_pre_ping=True)
        engine = sql.create_engine(url, connect_args={"timeout": SECONDS_BUSY})
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("PostgreSQL needs psycopg: pip install 'mnemic[postgres]'") from error
    event.listen(engine, "connect", _prepare_connection)
    return engine


def prepare_file(database: str | None, create: bool) -> None:
    """Makes SQLite's file, for its owner alone: what it holds tells what was read.

    Raises:
        ValueError: a database that is no file.
        StoreError: no file where none may be made, or one that cannot be opened.
    """
    if not database or database == ":memory:" or database.startswith("file:"):
        raise ValueError("a store in SQLite needs a file, as in sqlite:///memories.db")
    if not create and not Path(database).is_file():
        raise StoreError(f"there is no store at {database}")
    try:
        os.close(os.open(database, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError as error:
        raise StoreError(f"{database} cannot be opened: {error.strerror}") from error


def _prepare_connection(connection: Any, _: object) -> None:
    """SQLite's log in a file beside its own, so that readers and a writer do not wait for each other; what is deleted
    is overwritten.
    """
    until = time.monotonic() + SECONDS_BUSY
    while True:
        try:
            mode = connection.execute("PRAGMA journal_mode=WAL").fetchone()[0]
            break
        except sqlite3.OperationalError:
            # to change the mode SQLite does not wait for others who do the same
            if time.monotonic() > until:
                raise
            time.sleep(0.01)
    if mode != "wal":
        raise sqlite3.OperationalError(f"SQLite cannot keep its log here (journal mode {mode}); use a local disk")
    # the log is written before a commit returns, and flushed when it is moved into the file
    connection.execute("PRAGMA synchronous=NORMAL")
    connection.execute("PRAGMA secure_delete=ON")
    connection.execute("PRAGMA foreign_keys=ON")
    connection.execute(f"PRAGMA journal_size_limit={LOG}")
