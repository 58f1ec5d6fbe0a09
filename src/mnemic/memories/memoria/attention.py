"""The attentions of Memoria: the abstractor makes engrams of a segment, the reader lets tokens attend to engrams."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

# Shapes: b batch, t tokens, d host width, w working memory, k engrams, m inner width, h heads, c width of a head.


class Abstractor(nn.Module):
    """Encoding (paper 3.1): `M_wm = FFN(softmax(Q W_k X) W_v X)`, Q learned queries. `[b, t, d] -> [b, w, d]`.

    X are hidden states behind a layer norm: the paper's come behind the host's last one, ours straight from a block.
    """

    def __init__(self, working: int, width: int, feed_forward: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.query = nn.Parameter(torch.randn(working, width) * 0.02)
        self.key = nn.Linear(width, width, bias=False)  # a bias is the same for every token: softmax drops it
        self.value = nn.Linear(width, width)
        self.expand, self.contract = nn.Linear(width, feed_forward), nn.Linear(feed_forward, width)

    def forward(self, hidden_btd: Float[Tensor, "b t d"], keep_bt: Bool[Tensor, "b t"] | None) -> Tensor:
        """Keys and values are linear in the tokens, so they are applied where there are fewer rows, at the queries."""
        hidden_btd = self.norm(hidden_btd)
        content_bwd = self.value(self.weights(hidden_btd, keep_bt) @ hidden_btd)
        return self.contract(F.gelu(self.expand(content_bwd)))

    def weights(
        self, normed_btd: Float[Tensor, "b t d"], keep_bt: Bool[Tensor, "b t"] | None
    ) -> Float[Tensor, "b w t"]:
        """softmax(Q W_k X): how much each token weighs in each engram, of X behind the norm."""
        score_bwt = self.query @ self.key.weight @ normed_btd.transpose(1, 2)
        if keep_bt is not None:
            score_bwt = score_bwt.masked_fill(~keep_bt[:, None], torch.finfo(score_bwt.dtype).min)
        return score_bwt.softmax(-1)


class Reader(nn.Module):
    """Exploiting (paper 3.3): tokens attend to working memory, then with the same weights to what was reminded."""

    def __init__(self, width: int, inner: int, heads: int, null: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.null = nn.Parameter(torch.randn(heads, inner // heads) * 0.02) if null else None
        self.norm_working, self.norm_recalled = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.value = nn.Linear(width, inner), nn.Linear(width, inner)
        self.key = nn.Linear(width, inner, bias=False)
        # no bias: where there is nothing to attend to, nothing is added
        self.output = nn.Linear(inner, width, bias=False)
        nn.init.zeros_(self.output.weight)

    def forward(
        self, hidden_btd: Tensor, working_bwd: Tensor, recalled_bkd: Tensor, begun_b: Tensor, real_bk: Tensor
    ) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b t k"]]:
        """Hidden states, and the attention of each token to each reminded engram, averaged over heads."""
        added, _ = self.attend(self.norm_working(hidden_btd), working_bwd, begun_b[:, None])
        hidden_btd = hidden_btd + added
        added, weight_bhtk = self.attend(self.norm_recalled(hidden_btd), recalled_bkd, real_bk)
        return hidden_btd + added, weight_bhtk.detach().mean(1)

    def attend(self, asking_btd: Tensor, engram_bkd: Tensor, real_bk: Tensor) -> tuple[Tensor, Tensor]:
        """Multi-head attention over a row's engrams; 0 in a row that has none."""
        query, key, value = (
            projected.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projected in (self.query(asking_btd), self.key(engram_bkd), self.value(engram_bkd))
        )
        score_bhtk = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])
        score_bhtk = score_bhtk.masked_fill(~real_bk[:, None, None], torch.finfo(score_bhtk.dtype).min)
        if self.null is not None:
            # one more key, whose value is 0: what it draws is not read
            nothing_bht1 = query @ self.null[:, :, None] / math.sqrt(query.shape[-1])
            score_bhtk = torch.cat([score_bhtk, nothing_bht1], -1)
        weight_bhtk = score_bhtk.softmax(-1)[..., : key.shape[2]] * real_bk[:, None, None]
        return self.output((weight_bhtk @ value).transpose(1, 2).flatten(-2)), weight_bhtk
