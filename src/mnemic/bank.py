"""Keys and values of what was read, kept for good: chunks that are appended to, and copied only into more room.

A bank belongs to one stream and is immutable: `append` gives another that shares all chunks with it. The last chunk has
room behind what a bank knows of; the first who appends fills that room in place, and whoever else appends to the same
bank, a fork, gets a chunk of its own and shares what is whole, unless what it reads is as long as that: so a bank has
few chunks, however often forks read on first.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mnemic.forking import Lock
from mnemic.packing import Stored, pack, parts, products, unpack
from mnemic.spilling import Spill
from mnemic.state import State, nbytes

CHUNK = 65_536
"""Tokens of a full chunk. Within one, runs are found by a single look-up."""
LEAST = 256
"""Tokens that a chunk has room for at first, a divisor of every room."""
STEP = 16_384
"""A chunk that is full but for `CHUNK` is copied into one of twice the room, or of that much more."""

Check = Callable[[str, Tensor], None]
"""Raises `StateError` for a tensor, by its name in a chunk, that is not as it was written."""


class Chunk:
    """Room for `room` tokens, of which `used` are there: `tensors` `[l, k, room, ...]` by name. What is `made` of
    `LEAST` tokens each that are there, by what it is, stays as it is: means of keys, checksums.

    One that is `sealed` takes no more: its tensors may lie `in_file`, or be filled only when they are used, as
    `check(name, tensor)` is called before.
    """

    def __init__(self, tensors: State, check: Check | None = None, *, sealed: bool, in_file: bool = False) -> None:
        self.tensors, self.check, self.sealed, self.in_file = tensors, check, sealed, in_file
        self.room = length(tensors)
        self.used = self.room if sealed else 0
        self.lock = Lock()
        self.made: dict[Any, list[Any]] = {}

    @staticmethod
    def empty(like: State, count: int) -> Chunk:
        """One with room for `count` tokens such as these."""
        room = LEAST
        while room < count:
            room += min(room, STEP)
        with torch.inference_mode(False):  # whoever comes later may write outside of it
            return Chunk(
                {name: new.new_zeros(*new.shape[:2], room, new.shape[3]) for name, new in like.items()}, sealed=False
            )

    def __getitem__(self, name: str) -> Tensor:
        """What is used of it."""
        if self.check is not None:
            self.check(name, self.tensors[name])
        return self.tensors[name]

    def fill(self, known: int, new: State) -> bool:
        """Puts tokens behind the `known` first ones; False, and nothing done, where somebody else has done so, or there
        is no room.
        """
        stop = known + length(new)
        with self.lock:
            if self.sealed or self.used != known or stop > self.room:
                return False
            self.used = stop
        for name, tensor in new.items():
            self.tensors[name][:, :, known:stop] = tensor
        return True

    def part(self, start: int, stop: int, names: Iterable[str] | None = None) -> State:
        """Some of its tokens."""
        return {name: self[name][:, :, start:stop] for name in names or self.tensors}

    def copy(self, parts: Sequence[tuple[Chunk, int, int]]) -> None:
        """Fills an empty one with tokens of others, each from a first one on, of which it has whole `LEAST` before, to
        before another; and with what was made of them.
        """
        for chunk, start, stop in parts:
            self.fill(self.used, chunk.part(start, stop))
        self.take_made(parts)

    def take_made(self, parts: Sequence[tuple[Chunk, int, int]]) -> None:
        """Takes over what was made of tokens of others, of which it is made."""
        for key in {key for chunk, *_ in parts for key in tuple(chunk.made)}:  # another thread may make more
            made = self.made[key] = []
            for chunk, start, stop in parts:
                whole = chunk.made.get(key, [])[start // LEAST : stop // LEAST]
                made += whole
                if len(whole) < stop // LEAST - start // LEAST:
                    break


@dataclass(frozen=True)
class Bank:
    """The first `counts[i]` tokens of each of the `chunks`, whole `LEAST` tokens of all but the last. `positions [n]`
    int64 says where in the stream they stood. They are packed, as `stored` says, when they are appended, and once; a
    bank that packs gives float32. With `spill` chunks lie in files where they would take more RAM than that allows.
    """

    chunks: tuple[Chunk, ...] = ()
    counts: tuple[int, ...] = ()
    positions: Int[Tensor, " n"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    stored: Stored = "base"
    spill: Spill | None = None
    joined: dict[Any, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def length(self) -> int:
        """Tokens that are there."""
        return sum(self.counts)

    def spans(self) -> list[tuple[Chunk, int]]:
        """The chunks, each with how many of its tokens are there."""
        return list(zip(self.chunks, self.counts, strict=True))

    @property
    def heads(self) -> int:
        """Heads of keys."""
        return self.chunks[0].tensors["keys"].shape[1]

    def __reduce__(self) -> tuple[Any, ...]:
        return Bank.of, (self.tensors(), self.stored, self.spill)  # a chunk may hold what forks have read

    def append(
        self,
        keys_lkns: Float[Tensor, "l k n s"],
        values_lknv: Float[Tensor, "l k n v"],
        positions_n: Int[Tensor, " n"] | None = None,
    ) -> Bank:
        """The bank with `n` more tokens, by default those behind its last one. The first ones decide the dtype."""
        if positions_n is None:
            positions_n = torch.arange(keys_lkns.shape[2]) + (int(self.positions[-1]) + 1 if self.length else 0)
        keys = pack("keys", keys_lkns.detach(), self.stored)
        return self._append(keys | pack("values", values_lknv.detach(), self.stored), positions_n)

    def _append(self, new: State, positions_n: Int[Tensor, " n"]) -> Bank:
        """`append` for tokens as they are stored."""
        if self.chunks:
            new = {name: tensor.to(self.chunks[0].tensors[name]) for name, tensor in new.items()}
        chunks, counts, begin, end = list(self.chunks), list(self.counts), 0, length(new)
        while begin < end:
            goes_on = counts and (counts[-1] % LEAST if chunks[-1].sealed else counts[-1] < CHUNK)
            last, known = (chunks.pop(), counts.pop()) if goes_on else (None, 0)
            count = min(end - begin, CHUNK - known % CHUNK)
            some = {name: tensor[:, :, begin : begin + count] for name, tensor in new.items()}
            if last is None or not last.fill(known, some):
                # where a fork has read on, it has another end, and so has what is sealed; else it has no room
                ended = last is not None and (last.sealed or last.used != known)
                share = known // LEAST * LEAST if ended else 0
                before, size = [] if last is None else [(last, share, known)], known - share + count
                if last is not None and share:
                    chunks.append(last)
                    counts.append(share)
                # those before that are no longer are copied too, or every fork would leave one for good
                while counts and not chunks[-1].sealed and counts[-1] <= size <= CHUNK - counts[-1]:
                    before.insert(0, (chunks.pop(), 0, counts[-1]))
                    size += counts.pop()
                last, known = Chunk.empty(some, size), size - count
                last.copy(before)
                last.fill(known, some)
            chunks.append(last)
            counts.append(known + count)
            begin += count
        positions = torch.cat([self.positions, positions_n.cpu()])
        return replace(self, chunks=tuple(chunks), counts=tuple(counts), positions=positions)._spilled()

    def spilling(self, spill: Spill) -> Bank:
        """The same bank, whose chunks lie where `spill` says from now on."""
        return replace(self, spill=spill)._spilled()

    def _spilled(self) -> Bank:
        """With a file for whole `LEAST` tokens of all that is in RAM, where that is more than it may be."""
        loose = [(chunk, there) for chunk, there in self.spans() if not chunk.in_file]
        if self.spill is None or sum(nbytes(chunk.tensors) for chunk, _ in loose) <= self.spill.ram:
            return self
        last, there = loose.pop()
        whole = there // LEAST * LEAST
        parts = [(chunk, 0, count) for chunk, count in [*loose, (last, whole)] if count]
        if not parts:
            return self
        laid = self.spill.lay(
            [chunk.part(0, count) for chunk, _, count in parts], functools.partial(Chunk, sealed=True, in_file=True)
        )
        laid.take_made(parts)
        lie = len(self.chunks) - len(loose) - 1
        chunks, counts = [*self.chunks[:lie], laid], [*self.counts[:lie], laid.room]
        if there > whole:
            rest = last.part(whole, there)
            chunks.append(Chunk.empty(rest, there - whole))
            chunks[-1].fill(0, rest)
            counts.append(there - whole)
        return replace(self, chunks=tuple(chunks), counts=tuple(counts))

    def emptied(self) -> Bank:
        """A bank of nothing, which keeps tokens as this one does."""
        return Bank(stored=self.stored, spill=self.spill)

    def without(self, first: int, last: int) -> Bank:
        """The bank without the tokens that stood at `first` to `last`, in chunks of its own."""
        stay = (self.positions < first) | (self.positions > last)
        if not stay.any():
            return self.emptied()
        left = {name: tensor[:, :, stay.to(tensor.device)] for name, tensor in self._tensors().items()}
        return self.emptied()._append(left, self.positions[stay])

    def zeroed(self) -> Bank:
        """As many tokens, all of them zero, which take no room."""
        zeros = [
            {name: tensor.new_zeros(()).expand(tensor.shape) for name, tensor in chunk.tensors.items()}
            for chunk in self.chunks
        ]
        # as if in a file: there is nothing that could be laid into one
        return replace(self, chunks=tuple(Chunk(tensors, sealed=True, in_file=True) for tensors in zeros))

    def keys(self, place: int) -> list[Float[Tensor, "k n s"]]:
        """The keys of the `place`-th block that is kept, chunk by chunk."""
        return [unpack("keys", part) for part in self._of("keys", place)]

    def values(self, place: int) -> list[Float[Tensor, "k n v"]]:
        """Its values, likewise."""
        return [unpack("values", part) for part in self._of("values", place)]

    def products(self, query_kms: Float[Tensor, "k m s"], place: int) -> Float[Tensor, "k m n"]:
        """Queries in float32 times the keys of a block."""
        return torch.cat([products(query_kms, "keys", part) for part in self._of("keys", place)], -1)

    def first(self, place: int, count: int) -> tuple[Float[Tensor, "k n s"], Float[Tensor, "k n v"]]:
        """Keys and values of the first `count` tokens, or of as many as there are."""
        keys, values = (
            torch.cat([unpack(name, part) for part in self._of(name, place, count)], 1) for name in ("keys", "values")
        )
        return keys, values

    def runs(self, name: str, place: int, start_ktm: Int[Tensor, "k t m"], run: int) -> Float[Tensor, "k t n s"]:
        """`keys` or `values` of runs of `run` tokens from the given starts on, `n = m * run`, head by head. A start is
        a multiple of `run`, which divides `LEAST`; what is behind the end is zero, or what a fork has read.
        """
        return unpack(name, {part: self._runs(part, place, start_ktm, run) for part in parts(name, self.stored)})

    def _runs(self, name: str, place: int, start_ktm: Int[Tensor, "k t m"], run: int) -> Tensor:
        tables = [chunk[name][place] for chunk in self.chunks]
        heads, room, width = tables[0].shape
        tables = [table.view(-1, run * width) for table in tables]
        if len(tables) == 1:
            first_k = torch.arange(0, heads * room, room, device=start_ktm.device)
            found = tables[0].index_select(0, (start_ktm + first_k[:, None, None]).flatten() // run)
        else:
            found = tables[0].new_empty(start_ktm.numel(), run * width)
            begins = itertools.accumulate(self.counts, initial=0)
            for chunk, table, begin, count in zip(self.chunks, tables, begins, self.counts, strict=False):
                first_k = torch.arange(0, heads * chunk.room, chunk.room, device=start_ktm.device) - begin
                here = ((begin <= start_ktm) & (start_ktm < begin + count)).flatten().nonzero()[:, 0]
                row = (start_ktm + first_k[:, None, None]).flatten()[here] // run
                found.index_copy_(0, here, table.index_select(0, row))
        return found.view(*start_ktm.shape[:2], -1, width)

    def there(self, start_ktm: Int[Tensor, "k t m"], run: int) -> Bool[Tensor, "k t n"] | None:
        """Which tokens of these runs are before the end; None where all runs that there are end there."""
        if not self.length % run:
            return None
        return (start_ktm[..., None] + torch.arange(run, device=start_ktm.device) < self.length).flatten(2)

    def means(self, place: int, run: int) -> Float[Tensor, "k s u"]:
        """The mean keys of runs of `run` tokens, as far as `LEAST` tokens are whole. They are made of `LEAST` tokens at
        a time and once, so they are the same however tokens came; forks share them.
        """
        key, found = (place, run), []
        if key not in self.joined:
            with torch.inference_mode(False), torch.no_grad():
                for chunk, there in self.spans():
                    made, whole = chunk.made.get(key, []), there // LEAST
                    for begin in range(len(made) * LEAST, whole * LEAST, LEAST):
                        part = chunk.part(begin, begin + LEAST, parts("keys", self.stored))
                        part = {name: tensor[place] for name, tensor in part.items()}
                        made = [*made, unpack("keys", part).float().unflatten(1, (-1, run)).mean(2).transpose(1, 2)]
                    chunk.made[key] = made
                    found += made[:whole]
                self.joined[key] = torch.cat(found, -1) if found else self.keys(place)[0].mT[..., :0].float()
        return self.joined[key]

    @property
    def nbytes(self) -> int:
        """Bytes of the tokens that are there."""
        found = [{name: t[:, :, :there] for name, t in chunk.tensors.items()} for chunk, there in self.spans()]
        return sum(nbytes(part) for part in found)  # which uses nothing

    def tensors(self, *, whole: bool = False) -> State:
        """All of it: `keys [1, l, k, n, s]`, `values [1, l, k, n, v]`, `positions [1, n]`, and what else packing makes;
        nothing of an empty bank. For a file, with zeros behind them up to `whole` `LEAST` tokens.
        """
        if not self.length:
            return {}
        more = filled(self.length) - self.length if whole else 0
        found = {name: F.pad(tensor, (0, 0, 0, more))[None] for name, tensor in self._tensors().items()}
        return found | {"positions": self.positions[None]}

    @staticmethod
    def of(tensors: State, stored: Stored = "base", spill: Spill | None = None) -> Bank:
        """The inverse of `tensors`, of a bank that stores in this way; tokens behind those that have positions are left
        out.
        """
        return Bank(stored=stored, spill=spill).adding({name: tensor[0] for name, tensor in tensors.items()})

    def adding(self, tensors: State) -> Bank:
        """The bank with those tokens `[l, k, n, ...]` behind its own, as they are stored, that have `positions [n]`."""
        if not tensors:
            return self
        positions = tensors["positions"].cpu()
        kept = (part for name in ("keys", "values") for part in parts(name, self.stored))
        return self._append({part: tensors[part][:, :, : len(positions)] for part in kept}, positions)

    def holding(self, chunk: Chunk, positions_n: Int[Tensor, " n"]) -> Bank:
        """The bank, of whole `LEAST` tokens, with the first `n` of a chunk behind them, which stays as it is."""
        chunks, counts = (*self.chunks, chunk), (*self.counts, len(positions_n))
        return replace(self, chunks=chunks, counts=counts, positions=torch.cat([self.positions, positions_n.cpu()]))

    def _of(self, name: str, place: int, count: int | None = None) -> list[State]:
        """`keys` or `values` of one block as they are stored, chunk by chunk; of the first `count` tokens alone."""
        found, left = [], self.length if count is None else count
        for chunk, there in self.spans():
            if found and left <= 0:  # what is not used is not read
                break
            some = chunk.part(0, min(there, left), parts(name, self.stored))
            found.append({part: tensor[place] for part, tensor in some.items()})
            left -= there
        return found

    def _tensors(self) -> State:
        found = [chunk.part(0, there) for chunk, there in self.spans()]
        return {name: torch.cat([part[name] for part in found], 2) for name in found[0]}


def filled(count: int) -> int:
    """How many tokens there are with zeros behind the last, up to whole `LEAST`."""
    return count + -count % LEAST


def length(tensors: State) -> int:
    """How many tokens `[l, k, n, ...]` there are."""
    return next(iter(tensors.values())).shape[2]
