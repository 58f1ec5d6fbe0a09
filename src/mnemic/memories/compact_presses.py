"""Other ways to keep few keys, which compact is compared with: what is kept has no bias, and all but one leave values be.

Each gets what was kept and what leaves the window, in order of time (keys `[k, n, s]`, values `[k, n, v]`, masses `[k, n]`),
the attention `[k, j, n]` of the segment's queries over it, and how many keys to keep, fewer than n. It returns what is kept.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

SINKS = 4
"""First keys of a stream that "recent" keeps, as StreamingLLM does."""

Kept = tuple[Tensor, Tensor, Tensor]


def chosen(index_kc: Int[Tensor, "k c"], keys_kns: Tensor, value_knv: Tensor) -> Kept:
    """Some of the keys with their values, in order of time."""
    index_kc = index_kc.sort(-1).values
    keys, values = (x.gather(1, index_kc[..., None].expand(-1, -1, x.shape[-1])) for x in (keys_kns, value_knv))
    return keys, values, torch.ones_like(keys[..., 0])


def recent(keys_kns: Tensor, value_knv: Tensor, mass_kn: Tensor, share_kjn: Tensor, count: int) -> Kept:
    """The stream's first keys and the latest (StreamingLLM, Xiao et al., ICLR 2024, arXiv 2309.17453)."""
    first, size = min(SINKS, count), keys_kns.shape[1]
    index_c = torch.cat([torch.arange(first), torch.arange(size - count + first, size)]).to(keys_kns.device)
    return chosen(index_c.expand(len(keys_kns), -1), keys_kns, value_knv)


def heavy(keys_kns: Tensor, value_knv: Tensor, mass_kn: Tensor, share_kjn: Tensor, count: int) -> Kept:
    """Those that the segment's queries attended to most (SnapKV, Li et al., NeurIPS 2024, arXiv 2404.14469)."""
    return chosen(share_kjn.sum(1).topk(count).indices, keys_kns, value_knv)


def norm(keys_kns: Tensor, value_knv: Tensor, mass_kn: Tensor, share_kjn: Tensor, count: int) -> Kept:
    """The shortest keys (Devoto et al., EMNLP 2024, arXiv 2406.11430)."""
    return chosen((-keys_kns.norm(dim=-1)).topk(count).indices, keys_kns, value_knv)


def random(keys_kns: Tensor, value_knv: Tensor, mass_kn: Tensor, share_kjn: Tensor, count: int) -> Kept:
    """Any, the same for the same number of keys."""
    draw = torch.rand(keys_kns.shape[:2], generator=torch.Generator().manual_seed(keys_kns.shape[1]))
    return chosen(draw.to(keys_kns.device).topk(count).indices, keys_kns, value_knv)


def merged(keys_kns: Tensor, value_knv: Tensor, mass_kn: Tensor, share_kjn: Tensor, count: int) -> Kept:
    """Keys that are most like the one before them are merged with it, weighted by how many each stands for (CAMELoT, He
    et al., arXiv 2402.13449, which merges with the nearest of all slots).
    """
    near_kn = torch.nn.functional.cosine_similarity(keys_kns[:, 1:], keys_kns[:, :-1], dim=-1)
    joins_kn = torch.zeros_like(mass_kn, dtype=torch.long)
    joins_kn.scatter_(1, 1 + near_kn.topk(keys_kns.shape[1] - count).indices, 1)
    slot_kn = (1 - joins_kn).cumsum(-1) - 1
    mass_kc = mass_kn.new_zeros(len(mass_kn), count).scatter_add(1, slot_kn, mass_kn)

    def mean(x_knd: Float[Tensor, "k n d"]) -> Float[Tensor, "k c d"]:
        total = x_knd.new_zeros(len(x_knd), count, x_knd.shape[-1])
        index = slot_kn[..., None].expand_as(x_knd)
        return total.scatter_add(1, index, x_knd * mass_kn[..., None]) / mass_kc[..., None]

    return mean(keys_kns), mean(value_knv), mass_kc


PRESSES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, int], Kept]] = {
    "recent": recent,
    "heavy": heavy,
    "norm": norm,
    "merged": merged,
    "random": random,
}
