"""Keys and values of what was read, kept for good: chunks that are appended to and never copied by a write.

A bank belongs to one stream and is immutable: `append` gives another that shares all chunks with it. The last chunk has
room behind what a bank knows of; the first who appends fills that room in place, and whoever else appends to the same
bank, a fork, gets a chunk of its own.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

CHUNK = 4096
"""Tokens of a full chunk."""
LEAST = 256
"""Tokens that the first chunk of a bank has room for; until it is full, chunks double."""


class Chunk:
    """Room for `room` tokens, of which `used` are there: `keys [l, k, room, s]` and `values [l, k, room, v]`."""

    def __init__(self, keys: Tensor, values: Tensor, room: int) -> None:
        with torch.inference_mode(False):  # whoever comes later may write outside of it
            self.keys, self.values = (
                torch.empty(*new.shape[:2], room, new.shape[3], dtype=new.dtype, device=new.device)
                for new in (keys, values)
            )
        self.room, self.used = room, 0
        self.lock = threading.Lock()

    def fill(self, known: int, keys: Tensor, values: Tensor) -> bool:
        """Puts tokens behind the `known` first ones; False, and nothing done, where somebody else has done so, or there
        is no room.
        """
        stop = known + keys.shape[2]
        with self.lock:
            if self.used != known or stop > self.room:
                return False
            self.used = stop
        self.keys[:, :, known:stop], self.values[:, :, known:stop] = keys, values
        return True


@dataclass(frozen=True)
class Bank:
    """The first `length` tokens in `chunks`, of which all but the last are full. `positions [n]` int64 says where in
    the stream they stood.
    """

    chunks: tuple[Chunk, ...] = ()
    length: int = 0
    positions: Int[Tensor, " n"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))

    def __reduce__(self) -> tuple[Any, ...]:
        return Bank.of, (self.tensors(),)  # a chunk may hold what forks have read

    def append(
        self,
        keys_lkns: Float[Tensor, "l k n s"],
        values_lknv: Float[Tensor, "l k n v"],
        positions_n: Int[Tensor, " n"] | None = None,
    ) -> Bank:
        """The bank with `n` more tokens, by default those behind its last one. The first ones decide the dtype."""
        bank, start, count = self, 0, keys_lkns.shape[2]
        keys_lkns, values_lknv = keys_lkns.detach(), values_lknv.detach()
        if self.chunks:
            keys_lkns, values_lknv = keys_lkns.to(self.chunks[0].keys), values_lknv.to(self.chunks[0].values)
        if positions_n is None:
            positions_n = torch.arange(count) + (int(self.positions[-1]) + 1 if self.length else 0)
        while start < count:
            known = bank.length % CHUNK
            stop = start + min(count - start, CHUNK - known)
            keys, values = keys_lkns[:, :, start:stop], values_lknv[:, :, start:stop]
            chunks = bank.chunks
            if not known or not chunks[-1].fill(known, keys, values):
                room = CHUNK if bank.length >= CHUNK else LEAST
                while room < known + stop - start:
                    room *= 2
                own = Chunk(keys, values, room)
                if known:
                    own.fill(0, chunks[-1].keys[:, :, :known], chunks[-1].values[:, :, :known])
                own.fill(known, keys, values)
                chunks = (*chunks[:-1], own) if known else (*chunks, own)
            bank, start = Bank(chunks, bank.length + stop - start), stop
        return replace(bank, positions=torch.cat([self.positions, positions_n.cpu()]))

    def without(self, first: int, last: int) -> Bank:
        """The bank without the tokens that stood at `first` to `last`, in chunks of its own."""
        stay = (self.positions < first) | (self.positions > last)
        if not stay.any():
            return Bank()
        keys, values = (tensor[0][:, :, stay.to(tensor.device)] for tensor in self._tensors())
        return Bank().append(keys, values, self.positions[stay])

    def zeroed(self) -> Bank:
        """As many tokens, all of them zero."""
        if not self.length:
            return self
        keys, values = (torch.zeros_like(tensor[0]) for tensor in self._tensors())
        return Bank().append(keys, values, self.positions)

    def keys(self, place: int) -> list[Float[Tensor, "k n s"]]:
        """The keys of the `place`-th block that is kept, chunk by chunk."""
        return [chunk.keys[place, :, :there] for chunk, there in self._parts()]

    def values(self, place: int) -> list[Float[Tensor, "k n v"]]:
        """Its values, likewise."""
        return [chunk.values[place, :, :there] for chunk, there in self._parts()]

    def first(self, place: int, count: int) -> tuple[Float[Tensor, "k n s"], Float[Tensor, "k n v"]]:
        """Keys and values of the first `count` tokens, or of as many as there are."""
        keys, values = (
            torch.cat([part[:, : count - start] for start, part in zip(range(0, count, CHUNK), parts, strict=False)], 1)
            for parts in (self.keys(place), self.values(place))
        )
        return keys, values

    def runs(
        self, place: int, start_ktm: Int[Tensor, "k t m"], run: int
    ) -> tuple[Float[Tensor, "k t n s"], Float[Tensor, "k t n v"]]:
        """Keys and values of runs of `run` tokens from the given starts on, `n = m * run`, head by head. A run that
        begins at a multiple of `run` lies in one chunk, as `run` divides `CHUNK`; what is behind the end is anything.
        """
        chunk_ktm, found = start_ktm // CHUNK, []
        for parts in (self.keys(place), self.values(place)):
            whole = parts[0].new_empty(*start_ktm.shape, run, parts[0].shape[2])
            for number in chunk_ktm.unique().tolist() if len(parts) > 1 else [0]:
                here = (chunk_ktm == number).nonzero(as_tuple=True)
                whole[here] = _rows(parts[number], here[0], start_ktm[here] - number * CHUNK, run)
            found.append(whole.flatten(2, 3))
        return found[0], found[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the tokens that are there."""
        parts = (tensor[:, :, :there] for chunk, there in self._parts() for tensor in (chunk.keys, chunk.values))
        return sum(part.numel() * part.element_size() for part in parts)

    def tensors(self) -> dict[str, Tensor]:
        """All of it: `keys [1, l, k, n, s]`, `values [1, l, k, n, v]`, `positions [1, n]`; nothing of an empty bank."""
        if not self.length:
            return {}
        keys, values = self._tensors()
        return {"keys": keys, "values": values, "positions": self.positions[None]}

    @staticmethod
    def of(tensors: dict[str, Tensor]) -> Bank:
        """The inverse of `tensors`."""
        if not tensors:
            return Bank()
        return Bank().append(tensors["keys"][0], tensors["values"][0], tensors["positions"][0])

    def _parts(self) -> list[tuple[Chunk, int]]:
        return [(chunk, min(CHUNK, self.length - first * CHUNK)) for first, chunk in enumerate(self.chunks)]

    def _tensors(self) -> tuple[Tensor, Tensor]:
        parts = self._parts()
        keys = torch.cat([chunk.keys[:, :, :there] for chunk, there in parts], 2)
        values = torch.cat([chunk.values[:, :, :there] for chunk, there in parts], 2)
        return keys[None], values[None]


def _rows(part_kns: Tensor, head: Tensor, start: Tensor, run: int) -> Tensor:
    """`[len(start), run, s]`: the runs of some heads; at the end of a chunk the last token again."""
    place = (start[:, None] + torch.arange(run, device=start.device)).clamp_max(part_kns.shape[1] - 1)
    return part_kns[head[:, None], place]
