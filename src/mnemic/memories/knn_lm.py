"""kNN-LM: every token that was read, under the hidden state that came before it, mixed into the next distribution.

Khandelwal et al., "Generalization through Memorization: Nearest Neighbor Language Models" (ICLR 2020, arXiv
1911.00172), section 2. h_t is the hidden state of token t that enters the head, x_{t+1} the token that follows.

    M       <- M, (h_t, x_{t+1})            at a segment's end; beyond `size` entries the oldest leave
    d_i     = |h_t - k_i|² / |h_t|²         for the entries (k_i, v_i) of M
    N       = the `top_k` entries of M with the least d_i
    p_kNN(y) = Σ_{i in N, v_i = y} e^(-d_i / T) / Σ_{i in N} e^(-d_i / T)
    p       = λ p_kNN + (1 - λ) p_LM        λ is `rate`, T is `temperature`

The last token of a segment waits in the state until the next one tells what followed it, so pairs go across the borders
of segments and of calls. Each token reads M as it stood when its segment began. An empty M leaves p_LM, bit by bit.

λ may depend on how near the entries are: with `sentinel` at δ, p_LM counts as one more entry at the distance δ,

    λ_t     = λ S / (S + e^(-δ / T)),  S = Σ_{i in N} e^(-d_i / T)

and λ is the most it can be. Nothing is trained for it.

Where we depart. The paper's keys are what enters the last block's feed-forward, which it finds to work best; here they
are what enters the head, which every family has in one place. Its distances are not divided by |h_t|²: for one query
that changes nothing but the unit of T, which means the same on every host here. It builds M once, of a whole training
set; here M is what this stream has read. The mixture comes back as logits: only those of the tokens in N change,

    z_y'    = log(e^z_y + e^(log Z + log λ_t - log(1 - λ_t)) p_kNN(y)),  Z = Σ_y e^z_y

which is the same distribution, and the others keep their bits.

Search: as in `knn`. |h - k|² is least where h . k - |k|²/2 is greatest, so -|k|²/2 stands behind each key.

What is trained: nothing. What is forgotten: the oldest tokens.
State: `4 * (width + 1) + 8` bytes a token in float32, and the last hidden state.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mnemic.memories.fast_weights import wide
from mnemic.memories.knn import nearest, nearest_by_faiss
from mnemic.memories.knn_lm_naive import naive_write
from mnemic.memory import Attribution, Card, Memory, MemoryConfig, Site
from mnemic.state import State, append_rows, check_range, push_rows

# Shapes: b batch, t time, d host width, v vocabulary, n entries, m entries that are found.

AT_ONCE = 2**24
"""How many numbers of found keys, or of logits, are held at a time."""


@dataclass
class KNNLMConfig(MemoryConfig):
    """Settings of a kNN-LM.

    `size` is the most entries of a stream; `top_k` how many of them speak. `rate` is how much they count beside the
    model, `temperature` how much less a farther one counts, in squared lengths of the hidden state. With a `sentinel`
    the model counts as an entry at that distance, so that far entries count for less. Beyond `exact_up_to` entries
    the search is FAISS's: `pip install mnemic[faiss]`.
    """

    kind: ClassVar[str] = "knn-lm"
    card: ClassVar[Card] = Card(
        title="kNN-LM",
        seam="output distribution",
        trains="nothing",
        bytes_law="tokens x (width + 3) x 4",
        paper="Khandelwal et al., ICLR 2020, arXiv 1911.00172",
        citation="@inproceedings{khandelwal2020generalization, title = {Generalization through Memorization: Nearest "
        "Neighbor Language Models}, author = {Khandelwal, Urvashi and Levy, Omer and Jurafsky, Dan and Zettlemoyer, "
        "Luke and Lewis, Mike}, booktitle = {ICLR}, year = {2020}}",
    )

    size: int = 65_536
    top_k: int = 64
    rate: float = 0.25
    temperature: float = 0.05
    sentinel: float | None = None
    exact_up_to: int = 1_048_576

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("size", "top_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 < self.rate < 1:
            raise ValueError(f"rate is {self.rate}; a share beside the model's own lies between 0 and 1")
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}; it must be above 0")
        if self.sentinel is not None and not self.sentinel > 0:
            raise ValueError(f"sentinel is {self.sentinel}; a distance is above 0; None for one rate for all tokens")
        if self.exact_up_to < 0:
            raise ValueError(f"exact_up_to is {self.exact_up_to}; use 0 or more entries")

    @classmethod
    def tiny(cls) -> list[MemoryConfig]:
        """One rate for all tokens, with room for three segments and a half; and a sentinel."""
        return [
            cls(segment_length=8, size=28, top_k=6, rate=0.5, temperature=1.0),
            cls(segment_length=8, size=24, top_k=32, rate=0.8, temperature=0.5, sentinel=1.0),
        ]

    @classmethod
    def small(cls, segment_length: int, width: int, size: int | None = None) -> KNNLMConfig:
        """Room for `size` segments, by default for as many as make 4096 entries, or one."""
        return cls(segment_length=segment_length, size=segment_length * (size or max(1, 4096 // segment_length)))

    def build(self, width: int, depth: int, causal: bool = True) -> KNNLM:
        """The module; raises `ValueError` for an encoder, and `ModuleNotFoundError` where FAISS will be needed and is
        not installed.
        """
        if not causal:
            raise ValueError("a kNN-LM is about the token that follows, which an encoder has none of; use a decoder")
        return KNNLM(self, width, depth)


class KNNLM(Memory):
    """The module, which has no weights."""

    takes_ids = True
    starts_empty = True

    def __init__(self, config: KNNLMConfig, width: int, depth: int) -> None:
        super().__init__()
        if config.size > config.exact_up_to and importlib.util.find_spec("faiss") is None:
            raise ModuleNotFoundError(
                f"a memory of {config.size} entries needs FAISS to search more than exact_up_to={config.exact_up_to}: "
                "pip install mnemic[faiss], or set exact_up_to to the memory's size"
            )
        self.config, self.width = config, width
        self.reads = self.writes = (Site(depth - 1, "logits"),)
        self.reach = config.size // config.segment_length + 1  # a segment's last token is told of by the next one

    def init_state(self, batch: int, device: torch.device | None = None) -> State:
        """No entries. `keys [b, n, d + 1]` float32 and `tokens [b, n]` int64, each id + 1, a row's own `count [b]`
        first, oldest first, then zeros. `last [b, d]`, the hidden state of the latest token if one `waits [b]`, or 0.
        """
        return {
            "keys": torch.zeros(batch, 0, self.width + 1, device=device),
            "tokens": torch.zeros(batch, 0, dtype=torch.long, device=device),
            "count": torch.zeros(batch, dtype=torch.long, device=device),
            "last": torch.zeros(batch, self.width, device=device),
            "waits": torch.zeros(batch, dtype=torch.long, device=device),
        }

    def most_bytes(self, written: int) -> int:
        """`size` entries at most, and the latest hidden state."""
        entries = min(self.config.size, written * self.config.segment_length)
        return 16 + 4 * self.width + entries * (4 * self.width + 12)

    def check_state(self, state: State, written: int) -> None:
        """As many keys as tokens, the count among them, and tokens where it says so."""
        count = state["tokens"].shape[1]
        check_range("keys", torch.tensor(state["keys"].shape[1]), count, count)
        check_range("count", state["count"], 0, count)
        check_range("tokens", state["tokens"][:, : int(state["count"].max())], 1, 2**62)
        check_range("waits", state["waits"], 0, 1)

    def read(self, site: Site, hidden_btd: Float[Tensor, "b t d"], state: State) -> Float[Tensor, "b t d"]:
        """Hidden states are not read: `mix` is."""
        return hidden_btd

    def mix(
        self, site: Site, logits_btv: Float[Tensor, "b t v"], hidden_btd: Float[Tensor, "b t d"], state: State
    ) -> Float[Tensor, "b t v"]:
        """z'; the entries are those of the segment's start."""
        if not state["tokens"].shape[1]:
            return logits_btv
        size = max(logits_btv.shape[-1], self.width * self.config.top_k)
        at_once = max(1, AT_ONCE // (len(logits_btv) * size))
        parts = zip(logits_btv.split(at_once, 1), hidden_btd.split(at_once, 1), strict=True)
        with torch.autocast(hidden_btd.device.type, enabled=False):
            return torch.cat([self._mixed(logits, *self.nearest(hidden, state)) for logits, hidden in parts], 1)

    def nearest(
        self, hidden_btd: Float[Tensor, "b t d"], state: State
    ) -> tuple[Float[Tensor, "b t m"], Int[Tensor, "b t m"]]:
        """d_i of the entries in N, infinite where a row has fewer than `top_k`, and their tokens v_i."""
        hidden_btd, keys, count = wide(hidden_btd), state["keys"], state["count"]
        search = nearest if keys.shape[1] <= self.config.exact_up_to else nearest_by_faiss
        with torch.no_grad():
            keys = keys.to(hidden_btd.dtype)  # itself where that is float32, so that its index is kept
            found_btm = search(F.pad(hidden_btd, (0, 1), value=1.0)[:, None], keys, count, self.config.top_k)[:, 0]
        row_b11, place_btm = torch.arange(len(keys), device=keys.device)[:, None, None], found_btm.clamp_min(0)
        away_btm = (hidden_btd[:, :, None] - state["keys"][row_b11, place_btm][..., :-1]).square().sum(-1)
        away_btm = away_btm / hidden_btd.square().sum(-1, keepdim=True)
        return away_btm.masked_fill(found_btm < 0, torch.inf), state["tokens"][row_b11, place_btm] - 1

    def _mixed(self, logits_btv: Tensor, away_btm: Tensor, token_btm: Tensor) -> Tensor:
        config, logits = self.config, logits_btv.to(away_btm.dtype)
        real_btm = away_btm.isfinite() & (token_btm < logits.shape[-1])
        score_btm = (-away_btm / config.temperature).masked_fill(~real_btm, torch.finfo(away_btm.dtype).min)
        weight_btm = score_btm.softmax(-1) * real_btm
        said_btv = torch.zeros_like(logits).scatter_add(-1, token_btm.where(real_btm, 0), weight_btm)
        rate = logits.new_tensor(config.rate)
        if config.sentinel is not None:
            rate = rate * torch.sigmoid(score_btm.logsumexp(-1, keepdim=True) + config.sentinel / config.temperature)
        there = said_btv > 0
        odds = logits.logsumexp(-1, keepdim=True) + rate.log() - (-rate).log1p()
        mixed = torch.logaddexp(logits, odds + said_btv.where(there, 1).log())
        return torch.where(there, mixed.to(logits_btv.dtype), logits_btv)

    def write(
        self,
        hidden_btd: Float[Tensor, "b t d"],
        state: State,
        keep_bt: Bool[Tensor, "b t"] | None = None,
        ids_bt: Int[Tensor, "b t"] | None = None,
    ) -> State:
        """The entries after one segment: those of its tokens but the last, and of the one that waited."""
        assert ids_bt is not None
        waits = state["waits"].tolist()
        told, _ = append_rows(state["last"][:, None], waits, hidden_btd.to(state["last"].dtype), keep_bt)
        new, total = append_rows(state["waits"][:, None, None], waits, ids_bt[..., None] + 1, keep_bt)
        # each with what follows it
        ends = torch.tensor([max(0, each - 1) for each in total], device=told.device)
        key_btd, token_bt1 = told[:, :-1], new[:, 1:]
        key_bts = torch.cat([key_btd, -key_btd.square().sum(-1, keepdim=True) / 2], -1)
        there = torch.arange(key_btd.shape[1], device=told.device) < ends[:, None]
        there = None if bool(there.all()) else there
        counts, most = state["count"].tolist(), self.config.size
        keys, count = push_rows(state["keys"], counts, key_bts, there, most)
        tokens, _ = push_rows(state["tokens"][..., None], counts, token_bt1, there, most)
        last = F.pad(told, (0, 0, 0, 1))[torch.arange(len(told), device=told.device), ends]
        return {
            "keys": keys,
            "tokens": tokens[..., 0],
            "count": state["count"].new_tensor(count),
            "last": last,
            "waits": state["waits"].new_tensor([min(1, each) for each in total]),
        }

    def write_and_tell(
        self,
        hidden_btd: Float[Tensor, "b t d"],
        state: State,
        keep_bt: Bool[Tensor, "b t"] | None = None,
        ids_bt: Int[Tensor, "b t"] | None = None,
    ) -> tuple[State, Attribution | None]:
        """`write`; entries have no places that are written again."""
        return self.write(hidden_btd, state, keep_bt, ids_bt), None

    def naive(
        self,
        hidden_btd: Float[Tensor, "b t d"],
        state: State,
        keep_bt: Bool[Tensor, "b t"] | None = None,
        ids_bt: Int[Tensor, "b t"] | None = None,
    ) -> tuple[Float[Tensor, "b t d"], State]:
        """The equations above, one row and token at a time; `knn_lm_naive.mix` is the mixture."""
        assert ids_bt is not None
        return hidden_btd, naive_write(self.config.size, hidden_btd, ids_bt, state, keep_bt)
