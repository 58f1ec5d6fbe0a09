"""The tensors a memory carries, and the only file format they are stored in.

A state is a flat dictionary of tensors whose first dimension is the batch: one row is one stream (a user, a document).
Every operation here returns a new dictionary and leaves its argument alone, so a state may be shared and forked freely.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

State = dict[str, Tensor]
"""Named tensors, batch first: `{"slots": [B, ...], ...}`."""

FORMAT = "1"


class StateError(ValueError):
    """A state or a state file that does not fit: another model, another config, a truncated or edited file."""


def map_state(state: State, function: Callable[[Tensor], Tensor]) -> State:
    """Applies `function` to every tensor."""
    return {name: function(tensor) for name, tensor in state.items()}


def batch_size(state: State) -> int:
    """The number of rows; raises `StateError` when the tensors disagree or there are none."""
    sizes = {tensor.shape[0] for tensor in state.values()}
    if len(sizes) != 1:
        raise StateError(f"a state must have one batch size, found {sorted(sizes) or 'no tensors'}")
    return sizes.pop()


def select(state: State, rows: Int[Tensor, " n"]) -> State:
    """Rows by index, in that order, repeats allowed (beam search)."""
    return map_state(state, lambda tensor: tensor.index_select(0, rows.to(tensor.device)))


def repeat(state: State, times: int) -> State:
    """Every row `times` times in place: `[a, b] -> [a, a, b, b]`."""
    return map_state(state, lambda tensor: tensor.repeat_interleave(times, 0))


def concatenate(states: Sequence[State]) -> State:
    """Rows of several states one after another, the smaller padded with zeros; all must hold the same names."""
    names = {frozenset(state) for state in states}
    if len(names) != 1:
        raise StateError(f"states to concatenate hold different tensors: {[sorted(state) for state in states]}")
    return {name: torch.cat(level([state[name] for state in states])) for name in states[0]}


def level(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same tensors, padded with zeros to one size in every dimension but the first."""
    sizes = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    return [grow(tensor, sizes) for tensor in tensors]


def grow(tensor: Tensor, sizes: Sequence[int]) -> Tensor:
    """A tensor padded with zeros to `sizes` in every dimension but the first."""
    missing = [size - have for size, have in zip(sizes, tensor.shape[1:], strict=True)]
    if not any(missing):
        return tensor
    return torch.nn.functional.pad(tensor, [amount for gap in reversed(missing) for amount in (0, gap)])


def put(state: State, rows: Int[Tensor, " n"], chosen: State) -> State:
    """The state with some rows replaced by those of `chosen`, both padded to the larger."""
    result = {}
    for name, tensor in state.items():
        tensor, new = level([tensor, chosen[name]])
        result[name] = tensor.index_copy(0, rows, new)
    return result


def detach(state: State) -> State:
    """The same values outside any gradient."""
    return map_state(state, Tensor.detach)


def where(rows: Bool[Tensor, " batch"], chosen: State, other: State) -> State:
    """`chosen` for the rows that are True, `other` for the rest. Values are copied, never mixed: no arithmetic."""
    result = {}
    for name, tensor in chosen.items():
        mask = rows.to(tensor.device).view(-1, *[1] * (tensor.ndim - 1))
        result[name] = torch.where(mask, tensor, other[name])
    return result


def nbytes(state: State) -> int:
    """Bytes of all tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def append_rows(
    buffer: Float[Tensor, "batch waiting width"],
    counts: list[int],
    piece: Float[Tensor, "batch time width"],
    keep: Bool[Tensor, "batch time"] | None,
) -> tuple[Float[Tensor, "batch longer width"], list[int]]:
    """Appends each row's kept tokens behind its own `counts[b]` first ones; returns the buffer and the new counts.

    Rows stay packed to the left, so what a row holds never depends on the padding of its neighbours.
    """
    batch, time, width = piece.shape
    if keep is None and len(set(counts)) == 1:
        return torch.cat([buffer[:, : counts[0]], piece], 1), [count + time for count in counts]
    if keep is None:
        keep = torch.ones(batch, time, dtype=torch.bool, device=piece.device)
    start = torch.tensor(counts, device=piece.device)
    position = start[:, None] + keep.long().cumsum(1) - 1
    total = (start + keep.sum(1)).tolist()
    longer = piece.new_zeros(batch, max(total), width)
    longer[:, : min(buffer.shape[1], longer.shape[1])] = buffer[:, : longer.shape[1]]
    row, column = keep.nonzero(as_tuple=True)
    return longer.index_put((row, position[row, column]), piece[row, column]), total


# --- files -----------------------------------------------------------------------------------------------------------


def _digest(tensors: Mapping[str, Tensor], meta: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def write_file(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], meta: dict[str, Any]) -> None:
    """Writes tensors and metadata as one safetensors file with a checksum over both.

    The file appears whole or not at all: it is written beside its place, flushed to the disk, then renamed.
    """
    path = Path(path)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {"mnemic": FORMAT, "meta": json.dumps(meta, sort_keys=True), "sha256": _digest(tensors, meta)}
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(serialize(tensors, metadata=header))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_file(path: str | os.PathLike[str]) -> tuple[State, dict[str, Any]]:
    """Reads what `write_file` wrote; raises `StateError` for a truncated, edited or foreign file, loading nothing."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no memory file at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            # clones: the mapped file may be replaced while the tensors live
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise StateError(f"{path} is not a whole safetensors file ({error}); restore it from a copy") from error
    if header.get("mnemic") != FORMAT:
        raise StateError(f"{path} has format {header.get('mnemic')!r}, this version of mnemic reads {FORMAT!r}")
    try:
        meta = json.loads(header["meta"])
    except (KeyError, json.JSONDecodeError) as error:
        raise StateError(f"{path} has no readable description ({error!r}); restore it from a copy") from error
    if _digest(tensors, meta) != header.get("sha256"):
        raise StateError(f"{path} was changed after it was written: its checksum differs; restore it from a copy")
    return tensors, meta
