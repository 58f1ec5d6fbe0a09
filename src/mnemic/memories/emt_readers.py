"""EMT's readers: attention of tokens over slots, of any write and of allocation. The equations
stand in `mnemic.memories.emt`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnemic.memories.emt_writers import Whitening

if TYPE_CHECKING:
    from mnemic.memories.emt import EMTConfig
    from mnemic.memories.emt_writers import AllocationWriter


class Reader(nn.Module):
    """Multi-head attention of the tokens over the slots, then a feed-forward: `[b, t, d], [b, s, m] -> [b, t, d]`."""

    def __init__(self, config: EMTConfig, width: int) -> None:
        super().__init__()
        self.heads, self.feedback = config.heads, config.feedback
        self.norm_hidden, self.norm_slots = nn.LayerNorm(width), nn.LayerNorm(config.dim)
        self.whiten = Whitening(width, bound=True) if config.whiten else nn.Identity()
        self.build_attention(config, width)
        self.norm_feed, self.expand = nn.LayerNorm(width), nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)
        if not config.zero_shot:
            nn.init.zeros_(self.contract.weight)
            nn.init.zeros_(self.contract.bias)

    def build_attention(self, config: EMTConfig, width: int) -> None:
        """The projections of MHA; those of the output zero at first."""
        self.query, self.output = nn.Linear(width, config.dim), nn.Linear(config.dim, width)
        self.key = nn.Linear(config.dim, config.dim, bias=False)  # a bias is the same for every slot
        self.value = nn.Linear(config.dim, config.dim)
        if not config.zero_shot:
            nn.init.zeros_(self.output.weight)
            nn.init.zeros_(self.output.bias)

    def prepare(self, hidden: Tensor) -> Tensor:
        """What queries are made from."""
        return self.whiten(self.norm_hidden(hidden))

    def forward(self, hidden_btd: Tensor, slots_bsm: Tensor) -> Tensor:
        """h' of the equations above."""
        enhanced = hidden_btd + self.attend(hidden_btd, self.norm_slots(slots_bsm))
        enhanced = enhanced + self.contract(F.gelu(self.expand(self.norm_feed(enhanced))))
        return hidden_btd + self.feedback * (enhanced - hidden_btd)

    def attend(self, hidden_btd: Tensor, slots_bsm: Tensor) -> Tensor:
        """W_o MHA(h, M), M normed."""
        query, key, value = (
            projected.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projected in (self.query(self.prepare(hidden_btd)), self.key(slots_bsm), self.value(slots_bsm))
        )
        return self.output(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(-2))


class AllocationReader(Reader):
    """The reader of slots that were written by allocation: addressed by one half, read as the other."""

    def build_attention(self, config: EMTConfig, width: int) -> None:
        """Projections to and from half a slot's width, alpha, and the logarithm of the scores' scale."""
        half = config.dim // 2
        self.query, self.output = nn.Linear(width, half, bias=False), nn.Linear(half, width, bias=False)
        self.key, self.value = (nn.Linear(config.dim, half, bias=False) for _ in range(2))
        self.alpha = nn.Parameter(torch.zeros(()))
        self.scale = nn.Parameter(torch.full((config.heads, 1, 1), math.log(config.dim) / 2))

    @torch.no_grad()
    def tie(self, writer: AllocationWriter) -> None:
        """Begins as what `writer` does, turned around; what comes back has a mean square of 1."""
        half = len(self.query.weight)
        self.query.weight.copy_(writer.address.weight)
        for linear, part in ((self.key, slice(half)), (self.value, slice(half, None))):
            linear.weight.zero_()
            linear.weight[:, part] = torch.eye(half)
        back = torch.linalg.pinv(writer.content.weight.double())
        if isinstance(writer.whiten_entered, Whitening):
            back = torch.linalg.inv(writer.whiten_entered.matrix.double()).T @ back
        width = len(back)
        self.output.weight.copy_(back / back.norm(dim=0).mean() * (width / half) ** 0.5)

    def attend(self, hidden_btd: Tensor, slots_bsm: Tensor) -> Tensor:
        """alpha W_o MHA(h, M), M normed."""
        query, key, value = (
            projected.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projected in (self.query(self.prepare(hidden_btd)), self.key(slots_bsm), self.value(slots_bsm))
        )
        query, key = F.normalize(query, dim=-1) * self.scale.exp(), F.normalize(key, dim=-1)
        attended = F.scaled_dot_product_attention(query, key, value, scale=1.0).transpose(1, 2).flatten(-2)
        return self.alpha * self.output(attended)
