"""The history of a stream: which segments were written when, into which slots or engrams, and by which of their tokens.

A `Log` belongs to one row of a `Stream` and is carried with it, so it follows forks, batches, beams and failures as the
memory's state does, and never has a part in what a model computes. It is bounded (`WRITES`, `PER_PLACE`, `ENTRIES`):
what is kept of the past is what the memory still holds most of.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from mnemic.memory import Attribution
from mnemic.state import State, StateError

WRITES = 128
"""Writes that a log lists; of more, every second one of the older half goes, unless some place still holds it."""
PER_PLACE, SHARED = 3, 64
"""Writes that a log knows of each slot or engram, those of which it holds most: of few places, as many as make 64."""
ENTRIES = 1024
"""Pairs of a write and a place in all."""
TOKENS, FAINT = 4, 0.05
"""Tokens named for each of them: those that weighed most, down to a twentieth of the first."""
LEAST = 0.01
"""The share of a place below which a write is not worth an entry."""
CHUNK = 1024


@dataclass(frozen=True, eq=False)
class Log:
    """The history of one stream. Immutable.

    `writes [n, 5]`: number from 1, first and last position in the stream, time (UTC, seconds since 1970), and how many
    places there were after it (0 where the memory does not tell, or places never go).
    `entries [m, 2 + TOKENS]`: number of a write, place, positions of tokens (-1 for none). `weights [m, 2 + TOKENS]`:
    the share of the place that came with the write, how much of it later writes left there, the tokens' weights.
    `text`: ids of all tokens, where they are kept; -1 for those that came as embeddings.
    """

    writes: np.ndarray = field(default_factory=partial(np.zeros, (0, 5), np.int64))
    entries: np.ndarray = field(default_factory=partial(np.zeros, (0, 2 + TOKENS), np.int64))
    weights: np.ndarray = field(default_factory=partial(np.zeros, (0, 2 + TOKENS), np.float32))
    text: tuple[np.ndarray, ...] | None = None

    def note(self, number: int, first: int, last: int, told: Told | None = None) -> Log:
        """The log after write `number`, of the tokens at `first` to `last`."""
        alive = 0 if told is None or told.alive is None else int((told.alive >= 0).sum())
        now = np.array([[number, first, last, int(time.time()), alive]], np.int64)
        writes, entries, weights = np.concatenate([self.writes, now]), self.entries, self.weights
        if told is not None:
            entries, weights = _entered(entries, weights, number, first, told)
        return replace(self, writes=_thinned(writes, entries), entries=entries, weights=weights)

    def read(self, position: int, ids: np.ndarray) -> Log:
        """The log after the tokens `ids` from `position` on; what came before and is not known is marked so."""
        if self.text is None:
            return self
        missing = position - sum(map(len, self.text))
        ids = np.concatenate([np.full(max(0, missing), -1), ids]).astype(np.int32)
        if self.text and len(self.text[-1]) < CHUNK:
            return replace(self, text=(*self.text[:-1], np.concatenate([self.text[-1], ids])))
        return replace(self, text=(*self.text, ids))

    def without(self, first: int, last: int) -> Log:
        """The log without the text at positions `first` to `last`: these are marked as not known."""
        if self.text is None:
            return self
        ids = np.concatenate([np.zeros(0, np.int32), *self.text])
        ids[first : last + 1] = -1
        return replace(self, text=(ids,))

    def begun(self) -> Log:
        """An empty log, which keeps the text if this one does."""
        return Log(text=None if self.text is None else ())

    @property
    def ids(self) -> list[int] | None:
        """Ids of all tokens from the first on, None where they are not kept."""
        return None if self.text is None else [int(token) for part in self.text for token in part]

    def last(self, count: int) -> np.ndarray | None:
        """Ids of the last `count` tokens; None where they are not kept, or fewer are."""
        if self.text is None:
            return None
        parts, there = [], 0
        for part in reversed(self.text):
            if there >= count:
                break
            parts.append(part)
            there += len(part)
        ids = np.concatenate([np.zeros(0, np.int32), *reversed(parts)])
        return ids[len(ids) - count :] if there >= count else None

    def records(self) -> list[dict[str, Any]]:
        """Plain values, a record a write, oldest first; see `mnemic.Session.history`."""
        places: dict[int, list[dict[str, Any]]] = {}
        for entry, weight in zip(self.entries.tolist(), self.weights.tolist(), strict=True):
            found = {
                "place": entry[1],
                "share": round(weight[0], 4),
                "left": round(weight[1], 4),
                "tokens": [position for position in entry[2:] if position >= 0],
            }
            found["weights"] = [round(value, 4) for value in weight[2 : 2 + len(found["tokens"])]]
            places.setdefault(entry[0], []).append(found)
        names = ("number", "first", "last", "time", "alive")
        return [
            {**dict(zip(names, row, strict=True)), "places": places.get(row[0], [])} for row in self.writes.tolist()
        ]

    # --- in a file ---------------------------------------------------------------------------------------------------

    def tensors(self) -> State:
        """The log as tensors, for a file: numbers, since text would cost more than the memory's own state."""
        tables = {"writes": self.writes, "entries": self.entries, "weights": self.weights}
        if self.text is not None:
            tables["text"] = np.concatenate([np.zeros(0, np.int32), *self.text])
        return {name: torch.from_numpy(np.ascontiguousarray(table)) for name, table in tables.items()}

    @staticmethod
    def of(tensors: State) -> Log:
        """The inverse of `tensors`; raises `StateError` for what it never gives."""
        columns = {"writes": (5, torch.int64), "entries": (2 + TOKENS, torch.int64)}
        columns["weights"] = (2 + TOKENS, torch.float32)
        for name, (width, dtype) in columns.items():
            table = tensors.get(name)
            if table is None or table.ndim != 2 or table.shape[1] != width or table.dtype != dtype:
                found = "none" if table is None else f"{list(table.shape)} of {table.dtype}"
                raise StateError(f"the history's {name} should be [n, {width}] of {dtype}, and there is {found}")
        writes, entries, weights = (tensors[name].numpy(force=True) for name in columns)
        text = tensors.get("text")
        if text is not None and (text.ndim != 1 or text.dtype != torch.int32):
            raise StateError(f"the history's text should be [n] of int32, and is {list(text.shape)} of {text.dtype}")
        sound = (
            len(writes) <= WRITES + ENTRIES
            and len(weights) == len(entries) <= ENTRIES
            and bool((np.diff(writes[:, 0]) > 0).all() and (writes >= 0).all() and (entries >= -1).all())
            and bool(np.isin(entries[:, 0], writes[:, 0]).all() and np.isfinite(weights).all())
        )
        if not sound:
            raise StateError("the history's numbers do not fit each other: it was edited or is of another version")
        return Log(writes, entries, weights, None if text is None else (text.numpy(force=True),))


@dataclass(frozen=True, eq=False)
class Told:
    """What a memory told of one row's write: `place` and `share [n]`, the offsets in the segment and the weights
    `[n, k]` of the tokens that weighed most, and all places that are still there (None: every one).
    """

    place: np.ndarray
    share: np.ndarray
    offset: np.ndarray
    weight: np.ndarray
    alive: np.ndarray | None


def told_of(found: Attribution, rows: Sequence[int]) -> list[Told]:
    """What a memory told of some rows of a write: the tokens that weighed most, on the CPU."""
    weight, offset = found.weight.float().topk(min(TOKENS, found.weight.shape[-1]), dim=-1)
    place, share, offset, weight = (
        each.numpy(force=True) for each in (found.place, found.share.float(), offset, weight)
    )
    alive = None if found.alive is None else found.alive.numpy(force=True)
    return [Told(place[b], share[b], offset[b], weight[b], None if alive is None else alive[b]) for b in rows]


def _entered(
    entries: np.ndarray, weights: np.ndarray, number: int, first: int, told: Told
) -> tuple[np.ndarray, np.ndarray]:
    """The entries after a write: less is left of the earlier ones where it went, and places that are gone go."""
    there = told.place >= 0
    place, share = told.place[there], told.share[there].clip(0, 1)
    if told.alive is not None:
        kept = np.isin(entries[:, 1], told.alive)
        entries, weights = entries[kept], weights[kept]
    if len(entries) and len(place):
        order = np.argsort(place)
        found = order[np.searchsorted(place, entries[:, 1], sorter=order).clip(0, len(place) - 1)]
        covered = np.where(place[found] == entries[:, 1], share[found], 0)
        weights = weights.copy()
        weights[:, 1] *= 1 - covered
    new = share >= LEAST
    offset, weight, count = told.offset[there][new], told.weight[there][new], int(new.sum())
    named = slice(2, 2 + offset.shape[1])
    fresh, values = np.full((count, 2 + TOKENS), -1, np.int64), np.zeros((count, 2 + TOKENS), np.float32)
    fresh[:, 0], fresh[:, 1] = number, place[new]
    clear = (weight > 0) & (weight >= FAINT * weight[:, :1])
    fresh[:, named] = np.where(clear, offset + first, -1)
    values[:, :2], values[:, named] = share[new][:, None], weight * clear
    entries, weights = np.concatenate([entries, fresh]), np.concatenate([weights, values])
    return _most_left(entries, weights)


def _most_left(entries: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each place the entries of which most is left, and of all of them no more than `ENTRIES`."""
    left = weights[:, 1]
    order = np.lexsort((-entries[:, 0], -left, entries[:, 1]))
    place = entries[order, 1]
    begins = np.flatnonzero(np.diff(place, prepend=-2))
    rank = np.arange(len(order)) - np.repeat(begins, np.diff(begins, append=len(order)))
    most = max(PER_PLACE, SHARED // max(1, len(begins)))
    chosen = order[(rank < most) & (left[order] >= LEAST)]
    if len(chosen) > ENTRIES:
        chosen = chosen[np.lexsort((-entries[chosen, 0], -left[chosen]))[:ENTRIES]]
    chosen = np.sort(chosen)
    return entries[chosen], weights[chosen]


def _thinned(writes: np.ndarray, entries: np.ndarray) -> np.ndarray:
    """No more than `WRITES` besides those that some place holds."""
    held = np.isin(writes[:, 0], entries[:, 0])
    while int((~held).sum()) > WRITES:
        free = np.flatnonzero(~held)
        # the first and the newest stay, so that a log spans the whole stream
        gone = free[1 : len(free) // 2 : 2]
        writes, held = np.delete(writes, gone, 0), np.delete(held, gone)
    return writes
