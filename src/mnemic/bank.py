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
"""Tokens of a chunk."""


class Chunk:
    """Room for `CHUNK` tokens, of which `used` are there: `keys [l, k, CHUNK, s]` and `values [l, k, CHUNK, v]`."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = (new.new_empty(*new.shape[:2], CHUNK, new.shape[3]) for new in (keys, values))
        self.used = 0
        self.lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return _chunk, (self.keys[:, :, : self.used].clone(), self.values[:, :, : self.used].clone())

    def fill(self, known: int, keys: Tensor, values: Tensor) -> bool:
        """Puts tokens behind the `known` first ones; False, and nothing done, where somebody else has done so."""
        with self.lock:
            if self.used != known:
                return False
            self.used = known + keys.shape[2]
        self.keys[:, :, known : self.used], self.values[:, :, known : self.used] = keys, values
        return True


def _chunk(keys: Tensor, values: Tensor) -> Chunk:
    chunk = Chunk(keys, values)
    chunk.fill(0, keys, values)
    return chunk


@dataclass(frozen=True)
class Bank:
    """The first `length` tokens in `chunks`, of which all but the last are full. `positions [n]` int64 says where in
    the stream they stood.
    """

    chunks: tuple[Chunk, ...] = ()
    length: int = 0
    positions: Int[Tensor, " n"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))

    def append(
        self,
        keys_lkns: Float[Tensor, "l k n s"],
        values_lknv: Float[Tensor, "l k n v"],
        positions_n: Int[Tensor, " n"] | None = None,
    ) -> Bank:
        """The bank with `n` more tokens, by default those behind its last one."""
        bank, start, count = self, 0, keys_lkns.shape[2]
        if positions_n is None:
            positions_n = torch.arange(count) + (int(self.positions[-1]) + 1 if self.length else 0)
        keys_lkns, values_lknv = keys_lkns.detach(), values_lknv.detach()
        while start < count:
            known = bank.length % CHUNK
            stop = start + min(count - start, CHUNK - known)
            keys, values = keys_lkns[:, :, start:stop], values_lknv[:, :, start:stop]
            chunks = bank.chunks
            if not known:
                chunks = (*chunks, Chunk(keys, values))
            if not chunks[-1].fill(known, keys, values):
                last = chunks[-1]
                own = _chunk(last.keys[:, :, :known], last.values[:, :, :known])
                own.fill(known, keys, values)
                chunks = (*chunks[:-1], own)
            bank, start = Bank(chunks, bank.length + stop - start), stop
        return replace(bank, positions=torch.cat([self.positions, positions_n.cpu()]))

    def without(self, first: int, last: int) -> Bank:
        """The bank without the tokens that stood at `first` to `last`, in chunks of its own."""
        stay = (self.positions < first) | (self.positions > last)
        kept = {name: tensor[:, :, :, stay.to(tensor.device)] for name, tensor in self._tensors().items()}
        return Bank().append(kept["keys"][0], kept["values"][0], self.positions[stay]) if stay.any() else Bank()

    def first(self, place: int, count: int) -> tuple[Float[Tensor, "k n s"], Float[Tensor, "k n v"]]:
        """Keys and values of the first `count` tokens, or of as many as there are."""
        parts = self._parts()[: -(-count // CHUNK)]
        keys, values = ([tensor[place, :, :there] for tensor, there in each] for each in _both(parts))
        return torch.cat(keys, 1)[:, :count], torch.cat(values, 1)[:, :count]

    def keys(self, place: int) -> list[Float[Tensor, "k n s"]]:
        """The keys of the `place`-th block that is kept, chunk by chunk."""
        return [tensor[place, :, :there] for tensor, there in _both(self._parts())[0]]

    def values(self, place: int) -> list[Float[Tensor, "k n v"]]:
        """Its values, likewise."""
        return [tensor[place, :, :there] for tensor, there in _both(self._parts())[1]]

    def _parts(self) -> list[tuple[Chunk, int]]:
        return [(chunk, min(CHUNK, self.length - first * CHUNK)) for first, chunk in enumerate(self.chunks)]

    def runs(
        self, place: int, start_ktm: Int[Tensor, "k t m"], run: int
    ) -> tuple[Float[Tensor, "k t n s"], Float[Tensor, "k t n v"]]:
        """Keys and values of runs of `run` tokens from the given starts on, `n = m * run`, head by head. A run that
        begins at a multiple of `run` lies in one chunk, as `run` divides `CHUNK`; what is behind the end is anything.
        """
        found = []
        for parts in (self.keys(place), self.values(place)):
            if len(parts) == 1:
                found.append(_gather(parts[0], start_ktm, run))
                continue
            chunk_ktm = start_ktm // CHUNK
            whole = parts[0].new_empty(*start_ktm.shape, run, parts[0].shape[2])
            for number in chunk_ktm.unique().tolist():
                here = (chunk_ktm == number).nonzero(as_tuple=True)
                whole[here] = _rows(parts[number], here[0], start_ktm[here] - number * CHUNK, run)
            found.append(whole.flatten(2, 3))
        return found[0], found[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the tokens that are there."""
        parts = (tensor[:, :, :there] for each in _both(self._parts()) for tensor, there in each)
        return sum(part.numel() * part.element_size() for part in parts)

    def tensors(self) -> dict[str, Tensor]:
        """All of it: `keys [1, l, k, n, s]`, `values [1, l, k, n, v]`, `positions [1, n]`; nothing of an empty bank."""
        return {**self._tensors(), "positions": self.positions[None]} if self.length else {}

    def _tensors(self) -> dict[str, Tensor]:
        keys, values = ([tensor[:, :, :there] for tensor, there in each] for each in _both(self._parts()))
        return {"keys": torch.cat(keys, 2)[None], "values": torch.cat(values, 2)[None]}

    def zeroed(self) -> Bank:
        """As many tokens, all of them zero."""
        return Bank.of({name: torch.zeros_like(tensor) for name, tensor in self._tensors().items()})

    @staticmethod
    def of(tensors: dict[str, Tensor]) -> Bank:
        """The inverse of `tensors`."""
        if not tensors:
            return Bank()
        positions = tensors["positions"][0] if "positions" in tensors else None
        return Bank().append(tensors["keys"][0], tensors["values"][0], positions)


def _both(parts: list[tuple[Chunk, int]]) -> tuple[list[tuple[Tensor, int]], list[tuple[Tensor, int]]]:
    return [(chunk.keys, there) for chunk, there in parts], [(chunk.values, there) for chunk, there in parts]


def _gather(part_kns: Tensor, start_ktm: Tensor, run: int) -> Tensor:
    head = torch.arange(len(part_kns), device=part_kns.device)[:, None, None].expand(start_ktm.shape)
    flat = _rows(part_kns, head.reshape(-1), start_ktm.reshape(-1), run)
    return flat.view(*start_ktm.shape, run, part_kns.shape[2]).flatten(2, 3)


def _rows(part_kns: Tensor, head: Tensor, start: Tensor, run: int) -> Tensor:
    """`[len(start), run, s]`: the runs of some heads; at the end of a chunk the last token again."""
    place = (start[:, None] + torch.arange(run, device=start.device)).clamp_max(part_kns.shape[1] - 1)
    return part_kns[head[:, None], place]
