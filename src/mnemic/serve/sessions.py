"""Sessions of all tenants: each is used by one request at a time, those that were used last stay in RAM, and what is
kept is in the store.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator
from typing import Any

from torch import nn

from mnemic.serve.errors import Refused
from mnemic.session import Session
from mnemic.store import NotStored, SessionStore


class Sessions:
    """`load`, `keep` and `delete` wait for the database, and are for threads; `hold` is for the event loop.

    A session that is in RAM is used only where it is the version that the store has, so other servers may use the store
    too: of two that answer in one session at once, the second gets a `Conflict`.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, store: SessionStore, *, warm: int, wait: float, keep_text: bool
    ) -> None:
        self.model, self.tokenizer, self.store = model, tokenizer, store
        self.most, self.wait, self.keep_text = warm, wait, keep_text
        self._warm: OrderedDict[str, Session] = OrderedDict()
        self._warming = threading.Lock()
        self._locks: dict[str, tuple[asyncio.Lock, int]] = {}

    @contextlib.asynccontextmanager
    async def hold(self, name: str) -> AsyncIterator[None]:
        """Within it nobody else here uses the session of that name. Waits for it, in order, and then refuses (409)."""
        lock, users = self._locks.get(name, (asyncio.Lock(), 0))
        self._locks[name] = lock, users + 1
        try:
            try:
                if lock.locked() and not self.wait:
                    raise TimeoutError
                async with asyncio.timeout(self.wait or None):
                    await lock.acquire()
            except TimeoutError:
                raise Refused(
                    409, "session_busy", "another request uses this session; send it again when that has ended", retry=1
                ) from None
            try:
                yield
            finally:
                lock.release()
        finally:
            lock, users = self._locks.pop(name)
            if users > 1:
                self._locks[name] = lock, users - 1

    def new(self) -> Session:
        """One that has heard nothing."""
        return Session(self.model, self.tokenizer, keep_text=self.keep_text)

    def load(self, name: str) -> Session:
        """A fork of the session in the store, as it is now, to do with as one likes; raises `NotStored`."""
        with self._warming:
            found = self._warm.get(name)
        if found is None or found.stored is None or found.stored != self.store.stored(name):
            found = self.store.get(name, self.model, self.tokenizer)
            if found.window != (window := self.new().window):
                raise Refused(
                    409,
                    "other_window",
                    f"the session was made with a window of {found.window} tokens, and this server has {window}",
                )
            self._stay(name, found)
        return found.fork()

    def load_or_new(self, name: str | None) -> Session:
        """That, or a new one, as for no name."""
        with contextlib.suppress(NotStored):
            if name is not None:
                return self.load(name)
        return self.new()

    def keep(self, name: str, session: Session) -> int:
        """Puts a session into the store, and returns its version; raises as `SessionStore.put` does."""
        version = self.store.put(name, session)
        self._stay(name, session)
        return version

    def delete(self, name: str) -> None:
        """Removes a session for good; raises `NotStored`."""
        with self._warming:
            self._warm.pop(name, None)
        self.store.delete(name)

    def _stay(self, name: str, session: Session) -> None:
        with self._warming:
            self._warm[name] = session
            self._warm.move_to_end(name)
            while len(self._warm) > self.most:
                self._warm.popitem(last=False)
