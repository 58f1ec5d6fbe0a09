"""An unbiased sample of all tokens beside the engrams, which is not in the paper.

Engrams are chosen by similarity and use, so what they tell of a whole stream is biased; an unbiased sample is a floor
that memories of the sorting task are held against. Every token gets a random key, and the tokens of highest key are
kept: at any time each token so far is in the sample with equal probability.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from mnemic.memories.memoria.engrams import gather
from mnemic.memories.memoria.graph import token_keys
from mnemic.state import State


def empty(batch: int, size: int, width: int, device: torch.device | None = None) -> State:
    """`sample [b, r, d]` and `sample_key [b, r]` float32, a key of 0 for a free place; `tokens [b]` int64 so far."""
    return {
        "sample": torch.zeros(batch, size, width, device=device),
        "sample_key": torch.zeros(batch, size, device=device),
        "tokens": torch.zeros(batch, dtype=torch.long, device=device),
    }


def draw(state: State, hidden_btd: Float[Tensor, "b t d"], keep_bt: Bool[Tensor, "b t"] | None, seed: int) -> State:
    """The state after a segment's tokens, as constants to the gradient, each scaled to mean 0 and variance 1."""
    with torch.no_grad():
        batch, time, width = hidden_btd.shape
        keep = hidden_btd.new_ones(batch, time, dtype=torch.bool) if keep_bt is None else keep_bt
        number = state["tokens"][:, None] + keep.long().cumsum(1)
        key = torch.cat([state["sample_key"], token_keys(seed, number).masked_fill(~keep, 0)], 1)
        held = torch.cat([state["sample"], F.layer_norm(hidden_btd, (width,)).to(state["sample"].dtype)], 1)
        best, place = key.topk(state["sample"].shape[1], 1)
        sample = gather(held, place).masked_fill((best == 0)[..., None], 0)
        return {**state, "sample": sample, "sample_key": best, "tokens": state["tokens"] + keep.sum(1)}
