"""Tensors that lie in a file, which is mapped: nothing of them is read before it is used.

What is mapped is a file as it is now. Replaced or deleted, it lives on for whoever has it mapped. (Windows does not let
it be replaced or deleted.) Nobody may write into it, nor into the tensors. Each mapping keeps its file open.
"""

from __future__ import annotations

import ctypes
import math
import os
import threading
from collections.abc import Callable, Mapping
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mnemic.state import (
    APART,
    DTYPES,
    FORMAT_APART,
    State,
    StateError,
    check_digest,
    description_of,
    from_bytes,
    header_of,
)


class Mapped:
    """A mapped file, and the checksums of those of its tensors that are checked when they are used."""

    def __init__(self, data: mmap, source: object, digests: Mapping[str, str]) -> None:
        self.data, self.source, self.digests = data, source, digests
        self.checked: set[str] = set()
        self.lock = threading.Lock()

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
            check_digest(name, tensor, self.digests[name], self.source)
            if numbers is not None:
                numbers({name: tensor})
            self.checked.add(name)


def map_file(path: str | os.PathLike[str]) -> tuple[State, dict[str, Any], Mapped | None]:
    """As `read_file`, but a file's tensors that are `APART` are mapped, and not read. They are to be checked when they
    are used, by the third result; None where there are none.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no memory file at {path}")
    if not Path(path).stat().st_size:
        return *from_bytes(b"", path), None
    data, words, tensors = map_tensors(path)
    apart = APART if words.get("mnemic") == FORMAT_APART else ()
    with torch.inference_mode(False):
        tensors = {name: t if name.startswith(apart) else t.clone() for name, t in tensors.items()}
    meta, digests = description_of(tensors, words, path)
    return tensors, meta, Mapped(data, path, digests) if digests else None


def map_tensors(path: str | os.PathLike[str]) -> tuple[mmap, dict[str, str], State]:
    """The tensors of a safetensors file as they lie in it, one behind another, and its header's own words; raises
    `StateError` for a file that is no such one, or not whole.
    """
    with Path(path).open("rb") as file:
        data = mmap(file.fileno(), 0, access=ACCESS_READ)
    words, entries, start = header_of(data, path)
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
                raise StateError(f"{path} is not a whole safetensors file ({name} is {entry}); restore it from a copy")
            there = torch.frombuffer(buffer, dtype=dtype, count=count, offset=start + begin) if count else None
            tensors[name], end = torch.empty(shape, dtype=dtype) if there is None else there.view(shape), stop
    if start + end != len(data):
        said = f"{len(data):,} bytes, where its tensors end at {start + end:,}"
        raise StateError(f"{path} is not a whole safetensors file ({said}); restore it from a copy")
    return data, words, tensors
