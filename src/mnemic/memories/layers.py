"""What mechanisms share: the blocks that their settings name, the token before each, and two small numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from mnemic.memory import Site

EPSILON = 1e-5
"""Added to a normaliser: without it an empty one would divide 0 by 0."""
NEXT_TO_NOTHING = 1e-2
"""δ, the mean square below which what is read is not scaled up."""


def resolve_layer(index: int, depth: int, name: str) -> int:
    """A block index in `0 .. depth - 1`, negative ones counted from the end; raises `ValueError` out of range."""
    if not -depth <= index < depth:
        raise ValueError(f"{name} is {index}, but the model has {depth} blocks; use {-depth} .. {depth - 1}")
    return index % depth


def resolve_sites(
    write_layer: int | None, read_layers: Sequence[int] | None, depth: int
) -> tuple[tuple[Site, ...], tuple[Site, ...]]:
    """The block whose output a memory writes and those whose outputs it reads: the middle one, and that, unless said
    otherwise.

    Raises `ValueError` for a block that the model does not have or that is named twice.
    """
    write = resolve_layer((depth - 1) // 2 if write_layer is None else write_layer, depth, "write_layer")
    reads = (write,) if read_layers is None else distinct_layers(read_layers, depth, "read_layers")
    return (Site(write),), tuple(map(Site, reads))


def distinct_layers(layers: Sequence[int], depth: int, name: str) -> tuple[int, ...]:
    """Block indices in order; raises `ValueError` for a block that the model does not have, and for one named twice."""
    found = [resolve_layer(layer, depth, name) for layer in layers]
    if len(set(found)) < len(found):
        twice = next(layer for layer in found if found.count(layer) > 1)
        raise ValueError(f"{name} is {list(layers)}, which names block {twice} of {depth} twice; name each block once")
    return tuple(sorted(found))


def shifted(
    hidden_btd: Float[Tensor, "b t d"],
    keep_bt: Bool[Tensor, "b t"] | None,
    first_bd: Float[Tensor, "b d"] | None = None,
) -> Float[Tensor, "b t d"]:
    """For every token the one before it in its row, padding skipped; where there is none, `first_bd`, or zero."""
    first_b1d = (hidden_btd.new_zeros(hidden_btd[:, 0].shape) if first_bd is None else first_bd)[:, None]
    if keep_bt is None:
        return torch.cat([first_b1d, hidden_btd[:, :-1]], 1)
    place_t = torch.arange(hidden_btd.shape[1], device=hidden_btd.device)
    latest_bt = F.pad(place_t.where(keep_bt, -1).cummax(1).values, (1, -1), value=-1)
    before_btd = hidden_btd.gather(1, latest_bt.clamp_min(0)[..., None].expand_as(hidden_btd))
    return before_btd.where((latest_bt >= 0)[..., None], first_b1d)


def latest(
    hidden_btd: Float[Tensor, "b t d"], keep_bt: Bool[Tensor, "b t"] | None, first_bd: Float[Tensor, "b d"]
) -> Float[Tensor, "b d"]:
    """The last token of every row that is no padding; `first_bd` where all are."""
    if keep_bt is None:
        return hidden_btd[:, -1]
    place_t = torch.arange(hidden_btd.shape[1], device=hidden_btd.device)
    latest_b = place_t.where(keep_bt, -1).amax(1)
    return hidden_btd[torch.arange(len(hidden_btd)), latest_b.clamp_min(0)].where((latest_b >= 0)[:, None], first_bd)
