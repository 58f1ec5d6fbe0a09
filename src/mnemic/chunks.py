"""Sessions in two parts: a head, and what left the window as units that are known by what they hold.

A unit is `LEAST` tokens of a bank, over all blocks. Its SHA-256 is remembered with the chunk in RAM, so a unit that was
kept once is neither read, nor hashed, nor written again, and whoever has read the same keeps the same units. The head
is a session's file without them: the tensors `bank.*` hold the tokens behind the last whole unit, fewer than `LEAST`,
and `bank.units [1, u, 1 + t, 32]` uint8 the checksums of each unit in order: of all of it, then of its t tensors by
name. So a file that keeps all of a bank is a head without units.

What is restored is not read before it is used: it lies in a mapped file (`Mapped`), or elsewhere, from where it is
fetched then (`Unread`).
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mnemic import bank
from mnemic.bank import Bank, Chunk
from mnemic.forking import Lock
from mnemic.mapping import Mapped, checksums, laid, lying
from mnemic.packing import parts
from mnemic.state import State, StateError, nbytes

UNITS = "bank.units"
NAMES = {2 * len(parts("keys", way)): [*parts("keys", way), *parts("values", way)] for way in ("base", "int8")}
"""Names of a unit's tensors, in order, by how many there are."""
Numbers = Callable[[State], None]
"""Raises `StateError` for numbers, by the names of their tensors in a file, that no session has."""
Fetch = Callable[[Sequence[str]], Generator[bytes | None]]
"""The bytes of units by their digests, one after another; None for one that is not there."""


class Unit(NamedTuple):
    """What `LEAST` tokens are known by: the SHA-256 of the file that they make, and that of each of its tensors."""

    digest: str
    digests: dict[str, str]


class Units:
    """The whole units of a bank: their checksums, and where their tokens are."""

    def __init__(self, chunks: Sequence[tuple[Chunk, int]], numbers: Numbers) -> None:
        """Of the first tokens of each chunk, whole `LEAST`. What is not known yet is read and hashed once, and its
        `numbers` are checked.
        """
        self._chunks = [chunk for chunk, _ in chunks]
        self._ends = list(itertools.accumulate(count // bank.LEAST for _, count in chunks))
        self.known = [unit for chunk, count in chunks for unit in _known(chunk, count // bank.LEAST, numbers)]

    @staticmethod
    def of(lying: Sequence[Lying]) -> Units:
        """Of what was kept as units."""
        chunks = [Chunk(each.tensors, each.check, sealed=True) for each in lying]
        for chunk, each in zip(chunks, lying, strict=True):
            chunk.made[UNITS] = list(each.units)
        return Units([(chunk, chunk.room) for chunk in chunks], lambda _: None)

    @property
    def tensors(self) -> list[State]:
        """Their tokens, chunk by chunk; which is no use of them."""
        counts = [end - begin for begin, end in itertools.pairwise([0, *self._ends])]
        return [
            {name: tensor[:, :, : count * bank.LEAST] for name, tensor in chunk.tensors.items()}
            for chunk, count in zip(self._chunks, counts, strict=True)
        ]

    def parts(self, first: int, stop: int) -> list[State]:
        """The tokens of units `first` to before `stop`, as they lie in chunks."""
        found = []
        while first < stop:
            which = bisect.bisect_right(self._ends, first)
            begin = self._ends[which - 1] if which else 0
            end = min(stop, self._ends[which])
            found.append(_part(self._chunks[which], first - begin, end - begin))
            first = end
        return found

    def data(self, place: int) -> bytes:
        """One unit as the bytes of a file."""
        return b"".join(data for _, data in laid(self.parts(place, place + 1)))

    def size(self, first: int, stop: int) -> int:
        """Bytes of the file that some units make, which are not read for that."""
        count = (stop - first) * bank.LEAST
        like = {name: t[:, :, :1].expand(-1, -1, count, -1) for name, t in self._chunks[0].tensors.items()}
        _, header = next(laid([like]))
        return len(header) + nbytes(like)

    def listed(self) -> State:
        """`bank.units` of a head, where there are any."""
        digests = [[unit.digest, *(unit.digests[name] for name in sorted(unit.digests))] for unit in self.known]
        found = torch.tensor([[list(bytes.fromhex(each)) for each in unit] for unit in digests], dtype=torch.uint8)
        return {UNITS: found[None]} if self.known else {}


@dataclass(frozen=True)
class Lying:
    """Tokens of a bank that were kept, and are not read before they are used: `tensors` `[l, k, n, ...]` by name, what
    reads and checks them, and the units that they are, where that is known.
    """

    tensors: State
    unread: Mapped | Unread
    units: Sequence[Unit] = ()

    def check(self, name: str, tensor: Tensor, numbers: Numbers | None = None) -> None:
        """To be called before a tensor is used; raises `StateError` for one that is not as it was kept."""
        self.unread.check(f"bank.{name}", tensor, numbers)

    def check_all(self) -> None:
        """`check` for all of its tensors."""
        for name, tensor in self.tensors.items():
            self.check(name, tensor)


class Unread:
    """Units that lie elsewhere, and room for them, `tensors` `[l, k, n, ...]` by name, made for such as `like`. They
    are fetched when something of them is first used, all of them at once; what is put there has its checksum.
    """

    def __init__(self, units: Sequence[Unit], like: State, fetch: Fetch, source: object) -> None:
        self.units, self.source, self._fetch = units, source, fetch
        self._size, self._there, self._lock = bank.length(like), False, Lock()
        self._checked: set[str] = set()
        with torch.inference_mode(False):  # whoever comes later may use it outside
            self.tensors = {
                name: t.new_empty(*t.shape[:2], self._size * len(units), t.shape[3]) for name, t in like.items()
            }

    @staticmethod
    def of(units: Sequence[Unit], like: State, fetch: Fetch, source: object) -> list[Lying]:
        """Units that are all like one of them, `CHUNK` tokens together."""
        step = bank.CHUNK // bank.LEAST
        groups = [units[begin : begin + step] for begin in range(0, len(units), step)]
        found = [(Unread(group, like, fetch, source), group) for group in groups]
        return [Lying(its.tensors, its, group) for its, group in found]

    def check(self, name: str, tensor: Tensor, numbers: Numbers | None = None) -> None:
        """Reads all of it, the first time; raises `StateError` for a unit that is not there any more, cut or changed,
        or has `numbers` that raise one, and `StoreError` where it cannot be fetched.
        """
        if name in self._checked:
            return
        with self._lock:
            if not self._there:
                self._read()
                self._there = True
            if numbers is not None:
                numbers({name: tensor})
            self._checked.add(name)

    def _read(self) -> None:
        with contextlib.closing(self._fetch([unit.digest for unit in self.units])) as found:
            for place, (unit, data) in enumerate(zip(self.units, found, strict=True)):
                if data is None:
                    raise StateError(
                        f"{self.source} lacks its chunk {unit.digest}: it was deleted or replaced after it was loaded "
                        "and before this chunk was used; load it again, or restore it from a copy"
                    )
                for name, tensor in read_unit(data, unit, self.source).items():
                    room = self.tensors[name][:, :, place * self._size : (place + 1) * self._size]
                    if room.shape != tensor.shape or room.dtype != tensor.dtype:
                        raise StateError(f"{self.source} has chunks of several models; restore it from a copy")
                    room.copy_(tensor)


def cut(of: Bank, numbers: Numbers) -> tuple[State, Units]:
    """What a head has of a bank beside the list of its units, and these."""
    units = Units([(chunk, count) for chunk, count in of.spans() if count >= bank.LEAST], numbers)
    rest: State = {}
    if left := of.length % bank.LEAST:
        chunk, count = of.spans()[-1]
        rest = {f"bank.{name}": tensor[None] for name, tensor in chunk.part(count - left, count).items()}
    if of.length:
        rest["bank.positions"] = of.positions[None]
    return rest, units


def cut_file(tensors: State, numbers: Numbers) -> tuple[State, Units]:
    """`cut` for the contents of a file; those that no bank makes are left as they are."""
    there = {name: tensors[f"bank.{name}"] for name in NAMES[4] if f"bank.{name}" in tensors}
    positions = tensors.get("bank.positions")
    shapes = {tuple(tensor.shape[:4]) for tensor in there.values() if tensor.ndim == 5}
    count = 0 if positions is None else positions.numel()
    whole = count - count % bank.LEAST
    right = list(there) in NAMES.values() and len(shapes) == 1
    if not whole or not right or (shape := shapes.pop())[0] != 1 or shape[3] < count:
        return tensors, Units([], numbers)
    units = Units([(Chunk({name: t[0][:, :, :whole] for name, t in there.items()}, sealed=True), whole)], numbers)
    rest = {f"bank.{name}": t[:, :, :, whole:count] if whole < count else None for name, t in there.items()}
    head = {name: rest.get(name, tensor) for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in head.items() if tensor is not None}, units


def joined(tensors: State, chunks: Sequence[Lying]) -> State:
    """The contents of a file, of a head and of what lies beside it, which is checked: the inverse of `cut_file`."""
    if not chunks:
        return tensors
    for each in chunks:
        each.check_all()
    found = {}
    for name in chunks[0].tensors:
        kept = [each.tensors[name][None] for each in chunks]
        kept += [tensors[f"bank.{name}"]] if f"bank.{name}" in tensors else []
        count = sum(tensor.shape[3] for tensor in kept)
        more = bank.filled(count) - count
        # the zeros join in the same copy
        found[f"bank.{name}"] = torch.cat([*kept, kept[0].new_zeros(*kept[0].shape[:3], more, kept[0].shape[4])], 3)
    return tensors | found


def take_units(tensors: State, source: object) -> list[Unit]:
    """Takes the units out of a head; raises `StateError` for what `cut` does not make."""
    if (rows := tensors.pop(UNITS, None)) is None:
        return []
    count = rows.shape[2] - 1 if rows.ndim == 4 else 0
    if rows.dtype != torch.uint8 or count not in NAMES or rows.shape[0] != 1 or rows.shape[3] != 32:
        raise StateError(f"{source} says of its chunks {list(rows.shape)} of {rows.dtype}; restore it from a copy")
    found = [[bytes(digest).hex() for digest in unit] for unit in rows[0].tolist()]
    return [Unit(digest, dict(zip(NAMES[count], digests, strict=True))) for digest, *digests in found]


def read_unit(data: bytes, unit: Unit, source: object) -> State:
    """The tensors `[l, k, LEAST, ...]` of a unit's bytes; raises `StateError` where its checksum is not theirs."""
    problem = StateError(f"{source} has a chunk that was cut or changed, {unit.digest}; restore it from a copy")
    try:
        _, tensors = lying(data, source)
    except StateError as error:
        raise problem from error
    same = tensors.keys() == unit.digests.keys() and all(tensor.ndim == 4 for tensor in tensors.values())
    if not same or checksums([tensors]) != (unit.digest, unit.digests):
        raise problem
    return tensors


def _known(chunk: Chunk, count: int, numbers: Numbers) -> list[Unit]:
    """The first units of a chunk."""
    made = chunk.made.get(UNITS, [])
    if len(made) < count:
        made = list(made)
        for place in range(len(made), count):
            tensors = _part(chunk, place, place + 1)
            numbers({f"bank.{name}": tensor for name, tensor in tensors.items()})
            made.append(Unit(*checksums([tensors])))
        chunk.made[UNITS] = made
    return made[:count]


def _part(chunk: Chunk, first: int, stop: int) -> State:
    return {name: t.detach().cpu() for name, t in chunk.part(first * bank.LEAST, stop * bank.LEAST).items()}
