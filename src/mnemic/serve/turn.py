"""One request's answer, in a task of its own: it holds the session, has the engine continue a fork of it, and puts that
into the store when the answer is whole. A task that is cancelled before leaves the session as it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from mnemic.serve.again import Given
from mnemic.serve.engine import Answer, Engine
from mnemic.serve.errors import Refused
from mnemic.serve.metrics import Metrics
from mnemic.serve.said import Said
from mnemic.serve.sessions import Sessions
from mnemic.serve.settings import Settings
from mnemic.session import Session

Result = TypeVar("Result")


@dataclass
class Asked:
    """What the engine is to continue: the session's own fork, what it is to read, and how it answers; or the answer
    that the same request has got before (`given`).

    `heard` gives the session its notes when the answer is whole.
    """

    session: Session
    prompt: Any = None
    ways: dict[str, Any] = field(default_factory=dict)
    stop: list[str] = field(default_factory=list)
    closing: Callable[[list[int]], Any] = lambda _: None
    heard: Callable[[Given], None] = lambda _: None
    seed: int | None = None
    given: Given | None = None


class Turns:
    """Makes turns, of which there are `rows + queue` at most."""

    def __init__(self, engine: Engine, sessions: Sessions, settings: Settings, metrics: Metrics) -> None:
        self.engine, self.sessions, self.settings, self.metrics = engine, sessions, settings, metrics
        self._tasks: set[asyncio.Task[None]] = set()
        metrics.watch("mnemic_steps", "Forward passes of the batch.", lambda: engine.steps)
        metrics.watch("mnemic_turns_running", "Answers on their way or waiting.", lambda: self.running)

    def begin(self, tenant: str, hold: str | None, keep: str | None, prepare: Callable[[], Asked]) -> Turn:
        """A turn whose session is held while it runs (`hold`), and kept under a name (`keep`); `prepare` waits for the
        database, in a thread.

        Raises:
            Refused: there is no room for another one.
        """
        if len(self._tasks) >= self.settings.rows + self.settings.queue:
            raise Refused(429, "queue_full", "too many requests are waiting; send it again later", retry=1)
        turn = Turn(self, tenant, hold, keep, prepare)
        self._tasks.add(turn.task)
        turn.task.add_done_callback(self._tasks.discard)
        return turn

    @property
    def running(self) -> int:
        """Turns that have not ended."""
        return len(self._tasks)

    async def end(self) -> None:
        """Returns when all have ended."""
        if self._tasks:
            await asyncio.wait(self._tasks)


class Turn:
    """`started` raises what refuses it; `pieces` gives text as it comes, and raises what goes wrong then. When they end
    the answer is whole (`given`) and its session is kept (`version`).
    """

    def __init__(
        self, turns: Turns, whose: str, hold: str | None, keep: str | None, prepare: Callable[[], Asked]
    ) -> None:
        self._turns, self._whose, self._hold, self._keep, self._prepare = turns, whose, hold, keep, prepare
        self._loop = asyncio.get_running_loop()
        self._begun, self._pieces = asyncio.Event(), asyncio.Queue[str | None]()
        self._answer: Answer | None = None
        self._given: Given | None = None
        self.version: int | None = None
        self.task = asyncio.create_task(self._run())
        self.task.add_done_callback(self._ended)

    @property
    def given(self) -> Given:
        """The answer, when it is whole."""
        assert self._given is not None
        return self._given

    async def started(self) -> None:
        """Returns when the request has its place with the engine."""
        begun = asyncio.ensure_future(self._begun.wait())
        await asyncio.wait([begun, self.task], return_when=asyncio.FIRST_COMPLETED)
        begun.cancel()
        if self.task.done():
            self.task.result()

    async def pieces(self) -> AsyncIterator[str]:
        """The answer, and its end."""
        while (piece := await self._pieces.get()) is not None:
            yield piece
        await self.task

    def cancel(self) -> None:
        """Nobody waits for it any more. What is being kept is kept."""
        self.task.cancel()

    async def _run(self) -> None:
        async with contextlib.AsyncExitStack() as stack:
            if self._hold is not None:
                await stack.enter_async_context(self._turns.sessions.hold(self._hold))
            asked = await to_the_end(asyncio.to_thread(self._prepare))
            if asked.given is not None and asked.session.stored is not None:
                self._given, self.version = asked.given, asked.session.stored.version
                self._pieces.put_nowait(asked.given.text)
                self._begun.set()
                return
            async with asyncio.timeout(self._turns.settings.timeout):
                self._given = await self._answered(asked)
            asked.heard(self._given)
            if self._keep is not None:
                keep = asyncio.to_thread(self._turns.sessions.keep, self._keep, asked.session)
                self.version = await to_the_end(keep)

    async def _answered(self, asked: Asked) -> Given:
        begun: float | None = time.monotonic()
        done = asyncio.Event()

        def told(piece: str | None) -> None:
            nonlocal begun
            if piece is None:
                done.set()
            else:
                if begun is not None:
                    self._turns.metrics.first.observe(time.monotonic() - begun)
                begun = None
                self._pieces.put_nowait(piece)

        def tell(piece: str | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is gone
                self._loop.call_soon_threadsafe(told, piece)

        said = Said(self._turns.sessions.tokenizer, asked.stop)
        answer = self._answer = Answer(
            asked.session, asked.prompt, asked.ways, said, tell, asked.closing, asked.seed, self._whose
        )
        self._turns.engine.begin(answer)
        self._begun.set()
        try:
            await done.wait()
        except asyncio.CancelledError:
            answer.cancelled = True
            raise
        if answer.error is not None:
            raise answer.error
        return Given(said.text, "length" if answer.cut else "stop", answer.prompt.shape[1], len(answer.tokens))

    def _ended(self, task: asyncio.Task[None]) -> None:
        metrics = self._turns.metrics
        if self._answer is not None:
            metrics.read.inc(self._answer.prompt.shape[1])
            metrics.said.inc(len(self._answer.tokens))
        failed = task.cancelled() or task.exception() is not None
        metrics.turns.labels("cancelled" if task.cancelled() else "failed" if failed else "whole").inc()
        self._pieces.put_nowait(None)


async def to_the_end(work: Coroutine[Any, Any, Result]) -> Result:
    """What `work` returns; where its caller is cancelled it is not, and its caller goes when it has ended."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        task.exception()  # or asyncio says that nobody asked for it
        raise
