"""What a memory is worth: the same segments predicted with the stream's own memory and with others in its place.

other_stream    the memory of another row of the batch, which has read something else
zeroed          the memory with every value zero; whole numbers are bookkeeping and stay as they are
fresh           a memory that begins here
no_memory       the memory switched off, with the same weights

Every measurement takes its controls from here. Results name them with spaces.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mnemic.attachment import Attachment, attached, memory_cache, router_of
from mnemic.host.arguments import with_cache
from mnemic.host.cache import MemoryCache
from mnemic.host.router import Router
from mnemic.state import State, batch_size, map_state, select
from mnemic.stream import Stream
from mnemic.unrolling import IGNORED

CONTROLS = ("other_stream", "zeroed", "fresh", "no_memory")
CONDITIONS = ("memory", *(name.replace("_", " ") for name in CONTROLS))
"""The own memory and the controls, as results name them."""


def others(read: Tensor | State) -> list[int | None]:
    """For each row of a batch the nearest before it, the last before the first, that has read something else; None
    where there is none. `read` has what was read, `[b, ...]`: rows that are equal throughout are one stream twice.
    """
    tensors = [read] if isinstance(read, Tensor) else list(read.values())
    rows = len(tensors[0])

    def other(row: int, place: int) -> bool:
        return any(not torch.equal(tensor[row], tensor[place]) for tensor in tensors)

    before = ([(row - back) % rows for back in range(1, rows)] for row in range(rows))
    return [next((place for place in places if other(row, place)), None) for row, places in enumerate(before)]


def apart(order: Sequence[int | None]) -> list[int]:
    """The rows that `order` names, another for each row; raises `ValueError` for a row that has none."""
    for row, place in enumerate(order):
        if place is None or place == row:
            raise ValueError(
                f"row {row} of {len(order)} has no other stream, one that has read something else; give at least 2 "
                "streams that differ"
            )
    return [place for place in order if place is not None]


def zeroed(state: State) -> State:
    """The state with every value zero, and its bookkeeping as it is."""
    return map_state(state, lambda tensor: torch.zeros_like(tensor) if tensor.is_floating_point() else tensor)


def conditions(
    attachment: Attachment, state: State, order: Sequence[int | None] | None = None
) -> dict[str, State | None]:
    """The state under each of `CONDITIONS`; None for no memory. `order` names the other stream for each row (`others`
    of what was read); by default it is one with another state.

    Raises:
        ValueError: a row has no other stream.
    """
    return {
        "memory": state,
        "other stream": select(state, torch.tensor(apart(others(state) if order is None else order))),
        "zeroed": zeroed(state),
        "fresh": attachment.router.new_stream(batch_size(state)).state,
        "no memory": None,
    }


def changed(router: Router, stream: Stream, control: str, order: Sequence[int]) -> Stream:
    """Streams that begin a segment with the memory of a control in place of their own; `order` names the other stream
    of each row.
    """
    new, banks = router.new_stream(stream.batch), stream.banks
    if control == "fresh":
        return new
    if control == "zeroed":
        zeros = [None if bank is None else bank.zeroed() for bank in banks]
        return replace(new, state=zeroed(stream.state)).with_banks(zeros)
    state = select(stream.state, torch.tensor(order))
    return replace(new, state=state).with_banks([banks[row] for row in order])


def parts(rows: int, batch: int) -> Iterator[slice]:
    """`rows` streams in batches, of two at least: the last takes one more where a single one would be left, which has
    no other.
    """
    start, batch = 0, max(batch, 2)
    while start < rows:
        stop = rows if start + batch + 1 >= rows else start + batch
        yield slice(start, stop)
        start = stop


STUDENT = (12.7, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11, 2.10)
"""The 97.5 % quantile of Student's t with 1, 2, 3 ... degrees of freedom; the last stands for more."""


def verdict(labelled: Float[Tensor, " b"], own: Float[Tensor, " b"], other: Float[Tensor, " b"]) -> str:
    """What the streams of a test say in a line: whether their own memory predicts them better than that of another.

    Of each row how many tokens are labelled, and their nats with the own memory and with the other's. Better is by what
    chance gives in 1 of 40 such tests. NaN in `other` are rows that have no other stream.
    """
    known = other.isfinite()
    rows, tokens = int(known.sum()), float(labelled[known].sum())
    if not tokens:
        return "no row has another stream beside it: whether anything is remembered cannot be told; use batches of 2"
    gain = (other - own)[known].double()
    mean = float(gain.sum()) / tokens
    # of the mean of rows, as shares of all tokens
    error = float((gain - mean * labelled[known].double()).square().sum().sqrt()) / tokens
    error *= (rows / max(1, rows - 1)) ** 0.5
    told = f"{mean:+.4f} nats a token over {rows} rows, standard error {error:.4f}"
    if rows > 1 and mean > STUDENT[min(rows - 1, len(STUDENT)) - 1] * error:
        return f"the own memory is better than another stream's by {told}: something is remembered"
    return f"the own memory is no better than another stream's ({told}): nothing is remembered"


@dataclass
class Measured:
    """Of each row of a batch: how many tokens are labelled `[b]`; their nats, and how many of them are right, with the
    own memory and under each control `[b, 1 + controls]`; the logits with the own memory, where they are kept.
    """

    labelled: Float[Tensor, " b"]
    nats: Float[Tensor, "b c"]
    right: Float[Tensor, "b c"]
    logits: Float[Tensor, "b t v"] | None


@torch.no_grad()
def measure(
    model: nn.Module,
    ids: Int[Tensor, "b t"],
    labels: Int[Tensor, "b t"],
    *,
    window: int | None = None,
    controls: Sequence[str] = CONTROLS,
    keep_logits: bool = False,
) -> Measured:
    """Reads streams of whole segments and predicts their labelled tokens under every condition.

    A control stands in place of the memory at the start of each segment; what the base sees of earlier tokens stays.
    Where a row has no other stream, its numbers with the memory of another are NaN.
    """
    router = router_of(model)
    length = router.segment_length
    window = router.config.window or length if window is None else window
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    own, alone = memory_cache(model, window), memory_cache(model, window)
    nats, right = (torch.zeros(len(ids), 1 + len(controls), dtype=torch.float64, device=ids.device) for _ in range(2))
    kept: list[Tensor] = []
    starts = range(0, ids.shape[1], length)
    asked = [start for start in starts if bool((targets[:, start : start + length] != IGNORED).any())]
    order = others(ids[:, : max(asked, default=0) or None])  # what the last question can be about
    swapped = [row if place is None else place for row, place in enumerate(order)]

    def predict(cache: MemoryCache, here: slice, place: int) -> Tensor:
        logits, wanted = model(input_ids=ids[:, here], **with_cache(model, cache)).logits, targets[:, here]
        some = F.cross_entropy(logits.float().transpose(1, 2), wanted, ignore_index=IGNORED, reduction="none")
        nats[:, place] += some.double().sum(1)
        right[:, place] += (logits.argmax(-1) == wanted).double().sum(1)
        return logits

    for start in starts:
        here = slice(start, start + length)
        for place, control in enumerate(controls, 1):
            if control == "no_memory":
                with attached(model).disabled():
                    predict(alone, here, place)
            elif start in asked:
                branch = own.fork()
                stream = branch.memory.stream or router.new_stream(len(ids))
                branch.memory.stream = changed(router, stream, control, swapped)
                predict(branch, here, place)
        logits = predict(own, here, 0)
        kept += [logits] if keep_logits else []
    if "other_stream" in controls:
        place, alone_b = 1 + list(controls).index("other_stream"), torch.tensor([place is None for place in order])
        nats[alone_b, place] = right[alone_b, place] = math.nan
    return Measured((targets != IGNORED).sum(1).double(), nats, right, torch.cat(kept, 1) if kept else None)
