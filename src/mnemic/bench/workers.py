"""Running many runs, several processes at a time, each on one thread: small models are fastest so."""

from __future__ import annotations

import contextlib
import multiprocessing
import queue
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mnemic.bench.compare import Run
from mnemic.bench.results import Record, Score
from mnemic.bench.suite import file_name, finished
from mnemic.memories.registry import import_file, imported_files

CHECKPOINTS = ".checkpoints"


@dataclass
class Event:
    """What became known of run number `number`: `done` of `total` steps of a `phase`, or its `record`, or an `error`.
    `again` marks a record that was there before.
    """

    number: int
    phase: str = ""
    done: int = 0
    total: int = 0
    note: dict[str, float] = field(default_factory=dict)
    record: Record | None = None
    error: str | None = None
    again: bool = False


class _Telling:
    """A `Reporter` that tells events, not more than about one in a hundred steps."""

    def __init__(self, number: int, tell: Callable[[Event], None]) -> None:
        self.event, self.tell, self.told = Event(number), tell, 0

    def phase(self, name: str, total: int) -> None:
        self.event, self.told = Event(self.event.number, name, 0, total), 0
        self.tell(self.event)

    def advance(self, steps: int, **values: float) -> None:
        event = self.event
        self.event = Event(event.number, event.phase, event.done + steps, event.total, values)
        if 100 * (self.event.done - self.told) >= event.total:
            self.told = self.event.done
            self.tell(self.event)

    def score(self, score: Score) -> None:
        pass


def _one(number: int, run: Run, folder: Path, command: str, tell: Callable[[Event], None]) -> Record:
    name, threads = file_name(run), torch.get_num_threads()
    checkpoint = folder / CHECKPOINTS / name.replace(".json", ".safetensors")
    torch.set_num_threads(1)
    try:
        record = run.run(_Telling(number, tell), checkpoint)
    finally:
        torch.set_num_threads(threads)
    record.command = command
    record.save(folder, name)
    checkpoint.unlink(missing_ok=True)
    return record


def _import_all(files: Sequence[Path]) -> None:
    """What the parent knows of mechanisms outside of this package, a spawned worker must know too."""
    for file in files:
        import_file(file)


def _said(error: BaseException) -> str:
    return "".join(traceback.format_exception_only(error)).strip()


def perform(
    runs: Sequence[Run], folder: Path, command: str, workers: int, tell: Callable[[Event], None] = lambda event: None
) -> None:
    """Does all runs that are not finished in `folder`, telling how it goes. A run that fails does not stop the others,
    and neither does one whose process is killed: those that were running then go on from their checkpoints, each alone,
    and one that is killed again has failed.

    What is interrupted goes on from its checkpoint the next time.

    Raises:
        ValueError: no workers, or a run whose settings are wrong.
    """
    if workers < 1:
        raise ValueError(f"workers is {workers}; use 1 or more")
    left: list[int] = []
    for number, run in enumerate(runs):
        if record := finished(run, folder):
            tell(Event(number, record=record, again=True))
        else:
            left.append(number)
    if workers == 1 or len(left) < 2:
        for number in left:
            try:
                tell(Event(number, record=_one(number, runs[number], folder, command, tell)))
            except Exception as error:
                tell(Event(number, error=_said(error)))
        return
    with multiprocessing.get_context("spawn").Manager() as manager:
        events, groups = manager.Queue(), [left]
        while groups:
            group = groups.pop(0)
            begun, others = _pooled({number: runs[number] for number in group}, folder, command, workers, events, tell)
            if len(group) == 1 and begun:
                tell(Event(group[0], error="its process was killed, alone too: for want of memory, if nobody did it"))
                continue
            groups += [*([number] for number in begun), *([others] if others else [])]


def _pooled(
    runs: Mapping[int, Run], folder: Path, command: str, workers: int, events: Any, tell: Callable[[Event], None]
) -> tuple[list[int], list[int]]:
    """Does runs, by their numbers, in a pool of processes. Where one of these is killed the pool ends: returns which
    runs that are left had begun, and which had not.
    """
    begun: set[int] = set()
    lost: list[int] = []
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_import_all, initargs=(imported_files(),))

    def hear() -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                event = events.get_nowait()
                begun.add(event.number)
                tell(event)

    try:
        waiting: dict[Future[Record], int] = {}
        try:
            for number, run in runs.items():
                waiting[pool.submit(_one, number, run, folder, command, events.put)] = number
        except BrokenProcessPool:
            lost += [number for number in runs if number not in waiting.values()]
        while waiting:
            over, _ = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
            hear()
            for future in over:
                number, error = waiting.pop(future), future.exception()
                if isinstance(error, BrokenProcessPool):
                    lost.append(number)
                else:
                    tell(Event(number, error=_said(error)) if error else Event(number, record=future.result()))
    finally:
        for process in (pool._processes or {}).values():
            process.terminate()
        pool.shutdown(wait=False, cancel_futures=True)
    hear()
    # that nothing was heard of any says nothing: a process may be killed before it tells
    if not begun.intersection(lost):
        begun.update(lost)
    return [number for number in lost if number in begun], [number for number in lost if number not in begun]
