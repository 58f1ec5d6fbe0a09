"""A session as a folder: a head, and files of the units that it names, of which a save writes those that are new.

    session.safetensors  the head (`mnemic.chunks`), with `bank.files [1, f]` int64: how many units each file has
    <SHA-256>.chunk      units one behind another `[l, k, n, ...]`, named by their checksums

Files are joined as the digits of a binary counter are: a new one takes in those before it that are no longer. So a
session has few files, of at most `CHUNK` tokens each, and no unit is written more than log2(`CHUNK` / `LEAST`) times
again.

The head is replaced last and at once. Killed at any moment, a save leaves what was there before or what is there after;
what belongs to neither is removed by the next.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from mnemic import bank
from mnemic.chunks import Lying, Unit, Units, take_units
from mnemic.mapping import Mapped, laid, map_tensors
from mnemic.state import State, StateError, read_file, to_bytes, write_bytes

try:
    import fcntl
except ImportError:  # Windows, where two processes that save into one folder at once are not kept apart
    fcntl = None

HEAD = "session.safetensors"
FILES = "bank.files"
LOCK = ".lock"
OURS = re.compile(rf"[0-9a-f]{{64}}\.chunk|\.([0-9a-f]{{64}}\.chunk|{re.escape(HEAD)})\..*")
"""Files that a save has made beside the head, or was about to."""
ATTEMPTS = 5
"""How often a folder is opened, if others save into it at the same time."""


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a path means a folder: one that is there, or a name that ends as a folder's."""
    text = os.fsdecode(path)
    return text.endswith((os.sep, os.altsep or os.sep)) or os.path.isdir(text)


def save(path: str | os.PathLike[str], tensors: State, meta: Mapping[str, Any], units: Units) -> None:
    """Writes a head and what is new of its units.

    Raises:
        OSError: they could not be written, as where the disk is full; what was in the folder is as it was.
    """
    folder = Path(path)
    folder.mkdir(mode=0o700, exist_ok=True)
    with _alone(folder):
        names: set[str] = set()
        try:
            sizes = _grouped(_there(folder) or [], [unit.digest for unit in units.known])
            first = 0
            for size in sizes:
                name = _name(units.known[first : first + size])
                if not _is_there(folder / name, units.size(first, first + size)):
                    write_bytes(folder / name, (data for _, data in laid(units.parts(first, first + size))))
                names.add(name)
                first += size
            data = to_bytes(tensors | units.listed() | ({FILES: torch.tensor([sizes])} if sizes else {}), meta)
            _flush(folder)  # the files are on the disk by their names before the head names them
            write_bytes(folder / HEAD, data)
        except BaseException as error:
            # by the head that is there now: an interrupt may come when it is the new one already
            if (there := _there(folder)) is not None:
                _clean(folder, {_name(group) for group in there})
            if isinstance(error, OSError):
                raise OSError(
                    error.errno or errno.EIO,
                    f"the session could not be saved to {folder} ({error.strerror or error}); make room there, or save "
                    "it elsewhere. What was there is there still",
                ) from error
            raise
        _flush(folder)  # nor is anything removed before that head is on the disk
        _clean(folder, names)


def read(path: str | os.PathLike[str]) -> tuple[State, dict[str, Any], list[Lying]]:
    """A folder's head, and its units, which are mapped and not read.

    Raises:
        FileNotFoundError: no session was saved there.
        StateError: a head that is not as it was written, or a file that is missing or cut.
    """
    folder = Path(path)
    for attempt in range(ATTEMPTS):
        tensors, meta = read_file(folder / HEAD)
        groups = _groups(tensors, take_units(tensors, folder), folder)
        try:
            return tensors, meta, [_mapped(folder, group) for group in groups]
        except FileNotFoundError as error:
            # another save may have removed it since the head was read
            if attempt == ATTEMPTS - 1:
                lost = Path(error.filename).name
                raise StateError(f"{folder} lacks its chunk file {lost}; restore it from a copy") from error
    raise AssertionError


def _mapped(folder: Path, group: list[Unit]) -> Lying:
    path = folder / _name(group)
    data, _, tensors = map_tensors(path)
    count = len(group) * bank.LEAST
    if tensors.keys() != group[0].digests.keys() or any(t.shape[2:3] != (count,) for t in tensors.values()):
        raise StateError(f"{path} does not hold the {count} tokens that its folder says; restore it from a copy")
    digests = {f"bank.{name}": [unit.digests[name] for unit in group] for name in group[0].digests}
    return Lying(tensors, Mapped(data, path, digests), group)


def _groups(tensors: State, units: list[Unit], source: object) -> list[list[Unit]]:
    """Units by the files that they lie in; takes `FILES` out of a head."""
    sizes = tensors.pop(FILES, torch.zeros(1, 0, dtype=torch.long))
    if sizes.dtype != torch.long or sizes.ndim != 2 or bool((sizes < 1).any()) or int(sizes.sum()) != len(units):
        raise StateError(f"{source} does not say in which files its {len(units)} chunks lie; restore it from a copy")
    found, first = [], 0
    for size in sizes.flatten().tolist():
        found.append(units[first : first + size])
        first += size
    return found


def _there(folder: Path) -> list[list[Unit]] | None:
    """Which units lie together in the files that are there; None where the head is damaged, which is for those who load
    it to tell.
    """
    if not (folder / HEAD).exists():
        return []
    try:
        _, _, mapped = map_tensors(folder / HEAD)
        tensors = {name: mapped[name].clone() for name in ("bank.units", FILES) if name in mapped}
        return _groups(tensors, take_units(tensors, folder), folder)
    except StateError:
        return None


def _grouped(before: list[list[Unit]], digests: list[str]) -> list[int]:
    """How many units go into each file: those of the first ones stay, new ones take in those that are no longer."""
    sizes, at, most = [], 0, bank.CHUNK // bank.LEAST
    for group in before:
        if digests[at : at + len(group)] != [unit.digest for unit in group]:
            break
        sizes.append(len(group))
        at += len(group)
    while at < len(digests):
        size = min(len(digests) - at, most - at % most)
        while at % most and sizes[-1] <= size:
            at -= sizes[-1]
            size += sizes.pop()
        sizes.append(size)
        at += size
    return sizes


def _name(group: list[Unit]) -> str:
    return hashlib.sha256("".join(unit.digest for unit in group).encode()).hexdigest() + ".chunk"


def _is_there(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except FileNotFoundError:
        return False


def _clean(folder: Path, names: set[str]) -> None:
    """Removes what a save has made, or was about to, but for the chunk files of these names."""
    for path in folder.iterdir():
        if OURS.fullmatch(path.name) and path.name not in names:
            path.unlink(missing_ok=True)


def _flush(folder: Path) -> None:
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process, and thread, at a time saves into a folder; the lock of one that is killed is free."""
    if fcntl is None:
        yield
        return
    with (folder / LOCK).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
