"""By how much one of two things measured on the same examples is higher."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mnemic.tasks.base import generator


def difference(lower: Float[Tensor, " n"], higher: Float[Tensor, " n"], draws: int = 10_000) -> dict[str, float]:
    """By how much `higher` is higher, paired by document: mean, the middle 95 % of the bootstrap, and how often."""
    each = higher - lower
    picked = torch.randint(len(each), (draws, len(each)), generator=generator(0))
    means = each[picked].mean(1).sort().values
    return {
        "mean": float(each.mean()),
        "low": float(means[int(0.025 * draws)]),
        "high": float(means[int(0.975 * draws)]),
        "documents": float((each > 0).sum()),
        "of": float(len(each)),
    }
