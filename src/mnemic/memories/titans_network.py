"""The network of `titans.py`: what it says of a query, and how pairs of keys and values train it, a chunk at once.

Names are those of the equations there. Within a chunk S and M are linear in gradients that are known, so what is left
of each at the chunk's end is a number, and each layer is written with one product. Gradients are written out, so they
have gradients themselves.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mnemic.memories.fast_weights import wide
from mnemic.state import State

# Shapes: b batch, t time, h heads, k keys' and values' width, n tokens of a chunk's losses, e any layer's width.

UNIT_LENGTH = 2.8
"""1 / the mean of SiLU(z)² over normal z: with it features of any width are about as long as keys."""


class Pairs(NamedTuple):
    """What a segment teaches: real tokens first, padding behind them with θ = 0, η = 1 and α = 0."""

    key: Float[Tensor, "b h t k"]
    value: Float[Tensor, "b h t k"]
    rate: Float[Tensor, "b h t"]
    log_momentum: Float[Tensor, "b h t"]
    log_keep: Float[Tensor, "b h t"]
    share: Float[Tensor, "b h t"]
    real: Float[Tensor, "b 1 t"]

    def cut(self, start: int, stop: int) -> Pairs:
        """Those of some tokens."""
        return Pairs(*(each.narrow(2, start, stop - start) for each in self))


def activate(z: Float[Tensor, "*n e"]) -> Float[Tensor, "*n e"]:
    """σ(z) = SiLU(z) sqrt(2.8 / width)."""
    return F.silu(z) * math.sqrt(UNIT_LENGTH / z.shape[-1])


def slope(z: Float[Tensor, "*n e"]) -> Float[Tensor, "*n e"]:
    """σ'(z)."""
    gate = z.sigmoid()
    return gate * (1 + z * (1 - gate)) * math.sqrt(UNIT_LENGTH / z.shape[-1])


def network(state: State, first: list[Tensor], dtype: torch.dtype) -> list[Float[Tensor, "b h _ _"]]:
    """The matrices of M."""
    return [weights.to(dtype) + state[f"learned_{layer}"].to(dtype) for layer, weights in enumerate(first, 1)]


def recall(state: State, first: list[Tensor], query_bhtk: Float[Tensor, "b h t k"]) -> Float[Tensor, "b h t k"]:
    """r = M(q), in float32 or wider, under autocast too; `first` are the matrices `[h, in, out]` of M_*."""
    with torch.autocast(query_bhtk.device.type, enabled=False):
        features = wide(query_bhtk)
        *hidden, last = network(state, first, features.dtype)
        for weights in hidden:
            features = activate(features @ weights)
        return features @ last


def gradients(
    weights: list[Tensor], key: Float[Tensor, "*b n k"], value: Float[Tensor, "*b n k"], clip: float | None
) -> list[tuple[Float[Tensor, "*b n _"], Float[Tensor, "*b n _"]]]:
    """∇ℓ of every token for every matrix W_l, as two vectors whose outer product it is: a_{l-1} and the gradient of
    W_lᵀ a_{l-1}.
    """
    inputs, sums = [key], []
    for matrix in weights[:-1]:
        sums.append(inputs[-1] @ matrix)
        inputs.append(activate(sums[-1]))
    errors = [inputs[-1] @ weights[-1] - value]
    for matrix, z in zip(reversed(weights[1:]), reversed(sums), strict=True):
        errors.insert(0, (errors[0] @ matrix.mT) * slope(z))
    if clip is not None:
        squares = [x.square().sum(-1) * e.square().sum(-1) for x, e in zip(inputs, errors, strict=True)]
        shorter = torch.rsqrt(1 + torch.stack(squares).sum(0) / clip**2)[..., None]
        errors = [error * shorter for error in errors]
    return list(zip(inputs, errors, strict=True))


def learn(
    state: State, first: list[Tensor], pairs: Pairs, chunk: int, window_tokens: int = 1, clip: float | None = None
) -> State:
    """The state after pairs, chunk after chunk, in float32 or wider, under autocast too."""
    dtype, time = wide(pairs.key).dtype, pairs.key.shape[2]
    pairs = Pairs(*(each.to(dtype) for each in pairs))
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    with torch.autocast(pairs.key.device.type, enabled=False):
        for start in range(0, time, chunk):
            stop = min(start + chunk, time)
            begin = max(0, start - window_tokens + 1)
            state = _learn_chunk(state, first, pairs.cut(begin, stop), pairs.cut(start, stop), window_tokens, clip)
    return state


def _learn_chunk(
    state: State, first: list[Tensor], seen: Pairs, here: Pairs, window_tokens: int, clip: float | None
) -> State:
    """All tokens of a chunk at once; `seen` are those of their losses, so a window begins before the chunk.

    With E_t = η_1 ... η_t and A_t = (1 - α_1) ... (1 - α_t), and u_t the gradients that token t takes,

        S_c = E_c S_0 - Σ_i (E_c / E_i) θ_i u_i
        M_c = A_c M_0 + Σ_t (A_c / A_t) S_t = A_c M_0 + [Σ_t (A_c / A_t) E_t] S_0 - Σ_i p_i θ_i u_i
        p_i = Σ_{t>=i} (A_c / A_t) (E_t / E_i)

    where M stands for M - M_*, and padding has no S_t to add.
    """
    # logarithms, as E and A may be too small for a quotient
    momentum, kept = here.log_momentum.cumsum(-1), here.log_keep.cumsum(-1)
    left = (kept[..., -1:] - kept).exp() * here.real
    passed = (momentum[..., None] - momentum[..., None, :]).tril().exp().tril()
    to_momentum = here.rate * (momentum[..., -1:] - momentum).exp()
    to_learned = here.rate * (left[..., None, :] @ passed).squeeze(-2)
    if window_tokens > 1:
        before, time = seen.key.shape[2] - here.key.shape[2], here.key.shape[2]
        # token t of the chunk stands at t + before among those seen
        window = momentum.new_ones(time, before + time).tril(before).triu(before - window_tokens + 1)
        to_momentum, to_learned = to_momentum @ window * seen.share, to_learned @ window * seen.share
    from_momentum = (left * momentum.exp()).sum(-1)[..., None, None]
    after: State = {}
    weights = network(state, first, momentum.dtype)
    for layer, (inputs, errors) in enumerate(gradients(weights, seen.key, seen.value, clip), 1):
        learned, surprise = state[f"learned_{layer}"], state[f"momentum_{layer}"]
        after[f"learned_{layer}"] = (
            kept[..., -1, None, None].exp() * learned
            + from_momentum * surprise
            - (inputs * to_learned[..., None]).mT @ errors
        )
        after[f"momentum_{layer}"] = (
            momentum[..., -1, None, None].exp() * surprise - (inputs * to_momentum[..., None]).mT @ errors
        )
    return after
