"""EMT's three ways to write: once per segment, once per token, by allocation; and the whitening that comes before. The
equations stand in `mnemic.memories.emt`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mnemic.memories.layers import latest, shifted
from mnemic.state import State

if TYPE_CHECKING:
    from mnemic.memories.emt import EMTConfig

AGE_WEIGHT, USAGE_WEIGHT, AGE_DECAY, USAGE_DECAY = 0.1, 0.2, 0.98, 0.99
KEPT_BIAS, OPEN_BIAS, ENOUGH = 2.0, 1.0, 3.0
"""Of allocation: where the biases of beta and of the gate begin, and how fast a slot that gets tokens is rewritten."""


class Whitening(nn.Module):
    """x -> (x - mean) C^(-1/2), the identity until fitted; with `bound` its result is layer-normed, since a query of
    another kind than those it was fitted to may be large.
    """

    mean: Tensor
    matrix: Tensor

    def __init__(self, width: int, bound: bool) -> None:
        super().__init__()
        self.bound = bound
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("matrix", torch.eye(width))

    @torch.no_grad()
    def fit(self, samples_nd: Float[Tensor, "n d"], ridge: float = 1e-3) -> None:
        """Mean and covariance C of the samples; `ridge`, a share of the mean variance, keeps empty directions small."""
        samples_nd = samples_nd.double()
        covariance = torch.cov(samples_nd.T)
        covariance += ridge * covariance.diagonal().mean() * torch.eye(len(covariance), device=covariance.device)
        values, vectors = torch.linalg.eigh(covariance)
        self.mean.copy_(samples_nd.mean(0))
        self.matrix.copy_(vectors @ torch.diag(values.rsqrt()) @ vectors.T)

    def forward(self, hidden: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        """Whitened hidden states of the same shape."""
        white = (hidden - self.mean) @ self.matrix
        return F.layer_norm(white, white.shape[-1:]) if self.bound else white


class SegmentWriter(nn.Module):
    """Slots attend over a segment's tokens and blend in what they found: `[b, t, d] -> slots [b, s, m]`."""

    def __init__(self, config: EMTConfig, width: int) -> None:
        super().__init__()
        self.norm_hidden = nn.LayerNorm(width)
        self.whiten = Whitening(width, bound=False) if config.whiten else nn.Identity()
        self.query = nn.Linear(config.dim, config.dim)
        self.key = nn.Linear(width, config.dim, bias=False)  # a bias is the same for every token: softmax drops it
        self.value = nn.Linear(width, config.dim)
        self.gate = nn.Linear(2 * config.dim, 1)
        self.gru = nn.GRUCell(config.dim, config.dim)
        nn.init.constant_(self.gate.bias, config.gate_bias)
        with torch.no_grad():
            self.query.weight *= config.sharpness**0.5
            self.key.weight *= config.sharpness**0.5

    def prepare(self, hidden: Tensor) -> Tensor:
        """What keys and values are made from."""
        return self.whiten(self.norm_hidden(hidden))

    def forward(self, hidden_btd: Tensor, state: State, keep_bt: Tensor | None) -> tuple[State, Tensor, Tensor]:
        """The state of one memory after the segment, a `[b, s, t]` and g `[b, s, 1]` of the equations above.

        Keys and values are linear in the tokens, so they are applied where there are fewer rows, at the slots:
        q . (W_k h) = (W_k' q) . h, and the sum of a_t v(h_t) is v of the sum of a_t h_t, as the a_t sum to 1.
        """
        hidden_btd, slots_bsm = self.prepare(hidden_btd), state["slots"]
        asked_bsd = self.query(slots_bsm) @ self.key.weight / math.sqrt(slots_bsm.shape[-1])
        score_bst = asked_bsd @ hidden_btd.transpose(1, 2)
        if keep_bt is not None:
            score_bst = score_bst.masked_fill(~keep_bt[:, None], torch.finfo(score_bst.dtype).min)
        weight_bst = score_bst.softmax(-1)
        content_bsm = self.value(weight_bst @ hidden_btd)
        gate_bs1 = torch.sigmoid(self.gate(torch.cat([content_bsm, slots_bsm], -1)))
        candidate_bsm = self.gru(content_bsm.flatten(0, 1), slots_bsm.flatten(0, 1)).view_as(slots_bsm)
        # under autocast the layers' results are narrower than the slots, which lerp does not mix
        after_bsm = torch.lerp(slots_bsm, candidate_bsm.to(slots_bsm), gate_bs1.to(slots_bsm))
        return {"slots": after_bsm}, weight_bst, gate_bs1


class AllocationWriter(nn.Module):
    """Slots compete for a segment's tokens, which bring an address and a content: `[b, t, 2d] -> slots [b, s, m]`."""

    def __init__(self, config: EMTConfig, width: int) -> None:
        super().__init__()
        size = config.dim
        self.norm_hidden, self.norm_entered = nn.LayerNorm(width), nn.LayerNorm(width)
        self.whiten, self.whiten_entered = (
            Whitening(width, bound=True) if config.whiten else nn.Identity() for _ in range(2)
        )
        self.address, self.content = (nn.Linear(width, size // 2, bias=False) for _ in range(2))
        self.claim = nn.Parameter(torch.randn(config.slots, size))
        self.claim_more = nn.Linear(size, size, bias=False)
        self.key = nn.Linear(size, size, bias=False)
        self.sharpness, self.usage_weight = config.sharpness, config.usage_weight
        self.keep = nn.Linear(width, 1)
        self.gate = nn.Linear(2 * size, 1)
        self.gru = nn.GRUCell(size, size)
        for linear in (self.address, self.content):
            nn.init.orthogonal_(linear.weight)  # so that its inverse is well conditioned
        nn.init.zeros_(self.claim_more.weight)
        nn.init.zeros_(self.keep.weight)
        nn.init.constant_(self.keep.bias, KEPT_BIAS)
        nn.init.constant_(self.gate.bias, OPEN_BIAS)
        with torch.no_grad():
            # slots begin by choosing tokens by their addresses, so what is told again takes the old one's place
            self.key.weight[:, size // 2 :] = 0
            # the candidate begins as tanh(c), so that what is read is what was written
            self.gru.weight_ih *= 0.1
            self.gru.weight_hh *= 0.1
            self.gru.weight_ih[2 * size :] += torch.eye(size)
            self.gru.bias_ih[size : 2 * size] = -2.0

    def forward(self, hidden_btd: Tensor, state: State, keep_bt: Tensor | None) -> tuple[State, Tensor, Tensor]:
        """The state of one memory after the segment, w / n `[b, s, t]` and g `[b, s, 1]` of the equations above."""
        slots_bsm, last_bm = state["slots"], state["last"]
        entered_btd, hidden_btd = hidden_btd.chunk(2, -1)
        hidden_btd = self.whiten(self.norm_hidden(hidden_btd))
        entered_btd = self.whiten_entered(self.norm_entered(entered_btd))
        address_btm = self.address(hidden_btd)
        pair_btm = torch.cat([shifted(address_btm, keep_bt, last_bm), self.content(entered_btd)], -1)
        claim_bsm = F.normalize(self.claim + self.claim_more(slots_bsm), dim=-1)
        key_btm = F.normalize(self.key(F.layer_norm(pair_btm, pair_btm.shape[-1:])), dim=-1)
        scale = 2 * math.sqrt(slots_bsm.shape[-1]) * self.sharpness
        taken_bs = torch.zeros_like(slots_bsm[..., 0])
        if self.usage_weight:
            taken_bs = self.usage_weight * state["usage"]
        share_bst = self.allocate(key_btm @ claim_bsm.mT, self.kept(hidden_btd, keep_bt), scale, taken_bs)
        mass_bs1 = share_bst.sum(-1, keepdim=True)
        weight_bst = share_bst / mass_bs1.clamp_min(torch.finfo(share_bst.dtype).tiny)
        content_bsm = F.layer_norm(weight_bst @ pair_btm, slots_bsm.shape[-1:])
        gate_bs1 = torch.sigmoid(self.gate(torch.cat([content_bsm, slots_bsm.to(content_bsm)], -1)))
        gate_bs1 = gate_bs1 * (1 - torch.exp(-ENOUGH * mass_bs1))
        candidate_bsm = self.gru(content_bsm.flatten(0, 1), slots_bsm.flatten(0, 1)).view_as(slots_bsm)
        after_bsm = torch.lerp(slots_bsm, candidate_bsm.to(slots_bsm), gate_bs1.to(slots_bsm))
        after = {"slots": after_bsm, "last": latest(address_btm, keep_bt, last_bm)}
        if self.usage_weight:
            after["usage"] = USAGE_DECAY * (state["usage"] + mass_bs1[..., 0])
        return after, weight_bst, gate_bs1

    def kept(self, white_btd: Tensor, keep_bt: Tensor | None) -> Tensor:
        """beta `[b, t, 1]` of the equations above of whitened hidden states, 0 for padding."""
        keep_bt1 = torch.sigmoid(self.keep(white_btd))
        return keep_bt1 if keep_bt is None else keep_bt1 * keep_bt[..., None]

    def cost(self, hidden_btd: Tensor, keep_bt: Tensor | None) -> Tensor:
        """The mean of beta over the tokens of each row, `[b]`."""
        kept_bt1 = self.kept(self.whiten(self.norm_hidden(hidden_btd.chunk(2, -1)[1])), keep_bt)
        count = kept_bt1.shape[1] if keep_bt is None else keep_bt.sum(1).clamp_min(1)
        return kept_bt1.sum((1, 2)) / count

    @staticmethod
    def allocate(cosine_bts: Tensor, keep_bt1: Tensor, scale: float, taken_bs: Tensor) -> Tensor:
        """w `[b, s, t]` of the equations above: token after token, as each finds fewer slots free."""
        shares = []
        for cosine_bs, keep_b1 in zip(cosine_bts.unbind(1), keep_bt1.unbind(1), strict=True):
            shares.append((scale * (cosine_bs - taken_bs)).softmax(-1) * keep_b1)
            taken_bs = taken_bs + shares[-1]
        return torch.stack(shares, -1)


class TokenWriter(nn.Module):
    """The parameters of one memory's token write; `write_tokens` runs all stacked memories at once."""

    def __init__(self, config: EMTConfig, width: int) -> None:
        super().__init__()
        self.rate = config.update_rate
        self.address, self.value = nn.Linear(width, config.dim), nn.Linear(width, config.dim)
        self.gru = nn.GRUCell(config.dim, config.dim)


def write_tokens(writers: list[TokenWriter], hidden_btd: Tensor, state: State, keep_bt: Tensor | None) -> State:
    """Writes token after token: `[b, t, d] -> slots [b, k, s, m], usage and age [b, k, s]`.

    What does not depend on the slots is computed for the whole segment before the loop. The weights are scaled so that
    every gate comes out of a sigmoid: 1 - z of the turned update gate, which makes M + eta w (1 - z) (n - M) one
    interpolation, and n = tanh(x) = 2 sigmoid(2 x) - 1, as a vectorised sigmoid is five times faster than tanh.
    """
    slots, usage, age = (state[name].transpose(0, 1).contiguous() for name in ("slots", "usage", "age"))
    size = slots.shape[-1]
    turn = slots.new_tensor([1.0, -1.0, 2.0]).repeat_interleave(size)
    minus_one = -slots.new_ones(())
    weight = torch.stack([turn[:, None] * writer.gru.weight_hh for writer in writers]).transpose(1, 2).contiguous()
    bias_new = torch.stack([writer.gru.bias_hh[2 * size :] for writer in writers])[:, None] * 2
    bias = torch.cat([bias_new.new_zeros(len(writers), 1, 2 * size), bias_new], -1)
    gates, addresses = [], []
    for writer in writers:
        gate = F.linear(writer.value(hidden_btd), writer.gru.weight_ih, writer.gru.bias_ih)
        gate = gate + F.pad(writer.gru.bias_hh[: 2 * size], (0, size))
        gates.append(gate * turn)
        addresses.append(F.normalize(writer.address(hidden_btd), dim=-1))
    # [t, k, b, 1, .], so that a step's part is contiguous
    gates_in = torch.stack(gates).permute(2, 0, 1, 3)[..., None, :].contiguous()
    address = torch.stack(addresses).permute(2, 0, 1, 3)[..., None].contiguous()
    rate = writers[0].rate
    for t in range(hidden_btd.shape[1]):
        similarity = (slots @ address[t]).squeeze(-1)
        written = torch.softmax(AGE_WEIGHT * age + USAGE_WEIGHT * usage - similarity, -1)
        recurrent = torch.baddbmm(bias, slots.flatten(1, 2), weight).unflatten(1, slots.shape[1:3])
        reset, open_ = (recurrent[..., : 2 * size] + gates_in[t, ..., : 2 * size]).sigmoid_().chunk(2, -1)
        doubled = torch.addcmul(gates_in[t, ..., 2 * size :], reset, recurrent[..., 2 * size :])
        new = torch.add(minus_one, doubled.sigmoid_(), alpha=2)
        blended = torch.lerp(slots, new, open_ * (rate * written)[..., None])
        after = (F.normalize(blended, dim=-1), USAGE_DECAY * (usage + written), AGE_DECAY * age + 1)
        if keep_bt is not None:
            keep = keep_bt[None, :, t, None]
            after = (
                torch.where(keep[..., None], after[0], slots),
                torch.where(keep, after[1], usage),
                torch.where(keep, after[2], age),
            )
        slots, usage, age = after
    return {name: tensor.transpose(0, 1) for name, tensor in (("slots", slots), ("usage", usage), ("age", age))}
