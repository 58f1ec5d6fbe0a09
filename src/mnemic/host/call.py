"""One call of the trunk while it runs, and what this thread knows about the calls that are under way."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from mnemic.host.beside import Beside, Wordless
from mnemic.host.cache import MemoryLayer
from mnemic.host.release import Cache
from mnemic.state import State
from mnemic.stream import Piece, Stream


@dataclass
class Call:
    """One pass of the trunk. `states[i]` is the memory as it stands for the tokens of `pieces[i]`."""

    restore: Callable[[], None] = lambda: None
    cache: Cache | None = None
    layer: MemoryLayer | None = None
    before: Stream | None = None
    stream: Stream | None = None
    pieces: list[Piece] = field(default_factory=list)
    ids: Tensor | None = None
    keep: Tensor | None = None
    states: list[State] = field(default_factory=list)
    traces: State = field(default_factory=dict)
    written: dict[int, Tensor] = field(default_factory=dict)
    beside: Beside | None = None
    wordless: Wordless | None = None
    earlier: list[Any] = field(default_factory=list)
    private_cache: bool = False
    checkpointing: bool = False
    time: int = 0


class Thread(threading.local):
    """What belongs to this thread alone: two threads may call one model at the same time."""

    def __init__(self) -> None:
        self.calls: dict[int, list[Call]] = {}
        """Of every router (by id) its running calls, innermost last."""
        self.recording: object | None = None
        """The router that wants what its write layer puts out, and nothing else."""
        self.carried: MemoryLayer | None = None
        """What encoders read and write."""
        self.wordless: Wordless | None = None
        """Why the next call has no words."""


thread = Thread()
Function = TypeVar("Function", bound=Callable[..., Any])


def eager(function: Function) -> Function:
    """Keeps `torch.compile` out: what a call needs depends on its numbers. The base is compiled on both sides."""
    return cast(Function, torch.compiler.disable(function))


class RecordedError(Exception):
    """Leaves the trunk at the write layer with what was wanted there."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


@contextlib.contextmanager
def carrying(layer: MemoryLayer) -> Iterator[None]:
    """Within it, calls of encoders in this thread read and write the stream of `layer` (they have no cache to ride)."""
    outer, thread.carried = thread.carried, layer
    try:
        yield
    finally:
        thread.carried = outer
