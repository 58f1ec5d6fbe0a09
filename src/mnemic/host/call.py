"""One call of the trunk while it runs, and what this thread knows about the calls that are under way."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor

from mnemic.host.beside import Beside, Wordless
from mnemic.host.cache import MemoryLayer
from mnemic.host.release import Cache
from mnemic.memory import Further, Site
from mnemic.state import State
from mnemic.stream import Piece, Stream

if TYPE_CHECKING:
    from mnemic.host.router import Router


@dataclass(frozen=True)
class Pass:
    """Tokens `start <= t < stop` of a call that go through the base at once, in pieces counted from `start`. Behind
    them the rows `closing` end their segment in the window.
    """

    start: int
    stop: int
    pieces: tuple[Piece, ...]
    closing: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Plan:
    """A call of the trunk before any of it runs: what it was given, what it rides, and how it is cut. `keep [b, t]`
    marks its real tokens; None for all. `stream` is where it begins, None without a memory. The base had `seen` keys.
    """

    arguments: dict[str, Any]
    batch: int
    time: int
    passes: tuple[Pass, ...]
    keep: Tensor | None = None
    cache: Cache | None = None
    layer: MemoryLayer | None = None
    stream: Stream | None = None
    wordless: Wordless | None = None
    checkpointing: bool = False
    private_cache: bool = False
    seen: int = 0


@dataclass(eq=False)
class Call:
    """One pass while it runs. `states[i]` is the memory as it stands for the tokens of `pieces[i]`. No two are equal:
    a call inside of another one may be of the same tokens.
    """

    router: Router
    plan: Plan
    number: int
    """Of the pass among those of the plan."""
    arguments: dict[str, Any]
    keep: Tensor | None
    before: Stream | None
    stream: Stream | None
    states: list[State]
    traces: State = field(default_factory=dict)
    written: dict[Site, Tensor] = field(default_factory=dict)
    """What passed sites that are written, until the last of them."""
    angles: dict[Any, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Cosines and sines of positions, which are the same in many blocks."""
    beside: Beside | None = None
    held: list[dict[int, Further]] = field(init=False)
    """Of each row what the segment's next tokens share, as `Stream.held`."""

    def __post_init__(self) -> None:
        self.held = [{} for _ in range(self.plan.batch)]

    @property
    def now(self) -> Pass:
        """Which tokens these are."""
        return self.plan.passes[self.number]

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """Its pieces."""
        return self.now.pieces

    @property
    def time(self) -> int:
        """How many tokens."""
        return self.now.stop - self.now.start

    @property
    def ids(self) -> Tensor | None:
        """The tokens, where they were given as such."""
        ids = self.plan.arguments.get("input_ids")
        return None if ids is None else ids[:, self.now.start : self.now.stop]

    @property
    def reads(self) -> list[tuple[int, int, State]]:
        """What each piece reads, with its first token in the whole call and the one behind its last."""
        start = self.now.start
        # none where it is switched off, one where nothing is written
        states = self.states * len(self.pieces) if len(self.states) == 1 else self.states
        pieces = self.pieces if states else ()
        return [(start + p.start, start + p.stop, state) for p, state in zip(pieces, states, strict=True)]

    @property
    def cache(self) -> Cache | None:
        """What it rides."""
        return self.plan.cache


@dataclass(eq=False)
class Ahead:
    """What is to be known at the head of a model, when its trunk has run: what left the trunk, all tokens of the call,
    and what each piece of them reads, with its first token and the one behind its last. `kept` says which tokens get
    logits, as the model was told: so many of the last ones (0 for all), or their places. `undo` takes the call back.
    """

    kept: int | Tensor | None = 0
    hidden_btd: Tensor | None = None
    reads: list[tuple[int, int, State]] = field(default_factory=list)
    undo: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    met: bool = False
    """Whether the head has run."""


@dataclass
class Watch:
    """The hidden states `seen[site] [b, t, d]` that pass `sites` of the base alone in the call that this thread makes
    next. With `leaves` the trunk is left as soon as all of them are there.
    """

    router: object
    sites: frozenset[Site]
    leaves: bool = False
    seen: dict[Site, Tensor] = field(default_factory=dict)

    def at(self, site: Site, hidden_btd: Tensor) -> None:
        """Notes what it waits for; raises `SeenError` where nothing more is wanted of the trunk."""
        if site in self.sites:
            self.seen[site] = hidden_btd
            if self.leaves and self.seen.keys() == self.sites:
                raise SeenError


class Thread(threading.local):
    """What belongs to this thread alone: two threads may call one model at the same time."""

    def __init__(self) -> None:
        self.calls: dict[int, list[Call]] = {}
        """Of every router (by id) its running calls, innermost last."""
        self.ahead: dict[int, list[Ahead]] = {}
        """Of every router (by id) the calls of its whole model whose head is still to come, innermost last."""
        self.watch: Watch | None = None
        """What is to be seen of the base alone, and nothing else."""
        self.carried: MemoryLayer | None = None
        """What encoders read and write."""
        self.wordless: Wordless | None = None
        """Why the next call has no words."""
        self.probe: list[tuple[int, Tensor, Tensor, dict[str, Any], Tensor]] | None = None
        """What attention was given, while a model is looked at: block, keys, values, the rest, queries."""
        self.reading = False
        """Whether what the model says of these tokens is of no interest."""


thread = Thread()
Function = TypeVar("Function", bound=Callable[..., Any])


def eager(function: Function) -> Function:
    """Keeps `torch.compile` out: what a call needs depends on its numbers. The base is compiled on both sides."""
    return cast(Function, torch.compiler.disable(function))


def aside(function: Function) -> Function:
    """Keeps `torch.compile` out of this function alone, not out of what it calls: the base."""
    return cast(Function, torch.compiler.disable(function, recursive=False))


class SeenError(Exception):
    """Leaves the trunk when a `Watch` has all that it waits for."""


_disabled: ContextVar[frozenset[int]] = ContextVar("disabled", default=frozenset())
"""The routers (by id) that are switched off here: in this thread, or in this asynchronous task."""


@contextlib.contextmanager
def disabling(router: object) -> Iterator[None]:
    """Within it a router is switched off, for this thread or task alone."""
    before = _disabled.get()
    _disabled.set(before | {id(router)})
    try:
        yield
    finally:
        _disabled.set(before)


def is_disabled(router: object) -> bool:
    """Whether `disabling` holds here."""
    return id(router) in _disabled.get()


@contextlib.contextmanager
def carrying(layer: MemoryLayer) -> Iterator[None]:
    """Within it, calls of encoders in this thread read and write the stream of `layer` (they have no cache to ride)."""
    outer, thread.carried = thread.carried, layer
    try:
        yield
    finally:
        thread.carried = outer


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Within it, this thread's calls take tokens in and nobody waits for what the model says of them."""
    outer, thread.reading = thread.reading, True
    try:
        yield
    finally:
        thread.reading = outer
