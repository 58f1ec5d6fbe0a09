"""One at a time: whoever uses a session holds its lock."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar


class Lock:
    """A lock that its holder may take again. A copy of it, or of what has it, has one of its own.

    `with lock:` waits for it; `with lock.use():` is refused while another thread holds it.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[Any, ...]:
        return Lock, ()

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        """Holds it; raises `RuntimeError` while another thread does."""
        if not self._lock.acquire(blocking=False):
            raise RuntimeError(
                "the session is in use by another thread, and of two calls at once one would be lost; hold "
                "`with session.lock:` around calls that are to wait for each other, or give each thread its own session"
            )
        try:
            yield
        finally:
            self._lock.release()


class Locked(Protocol):
    """What has a lock."""

    lock: Lock


Own = TypeVar("Own", bound=Locked)
Given = ParamSpec("Given")
Result = TypeVar("Result")


def alone(method: Callable[Concatenate[Own, Given], Result]) -> Callable[Concatenate[Own, Given], Result]:
    """The method, as a use of its object's lock."""

    @functools.wraps(method)
    def locked(self: Own, /, *args: Given.args, **kwargs: Given.kwargs) -> Result:
        with self.lock.use():
            return method(self, *args, **kwargs)

    return locked
