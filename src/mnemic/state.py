"""The tensors a memory carries, and the only file format they are stored in.

A state is a flat dictionary of tensors whose first dimension is the batch: one row is one stream (a user, a document).
Every operation here returns a new dictionary and leaves its argument alone, so a state may be shared and forked freely.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from mmap import mmap
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from safetensors.torch import load as deserialize
from safetensors.torch import save as serialize
from torch import Tensor

State = dict[str, Tensor]
"""Named tensors, batch first: `{"slots": [B, ...], ...}`."""

FORMAT = "1"
FORMAT_APART = "2"
"""Of a file with tensors that have a checksum each."""
APART = ("bank.keys", "bank.values")
"""What their names begin with: they may be larger than all else, and are read, and checked, when they are used."""
META_LIMIT = 8 * 2**20
"""Most bytes of a file's description, as JSON."""
HEADER_LIMIT = 4 * META_LIMIT
"""Most bytes of a file's header: the description again, quoted, and the tensors' names."""
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""What a file's tensors may be."""
DIMENSIONS = 16
LARGEST = 2**48
"""Most elements of a tensor, empty dimensions counted as 1: beyond it sizes overflow."""


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


def check_range(name: str, numbers: Tensor, least: int, most: int) -> None:
    """Raises `StateError` for whole numbers that are not all in `least .. most`: places and counts in a state."""
    low, high = (int(numbers.min()), int(numbers.max())) if numbers.numel() else (least, least)
    if low < least or high > most:
        raise StateError(f"{name} goes from {low} to {high}, and can be {least} to {most}")


def is_finite(tensor: Tensor) -> bool:
    """Whether there is no NaN and no infinity in it; what holds no such numbers is finite. In one pass, no copy."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return all(math.isfinite(end) for end in tensor.aminmax())


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
    for dim, size in enumerate(sizes, 1):
        if size != tensor.shape[dim]:
            # not `pad`: that of torch 2.8 refuses a tensor that is empty in another dimension
            missing = [*tensor.shape[:dim], size - tensor.shape[dim], *tensor.shape[dim + 1 :]]
            tensor = torch.cat([tensor, tensor.new_zeros(missing)], dim)
    return tensor


def shrink(state: State, least: State) -> State:
    """The same rows without the zeros behind what the fullest of them needs: the inverse of `level`.

    `least` is the state of a new stream. Dimensions of its size did not grow and stay; those that grew alike, from one
    size to one other, are cut alike, as they count the same things.
    """
    needed: dict[tuple[int, int], int] = {}
    grown = {
        (name, dim): (least[name].shape[dim], size)
        for name, tensor in state.items()
        for dim, size in enumerate(tensor.shape)
        if dim and size > least[name].shape[dim]
    }
    for (name, dim), kind in grown.items():
        there = (state[name] != 0).transpose(0, dim).flatten(1).any(1).nonzero()
        needed[kind] = max(needed.get(kind, kind[0]), int(there.max()) + 1 if len(there) else 0)
    result = dict(state)
    for (name, dim), kind in grown.items():
        if needed[kind] < kind[1]:
            result[name] = result[name].narrow(dim, 0, needed[kind]).clone()
    return result


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


def drop_rows(
    buffer: Float[Tensor, "batch held width"], counts: Sequence[int], gone: Sequence[int]
) -> tuple[Float[Tensor, "batch shorter width"], list[int]]:
    """Each row without its own first `gone[b]` of `counts[b]`, packed to the left, and the new counts.

    A copy, no view: what has left is in neither memory nor files.
    """
    counts = [count - less for count, less in zip(counts, gone, strict=True)]
    longest = max(counts)
    if len(set(gone)) == 1:
        return buffer[:, gone[0] : gone[0] + longest].clone(), counts
    place = torch.arange(longest, device=buffer.device) + torch.tensor(gone, device=buffer.device)[:, None]
    chosen = buffer.gather(1, place.clamp_max(buffer.shape[1] - 1)[..., None].expand(-1, -1, buffer.shape[2]))
    there = torch.arange(longest, device=buffer.device) < torch.tensor(counts, device=buffer.device)[:, None]
    return chosen.masked_fill(~there[..., None], 0), counts


def push_rows(
    buffer: Float[Tensor, "batch held width"],
    counts: list[int],
    piece: Float[Tensor, "batch time width"],
    keep: Bool[Tensor, "batch time"] | None,
    most: int,
) -> tuple[Float[Tensor, "batch longer width"], list[int]]:
    """A queue for each row: its own `counts[b]` first ones, then its kept new tokens, and of all these the last `most`.

    A copy, no view: what has left is in neither memory nor files.
    """
    if keep is None and len(set(counts)) == 1:
        # rows in step: no more is copied than stays
        kept = buffer[:, max(0, counts[0] + piece.shape[1] - most) : counts[0]]
        queue = torch.cat([kept, piece[:, max(0, piece.shape[1] - most) :]], 1)
        return queue, [queue.shape[1]] * len(counts)
    longer, total = append_rows(buffer, counts, piece, keep)
    return drop_rows(longer, total, [max(0, count - most) for count in total])


# --- files -----------------------------------------------------------------------------------------------------------


def to_bytes(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> bytes:
    """Tensors and metadata as the bytes of one safetensors file, with a checksum over both; those that are `APART` have
    a checksum each, and that over all is over theirs.

    Raises:
        StateError: a dtype that files do not hold, a description beyond `META_LIMIT`, or one that `from_bytes` would
            not read.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    places = [tensor.untyped_storage().data_ptr() for tensor in tensors.values() if tensor.numel()]
    if len(set(places)) < len(places):  # a file has no tensors that share values
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES.values():
            raise StateError(f"{name} is {tensor.dtype}, which files do not hold; they hold {', '.join(DTYPES)}")
    try:
        text = json.dumps(meta, sort_keys=True, allow_nan=False)
        strict_json(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise StateError(
            f"the description is not plain JSON: {error}; leave out what is no number, text or list"
        ) from error
    if len(text) > META_LIMIT:
        raise StateError(f"the description has {len(text):,} bytes, a file holds {META_LIMIT:,}; leave something out")
    apart = {name: digest_of(tensor) for name, tensor in tensors.items() if name.startswith(APART)}
    words = {"mnemic": FORMAT_APART, "apart": json.dumps(apart, sort_keys=True)} if apart else {"mnemic": FORMAT}
    return serialize(tensors, metadata={**words, "meta": text, "sha256": checksum(tensors, text, apart)})


def from_bytes(data: bytes, source: object = "these bytes") -> tuple[State, dict[str, Any]]:
    """What `to_bytes` made; `source` is how errors name the bytes.

    Raises:
        StateError: truncated, edited or foreign bytes, and any that `to_bytes` would not make. Nothing is loaded.
    """
    words, _, _ = header_of(data, source)
    try:
        tensors = deserialize(data)
    except SafetensorError as error:
        raise StateError(f"{source} is not a whole safetensors file ({error}); restore it from a copy") from error
    meta, apart = description_of(tensors, words, source)
    for name, digest in apart.items():
        check_digest(name, tensors[name], digest, source)
    return tensors, meta


def description_of(tensors: State, words: Mapping[str, str], source: object) -> tuple[dict[str, Any], dict[str, str]]:
    """What a file says of its tensors, and the checksums of those that are `APART`, which are still to be checked."""
    if (known := words.get("mnemic")) not in (FORMAT, FORMAT_APART):
        said = f"{FORMAT!r} and {FORMAT_APART!r}"
        raise StateError(f"{source} has format {known!r}, this version of mnemic reads {said}")
    try:
        meta, apart = strict_json(words["meta"]), strict_json(words["apart"] if known == FORMAT_APART else "{}")
    except (KeyError, ValueError, RecursionError) as error:
        raise StateError(f"{source} has no readable description ({error!r}); restore it from a copy") from error
    if not isinstance(meta, dict) or len(words["meta"]) > META_LIMIT:
        raise StateError(f"{source} has a description that is no dictionary of at most {META_LIMIT:,} bytes")
    stand = {name for name in tensors if name.startswith(APART)} if known == FORMAT_APART else set()
    if (
        not isinstance(apart, dict)
        or apart.keys() != stand
        or not all(isinstance(each, str) for each in apart.values())
    ):
        raise StateError(f"{source} has no checksum for each of {sorted(stand)}; restore it from a copy")
    if checksum(tensors, json.dumps(meta, sort_keys=True), apart) != words.get("sha256"):
        raise StateError(f"{source} was changed after it was written: its checksum differs; restore it from a copy")
    for name, tensor in tensors.items():
        if tensor.dtype == torch.bool and tensor.numel() and int(tensor.view(torch.uint8).max()) > 1:
            raise StateError(f"{source} has bytes in {name} that are neither True nor False")
    return meta, apart


def write_file(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Writes what `to_bytes` makes as one file.

    The file appears whole or not at all: it is written beside its place, flushed to the disk, then renamed.
    """
    write_bytes(path, to_bytes(tensors, meta))


def write_bytes(path: str | os.PathLike[str], data: bytes | Iterable[bytes | memoryview]) -> None:
    """Writes a file that appears whole or not at all, readable by its owner alone."""
    write_all({path: data})


def write_all(files: Mapping[str | os.PathLike[str], bytes | Iterable[bytes | memoryview]]) -> None:
    """`write_bytes` for files that belong together: none is replaced before all are on the disk. What is large comes in
    pieces.
    """
    written: dict[str, Path] = {}
    try:
        for path, data in files.items():
            path = Path(path)
            descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            written[temporary] = path
            with os.fdopen(descriptor, "wb") as file:
                for piece in [data] if isinstance(data, bytes) else data:
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
        for temporary, path in written.items():
            os.replace(temporary, path)
    except BaseException:
        for temporary in written:
            Path(temporary).unlink(missing_ok=True)
        raise


def read_file(path: str | os.PathLike[str]) -> tuple[State, dict[str, Any]]:
    """Reads what `write_file` wrote; raises `FileNotFoundError`, and `StateError` as `from_bytes` does."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no memory file at {path}")
    return from_bytes(Path(path).read_bytes(), path)


def checksum(tensors: Mapping[str, Tensor], text: str, apart: Mapping[str, str] | None = None) -> str:
    """SHA-256 over a file's description, as JSON, and its tensors, or the checksums of those that stand apart."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(apart[name].encode() if apart and name in apart else bytes_of(tensor))
    return digest.hexdigest()


def digest_of(tensor: Tensor) -> str:
    """SHA-256 over the values of a tensor."""
    return hashlib.sha256(bytes_of(tensor)).hexdigest()


def check_digest(name: str, tensor: Tensor, digest: str, source: object) -> None:
    """Raises `StateError` for a tensor that has another checksum than its file says."""
    if digest_of(tensor) != digest:
        raise StateError(
            f"{source} was changed after it was written: the checksum of {name} differs; restore it from a copy"
        )


def bytes_of(tensor: Tensor) -> memoryview:
    """The values of a tensor in memory; of one that is contiguous without a copy."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


def header_of(data: bytes | mmap, source: object) -> tuple[dict[str, str], dict[str, Any], int]:
    """The header's own words, its entries, once they are of tensors that may be made, and where these begin; where they
    lie is safetensors' to check.
    """
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(len(data) - 8, HEADER_LIMIT):
        raise StateError(
            f"{source} is not a whole safetensors file ({len(data):,} bytes, of which its header would be {length:,}); "
            "restore it from a copy"
        )
    try:
        entries = strict_json(data[8 : 8 + length].decode())
        words = entries.pop("__metadata__", None) or {}
        for name, entry in entries.items():
            if not _possible(**entry):
                raise ValueError(f"tensor {name!r} is {entry}")
        if not all(isinstance(word, str) for word in words.values()):
            raise ValueError("metadata that is not text")
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise StateError(
            f"{source} is not a whole safetensors file (its header: {str(error)[:200]}); restore it from a copy"
        ) from error
    return words, entries, 8 + length


def _possible(dtype: Any, shape: Any, data_offsets: Any) -> bool:
    """Whether an entry of a header tells of a tensor that can be made; raises `TypeError` for what has no such keys."""
    whole = all(type(size) is int and 0 <= size <= LARGEST for size in [*shape, *data_offsets])
    fits = len(shape) <= DIMENSIONS and math.prod(max(1, size) for size in shape) <= LARGEST
    return whole and fits and dtype in DTYPES and len(data_offsets) == 2


def strict_json(text: str) -> Any:
    """Strict JSON: no name twice in one object, no numbers that are not finite; raises `ValueError`."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a name stands twice")
        return found

    def number(digits: str) -> float:
        if not math.isfinite(value := float(digits)):
            raise ValueError(f"{digits[:20]} is not a finite number")
        return value

    return json.loads(text, object_pairs_hook=unique, parse_float=number, parse_constant=number)
