"""Attention matching for compact: few keys in which some queries find what they find in all. Equations: `compact`."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from mnemic.memories.compact_presses import Kept, Seen

# Shapes: k heads of keys, j queries, n keys before, c after, v width of values.

SAME = 1e-3
"""A key adds nothing to others where, as a share of squares, less than that of it is no combination of theirs."""
STEPS = 20
"""How often masses are improved."""
RIDGE = 0.01
"""How strongly values are held to those of the chosen keys, in mean squares of a key's weights."""
MOST = 1e3
"""A mass and its inverse are at most that: of keys that no query found."""
TINY = 1e-20


def matching(old: Kept, seen: Seen, count: int) -> Kept:
    """C are the keys of which the queries saw most."""
    part_kjn = seen.weight_kj1 * seen.share_kjn
    return fitted(old, seen, part_kjn.square().sum(1).topk(count).indices)


def pursuit(old: Kept, seen: Seen, count: int) -> Kept:
    """C by orthogonal matching pursuit: one by one the key with which the least is left of what the queries read, where
    values are free. When nothing is left, those of which the queries saw most.
    """
    part_kjn = seen.weight_kj1 * seen.share_kjn
    left_knv = part_kjn.mT @ (part_kjn @ old.value_knv)
    size_kn = part_kjn.square().sum(1)
    rest_kn, taken_kn = size_kn, torch.zeros_like(size_kn, dtype=torch.bool)
    # the Cholesky factor of the products of keys, a column for each that is chosen: nothing is solved anew. With one
    # less than there are queries it ends, as then any other key would do as well as any
    factor_knm = size_kn.new_zeros(*size_kn.shape, min(count, part_kjn.shape[1] - 1))
    for step in range(factor_knm.shape[-1]):
        open_kn = ~taken_kn & (rest_kn > SAME * size_kn)
        best_k11 = (left_knv.square().sum(-1) / rest_kn).where(open_kn, -1).argmax(-1)[:, None, None]
        taken_kn = taken_kn | (torch.zeros_like(taken_kn).scatter(1, best_k11[..., 0], True) & open_kn)
        before_knm = factor_knm[..., :step]
        column_kn1 = part_kjn.mT @ part_kjn.take_along_dim(best_k11, 2)
        column_kn1 = column_kn1 - before_knm @ before_knm.take_along_dim(best_k11, 1).mT
        # 0 where nothing was left
        scale_k11 = (rest_kn.clamp_min(TINY).rsqrt() * open_kn)[..., None].take_along_dim(best_k11, 1)
        column_kn1 = column_kn1 * scale_k11
        factor_knm[..., step] = column_kn1[..., 0]
        left_knv = left_knv - column_kn1 * (left_knv.take_along_dim(best_k11, 1) * scale_k11)
        rest_kn = rest_kn - column_kn1[..., 0].square()
    return fitted(old, seen, size_kn.masked_fill(taken_kn, torch.inf).topk(count).indices)


def fitted(old: Kept, seen: Seen, index_kc: Int[Tensor, "k c"]) -> Kept:
    """Some keys, with B and V."""
    index_kc, weight_kj1 = index_kc.sort(-1).values, seen.weight_kj1
    part_kjn = weight_kj1 * seen.share_kjn
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
    ridge_k = RIDGE * gram_kjj.diagonal(dim1=-2, dim2=-1).sum(-1) / index_kc.shape[1]
    gram_kjj = gram_kjj + ridge_k.clamp_min(TINY)[:, None, None] * torch.eye(gram_kjj.shape[-1], device=gram_kjj.device)
    precise = torch.float32 if gram_kjj.device.type == "mps" else torch.float64  # which MPS does not have
    more_kcv = share_kjc.mT @ torch.linalg.solve(gram_kjj.to(precise), miss_kjv.to(precise)).to(miss_kjv)
    return kept._replace(value_knv=kept.value_knv + more_kcv, mass_kn=mass_kc)
