"""Where each row of a batch stands in its stream: the memory's state, the tokens that wait, and what was counted."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mnemic.bank import Bank
from mnemic.history import Log, told_of
from mnemic.memory import Further, Leaving, Memory, Site
from mnemic.state import State, StateError, append_rows, concatenate, detach, level, nbytes, put, repeat, select


@dataclass(frozen=True)
class Piece:
    """Tokens `start <= t < stop` of a call, inside one segment of every row.

    `fresh` are the rows whose document begins at `start`, `ended` those whose segment is full at `stop`.
    """

    start: int
    stop: int
    fresh: tuple[int, ...] = ()
    ended: tuple[int, ...] = ()


def cut(
    waiting: Sequence[int],
    time: int,
    segment_length: int,
    keep_bt: Bool[Tensor, "b t"] | None = None,
    fresh_bt: Bool[Tensor, "b t"] | None = None,
) -> list[Piece]:
    """Cuts a call of `time` tokens wherever some row's segment ends or its document begins.

    `waiting[b]` tokens of row b's running segment came in earlier calls; only tokens with `keep_bt` count.
    """
    if keep_bt is None and fresh_bt is None and len(set(waiting)) == 1:
        # rows in step, as in training: no need to look at each
        rows = tuple(range(len(waiting)))
        ends = range(segment_length - waiting[0], time + 1, segment_length)
        return [
            Piece(start, stop, (), rows if stop in ends else ())
            for start, stop in itertools.pairwise(sorted({0, time, *ends}))
        ]
    keep = np.ones((len(waiting), time), bool) if keep_bt is None else keep_bt.cpu().numpy()
    fresh = np.zeros((len(waiting), time), bool) if fresh_bt is None else fresh_bt.cpu().numpy()
    ended: dict[int, list[int]] = {}
    begun: dict[int, list[int]] = {}
    for row, count in enumerate(waiting):
        starts = np.flatnonzero(fresh[row])
        for start in starts:
            begun.setdefault(int(start), []).append(row)
        for run, positions in enumerate(np.split(np.arange(time), starts)):
            real = positions[keep[row, positions]]
            offset = count if run == 0 else 0
            for end in real[segment_length - offset - 1 :: segment_length]:
                ended.setdefault(int(end) + 1, []).append(row)
    cuts = sorted({0, time, *ended, *begun})
    return [
        Piece(start, stop, tuple(begun.get(start, ())), tuple(ended.get(stop, ())))
        for start, stop in itertools.pairwise(cuts)
    ]


def waiting_width(memory: Memory, width: int) -> int:
    """Values kept of a token until its segment is written: none where tokens behind the segment are written instead."""
    if memory.writes_inside:
        return memory.inside.blocks * memory.inside.queries * memory.inside.key_width
    return 0 if memory.writes_tokens_behind else len(memory.writes) * width


@dataclass(frozen=True)
class Stream:
    """The carried part of a batch of streams. Immutable: every step returns a new one, so nothing is ever half-done.

    `state` is the memory's own; `waiting [b, p, d]` holds the hidden states of tokens that do not fill a segment yet
    (of several sites joined along d), `counts[b]` of them in row b. `written[b]` counts segments, `seen[b]` tokens.
    `logs[b]` is the row's history, None where nobody keeps one; it has no part in what is computed. `banks[b]` has the
    keys and values that left its window, None where nothing has. `held[b]` is what the running segment's tokens share
    of what attention sees before the window, by the block's place in the bank; after loading, what was chosen for it.
    `ids [b, p]` are those of the tokens that wait, for a memory that takes them; None for all others.
    """

    state: State
    waiting: Float[Tensor, "b p d"]
    counts: tuple[int, ...]
    written: tuple[int, ...]
    seen: tuple[int, ...]
    logs: tuple[Log | None, ...] = ()
    banks: tuple[Bank | None, ...] = ()
    held: tuple[Mapping[int, Further | Tensor], ...] = ()
    ids: Int[Tensor, "b p"] | None = None

    def __post_init__(self) -> None:
        for name, nothing in (("logs", None), ("banks", None), ("held", {})):
            if not getattr(self, name):
                object.__setattr__(self, name, (nothing,) * len(self.counts))

    @staticmethod
    def new(memory: Memory, batch: int, like: Tensor) -> Stream:
        """`batch` streams at their beginning, on the device and in the dtype of the hidden states `like [., ., d]`."""
        zeros = (0,) * batch
        waiting = like.new_zeros(batch, 0, waiting_width(memory, like.shape[-1]))
        ids = torch.zeros(batch, 0, dtype=torch.long, device=like.device) if memory.takes_ids else None
        return Stream(memory.init_state(batch, like.device), waiting, zeros, zeros, zeros, ids=ids)

    @property
    def batch(self) -> int:
        """Number of rows."""
        return len(self.counts)

    @property
    def nbytes(self) -> int:
        """Bytes carried for all rows: the memory's state and the tokens that wait."""
        return nbytes(self.tensors()) + sum(bank.nbytes for bank in self.banks if bank is not None)

    def with_banks(self, banks: Sequence[Bank | None]) -> Stream:
        """The same stream with other banks; what is held of those before is dropped."""
        same = (bank is before for bank, before in zip(banks, self.banks, strict=True))
        held = tuple(own if stays else {} for own, stays in zip(self.held, same, strict=True))
        return replace(self, banks=tuple(banks), held=held)

    def holding(self, held: Sequence[Mapping[int, Further | Tensor]]) -> Stream:
        """The same stream with this held of each row, unless its segment has ended."""
        return replace(self, held=tuple(own if count else {} for own, count in zip(held, self.counts, strict=True)))

    def tensors(self) -> State:
        """Every carried tensor by name, the state's under `state.`."""
        waiting = {"waiting": self.waiting} if self.ids is None else {"waiting": self.waiting, "ids": self.ids}
        return waiting | {f"state.{name}": tensor for name, tensor in self.state.items()}

    def with_tensors(self, tensors: State) -> Stream:
        """The same stream over other tensors of the same names."""
        state = {name: tensors[f"state.{name}"] for name in self.state}
        return replace(self, state=state, waiting=tensors["waiting"], ids=tensors.get("ids"))

    def append(
        self,
        hidden_btd: Float[Tensor, "b t d"],
        keep_bt: Bool[Tensor, "b t"] | None,
        ids_bt: Int[Tensor, "b t"] | None = None,
    ) -> Stream:
        """Tokens join the running segment; it must not overflow, which `cut` sees to."""
        waiting, counts = append_rows(self.waiting, list(self.counts), hidden_btd, keep_bt)
        ids = self.ids
        if ids is not None:
            assert ids_bt is not None  # `planned` refuses a call without
            ids = append_rows(ids[..., None], list(self.counts), ids_bt[..., None].to(ids), keep_bt)[0][..., 0]
        added = [after - before for after, before in zip(counts, self.counts, strict=True)]
        seen = tuple(total + new for total, new in zip(self.seen, added, strict=True))
        return replace(self, waiting=waiting, ids=ids, counts=tuple(counts), seen=seen)

    def leave(self, traces: State, keep_bt: Bool[Tensor, "b t"] | None) -> Stream:
        """What reading left behind joins the state: `traces` `[b, t, ...]` summed over real tokens."""
        state = dict(self.state)
        for name, trace in traces.items():
            if keep_bt is not None:
                keep_bt = keep_bt.to(trace.device)
                trace = trace.masked_fill(~keep_bt.view(*keep_bt.shape, *[1] * (trace.ndim - 2)), 0)
            state[name] = state[name] + trace.sum(1)
        return replace(self, state=state)

    def commit(
        self,
        memory: Memory,
        rows: Sequence[int],
        behind_bmd: Float[Tensor, "b m d"] | None = None,
        leaving: Mapping[int, Leaving] | None = None,
    ) -> Stream:
        """Writes the running segment of `rows`, full or not; rows with nothing waiting stay as they are.

        What is written is what waits, or `behind_bmd`, the hidden states of the memory tokens behind the segment; and
        what is `leaving` the window of each of the rows, for a memory that writes inside attention.
        """
        rows = [row for row in rows if self.counts[row]]
        if not rows:
            return self
        lengths = [self.counts[row] for row in rows]
        everyone = len(rows) == self.batch
        index = torch.tensor(rows, device=self.waiting.device)
        source = self.waiting[:, : max(lengths)] if behind_bmd is None else behind_bmd
        hidden = source if everyone else source[index]
        state = self.state if everyone else select(self.state, index)
        keep = None
        if behind_bmd is None and min(lengths) < max(lengths):
            keep = torch.arange(max(lengths), device=index.device) < torch.tensor(lengths, device=index.device)[:, None]
        ids = None if self.ids is None else self.ids[index, : max(lengths)]
        note_auxiliary(memory, hidden, state, keep)
        left = None if leaving is None else [leaving[row] for row in rows]
        after, logs = self._write(memory, rows, hidden, state, keep, memory.known(ids, left))
        if not everyone:
            after = put(self.state, index, after)
        counts = tuple(0 if row in rows else count for row, count in enumerate(self.counts))
        written = tuple(count + (row in rows) for row, count in enumerate(self.written))
        stream = replace(self, state=after, **self._waiting(index, counts), counts=counts, written=written, logs=logs)
        return stream.holding(self.held)

    def passed(self, memory: Memory, pieces: Sequence[Piece], time: int, keep_bt: Bool[Tensor, "b t"] | None) -> Stream:
        """The stream after a call of which the memory writes nothing: its tokens are counted."""
        stream, nothing = self, self.waiting.new_zeros(self.batch, time, self.waiting.shape[-1])
        for piece in pieces:
            part = slice(piece.start, piece.stop)
            stream = stream.reset(memory, piece.fresh) if piece.fresh else stream
            stream = stream.append(nothing[:, part], None if keep_bt is None else keep_bt[:, part])
            stream = stream.commit(memory, piece.ended)
        return stream

    def whole(self, memory: Memory, hidden_btd: Float[Tensor, "b t d"], ids_bt: Int[Tensor, "b t"]) -> Stream:
        """Writes one more segment to every row, which comes at once; no row may have tokens waiting."""
        length = hidden_btd.shape[1]
        came = replace(self, counts=(length,) * self.batch, seen=tuple(count + length for count in self.seen))
        after, logs = came._write(memory, range(self.batch), hidden_btd, self.state, None, memory.known(ids_bt))
        return replace(self, logs=logs).after(after, 1, length).read(ids_bt, None)

    def _write(
        self,
        memory: Memory,
        rows: Sequence[int],
        hidden: Tensor,
        state: State,
        keep: Tensor | None,
        known: dict[str, Any],
    ) -> tuple[State, tuple[Log | None, ...]]:
        """The state after the running segment of `rows`, which are those of the tensors, and the logs after it."""
        logged = [(place, row) for place, row in enumerate(rows) if self.logs[row] is not None]
        if not logged:
            return memory.write(hidden, state, keep, **known), self.logs
        after, found = memory.write_and_tell(hidden, state, keep, **known)
        told = [None] * len(logged) if found is None else told_of(found, [place for place, _ in logged])
        logs = list(self.logs)
        for (_, row), each in zip(logged, told, strict=True):
            log, seen = logs[row], self.seen[row]
            assert log is not None
            logs[row] = log.note(self.written[row] + 1, seen - self.counts[row], seen - 1, each)
        return after, tuple(logs)

    def read(self, ids_bt: Int[Tensor, "b t"] | None, keep_bt: Bool[Tensor, "b t"] | None) -> Stream:
        """The ids of the tokens that joined last, for rows whose log keeps the text."""
        if ids_bt is None or all(log is None or log.text is None for log in self.logs):
            return self
        logs = list(self.logs)
        for row, log in enumerate(logs):
            if log is not None and log.text is not None:
                ids = ids_bt[row] if keep_bt is None else ids_bt[row][keep_bt[row].to(ids_bt.device)]
                logs[row] = log.read(self.seen[row] - len(ids), ids.numpy(force=True))
        return replace(self, logs=tuple(logs))

    def after(self, state: State, segments: int, segment_length: int) -> Stream:
        """The stream when `segments` whole segments were written to every row elsewhere, giving `state`."""
        return replace(
            self,
            state=state,
            written=tuple(count + segments for count in self.written),
            seen=tuple(count + segments * segment_length for count in self.seen),
        )

    def reset(self, memory: Memory, rows: Sequence[int]) -> Stream:
        """`rows` begin again: initial state, nothing waiting, nothing counted."""
        first = memory.init_state(self.batch, self.waiting.device)
        index = torch.tensor(list(rows), device=self.waiting.device)
        state = put(self.state, index, select(first, index))
        counts, written, seen = (
            tuple(0 if row in rows else value for row, value in enumerate(values))
            for values in (self.counts, self.written, self.seen)
        )
        logs = tuple(log.begun() if log is not None and row in rows else log for row, log in enumerate(self.logs))
        banks = tuple(bank.emptied() if bank and row in rows else bank for row, bank in enumerate(self.banks))
        ledgers: Any = (counts, written, seen, logs, banks)
        return replace(Stream(state, self.waiting, *ledgers), **self._waiting(index, counts)).holding(self.held)

    def _waiting(self, emptied: Tensor, counts: Sequence[int]) -> dict[str, Any]:
        # a copy filled with zeros, no view: what a row forgot stays neither in memory nor in a file
        return self._waits(lambda tensor: tensor[:, : max(counts)].index_fill(0, emptied, 0))

    def _waits(self, function: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """What is made of the tokens that wait: of their hidden states, and of their ids where there are any."""
        return {"waiting": function(self.waiting), "ids": None if self.ids is None else function(self.ids)}

    @property
    def _ledgers(self) -> tuple[tuple[Any, ...], ...]:
        return self.counts, self.written, self.seen, self.logs, self.banks, self.held

    def select(self, rows: Sequence[int]) -> Stream:
        """Rows by index, repeats allowed."""
        index = torch.tensor(list(rows), dtype=torch.long, device=self.waiting.device)
        ledgers: list[Any] = [tuple(values[row] for row in rows) for values in self._ledgers]
        waiting = self._waits(lambda tensor: tensor[:, : max(ledgers[0], default=0)][index])
        return replace(Stream(select(self.state, index), self.waiting, *ledgers), **waiting)

    def repeat(self, times: int) -> Stream:
        """Every row `times` times in place."""
        ledgers: Any = (tuple(value for value in values for _ in range(times)) for values in self._ledgers)
        waiting = self._waits(lambda tensor: tensor.repeat_interleave(times, 0))
        return replace(Stream(repeat(self.state, times), self.waiting, *ledgers), **waiting)

    def detach(self) -> Stream:
        """The same stream outside any gradient: where truncated backpropagation is cut."""
        return self.with_tensors(detach(self.tensors()))

    @staticmethod
    def concatenate(streams: Sequence[Stream]) -> Stream:
        """Several batches of streams as one."""
        waiting = torch.cat(level([stream.waiting for stream in streams]))
        given = [stream.ids for stream in streams if stream.ids is not None]
        ids = torch.cat(level(given)) if given else None
        ledgers: Any = (
            tuple(itertools.chain(*each)) for each in zip(*(stream._ledgers for stream in streams), strict=True)
        )
        return Stream(concatenate([stream.state for stream in streams]), waiting, *ledgers, ids=ids)


_collected = threading.local()


@contextlib.contextmanager
def collecting(losses: list[Tensor] | None) -> Iterator[None]:
    """Within it, auxiliary losses of what this thread writes are collected; with None they are not even computed."""
    outer = getattr(_collected, "losses", None)
    _collected.losses = losses
    try:
        yield
    finally:
        _collected.losses = outer


def note_auxiliary(memory: Memory, hidden_btd: Tensor, state: State, keep_bt: Tensor | None = None) -> None:
    """Collects the auxiliary loss of a write that is about to happen, where someone collects."""
    losses = getattr(_collected, "losses", None)
    if losses is None:
        return
    with torch.enable_grad():
        loss = memory.auxiliary(hidden_btd, state, keep_bt)
    if loss is not None:
        losses.append(loss)


def check_finite(hidden_btd: Tensor, keep_bt: Tensor | None, site: Site) -> None:
    """Raises `StateError` when a real token's hidden state is NaN or infinite, before anything is written."""
    bad = ~torch.isfinite(hidden_btd).all(-1)
    if keep_bt is not None:
        bad = bad & keep_bt
    if bad.any():
        row, time = bad.nonzero()[0].tolist()
        where = {"input": f"entering block {site.layer}", "logits": "entering the head"}.get(
            site.at, f"after block {site.layer}"
        )
        raise StateError(
            f"hidden states {where} are NaN or infinite (first at row {row}, token {time} of the call), "
            "so nothing was written; check the input and the base's dtype (float16 overflows where bfloat16 does not)"
        )
