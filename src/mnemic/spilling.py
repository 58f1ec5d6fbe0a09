"""Chunks of banks in files, for sessions whose keys and values do not fit into RAM.

A chunk file is a safetensors file, named by its content: the SHA-256 of its header and of its tensors' checksums, and
something that no other session's has. It is written once, mapped, and removed when nobody holds its chunk any more; a
process that is killed leaves its files.
"""

from __future__ import annotations

import errno
import os
import secrets
import tempfile
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mnemic.mapping import Mapped, checksums, map_tensors
from mnemic.state import State, StateError, nbytes

if TYPE_CHECKING:
    from mnemic.bank import Chunk

RAM = 2**30
"""Bytes that stay in RAM unless somebody says otherwise."""


@dataclass(frozen=True)
class Spill:
    """Where a bank lays its chunks when they take more than `ram` bytes: in files of `folder`."""

    folder: Path
    ram: int
    held: weakref.WeakValueDictionary[str, Chunk] = field(
        default_factory=weakref.WeakValueDictionary, init=False, repr=False, compare=False
    )

    def __reduce__(self) -> tuple[Any, ...]:
        return Spill, (self.folder, self.ram)

    def lay(self, parts: Sequence[State], make: Callable[[State, Callable[[str, Tensor], None]], Chunk]) -> Chunk:
        """One chunk of the tokens of some parts `[l, k, n, ...]`, which lies in a file: `make` makes it of its tensors
        and of what checks them.

        Raises:
            OSError: it could not be written (a full disk, a folder that is not there). Nothing of it stays then.
        """
        try:
            descriptor, temporary = tempfile.mkstemp(dir=self.folder, prefix=".", suffix=".chunk")
            try:
                with os.fdopen(descriptor, "wb") as file:
                    digest, found = checksums(parts, file.write)
                data, _, tensors = map_tensors(temporary)
                # what another session has read may be the same, and go sooner
                path = self.folder / f"{digest}.{secrets.token_hex(4)}.chunk"
                chunk = self.held.get(digest)  # of a fork, which has read the same
                if chunk is None or not _sound(chunk):
                    digests = {name: [its] for name, its in found.items()}
                    chunk = make(tensors, Mapped(data, f"chunk {path}", digests).check)
                    os.replace(temporary, path)
                    self.held[digest] = chunk
                    weakref.finalize(chunk, path.unlink, missing_ok=True)
                return chunk
            finally:
                Path(temporary).unlink(missing_ok=True)
        except OSError as error:
            size = sum(nbytes(part) for part in parts)
            if error.errno == errno.EMFILE:
                raise OSError(
                    errno.EMFILE,
                    f"a chunk of {size:,} bytes could not be written: the process has too many files open, one for "
                    f"each chunk. spill_to with more ram than {self.ram:,} bytes makes fewer. The session is as it was "
                    "before the call",
                ) from error
            raise OSError(
                error.errno or errno.EIO,
                f"a chunk of {size:,} bytes could not be written to {self.folder} ({error.strerror or error}); make "
                "room there, or name another folder with spill_to. The session is as it was before the call",
            ) from error


def _sound(chunk: Chunk) -> bool:
    """Whether a chunk is as it was written."""
    try:
        return all(chunk[name] is not None for name in chunk.tensors)
    except StateError:
        return False
