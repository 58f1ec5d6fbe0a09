"""What a memory is worth: the same segments predicted with the stream's own memory and with others in its place.

no_memory       the memory switched off, with the same weights
zeroed          the memory with every value zero
other_stream    the memory of another row of the batch, which has read as much
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mnemic.attachment import attached, memory_cache, router_of
from mnemic.host.arguments import with_cache
from mnemic.host.cache import MemoryCache
from mnemic.state import State, map_state
from mnemic.unrolling import IGNORED

CONTROLS = ("no_memory", "zeroed", "other_stream")


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
    Of a batch of one row, the nats with the memory of another are NaN.
    """
    router = router_of(model)
    length = router.segment_length
    window = router.config.window or length if window is None else window
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    own, alone = memory_cache(model, window), memory_cache(model, window)
    nats, right = (torch.zeros(len(ids), 1 + len(controls), dtype=torch.float64, device=ids.device) for _ in range(2))
    kept: list[Tensor] = []

    def predict(cache: MemoryCache, here: slice, place: int) -> Tensor:
        logits, wanted = model(input_ids=ids[:, here], **with_cache(model, cache)).logits, targets[:, here]
        some = F.cross_entropy(logits.float().transpose(1, 2), wanted, ignore_index=IGNORED, reduction="none")
        nats[:, place] += some.double().sum(1)
        right[:, place] += (logits.argmax(-1) == wanted).double().sum(1)
        return logits

    for start in range(0, ids.shape[1], length):
        here = slice(start, start + length)
        asked = bool((targets[:, here] != IGNORED).any())
        for place, control in enumerate(controls, 1):
            if control == "no_memory":
                with attached(model).disabled():
                    predict(alone, here, place)
            elif asked:
                branch = own.fork()
                stream = branch.memory.stream or router.new_stream(len(ids))
                branch.memory.stream = router.new_stream(len(ids), _changed(stream.state, control))
                predict(branch, here, place)
        logits = predict(own, here, 0)
        kept += [logits] if keep_logits else []
    if len(ids) == 1 and "other_stream" in controls:
        nats[:, 1 + list(controls).index("other_stream")] = math.nan
    return Measured((targets != IGNORED).sum(1).double(), nats, right, torch.cat(kept, 1) if kept else None)


def _changed(state: State, control: str) -> State:
    """The state that stands in place of a stream's own. Whole numbers are bookkeeping and stay as they are."""
    if control == "other_stream":
        return map_state(state, lambda tensor: tensor.roll(1, 0))
    return map_state(state, lambda tensor: torch.zeros_like(tensor) if tensor.is_floating_point() else tensor)
