"""Tensors as they lie in a safetensors file: written without a copy, and mapped, so that nothing is read before it is
used.

What is mapped is a file as it is now. Replaced or deleted, it lives on for whoever has it mapped. (Windows does not let
it be replaced or deleted.) Nobody may write into it, nor into the tensors. Each mapping keeps its file open.
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mnemic.forking import Lock
from mnemic.state import (
    APART,
    DTYPES,
    FORMAT_APART,
    State,
    StateError,
    bytes_of,
    check_digest,
    description_of,
    header_of,
)


class Mapped:
    """A mapped file, and the checksums of those of its tensors that are checked when they are used: one each, or one
    for each of as many equal parts of its tokens `[..., n, width]`.
    """

    def __init__(self, data: mmap, source: object, digests: Mapping[str, Sequence[str]]) -> None:
        self.data, self.source, self.digests = data, source, digests
        self.checked: set[str] = set()
        self.lock = Lock()

    def check(self, name: str, tensor: Tensor, numbers: Callable[[State], None] | None = None) -> None:
        """Raises `StateError` where the file was cut, or (the first time) a tensor has not the checksum that it had, or
        has `numbers` that raise one.
        """
        if (size := self.data.size()) < len(self.data):  # to read what was there would end the process
            raise StateError(
                f"{self.source} was cut to {size:,} of {len(self.data):,} bytes while it was in use; restore it from a "
                "copy, and load what uses it again"
            )
        if name in self.checked:
            return
        with self.lock:
            parts = tensor.chunk(len(self.digests[name]), -2)
            for part, digest in zip(parts, self.digests[name], strict=True):
                check_digest(name, part, digest, self.source)
            if numbers is not None:
                numbers({name: tensor})
            self.checked.add(name)


def map_file(path: str | os.PathLike[str]) -> tuple[State, dict[str, Any], Mapped | None]:
    """As `read_file`, but a file's tensors that are `APART` are mapped, and not read. They are to be checked when they
    are used, by the third result; None where there are none.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no memory file at {path}")
    data, words, tensors = map_tensors(path)
    apart = APART if words.get("mnemic") == FORMAT_APART else ()
    with torch.inference_mode(False):
        tensors = {name: t if name.startswith(apart) else t.clone() for name, t in tensors.items()}
    meta, digests = description_of(tensors, words, path)
    return tensors, meta, Mapped(data, path, {name: [digest] for name, digest in digests.items()}) if digests else None


def map_tensors(path: str | os.PathLike[str]) -> tuple[mmap, dict[str, str], State]:
    """A safetensors file, its header's own words, and its tensors as they lie in it; raises `StateError` as `lying`."""
    if not Path(path).stat().st_size:  # which cannot be mapped
        lying(b"", path)
    with Path(path).open("rb") as file:
        data = mmap(file.fileno(), 0, access=ACCESS_READ)
    return data, *lying(data, path)


def lying(data: mmap | bytes, source: object) -> tuple[dict[str, str], State]:
    """The header's own words, and the tensors as they lie in a safetensors file, one behind another; raises
    `StateError` for what is no such file, or not whole.
    """
    words, entries, start = header_of(data, source)
    # of memory that may be written there could be no more than fits into RAM, and PyTorch knows no other
    values = np.frombuffer(data, np.uint8)
    buffer = (ctypes.c_ubyte * len(data)).from_address(values.ctypes.data)
    buffer.lies_in = values  # pyright: ignore[reportAttributeAccessIssue]
    tensors, end = {}, 0
    with torch.inference_mode(False):
        for name, entry in sorted(entries.items(), key=lambda each: each[1]["data_offsets"]):
            dtype, shape, (begin, stop) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            count = math.prod(shape)
            if begin != end or stop - begin != count * dtype.itemsize or start + stop > len(data):
                raise StateError(
                    f"{source} is not a whole safetensors file ({name} is {entry}); restore it from a copy"
                )
            there = torch.frombuffer(buffer, dtype=dtype, count=count, offset=start + begin) if count else None
            tensors[name], end = torch.empty(shape, dtype=dtype) if there is None else there.view(shape), stop
    if start + end != len(data):
        said = f"{len(data):,} bytes, where its tensors end at {start + end:,}"
        raise StateError(f"{source} is not a whole safetensors file ({said}); restore it from a copy")
    return words, tensors


def laid(parts: Sequence[State]) -> Iterator[tuple[str, memoryview | bytes]]:
    """A safetensors file of the tokens of all `parts` `[l, k, n, ...]`, bit by bit: the header, under the name "", and
    each tensor's bytes under its name. Nothing is copied for that.
    """
    named = {dtype: name for name, dtype in DTYPES.items()}
    # the widest numbers first, so that all lie at multiples of their size
    names = sorted(parts[0], key=lambda name: (-parts[0][name].itemsize, name))
    entries, end = {}, 0
    for name in names:
        blocks, heads, _, width = parts[0][name].shape
        shape = [blocks, heads, sum(part[name].shape[2] for part in parts), width]
        begin, end = end, end + math.prod(shape) * parts[0][name].itemsize
        entries[name] = {"dtype": named[parts[0][name].dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    yield "", len(text).to_bytes(8, "little") + text
    for name in names:
        blocks, heads = parts[0][name].shape[:2]
        if len(parts) == 1 and parts[0][name].is_contiguous():  # as it lies
            yield name, bytes_of(parts[0][name])
            continue
        for block, head, part in itertools.product(range(blocks), range(heads), parts):
            yield name, bytes_of(part[name][block, head])


def checksums(
    parts: Sequence[State], write: Callable[[memoryview | bytes], Any] | None = None
) -> tuple[str, dict[str, str]]:
    """SHA-256 of the file of all `parts`, by its header and the checksums of its tensors, and these by name. On the way
    it can be written.
    """
    found: dict[str, Any] = {}
    for name, data in laid(parts):
        if write is not None:
            write(data)
        found.setdefault(name, hashlib.sha256()).update(data)
    digests = {name: digest.hexdigest() for name, digest in found.items()}
    whole = hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()
    return whole, {name: digest for name, digest in digests.items() if name}
