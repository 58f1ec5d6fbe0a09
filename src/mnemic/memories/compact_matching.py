"""Attention matching for compact: few keys in which some queries find what they find in all. Equations: `compact`."""

from __future__ import annotations

import torch

from mnemic.memories.compact_presses import Kept, Seen

# Shapes: k heads of keys, j queries, n keys before, c after, v width of values.

STEPS = 20
"""How often masses are improved."""
RIDGE = 0.01
"""How strongly values are held to those of the chosen keys, in mean squares of a key's weights."""
MOST = 1e3
"""A mass and its inverse are at most that: of keys that no query found."""
TINY = 1e-20


def matching(old: Kept, seen: Seen, count: int) -> Kept:
    """The keys C with masses B and values V, `count` of them."""
    weight_kj1, part_kjn = seen.weight_kj1, seen.weight_kj1 * seen.share_kjn
    index_kc = part_kjn.square().sum(1).topk(count).indices.sort(-1).values
    kept, part_kjc = old.some(index_kc), part_kjn.take_along_dim(index_kc[:, None], 2)
    # B, of which a key had so much before
    wanted_kc1, times_kc1 = part_kjc.mT @ weight_kj1, torch.ones_like(kept.mass_kn)[..., None]
    for _ in range(STEPS):
        times_kc1 = times_kc1 * wanted_kc1 / (part_kjc.mT @ (part_kjc @ times_kc1)).clamp_min(TINY)
    mass_kc = (kept.mass_kn * times_kc1[..., 0]).clamp(1 / MOST, MOST)
    part_kjc = part_kjc * (mass_kc / kept.mass_kn)[:, None]
    share_kjc = weight_kj1 * part_kjc / part_kjc.sum(-1, keepdim=True).clamp_min(TINY)
    # V by queries, of which there are few however many keys are kept: X' (X X' + r)^-1 = (X' X + r)^-1 X'
    miss_kjv, gram_kjj = part_kjn @ old.value_knv - share_kjc @ kept.value_knv, share_kjc @ share_kjc.mT
    ridge_k = RIDGE * gram_kjj.diagonal(dim1=-2, dim2=-1).sum(-1) / count
    gram_kjj = gram_kjj + ridge_k.clamp_min(TINY)[:, None, None] * torch.eye(gram_kjj.shape[-1], device=gram_kjj.device)
    precise = torch.float32 if gram_kjj.device.type == "mps" else torch.float64  # which MPS does not have
    more_kcv = share_kjc.mT @ torch.linalg.solve(gram_kjj.to(precise), miss_kjv.to(precise)).to(miss_kjv)
    return kept._replace(value_knv=kept.value_knv + more_kcv, mass_kn=mass_kc)
