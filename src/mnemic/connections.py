"""A database's connections, of which no fork inherits any.

A child that uses a connection of its parent's, or closes one, harms both: two processes talk over one socket, and
SQLite goes by locks that only the parent holds, so that what the child writes can be lost. Nothing is open, therefore,
while a process forks: the fork waits for the transactions that run and closes what is idle, and either side opens its
own.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Iterator

import sqlalchemy as sql

SECONDS_BUSY = 30
"""How long a write waits for another one before it gives up, and a fork for a transaction."""

_all: weakref.WeakSet[Connections] = weakref.WeakSet()
_held: list[Connections] = []
"""Those that this fork has stopped."""
_abandoned: list[sql.Engine] = []
"""What a child must neither use nor close."""
_lock = threading.Lock()


class Connections:
    """What `make` opens: used by many threads at once, and anew on both sides of a fork."""

    def __init__(self, make: Callable[[], sql.Engine]) -> None:
        self._make, self.engine = make, make()
        self._turn, self._running = threading.Condition(), 0
        with _lock:
            _all.add(self)

    @contextlib.contextmanager
    def begin(self) -> Iterator[sql.Connection]:
        """A transaction."""
        with self._turn:
            self._running += 1
        try:
            with self.engine.begin() as connection:
                yield connection
        finally:
            with self._turn:
                self._running -= 1
                self._turn.notify_all()

    def close(self) -> None:
        """Closes what is idle; what is used later is opened anew."""
        self.engine.dispose()

    # --- around a fork -----------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """No transaction runs any more, nothing is open, and none begins."""
        self._turn.acquire()
        self._turn.wait_for(lambda: not self._running, SECONDS_BUSY)
        self.close()

    def go_on(self) -> None:
        """In the parent, after `stop`."""
        self._turn.release()

    def begin_anew(self) -> None:
        """In the child. The threads that used the connections are not there, and whatever they still held is left."""
        _abandoned.append(self.engine)
        self._turn, self._running = threading.Condition(), 0
        self.engine = self._make()


def _before() -> None:
    _lock.acquire()
    for each in tuple(_all):
        _held.append(each)
        each.stop()


def _in_parent() -> None:
    while _held:
        _held.pop().go_on()
    _lock.release()


def _in_child() -> None:
    global _lock
    _lock = threading.Lock()
    _held.clear()
    for each in tuple(_all):
        each.begin_anew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
