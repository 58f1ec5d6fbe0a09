"""Other ways to keep few keys, with which compact is compared: keys are left out, or merged.

Each gets what was kept and what leaves the window, in order of time, what the segment's queries saw of it, and how many
keys to keep, fewer than there are. It returns what is kept, in order of time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

# Shapes: k heads of keys, n keys before, c after, s and v widths of a head, j queries.

SINKS = 4
"""First keys of a stream that `recent` keeps."""


class Kept(NamedTuple):
    """Keys without positions, their values, how many keys of those that were read each weighs as much as, and how many
    tokens before the window's first key it stands.
    """

    keys_kns: Float[Tensor, "k n s"]
    value_knv: Float[Tensor, "k n v"]
    mass_kn: Float[Tensor, "k n"]
    behind_kn: Int[Tensor, "k n"]

    def some(self, index_kc: Int[Tensor, "k c"]) -> Kept:
        """Of each head some, in order of time."""
        index_kc = index_kc.sort(-1).values
        keys, values = (x.take_along_dim(index_kc[..., None], 1) for x in self[:2])
        return Kept(keys, values, *(x.gather(1, index_kc) for x in self[2:]))

    def placed(self, first: int, turn: Callable[..., Tensor]) -> Float[Tensor, "k n s"]:
        """Keys turned to where they stand, before a window whose first key stands at `first`."""
        keys_1ns, stands_n = self.keys_kns.flatten(0, 1)[None], (first - self.behind_kn).long().flatten()
        return turn(keys_1ns, stands_n).view_as(self.keys_kns)


class Seen(NamedTuple):
    """The share of each key in what each query saw of them, and the share that they all had beside the window."""

    share_kjn: Float[Tensor, "k j n"]
    weight_kj1: Float[Tensor, "k j 1"]


def recent(old: Kept, seen: Seen, count: int) -> Kept:
    """The stream's first keys and the latest (StreamingLLM, Xiao et al., ICLR 2024, arXiv 2309.17453)."""
    heads, size = old.mass_kn.shape
    first = min(SINKS, count)
    index_c = torch.cat([torch.arange(first), torch.arange(size - count + first, size)])
    return old.some(index_c.to(old.mass_kn.device).expand(heads, -1))


def heavy(old: Kept, seen: Seen, count: int) -> Kept:
    """Those that the segment's queries attended to most (SnapKV, Li et al., NeurIPS 2024, arXiv 2404.14469)."""
    return old.some((seen.share_kjn * seen.weight_kj1).sum(1).topk(count).indices)


def norm(old: Kept, seen: Seen, count: int) -> Kept:
    """The shortest keys (Devoto et al., EMNLP 2024, arXiv 2406.11430)."""
    return old.some((-old.keys_kns.norm(dim=-1)).topk(count).indices)


def random(old: Kept, seen: Seen, count: int) -> Kept:
    """Any; which ones depends on how many there are alone."""
    draw = torch.rand(old.mass_kn.shape, generator=torch.Generator().manual_seed(old.mass_kn.shape[1]))
    return old.some(draw.topk(count).indices.to(old.mass_kn.device))


def merged(old: Kept, seen: Seen, count: int) -> Kept:
    """Keys that are most like the one before them are merged with it: means of keys and values, by their masses. After
    CAMELoT (He et al., arXiv 2402.13449), which merges what comes with the nearest of all slots.
    """
    like_kn = F.cosine_similarity(old.keys_kns[:, 1:], old.keys_kns[:, :-1], dim=-1)
    joins_kn = torch.zeros_like(old.mass_kn, dtype=torch.long)
    joins_kn.scatter_(1, 1 + like_kn.topk(joins_kn.shape[1] - count).indices, 1)
    slot_kn = (1 - joins_kn).cumsum(-1) - 1
    mass_kc = old.mass_kn.new_zeros(len(slot_kn), count).scatter_add(1, slot_kn, old.mass_kn)

    def mean(x_knd: Tensor) -> Tensor:
        total = old.mass_kn.new_zeros(len(x_knd), count, x_knd.shape[-1])
        total = total.scatter_add(1, slot_kn[..., None].expand_as(x_knd), x_knd * old.mass_kn[..., None])
        return total / mass_kc[..., None]

    behind_kc = mean(old.behind_kn[..., None])[..., 0].round().to(old.behind_kn)
    return Kept(mean(old.keys_kns), mean(old.value_knv), mass_kc, behind_kc)


PRESSES: dict[str, Callable[[Kept, Seen, int], Kept]] = {
    "recent": recent,
    "heavy": heavy,
    "norm": norm,
    "merged": merged,
    "random": random,
}
